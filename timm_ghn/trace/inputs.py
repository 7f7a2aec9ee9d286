"""What the forward pass of a model is called with: example inputs, or the image size that the model names."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from timm_ghn.errors import InitError

DEFAULT_INPUT_SIZE = (3, 224, 224)
"""(channels, height, width) of the input when neither the caller nor the model names one."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward pass."""


def timm_config(model: nn.Module) -> Mapping[str, Any]:
    """The `pretrained_cfg` of a timm model as a mapping; an empty one for other models, and where it is a text.

    Fields that are not what timm writes there are left out.
    """
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, PretrainedCfg):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        return {}
    return {name: value for name, value in config.items() if name not in _FIELDS or _FIELDS[name](value)}


def _is_size(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 3 and all(isinstance(side, int) for side in value)


def _is_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value))


_FIELDS = {"input_size": _is_size, "first_conv": _is_names, "classifier": _is_names, "notes": _is_names}
"""What some fields of timm's description of a model have to be."""


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Input sizes (channels, height, width) worth trying, best first, from the attributes of a timm model."""
    config = timm_config(model)
    size = tuple(config.get("input_size") or DEFAULT_INPUT_SIZE)
    channels = _input_channels(model, config) or size[0]
    found: list[tuple[int, ...]] = []
    for owner in (getattr(model, "patch_embed", None), model):
        image_size = getattr(owner, "img_size", None)
        if isinstance(image_size, int) and image_size > 0:
            found.append((channels, image_size, image_size))
        elif isinstance(image_size, (tuple, list)) and len(image_size) == 2:
            found.append((channels, *image_size))
    # The layer that is named first does not always see the image itself (space-to-depth stems).
    return list(dict.fromkeys([*found, (channels, *size[1:]), size]))


def check_model(model: object) -> None:
    """Raise InitError unless this is a model; a text is probably the name of one."""
    if not isinstance(model, nn.Module):
        hint = f"; timm.create_model({model!r}) builds one" if isinstance(model, str) else ""
        raise InitError(f"expected a model, a torch.nn.Module, and got {type(model).__name__} {model!r:.80}{hint}")


def checked_size(model: nn.Module, size: int | Sequence[int]) -> tuple[int, ...]:
    """The size of one input; of a square image whose side is given, with the channels that the model takes.

    Raises:
        InitError: If it is no size.
    """
    try:
        sides = [size, size] if isinstance(size, int) else list(size)
        sizes = tuple(operator.index(side) for side in sides if not isinstance(side, bool))
    except TypeError:
        sizes, sides = (), []
    if not sizes or len(sizes) < len(sides) or min(sizes) < 1:
        raise InitError(f"input_size={size!r}: expected (channels, height, width), or the side of a square")
    return (input_sizes(model)[0][0], *sizes) if isinstance(size, int) else sizes


def possible_calls(model: nn.Module, input_size: int | Sequence[int] | None, example_input: Any) -> list[Call]:
    """Arguments to try a forward pass with, in this order, all of them on the meta device.

    Args:
        model: The model.
        input_size: (channels, height, width) of one image, or the side of a square; None for the sizes that the model
            names.
        example_input: Instead of an image: a tensor, or a tuple or dict of tensors. With integers and booleans, a
            second call is returned in which these are on the CPU and keep their values (positions, masks).
    """
    if example_input is not None:
        return [as_call(tree_map(to_meta, example_input)) for to_meta in (_to_meta, _floats_to_meta)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    sizes = input_sizes(model) if input_size is None else [checked_size(model, input_size)]
    return [((torch.empty((1, *size), dtype=dtype, device="meta"),), {}) for size in sizes]


def _input_channels(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Input channels of the layer that timm's configuration names as the first, if the model has the layer."""
    names = config.get("first_conv")
    for name in [names] if isinstance(names, str) else names or []:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    return None


def as_call(example: Any) -> Call:
    """The arguments that an example stands for: tensors of a tuple by position, of a mapping by name."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _to_meta(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta", requires_grad=False) if isinstance(leaf, Tensor) else leaf


def _floats_to_meta(leaf: Any) -> Any:
    is_kept = isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex() or leaf.is_meta)
    return leaf.detach().cpu() if is_kept else _to_meta(leaf)
