"""Which weights count as layers of a network, and from which of them on it is post-processed."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers.cond_conv2d import CondConv2d
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from timm_ghn.errors import CaptureError, InitError
from timm_ghn.graph.origins import find_origins
from timm_ghn.text import did_you_mean
from timm_ghn.trace.capture import capture
from timm_ghn.trace.inputs import timm_config
from timm_ghn.trace.operations import Kind, is_matrix, kind_of, operands
from timm_ghn.trace.records import Operation, Trace

_logger = logging.getLogger(__name__)

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()))  # RMSNorm: torch 2.4
_NOT_LAYERS = (*_TABLES, *_NORMS)
"""Modules whose `weight` is a lookup table or an elementwise scale, whatever its number of dimensions."""

_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, CondConv2d)
"""Modules whose `weight` is multiplied as a matrix or a kernel."""

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

_ELEMENTWISE = {
    Kind.SUM, Kind.SCALED_SUM, Kind.OTHER_SUM, Kind.MULTIPLICATION, Kind.DIVISION, Kind.NORM, Kind.LOOKUP,
    Kind.MAXIMUM,
}  # fmt: skip
"""Operations whose parameters are scales, offsets or tables, not layers. (Of others, shapes tell.)"""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that are predicted and post-processed."""


@dataclass(frozen=True)
class WeightLayer:
    """A convolutional or fully-connected layer, `l` of the paper.

    Attributes:
        number: `l`, from 1, in module-definition order.
        parameter: Qualified name of its weight.
        module: Qualified name of the module that holds the weight; empty for the model itself.
        is_classifier: Whether it belongs to the classifier, which is counted but never changed.
        kernel: Shape of one kernel, where each row of the weight is the flattened kernel of an expert (CondConv);
            empty where the weight is one kernel.
        side: Longest side of the kernel; 1 for a layer that looks at single positions.
        kept: Why the layer is counted but never changed; empty for other layers.
    """

    number: int
    parameter: str
    module: str
    is_classifier: bool = False
    kernel: tuple[int, ...] = ()
    side: int = 1
    kept: str = ""


def weight_layers(
    model: nn.Module,
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
    trace: Trace | None = None,
) -> tuple[WeightLayer, ...]:
    """Lists the convolutional and fully-connected layers of a model, in the order of `model.modules()`.

    A layer is a module with a floating or complex `weight` parameter of two or more dimensions, other than lookup
    tables and norms. The stacked (or separate) query, key and value matrices of `nn.MultiheadAttention` count as well.
    A module or parameter that occurs several times counts once, and not at all if it is also a lookup table. The
    experts of a `CondConv2d` are one layer of several kernels. A layer whose weight is computed from other parameters
    (weight or spectral normalization, pruning) is listed by the largest of these, and kept.

    Of modules that are neither linear layers nor convolutions of torch or timm, a forward pass decides: a weight that
    is only multiplied or added elementwise, or looked up, is no layer. If the forward pass cannot be recorded, a weight
    with at most one dimension larger than 1 is none.

    The classifier is what the `get_classifier()` of a timm model returns (an identity, one or several modules, all
    their layers), what its `pretrained_cfg` names besides if that has as many rows as there are classes, and any layers
    of the same shape right behind it, which are auxiliary heads. Of a model without that method it is the last layer,
    except of timm's feature extractors, which have none.

    Args:
        model: The model, on any device.
        input_size: (channels, height, width) of one image, as of `capture`.
        example_input: Instead of an image, as of `capture`.
        trace: A recorded forward pass of the model, if there is one.

    Raises:
        InitError: A parameter of a lazy module has no shape yet.
    """
    kept = kept_parameters(model)
    seen = {id(module._parameters.get("weight")) for module in model.modules() if isinstance(module, _TABLES)}
    found: list[tuple[nn.Parameter, WeightLayer]] = []
    unclear: set[str] = set()
    for module_name, module in model.named_modules():
        for attribute, weight in _weights(module, module_name):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            name = f"{module_name}.{attribute}" if module_name else attribute
            kernel = tuple(module.weight_shape) if isinstance(module, CondConv2d) else ()
            side = max((kernel or weight.shape)[2:], default=1)
            found.append((weight, WeightLayer(0, name, module_name, False, kernel, side, kept.get(name, ""))))
            if not isinstance(module, _LAYERS):
                unclear.add(name)
    if unclear:
        scales = _scales(model, unclear, input_size, example_input, trace)
        found = [(weight, layer) for weight, layer in found if layer.parameter not in scales]
    classifier = _classifier_weights(model)
    if classifier is None:
        classifier = {id(weight) for weight, _ in found[-1:]}
    for (before, _), (weight, _) in itertools.pairwise(found):
        if id(before) in classifier and weight.shape == before.shape:
            classifier.add(id(weight))
    numbered = enumerate(found, start=1)
    return tuple(replace(layer, number=i, is_classifier=id(weight) in classifier) for i, (weight, layer) in numbered)


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of a classifier's parameters begin with; see `weight_layers`."""
    return tuple(f"{layer.module}." for layer in weight_layers(model) if layer.is_classifier)


