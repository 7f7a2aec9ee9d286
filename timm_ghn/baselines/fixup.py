"""Fixup (Zhang, Dauphin, Ma 2019, arXiv 1901.09321): residual networks without normalization.

With L residual branches of m layers each, all layers get He's initialization; those inside of branches are scaled by
`L^(-1 / (2 m - 2))`, the last one of every branch and the classifier are 0. The paper's third rule, scalar multipliers
and biases in every branch, would change the architecture and is left out.

Applies to networks with residual branches and without normalization layers, which is what the scaling replaces.
Branches are found in the recorded operations: a sum of two values, one of which has layers that the other does not
have; what is on the other side is the shortcut, possibly with a layer of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from timm_ghn.baselines.setting import Computation, Setting
from timm_ghn.errors import InitError
from timm_ghn.graph.origins import find_origins
from timm_ghn.orthogonalization import weight_layers
from timm_ghn.seeding import derived_seed
from timm_ghn.trace.capture import capture
from timm_ghn.trace.operations import LAYERS, Kind, kind_of, weight_and_bias
from timm_ghn.trace.records import Operation, Trace, Value

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)


Branch = tuple[str, ...]
"""A residual branch: the names of its weights in the order in which they run."""


def residual_branches(trace: Trace) -> tuple[Branch, ...]:
    """The residual branches of a recorded forward pass."""

    def passed(operation: Operation, _: Value, known: Sequence[Branch | None]) -> Branch:
        """The weights of all layers on the way to a value."""
        weight = weight_and_bias(operation)[0] if kind_of(operation) in LAYERS else None
        names = trace.parameters.get(weight.index, ()) if weight is not None else ()
        return (*dict.fromkeys(name for before in known for name in before or ()), *names[:1])

    flow = find_origins(trace).flow
    weights = flow.follow(passed)
    branches: list[Branch] = []
    for operation, sources, _ in flow.steps:
        if kind_of(operation) is Kind.SUM and len(sources) == 2:
            first, second = (weights.get(index, ()) for index in sources)
            ways = [tuple(n for n in first if n not in second), tuple(n for n in second if n not in first)]
            shortcut, branch = sorted(ways, key=len)
            if len(branch) > len(shortcut) <= 1:
                branches.append(branch)
    return tuple(branches)


def fixup_scales(branches: Sequence[Branch]) -> Mapping[str, float]:
    """What He's initialization is multiplied with, for the weights inside of branches."""
    scales: dict[str, float] = {}
    for *inner, last in branches:
        scales |= dict.fromkeys(inner, len(branches) ** (-1 / (2 * len(inner))) if inner else 0.0)
        scales[last] = 0.0
    return scales


def fixup(setting: Setting) -> Computation:
    """Weights and biases of all convolutional and fully-connected layers.

    Raises:
        InitError: If the network has normalization layers or no residual branches.
    """
    model = setting.model
    norm = next((module for module in model.modules() if isinstance(module, _NORMS)), None)
    if norm is not None:
        raise InitError(
            f"fixup is for residual networks without normalization, and {type(model).__name__} has "
            f"{type(norm).__name__} layers"
        )
    branches = residual_branches(capture(model, input_size=setting.input_size, example_input=setting.example_input))
    if not branches:
        raise InitError(f"fixup is for residual networks, and {type(model).__name__} has no residual branches")
    parameters = dict(model.named_parameters())
    layers = weight_layers(model)
    biases = [name for layer in layers if (name := f"{layer.module}.bias".lstrip(".")) in parameters]
    scales = fixup_scales(branches)

    def values() -> Iterator[tuple[str, Tensor]]:
        for layer in layers:
            scale = 0.0 if layer.is_classifier else scales.get(layer.parameter, 1.0)
            yield layer.parameter, _drawn(parameters[layer.parameter].shape, scale, layer.number, setting.seed)
        yield from ((name, torch.zeros(parameters[name].shape)) for name in biases)

    return setting.computation((*(layer.parameter for layer in layers), *biases), values, "it has no layers")


def _drawn(shape: Sequence[int], scale: float, number: int, seed: int) -> Tensor:
    """He's initialization of a weight, times a scale."""
    generator = torch.Generator().manual_seed(derived_seed("fixup", seed, number, tuple(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float32) * scale * math.sqrt(2 / math.prod(shape[1:]))
