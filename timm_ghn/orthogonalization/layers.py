"""Which weights count as layers of a network, and from which of them on it is post-processed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from timm.layers.cond_conv2d import CondConv2d
from torch import nn

from timm_ghn.errors import InitError
from timm_ghn.text import did_you_mean

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()))  # RMSNorm: torch 2.4
_NOT_LAYERS = (*_TABLES, *_NORMS)
"""Modules whose `weight` is a lookup table or an elementwise scale, whatever its number of dimensions."""

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


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
    """

    number: int
    parameter: str
    module: str
    is_classifier: bool = False
    kernel: tuple[int, ...] = ()
    side: int = 1


def weight_layers(model: nn.Module) -> tuple[WeightLayer, ...]:
    """Lists the convolutional and fully-connected layers of a model, in the order of `model.modules()`.

    A layer is a module with a floating `weight` parameter of two or more dimensions, other than lookup tables and
    norms. The stacked (or separate) query, key and value matrices of `nn.MultiheadAttention` count as well. A module
    or parameter that occurs several times counts once, and not at all if it is also a lookup table. The experts of a
    `CondConv2d` are one layer of several kernels.

    The classifier is what the `get_classifier()` of a timm model returns (an identity, one or several modules, all
    their layers), what its `pretrained_cfg` names besides if that has as many rows as there are classes, and any layers
    of the same shape right behind it, which are auxiliary heads. Of a model without that method it is the last layer,
    except of timm's feature extractors, which have none.

    Raises:
        InitError: A parameter of a lazy module has no shape yet.
    """
    seen = {id(module.weight) for module in model.modules() if isinstance(module, _TABLES)}
    found: list[tuple[str, str, nn.Parameter, tuple[int, ...]]] = []
    for module_name, module in model.named_modules():
        for attribute, weight in _weights(module, module_name):
            if id(weight) not in seen:
                seen.add(id(weight))
                parameter = f"{module_name}.{attribute}" if module_name else attribute
                kernel = tuple(module.weight_shape) if isinstance(module, CondConv2d) else ()
                found.append((parameter, module_name, weight, kernel))
    classifier = _classifier_weights(model)
    if classifier is None:
        classifier = {id(weight) for _, _, weight, _ in found[-1:]}
    for (_, _, before, _), (_, _, weight, _) in itertools.pairwise(found):
        if id(before) in classifier and weight.shape == before.shape:
            classifier.add(id(weight))
    return tuple(
        WeightLayer(number, parameter, module_name, id(weight) in classifier, kernel, _side(kernel or weight.shape))
        for number, (parameter, module_name, weight, kernel) in enumerate(found, start=1)
    )


def _side(kernel: Sequence[int]) -> int:
    return max(kernel[2:], default=1)


def _weights(module: nn.Module, module_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the weights that a module itself holds, by the name of the attribute."""
    if isinstance(module, _NOT_LAYERS):
        return
    names = _ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",)
    for name in names:
        weight = getattr(module, name, None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            continue
        if isinstance(weight, nn.UninitializedParameter):
            raise InitError(f"{module_name}.{name} has no shape yet: run one forward pass of the model first")
        if weight.dim() >= 2:
            yield name, weight


def _classifier_weights(model: nn.Module) -> set[int] | None:
    """Returns the identities of all parameters of the classifier, or None if the model does not name one."""
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return set() if hasattr(model, "feature_info") else None
    classifier = get_classifier()
    modules = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    found = {id(weight) for module in modules if isinstance(module, nn.Module) for weight in module.parameters()}
    return found | {id(weight) for weight in _named_heads(model)}


def _named_heads(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the weights of the modules that timm's description of a model calls classifiers, auxiliary ones too."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        try:
            module = model.get_submodule(name)
        except AttributeError:  # a model without this head
            continue
        for weight in module.parameters():
            if weight.dim() > 1 and weight.shape[0] == getattr(model, "num_classes", None):
                yield weight


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
