"""The networks that a GHN is trained on: an endless stream of draws from timm's constructors, within bounds of cost."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from timm_ghn.errors import CaptureError, GraphError, TrainingError
from timm_ghn.ghn.features import shape_4d
from timm_ghn.ghn.layout import token_rows
from timm_ghn.ghn.model import GHN
from timm_ghn.ghn.seen import Seen
from timm_ghn.graph import to_graph
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Layout
from timm_ghn.initialize.hypernetwork import Hypernetwork
from timm_ghn.initialize.plan import make_plan
from timm_ghn.seeding import seeded
from timm_ghn.settings import Init, Source
from timm_ghn.trace.skeleton import build_on_meta
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.families import FAMILIES, Draw

logger = logging.getLogger(__name__)

_MAX_DRAWS = 200
"""Draws of one family after which a search within the bounds gives up."""

_WIDE = frozenset({"vit", "eva", "cait", "xcit", "mixer", "convnext", "swin"})
"""Families whose networks are far wider in timm than cheap ones are. What a GHN learned at widths up to 128 did not
carry over: cosines to the teacher were 0.20 for plain transformers of width 128, 0.15 at 192 and 0.09 at 768."""
_WIDER, _WIDER_MACS = 3.0, 4.0
"""How many times the parameters and outputs, and the multiply-adds, of other networks theirs may have."""

_COUNTED = 1000
"""Networks of a run whose surroundings are listed: more add next to nothing, and each takes half a second."""

_IMPOSSIBLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What timm's constructors raise for arguments that do not go together; such a network is drawn again."""


@dataclass(frozen=True)
class Bounds:
    """What a training network may cost, for one image.

    Attributes:
        sizes: Sides of the images in pixels, with their weights.
        min_macs: Fewest multiply-adds of convolutions and linear layers, those of linear layers counted as a third.
        max_macs: Most of them.
        max_outputs: Most elements in the outputs of these layers: small networks are bound by memory traffic.
        max_params: Most parameters, with weights: a bound is drawn for each network. The cost of an update grows with
            the parameters, what a GHN learns from it much less: so most networks are small, and some are large.
        max_layers: Most layers.
    """

    sizes: Mapping[int, float] = field(default_factory=lambda: {32: 3.0, 48: 0.5, 64: 1.0})
    min_macs: float = 0.5e6
    max_macs: float = 16e6
    max_outputs: float = 5e5
    max_params: Mapping[float, float] = field(default_factory=lambda: {0.4e6: 3.0, 1e6: 2.0, 4e6: 1.0})
    max_layers: int = 100

    def of(self, family: str) -> Bounds:
        """The bounds of a family: networks of the wide ones may cost more, and are large as often as small."""
        if family not in _WIDE:
            return self
        return replace(
            self,
            max_macs=_WIDER_MACS * self.max_macs,
            max_outputs=_WIDER * self.max_outputs,
            max_params={_WIDER * most: 1.0 for most in self.max_params},
        )


@dataclass(frozen=True)
class Architecture:
    """A network that can be drawn again.

    Attributes:
        family: Its name in `FAMILIES`.
        seed: What decides the draws.
        size: Side of the images that it takes, in pixels.
    """

    family: str
    seed: str
    size: int

    def build(self, classes: int) -> nn.Module:
        """The network, on the current default device."""
        return FAMILIES[self.family][1](Draw(self.seed, self.size, classes))


def draw_architecture(stream: str, index: int, shares: Mapping[str, float], bounds: Bounds) -> Architecture:
    """The architecture with a number in a stream of draws; it depends on the arguments alone.

    Args:
        stream: Names the stream, its seed included.
        index: The number.
        shares: How often each family is drawn relative to the others.
        bounds: What it may cost, unless its family is wide.

    Raises:
        TrainingError: If no network of the family is within the bounds.
    """
    rng = random.Random(f"{stream}/{index}")
    names = sorted(shares)
    family = rng.choices(names, [shares[name] for name in names])[0]
    bounds = bounds.of(family)
    for attempt in range(_MAX_DRAWS):
        size = rng.choices(list(bounds.sizes), list(bounds.sizes.values()))[0]
        max_params = rng.choices(list(bounds.max_params), list(bounds.max_params.values()))[0]
        architecture = Architecture(family, f"{stream}/{index}/{attempt}", size)
        if _is_within(architecture, max_params, bounds):
            return architecture
    raise TrainingError(f"no network of the family {family!r} is within the bounds on cost: {bounds}")


def _is_within(architecture: Architecture, max_params: float, bounds: Bounds) -> bool:
    try:
        with torch.device("meta"):
            model = architecture.build(100)
        layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        too_large = sum(parameter.numel() for parameter in model.parameters()) > max_params
        if too_large or len(layers) > bounds.max_layers:
            return False
        macs, outputs = count_macs(model, architecture.size)
        if not bounds.min_macs <= macs <= bounds.max_macs or outputs > bounds.max_outputs:
            return False
        model.eval()(torch.empty(1, 3, architecture.size, architecture.size, device="meta"))  # as it is recorded
    except _IMPOSSIBLE as error:
        logger.debug("%s cannot be built: %s", architecture, error)
        return False
    return True