def kept_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that are neither predicted nor post-processed, and the reason, by name.

    These are parameters that a module computes another tensor from before each forward pass, whose values and buffers
    would no longer fit together, and parameters that are neither float16, bfloat16, float32 nor float64.
    """
    kept: dict[str, str] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype not in _DTYPES:
                kept[prefix + name] = f"of type {str(parameter.dtype).removeprefix('torch.')}"
        for attribute, computed_by, sources in _computed_tensors(module):
            kept.update((prefix + name, f"{attribute} is computed from it by {computed_by}") for name in sources)
    return kept


def _computed_tensors(module: nn.Module) -> Iterator[tuple[str, str, dict[str, nn.Parameter]]]:
    """Yields the tensors that a module computes before each forward pass, what computes them, and from what by name."""
    if nn.utils.parametrize.is_parametrized(module):
        for attribute, steps in module.parametrizations.items():  # type: ignore[union-attr, operator]
            sources = {f"parametrizations.{attribute}.{name}": source for name, source in steps.named_parameters()}
            yield attribute, " and ".join(type(step).__name__.lstrip("_") for step in steps), sources
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            attribute, computed_by = hook._tensor_name, "pruning"
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            attribute, computed_by = hook.name, type(hook).__name__
        else:
            continue
        names = (f"{attribute}_{end}" for end in ("orig", "g", "v"))  # what torch calls the sources
        named = ((name, module._parameters.get(name)) for name in names)
        yield attribute, computed_by, {name: source for name, source in named if source is not None}


def _weights(module: nn.Module, module_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the weights that a module itself holds, or the largest parameters that they are computed from, by name."""
    if isinstance(module, _NOT_LAYERS):
        return
    computed = {attribute: sources for attribute, _, sources in _computed_tensors(module)}
    for name in _ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",):
        weight = module._parameters.get(name)
        if name in computed:
            name, weight = max(computed[name].items(), key=lambda item: item[1].numel(), default=(name, None))
        if weight is None or not (weight.is_floating_point() or weight.is_complex()):
            continue
        if isinstance(weight, nn.UninitializedParameter):
            raise InitError(f"{module_name}.{name} has no shape yet: run one forward pass of the model first")
        if weight.dim() >= 2:
            yield name, weight


def _scales(
    model: nn.Module,
    names: Collection[str],
    input_size: int | Sequence[int] | None,
    example_input: Any,
    trace: Trace | None,
) -> set[str]:
    """Those of the named parameters that are no layers, because they only meet activations elementwise."""
    if trace is None:
        try:
            trace = capture(model, input_size=input_size, example_input=example_input)
        except CaptureError as error:
            parameters = dict(model.named_parameters())
            scales = {name for name in names if not is_matrix(parameters[name].shape)}
            if unclear := sorted(set(names) - scales):
                _logger.warning("%s count as layers, as no forward pass says how they are used: %s", unclear, error)
            return scales
    origins = find_origins(trace)
    uses: dict[str, set[bool]] = {name: set() for name in names}
    for operation in trace.operations:
        values = operands(operation)
        if not any(origins.is_data(value) for value in values):
            continue
        for value in values:
            origin = origins.of(value)
            used = {name for index in origin.values for name in trace.parameters[index]}
            is_unknown_vector = kind_of(operation) is Kind.OTHER and not is_matrix(value.shape)
            for name in used.intersection(names):
                is_all = math.prod(value.shape) == math.prod(trace.parameter_shapes[name])
                uses[name].add(origin.is_spread or _is_elementwise(operation) or (is_unknown_vector and is_all))
    return {name for name, found in uses.items() if found == {True}}


def _is_elementwise(operation: Operation) -> bool:
    """Whether the parameters of an operation are scales, offsets or tables, not layers."""
    kind = kind_of(operation)
    if kind is not Kind.OTHER:
        return kind in _ELEMENTWISE
    try:  # of an operation that the table does not know, shapes tell
        shape = torch.broadcast_shapes(*(value.shape for value in operation.inputs))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return {value.shape for value in operation.outputs} == {tuple(shape)}


