"""What an initialization is going to do, decided before a weight is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.ghn import GHN, content_hash, default_ghn, load_ghn
from timm_ghn.graph import Graph, Layout, Reading, Role, Target, capture, condense
from timm_ghn.graph.analyses import Analyses
from timm_ghn.orthogonalization import PostProcess, WeightLayer, resolve_start_layer, selected_layers, weight_layers
from timm_ghn.scale.structure import find_structure
from timm_ghn.settings import Init, Source


@dataclass(frozen=True)
class Hypernetwork:
    """A GHN that is going to predict.

    Attributes:
        model: The GHN.
        name: What it is called in the provenance.
        hash: SHA-256 of its configuration and weights.
    """

    model: GHN
    name: str
    hash: str


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the parameters of a model get.

    Attributes:
        init: Settings.
        hypernetwork: What predicts; None for methods without a GHN.
        graph: The model's graph; None likewise.
        parameters: Parameters by name; tied ones once.
        layers: All conv and fully-connected layers, in order.
        start_layer: L; None without post-processing.
        targets: What the GHN predicts, by name.
        reasons: Why a parameter is not predicted, by name.
        processed: Layers that are post-processed, by the name of their weight.
        factors: What a prediction is multiplied with before it is post-processed, by name; 1 for all others.
    """

    init: Init
    hypernetwork: Hypernetwork | None
    graph: Graph | None
    parameters: Mapping[str, nn.Parameter]
    layers: tuple[WeightLayer, ...]
    start_layer: int | None
    targets: Mapping[str, Target]
    reasons: Mapping[str, str]
    processed: Mapping[str, WeightLayer]
    factors: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def postprocess(self) -> PostProcess:
        """Settings of the post-processing."""
        return postprocess_settings(self.init)

    @property
    def generated(self) -> tuple[str, ...]:
        """Parameters whose values depend on the plan alone, not on what they were before."""
        drawn = self.processed if self.init.spec.source is Source.GAUSSIAN else {}
        return tuple(name for name in self.parameters if name in self.targets or name in drawn)

    def is_overwritten(self, name: str) -> bool:
        """Whether nothing is kept of a generated parameter, not even the prefix rows of a table of tokens."""
        return name not in self.targets or self.targets[name].layout is not Layout.TOKENS


def postprocess_settings(init: Init) -> PostProcess:
    """Settings of the post-processing; random weights get no noise."""
    noise = init.noise if init.spec.source is Source.GHN else 0.0
    return PostProcess(noise=noise, seed=init.seed, correlation=init.correlation)


def find_hypernetwork(init: Init) -> Hypernetwork | None:
    """The GHN that an initialization asks for, and its hash; None for methods without one.

    Raises:
        CheckpointError, UnknownGhnError, DownloadError: If it cannot be loaded.
    """
    if init.spec.source is not Source.GHN:
        return None
    ghn = load_ghn(init.ghn) if init.ghn is not None else default_ghn()
    if isinstance(init.ghn, GHN) or ghn.info is None:  # its weights may have changed since it was loaded
        return Hypernetwork(ghn, ghn.info.name if ghn.info else "in memory", content_hash(ghn))
    return Hypernetwork(ghn, ghn.info.name, ghn.info.hash)


def make_plan(
    model: nn.Module,
    init: Init,
    hypernetwork: Hypernetwork | None,
    *,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
    deferred: DeferredRandom | None = None,
) -> Plan:
    """Decide what every parameter gets. The model is not changed, and no values but those of kept scales are read.

    Args:
        model: The model.
        init: Settings.
        hypernetwork: What predicts; None for methods without a GHN.
        input_size: As of `init_model`.
        example_input: As of `init_model`.
        deferred: What was put off while the model was built: values that it is still going to get.

    Raises:
        InitError: If L lies outside of the model.
        CaptureError: If the forward pass cannot be recorded.
        GraphError: If the model has no layer that can be predicted.
    """
    parameters = dict(model.named_parameters())
    layers = weight_layers(model)
    start_layer = None
    processed: dict[str, WeightLayer] = {}
    if init.spec.orthogonal:
        start_layer = resolve_start_layer(layers, init.start_layer, init.spec.start_layer)
        processed = {layer.parameter: layer for layer in selected_layers(layers, start_layer)}
    graph = None
    targets: dict[str, Target] = {}
    reasons: dict[str, str] = {}
    factors: dict[str, float] = {}
    if hypernetwork is not None:
        trace = capture(model, input_size=input_size, example_input=example_input)
        analyses = Analyses(trace)
        graph = condense(trace, reading=Reading(init.reading), analyses=analyses)
        targets, reasons = _choose_targets(graph, hypernetwork.model)
        if init.rescale == "auto":
            kept = {name: parameter for name, parameter in parameters.items() if name not in targets}
            structure = find_structure(trace, partial(_start, kept, deferred), analyses=analyses)
            if init.spec.orthogonal:
                unscaled = (layer for layer in layers if structure.needs_orthogonal(layer.parameter))
                processed.update({layer.parameter: layer for layer in unscaled if not layer.is_classifier})
            unprocessed = (target for name, target in targets.items() if name not in processed)
            factors = structure.factors(unprocessed, hypernetwork.model.config.largest_kernel[1])
    return Plan(init, hypernetwork, graph, parameters, layers, start_layer, targets, reasons, processed, factors)


def check_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises InitError for a parameter without memory."""
    on_meta = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if on_meta is not None:
        raise InitError(f"{on_meta} is on the meta device and has no memory; call model.to_empty(device=...) first")


def _start(kept: Mapping[str, Tensor], deferred: DeferredRandom | None, name: str) -> float | None:
    """The value that all elements of a kept parameter have; None if they differ, or get random values later."""
    parameter = kept.get(name)
    if parameter is None or (deferred is not None and deferred.is_pending(parameter)):
        return None
    low, high = (float(value) for value in parameter.detach().aminmax())
    return low if low == high else None


def _choose_targets(graph: Graph, ghn: GHN) -> tuple[dict[str, Target], dict[str, str]]:
    """Parameters to predict, and why the others are not."""
    reasons = dict(graph.unused)
    chosen: dict[str, Target] = {}
    for target in graph.targets:
        classes = target.shape[0]
        if target.role in (Role.CLASS_WEIGHT, Role.CLASS_BIAS) and classes != ghn.config.num_classes:
            reasons[target.name] = f"classifier of {classes} classes, the GHN's has {ghn.config.num_classes}"
        else:
            chosen[target.name] = target
    return chosen, reasons
