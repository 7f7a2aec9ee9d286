"""Models on the meta device, without memory: built there, or copied from one that has values."""

from __future__ import annotations

import copy
import functools
import logging
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import CaptureError
from timm_ghn.trace.distributed import copied_plainly, meta_like

_logger = logging.getLogger(__name__)

_CONSTANTS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})
"""Types of values that a copy may share."""
_Model = TypeVar("_Model", bound=nn.Module)
_COPIED = (dict, list, set, deque, Tensor, nn.Module)
"""What a hook may change. Other objects that it refers to (loggers, data sets) are shared."""


def build_on_meta(create: Callable[[], _Model]) -> _Model:
    """A model on the meta device.

    Models of older timm read numbers from tensors while they are built (the steps of drop path rates), and meta
    tensors have none. Such a model is built on the CPU, without filling its parameters, and moved.

    Args:
        create: Builds the model; called a second time if it fails on the meta device.
    """
    try:
        with torch.device("meta"):
            return create()
    except RuntimeError:  # and NotImplementedError, which is one
        with DeferredRandom(seed=0):
            model = create()
        return model.to("meta")


def skeleton_of(model: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """Copies a model without its values.

    Objects that cannot be copied (locks, open files, Python modules) are shared with the model.

    Returns:
        The copy in evaluation mode, and the tensors that it was made with. All are on the meta device, but those of
        scripted modules, which are copied by torch's C++ code.

    Raises:
        CaptureError: A parameter has no shape yet, or a module refuses to be copied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise CaptureError(f"{name} has no shape yet: run one forward pass of the lazy model first")
        # Tensor subclasses of parameters (timm and torch have some) are not needed to record shapes.
        meta = meta_like(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    tensors = [*memo.values()]
    # Most modules, with which copy.deepcopy is slow, are copied here; the inner ones first.
    for module in reversed([*model.modules()]):
        if (copied := _plain_copy(module, memo)) is not None:
            memo[id(module)] = copied
    with _CopiesOnMeta(tensors):
        skeleton, memo = _copied(model, memo)
        _isolate_hooks(skeleton, memo)
    return skeleton.eval(), tensors


def _plain_copy(module: nn.Module, memo: Mapping[int, Any]) -> nn.Module | None:
    """The copy of a module of torch or timm that holds nothing but constants and what was copied; None for others."""
    kind = type(module)
    if not kind.__module__.startswith(("torch.nn.", "timm.")) or hasattr(kind, "__deepcopy__"):
        return None
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        container = type(value)
        if container in _CONSTANTS:
            state[name] = value
        elif container not in (dict, OrderedDict, set, tuple):
            return None
        elif not value:  # the dozen tables of hooks
            state[name] = container()
        else:
            is_table = container in (dict, OrderedDict)
            items = value.values() if is_table else value
            if not all(type(item) in _CONSTANTS or id(item) in memo for item in items):
                return None
            copies = [memo.get(id(item), item) for item in items]
            state[name] = container(zip(value, copies, strict=True) if is_table else copies)
    copied = kind.__new__(kind)
    vars(copied).update(state)
    return copied


class _CopiesOnMeta(TorchFunctionMode):
    """Copies of tensors are made on the meta device, and noted in a list."""

    def __init__(self, made: list[Tensor]) -> None:
        super().__init__()
        self._made = made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (Tensor.__deepcopy__, Tensor.clone):  # of plain tensors, and of parameters
            return func(*args, **(kwargs or {}))
        meta = meta_like(args[0])
        self._made.append(meta)
        if func is Tensor.__deepcopy__:
            args[1][id(args[0])] = meta
        return meta


def _copied(model: nn.Module, memo: dict[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    """A deep copy, and its memo: the copy of each object by the object's id."""
    shared: dict[int, Any] = {}
    while True:
        copies = {**memo, **shared}
        try:
            return copied_plainly(model, copies), copies
        except Exception as error:
            stuck = _object_in_the_way(error)
            if stuck is None or isinstance(stuck, nn.Module) or id(stuck) in shared:
                name = type(stuck).__name__ if isinstance(stuck, nn.Module) else type(model).__name__
                raise CaptureError(
                    f"{name} cannot be copied to the meta device ({error!r}); copy.deepcopy has to work for modules"
                ) from error
            shared[id(stuck)] = stuck


def _object_in_the_way(error: Exception) -> Any:
    """The object that `copy.deepcopy` could not copy."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is copy.deepcopy.__code__]
    return frames[-1].f_locals["x"] if frames else None


# --- forward hooks -------------------------------------------------------------------------------------------------


def _isolate_hooks(skeleton: nn.Module, memo: dict[int, Any]) -> None:
    """Replaces the forward hooks of a copied model by hooks that change nothing outside of the copy.

    Some hooks are a part of the model (weight normalization, timm's feature extraction); others only look on and keep
    what they see. Nobody can tell these apart before they run. So all of them run, with copies of the lists,
    dictionaries, tensors and modules that they refer to.

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
                    title = getattr(hook, "__qualname__", type(hook).__qualname__)
                    hooks[key] = _tolerant(isolated, f"{title} of module {name!r}")


def _belongs_to_model(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return True
    code = hook if isinstance(hook, (FunctionType, MethodType)) else type(hook)
    return code.__module__.partition(".")[0] in ("torch", "timm")


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