def count_macs(model: nn.Module, size: int) -> tuple[int, int]:
    """Multiply-adds of a meta model's convolutions and linear layers, and elements of their outputs, for one image.

    Those of linear layers count as a third: a processor takes about a third of the time for them.
    """
    macs = outputs = 0

    def add(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, outputs
        channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
        macs += output.numel() // channels * module.weight.numel() // (1 if isinstance(module, nn.Conv2d) else 3)
        outputs += output.numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:  # batch norms need two images
        model.train()(torch.empty(2, 3, size, size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return macs // 2, outputs // 2


class Network:
    """An architecture, what a GHN's prediction for it goes through, and its module without what is predicted.

    Args:
        architecture: What to build.
        ghn: GHN that is going to predict; its configuration alone matters.

    Attributes:
        graph: What a GHN reads.
        assignments: What each predicted parameter goes through, as users get it (`timm_ghn.initialize.plan`).

    Raises:
        TrainingError: If its forward pass cannot be recorded.
    """

    def __init__(self, architecture: Architecture, ghn: GHN) -> None:
        self.architecture = architecture
        with seeded(0):  # what is not predicted depends on the architecture alone
            model = architecture.build(ghn.config.num_classes)
        size = (3, architecture.size, architecture.size)
        try:
            plan = make_plan(
                model, Init("ghn-orth", fallback="off"), Hypernetwork(ghn, "in training", ""), input_size=size
            )
        except GraphError as error:
            raise TrainingError(f"no graph of {architecture}: {error}") from error
        self.graph = cast(Graph, plan.graph)
        self.assignments = {name: what for name, what in plan.assignments.items() if what.source is Source.GHN}
        self._first_rows = _first_rows(model, self.graph)
        for name in self.assignments:  # their memory is not needed
            module_name, _, attribute = name.rpartition(".")
            module = model.get_submodule(module_name)
            value = getattr(module, attribute)
            setattr(module, attribute, nn.Parameter(value.to("meta"), requires_grad=False))
        for module in model.modules():
            if isinstance(module, _BatchNorm):  # statistics are those of the batch
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self.model = model.train().requires_grad_(False)
        heads: Any = model.get_classifier()  # type: ignore[operator]
        self._classifier: nn.Module = heads[0] if isinstance(heads, tuple) else heads

    def __call__(self, parameters: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, classes), the mean of several heads, and the features (B, D) that the first of them reads.

        Args:
            parameters: Values of all predicted parameters. The rows of a table of tokens that are not predicted,
                those of class tokens, are the network's own.
            images: Normalized images (B, 3, S, S) of any size S.
        """
        size = self.architecture.size
        if images.shape[-1] != size:
            images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        own = {
            name: torch.cat([rows.to(parameters[name]), parameters[name][..., rows.shape[-2] :, :]], -2)
            for name, rows in self._first_rows.items()
        }
        caught: list[Tensor] = []
        handle = self._classifier.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            outputs = functional_call(self.model, {**parameters, **own}, (images,))
        finally:
            handle.remove()
        heads = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return torch.stack(list(heads)).mean(0), caught[0].flatten(1)


def _first_rows(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The rows of tables of tokens that no GHN predicts, by name of the table: those of class tokens."""
    found = {}
    for node in graph.nodes:
        for target in node.targets:
            if target.layout is Layout.TOKENS and node.shape is not None:
                table = model.get_parameter(target.name).detach()
                rows = table.shape[-2] - token_rows(table, shape_4d(node.shape)).shape[-2]
                if rows:
                    found[target.name] = table[..., :rows, :].clone()
    return found


def training_architecture(config: TrainConfig, index: int) -> Architecture:
    """The network of a run with a number."""
    return draw_architecture(f"{config.seed}/train", index, config.families, Bounds())


def training_networks(ghn: GHN, config: TrainConfig) -> Callable[[int], Network]:
    """The networks of a run by number, built when they are first used; the latest ones are kept."""
    return lru_cache(config.kept)(lambda index: Network(training_architecture(config, index), ghn))


def seen_in_training(config: TrainConfig, step: int) -> Seen:
    """The surroundings that a GHN was trained in: those of layers of its first networks, `_COUNTED` at most.

    Args:
        config: The run.
        step: Updates so far.
    """

    graphs = []
    count = min(config.in_use(step)[1], _COUNTED)
    for index in tqdm(range(count), desc="what was seen", unit="network", delay=2, disable=None):
        architecture = training_architecture(config, index)
        model = build_on_meta(partial(architecture.build, config.ghn.num_classes))
        with suppress(CaptureError, GraphError):  # training leaves the network out as well
            graphs.append(to_graph(model, input_size=architecture.size))
    return Seen.of(graphs)


def evaluation_networks(ghn: GHN) -> list[Network]:
    """One network of each family, the same in all runs; none of them is trained on."""
    families = tqdm(sorted(FAMILIES), desc="networks to evaluate", unit="network", delay=2, leave=False)
    return [
        Network(draw_architecture("evaluation", index, {family: 1.0}, Bounds()), ghn)
        for index, family in enumerate(families)
    ]
