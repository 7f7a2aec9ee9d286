"""Copies of models on the meta device: the code and settings of a model without its values."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.errors import CaptureError

ATOMS = frozenset({type(None), bool, int, float, str, type, FunctionType, BuiltinFunctionType, torch.dtype})
"""Types of values that cannot change."""


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors are on the meta device, in evaluation mode; the model if it is there already.

    Raises:
        CaptureError: If the model cannot be copied.
    """
    tensors = [*model.parameters(), *model.buffers(), *_loose_tensors(model)]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        # Tensor subclasses of parameters (timm and torch have some) are not needed to record shapes.
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    try:
        skeleton = _copy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied to the meta device ({error!r}); build it under "
            "torch.device('meta') and pass that model's graph instead"
        ) from error
    return skeleton.eval()


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(model, memo)`, without its generic treatment of the dozen empty tables of every module."""
    states: list[tuple[nn.Module, dict[str, Any]]] = []  # kept to the end, so that the memo's ids stay theirs
    for module in model.modules():
        state = _state(module)
        if state is not None:
            memo[id(module)] = type(module).__new__(type(module))
            states.append((module, state))
    for module, state in reversed(states):  # children first
        copied: dict[str, Any] = {}
        for key, value in state.items():
            if type(value) in ATOMS:
                copied[key] = value
            elif type(value) is _TABLES.get(key) and not value:
                copied[key] = type(value)()
            else:
                copied[key] = _copy_value(value, memo)
        memo[id(module)].__setstate__(copied)
    return copy.deepcopy(model, memo)


def _state(module: nn.Module) -> dict[str, Any] | None:
    """What a copy of a module is made from, or None if its class has its own way of being copied."""
    if hasattr(type(module), "__deepcopy__") or type(module) in copyreg.dispatch_table:
        return None
    reduced = module.__reduce_ex__(4)
    is_usual = len(reduced) == 5 and reduced[:2] == (_MAKE, (type(module),)) and reduced[3:] == (None, None)
    return reduced[2] if is_usual and type(reduced[2]) is dict else None


_MAKE = object().__reduce_ex__(4)[0]  # copyreg's function that makes an object before its state is set
_TABLES = {key: type(value) for key, value in vars(nn.Module()).items() if type(value) not in ATOMS}


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy(value, memo)` with a short way for what modules consist of."""
    kind = type(value)
    if kind in ATOMS or (kind is tuple and all(type(entry) in ATOMS for entry in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict:
        copied: dict[Any, Any] = {}
        memo[id(value)] = copied
        copied.update((_copy_value(key, memo), _copy_value(entry, memo)) for key, entry in value.items())
        return copied
    return copy.deepcopy(value, memo)


def _loose_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep as plain attributes, alone or in lists and tuples."""
    for module in model.modules():
        for key, attribute in vars(module).items():
            if key in _TABLES or type(attribute) in ATOMS:
                continue
            for item in attribute if isinstance(attribute, (list, tuple)) else (attribute,):
                if isinstance(item, Tensor):
                    yield item