def _classifier_weights(model: nn.Module) -> set[int] | None:
    """Returns the identities of all parameters of the classifier, or None if the model does not name one.

    timm's description of a model may name more classifiers, auxiliary ones, than `get_classifier` returns.
    """
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return set() if hasattr(model, "feature_info") else None
    try:
        classifiers = list(_parameters_of(model, get_classifier()))
    except Exception as error:  # noqa: BLE001 - any model code may run here; the method may take arguments
        _logger.debug("get_classifier() of %s failed: %r", type(model).__name__, error)
        return None
    described = _parameters_of(model, timm_config(model).get("classifier") or ())
    rows = getattr(model, "num_classes", None)
    return {id(weight) for weight in (*classifiers, *(w for w in described if w.dim() > 1 and w.shape[0] == rows))}


def _parameters_of(model: nn.Module, item: Any) -> Iterator[Tensor]:
    """Yields the parameters of a module or its name, of a tensor, or of several of them."""
    if isinstance(item, str):
        item = dict(model.named_modules()).get(item)
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, nn.Module):
        yield from item.parameters()
    elif isinstance(item, (Mapping, list, tuple, set)):
        for entry in item.values() if isinstance(item, Mapping) else item:
            yield from _parameters_of(model, entry)


def default_start_layer(num_layers: int) -> int:
    """Returns `L` for a network of `n` layers: the last `min(n / 3, 16.2 + n / 30)` layers are post-processed.

    That is the last third up to the 54 layers of ResNet-50, and from there on one layer more for each further 30. It
    reproduces both published values, `L = 37` of 54 for ResNet-50 (18 layers) and `L = 94` of 113 for ConvNeXt-Base
    (20 layers). Between and beyond them it is an interpolation in depth, not a result of the paper: neither the share
    of the parameters before `L` (24 % and 61 %), nor that of the widths (41 % and 73 %), nor that of the layers (67 %
    and 82 %) is the same in the two networks, but the number of layers after `L` nearly is. The classifier counts.
    """
    processed = math.floor(min(num_layers / 3, 16.2 + num_layers / 30) + 0.5)
    return max(1, num_layers + 1 - max(2, processed))  # at least the classifier and one layer before it


POINTWISE = 0.07
"""Share of layers with kernels larger than 1 below which a network counts as one of matrices: a ViT, not a MaxViT."""


def is_pointwise(layers: Sequence[WeightLayer]) -> bool:
    """Whether hardly any layer looks at more than one position, as in transformers and mixers."""
    return sum(layer.side > 1 for layer in layers) < POINTWISE * len(layers)


def resolve_start_layer(
    layers: Sequence[WeightLayer], start_layer: int | float | str | None = None, default: int | float | None = None
) -> int:
    """Returns the number of the layer from which a network is post-processed, `L`.

    Args:
        layers: What `weight_layers` lists.
        start_layer: The number of a layer from 1; or a share of the number of layers, a float in (0, 1], rounded
            (0.69 gives 37 of 54, 0.83 gives 94 of 113); or the name of a module or parameter, for its first layer; or
            None for the default.
        default: What None stands for, as a number or share; None for `default_start_layer`, and for 1 in networks of
            matrices (`is_pointwise`), whose early layers hold no features that are worth more than their rank.

    Raises:
        InitError: There are no layers, or the number, share or name lies outside of the network.
    """
    count = len(layers)
    if count == 0:
        raise InitError("the model has no convolutional or fully-connected weights to post-process")
    chosen = default if start_layer is None else start_layer
    # A classifier that was left out counts, so that L is the same layer with and without it.
    depth = count + (not any(layer.is_classifier for layer in layers))
    if chosen is None:
        return 1 if is_pointwise(layers) else min(default_start_layer(depth), count)
    if isinstance(chosen, str):
        return _first_layer_of(layers, chosen)
    if isinstance(chosen, int) and not isinstance(chosen, bool) and 1 <= chosen <= count:
        return chosen
    if isinstance(chosen, float) and 0 < chosen <= 1:
        return min(max(1, math.floor(chosen * depth + 0.5)), count)
    raise InitError(
        f"start_layer={chosen!r}: expected a layer number from 1 to {count}, a share in (0, 1], or the name of a module"
    )


def _first_layer_of(layers: Sequence[WeightLayer], name: str) -> int:
    """Returns the number of the first layer in the module, or with the parameter, of that name."""
    for layer in layers:
        if name in (layer.parameter, layer.module) or layer.module.startswith(f"{name}."):
            return layer.number
    parts = (layer.module.split(".") for layer in layers)
    known = dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
    hint = did_you_mean(name, known) or f"; the first layer is in {layers[0].module!r}"
    raise InitError(f"start_layer={name!r}: no module of this name has a layer{hint}")
