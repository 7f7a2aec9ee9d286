"""Results of functions on meta tensors, looked up where the layouts of the arguments came before.

On meta tensors many functions run Python code, for up to some milliseconds, and models repeat their blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.trace.operations import TABLE, Kind

_ATOMS = frozenset({type(None), bool, int, float, str, type, FunctionType, BuiltinFunctionType, torch.dtype})
"""Types of values that cannot change."""

_NOT_NEW = (Kind.VIEW, Kind.PART, Kind.LOOKUP, Kind.BLANK)
_COMPUTING = {name for name, row in TABLE.items() if row.kind not in _NOT_NEW} | {
    "exp", "gelu", "interpolate", "leaky_relu", "log_softmax", "neg", "pow", "relu", "roll", "silu",
}  # fmt: skip
"""Functions that only compute new tensors."""

PLAIN = frozenset({Tensor, nn.Parameter})
"""Types of tensors that do nothing of their own when a function is called with them."""


class Results:
    """Results of computing functions, which on meta tensors depend on nothing but the layouts of the arguments.

    Models repeat their blocks: what a function made of arguments like these is looked up when they come again.
    """

    def __init__(self) -> None:
        self._layouts: dict[Hashable, Any] = {}

    def find(
        self, key: Hashable | None, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """New tensors like the function's result; None if the function has to be called."""
        if key is None:
            return None
        layout = self._layouts.get(key)
        return _like_input(function, args, kwargs) if layout is None else _made(layout)

    def keep(self, key: Hashable | None, result: Any, operands: Iterable[Tensor]) -> None:
        """Note what a call made of some tensors, unless it gave back one of them or a part of one."""
        if key is not None and _is_new(result, list(operands)):
            self._layouts[key] = _layout(result)


def call_key(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Hashable | None:
    """Equal for calls with results of equal layouts; None if that is not known of the function or its arguments."""
    if name not in _COMPUTING or torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    try:
        return function, _layout(args), *((key, _layout(item)) for key, item in kwargs.items())
    except _UnusualError:
        return None


_LIKE_INPUT: Mapping[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    F.hardsigmoid: ("input", "inplace"),
    F.hardswish: ("input", "inplace"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    F.relu: ("input", "inplace"),
    F.silu: ("input", "inplace"),
}  # slow functions that many models call with ever other shapes, and the names of their first parameters


def _like_input(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a few functions make of an input whose elements are in order: a tensor like it, or the input itself.

    None if the function is another one, or if anything about the arguments is unusual or may be wrong.
    """
    if function not in _LIKE_INPUT:
        return None
    named = dict(zip(_LIKE_INPUT[function], args, strict=False)) | dict(kwargs)
    source = named.pop("input", None)
    if not isinstance(source, Tensor) or not source.is_floating_point():
        return None
    shape: tuple[int, ...] = ()  # of the other tensors
    is_usual = True
    if function is F.layer_norm:
        normalized = named["normalized_shape"]
        shape = tuple(normalized) if isinstance(normalized, (tuple, list)) else ()
        is_usual = len(shape) > 0 and shape == source.shape[-len(shape) :]
    elif function is F.batch_norm:  # with the mean and variance that it has kept, not with the batch's
        shape = source.shape[1:2]
        kept = (named.get("running_mean"), named.get("running_var"))
        is_usual = len(shape) > 0 and named.get("training") is False and all(isinstance(item, Tensor) for item in kept)
    others = [item for item in named.values() if isinstance(item, Tensor)]
    is_usual = is_usual and all(item.shape == shape and item.dtype == source.dtype for item in others)
    if not is_usual or not source.is_contiguous():
        return None
    if named.get("inplace"):
        return source
    return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")  # cheaper than _like


class _UnusualError(Exception):
    """An argument whose influence on a result is not known."""


def _layout(item: Any) -> Hashable:
    """What there is to know of meta tensors, alone or in lists and tuples, and of constants among them."""
    kind = type(item)
    if kind in PLAIN:
        if not item.is_meta or item.layout is not torch.strided:
            raise _UnusualError
        return Tensor, item.shape, item.stride(), item.dtype
    if kind in _ATOMS:
        return kind, item  # with its type: 1, 1.0 and True are equal
    if kind is tuple or kind is list or kind is torch.Size:
        return kind, *map(_layout, item)
    raise _UnusualError


def _made(layout: Any) -> Any:
    """Tensors of a layout."""
    kind, *rest = layout
    if kind is Tensor:
        shape, stride, dtype = rest
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return kind(_made(entry) for entry in rest)


def _is_new(result: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a result consists of tensors that share no memory with given ones (as those of in-place calls do)."""
    if type(result) is tuple:
        return all(_is_new(entry, tensors) for entry in result)
    if type(result) is not Tensor or not result.is_meta or result.layout is not torch.strided:
        return False
    own = result if result._base is None else result._base
    return all(own is not tensor and own is not tensor._base for tensor in tensors)
