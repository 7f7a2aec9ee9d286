"""Forward hooks while a forward pass is recorded: they compute, but leave what belongs to the user alone.

Some hooks are a part of the model (weight normalization, timm's feature extraction); others only look on and keep what
they see. Nobody can tell these apart before they run. So all of them run, with copies of the lists, dictionaries,
tensors and modules that they refer to.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import deque
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_logger = logging.getLogger(__name__)

_COPIED = (dict, list, set, deque, Tensor, nn.Module)
"""What a hook may change. Other objects that it refers to (loggers, data sets) are shared."""


def isolate_hooks(skeleton: nn.Module, memo: dict[int, Any]) -> None:
    """Replaces the forward hooks of a copied model by hooks that change nothing outside of the copy.

    A hook from outside of torch, timm and the model's own methods may fail on tensors without values. Such a hook is
    left out, with a warning that names the hook.

    Args:
        skeleton: The copied model.
        memo: The copy of each object of the model by the object's id, as `copy.deepcopy` fills it.
    """
    for name, module in skeleton.named_modules():
        for hooks in (getattr(module, "_forward_pre_hooks", {}), getattr(module, "_forward_hooks", {})):
            for key, hook in hooks.items():
                if not _belongs_to_model(hook):
                    isolated = _isolated(hook, memo) if isinstance(hook, FunctionType) else hook  # an object is copied
                    hooks[key] = _tolerant(isolated, f"{_title(hook)} of module {name!r}")


def _belongs_to_model(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return True
    code = hook if isinstance(hook, (FunctionType, MethodType)) else type(hook)
    return code.__module__.partition(".")[0] in ("torch", "timm")


def _title(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _isolated(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function with variables of its own in place of those that it shares with its surroundings."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(CellType(_copy(cell.cell_contents, memo)))
        except ValueError:  # no contents yet
            cells.append(CellType())
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    variables = {**function.__globals__, **{name: _copy(value, memo) for name, value in used.items()}}
    copied = FunctionType(function.__code__, variables, function.__name__, function.__defaults__, tuple(cells))
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(value, _COPIED):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:  # noqa: BLE001 - a hook's variable may hold anything
        _logger.debug("a variable of a hook is shared, because it cannot be copied: %s", error)
        return value


def _tolerant(hook: Callable[..., Any], title: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - any code of the user may run here
            _logger.warning(
                "the forward hook %s is left out of the recording, since tensors have no values there: %s", title, error
            )
            return None

    return run
