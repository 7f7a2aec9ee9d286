"""Writing down the torch functions that a forward pass calls.

A `TorchFunctionMode` sees a model as a short list of semantic calls (conv2d, linear, layer_norm, add, ...). Some
computation passes it by: scripted modules, code within `DisableTorchFunction`. The recorder notices such code by the
tensors that it leaves behind. A second recording then takes a `TorchDispatchMode` along, which sees every kernel.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_ghn.errors import CaptureError
from timm_ghn.seeding import PrivateRandom
from timm_ghn.trace.memo import PLAIN, Results, call_key
from timm_ghn.trace.records import Operation, Trace, Value

_logger = logging.getLogger(__name__)

_SEEN_DEVICE = torch.device("cpu", 0)
"""What code gets from `tensor.device`. Unlike the meta device, `torch.autocast` knows this one. As an argument of a
call, it stands for the meta device again. (Nobody else writes an index behind "cpu".)"""

_LEAVES = (int, float, str, type(None), torch.dtype)
"""Types of most arguments of calls: they hold no tensors."""

_ARITHMETIC = {
    "add", "sub", "mul", "truediv", "floordiv", "div", "matmul", "pow", "mod", "and", "or", "xor", "lshift", "rshift",
}  # fmt: skip

# Calls that compute nothing, or that only ask for a size; and those that give a tensor the memory of another one,
# which is noticed when the tensor is used.
_SILENT = {
    "size", "shape", "dim", "ndim", "device", "dtype", "numel", "stride", "is_contiguous", "requires_grad", "len",
    "set", "storage_offset", "untyped_storage", "storage",
}  # fmt: skip
_MEMORY = {"untyped_storage", "storage"}

_KERNEL_MODULES = ("torch._meta_registrations", "torch._refs", "torch._decomp", "torch._prims")

# Kernels with another name or another order of arguments than the function that calls them.
_KERNELS: Mapping[str, tuple[str, Sequence[int]]] = {
    "_adaptive_avg_pool2d": ("adaptive_avg_pool2d", range(2)),
    "_native_batch_norm_legit_no_training": ("batch_norm", (0, 3, 4, 1, 2)),
    "_softmax": ("softmax", range(2)),
    "batch_norm": ("batch_norm", (0, 3, 4, 1, 2, 5)),
    "instance_norm": ("instance_norm", (0, 3, 4, 1, 2, 5)),
    "max_pool2d_with_indices": ("max_pool2d", range(6)),
    "native_batch_norm": ("batch_norm", (0, 3, 4, 1, 2, 5)),
    "native_group_norm": ("group_norm", (0, 6, 1, 2)),
    "native_layer_norm": ("layer_norm", range(5)),
}


def operation_name(function: Callable[..., Any]) -> str:
    """Name of a torch function, the same for its function, method, operator, in-place, property and kernel forms."""
    name: str = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, torch._ops.OpOverload):
        name = function.overloadpacket.__name__
    if name == "__get__":  # a property of Tensor: its descriptor knows the name
        return str(getattr(getattr(function, "__self__", None), "__name__", name))
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in ("rdiv", "rtruediv"):  # 1 / x
            return "reciprocal"
        if name[:1] in ("i", "r") and name[1:] in _ARITHMETIC:
            name = name[1:]
        return {"truediv": "div"}.get(name, name)
    return name.rstrip("_") or name


class _Known(NamedTuple):
    """What the recorder knows of a tensor, or of memory."""

    value: Value
    storage: int | None  # of the tensor when the value was noted
    version: int  # counts writes in place


class Recorder(TorchFunctionMode):
    """Numbers every tensor that it sees and writes down every call.

    Args:
        model: The model, on the meta device.
        tensors: Tensors that the model holds, as parameters, buffers or otherwise.
        sees_kernels: Whether kernels that no recorded call has run are recorded, too.

    Attributes:
        is_complete: False if a tensor turned up that no recorded call has made, or that was changed by none.
        call: Name of the call in progress, or of the one that failed.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor], *, sees_kernels: bool = False) -> None:
        super().__init__()
        self.is_complete = True
        self.call = ""
        self._sees_kernels = sees_kernels
        self._kernels = _Kernels(self)
        self._is_calling = False
        self._operations: list[Operation] = []
        self._known: dict[int, _Known] = {}  # by id of the tensor
        self._values: dict[int, Value] = {}  # the latest one by storage
        self._kept: list[Any] = []  # so that no id is used twice
        self._wholes: dict[int, Tensor] = {}  # what a view was taken from, by id of the view
        self._results = Results()
        self._random = PrivateRandom(seed=0)
        self._count = 0
        self._inputs: frozenset[int] = frozenset()
        self._parameters: dict[int, tuple[str, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for tensor in tensors:
            self._new_value(tensor)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            value = self._value(parameter)
            self._parameters[value.index] = (*self._parameters.get(value.index, ()), name)
            self._shapes[name] = value.shape

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """Record a forward pass."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._inputs = frozenset(self._new_value(tensor).index for tensor in tensors)
        kernels = self._kernels if self._sees_kernels else nullcontext()
        with torch.no_grad(), _MetaByDefault(), self, kernels:
            output = model(*args, **kwargs)
        outputs = list(tensors_in(output, in_objects=True))
        if not outputs:
            raise CaptureError(
                f"forward of {type(model).__name__} returns {type(output).__name__}, in which there is no tensor"
            )
        return Trace(
            outputs=tuple(dict.fromkeys(self._value(leaf).index for leaf in outputs)),
            operations=tuple(self._operations),
            inputs=self._inputs,
            parameters=self._parameters,
            parameter_shapes=self._shapes,
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name in _SILENT:
            if name == "device" and isinstance(args[0], Tensor) and args[0].is_meta:
                return _SEEN_DEVICE
            if name in _MEMORY:
                _logger.warning("what is done with the memory of a tensor, given by %s(), is not recorded", name)
            with torch._C.DisableTorchFunction() if PLAIN.issuperset(types) else nullcontext():
                return func(*args, **kwargs)
        self.call = name
        # Kernels for the meta device are Python code. If one calls this, no recorded call has run the kernel.
        self.is_complete &= not sys._getframe(1).f_globals.get("__name__", "").startswith(_KERNEL_MODULES)
        with torch._C.DisableTorchFunction():  # what is asked of tensors here is no part of the forward pass
            inputs: list[Value] = []
            recorded_args = tuple(self._replace(item, inputs) for item in args)
            recorded_kwargs = {word: self._replace(item, inputs) for word, item in kwargs.items()}
            key = None if self._sees_kernels else call_key(name, func, args, kwargs)
            result = self._results.find(key, func, args, kwargs)
        if is_called := result is None:
            result = self._call(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            if is_called:
                self._results.keep(key, result, tensors_in((*args, *kwargs.values())))
            changed = [args[0]] if name == "setitem" else list(tensors_in(result))
            if changed:
                outputs = tuple(self._new_value(tensor) for tensor in self._with_wholes(changed, args, kwargs))
                if isinstance(func, (torch._ops.OpOverload, BuiltinFunctionType)):
                    name, recorded_args = _as_called(name, recorded_args)
                self._operations.append(Operation(name, recorded_args, recorded_kwargs, tuple(inputs), outputs))
        self.call = ""
        return result

    def kernel(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a kernel, and record it unless it is a part of a recorded call."""
        if self._is_calling:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self.__torch_function__(func, types, args, kwargs)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function; one that refuses tensors with values beside those without gets none with values."""
        if any(type(item) is torch.device for item in (*args, *kwargs.values())):
            args, kwargs = tree_map_only(torch.device, _real_device, (args, kwargs))
        self._is_calling = True
        try:
            return self._random.call(function, args, kwargs)
        except RuntimeError:
            if all(tensor.is_meta for tensor in tensors_in([*args, *kwargs.values()])):
                raise
            args, kwargs = tree_map_only(Tensor, lambda leaf: leaf.to("meta"), (args, kwargs))
            return function(*args, **kwargs)
        finally:
            self._is_calling = False

    def _with_wholes(self, changed: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """What changed, and the tensors that a view which was written into is a view of."""
        views = [tensor for tensor in changed if tensor._base is not None]
        if not views:
            return changed
        operands = list(tensors_in([*args, *kwargs.values()]))
        for view in views:
            base = view._base
            if not any(view is operand for operand in operands):  # a new one
                whole = next((operand for operand in operands if operand is base or operand._base is base), None)
                if whole is not None:
                    self._wholes[id(view)] = whole
        wholes = []
        written = operands[0] if operands and any(operands[0] is view for view in views) else None
        while written is not None and (written := self._wholes.get(id(written))) is not None:
            wholes.append(written)
        return [*changed, *wholes]

    def _replace(self, item: Any, inputs: list[Value]) -> Any:
        if isinstance(item, Tensor):
            value = self._value(item)
            inputs.append(value)
            return value
        if isinstance(item, (list, tuple)) and any(isinstance(entry, (Tensor, list, tuple)) for entry in item):
            return tuple(self._replace(entry, inputs) for entry in item)
        return item

    def _value(self, tensor: Tensor) -> Value:
        """The value of a tensor. One that has the memory of another tensor (a copy, a wrapper) has its value."""
        known = self._known.get(id(tensor))
        storage = _storage(tensor)
        if known is not None and known.storage == storage:
            self.is_complete &= known.version == _version(tensor)
            return known.value
        source = None if storage is None else self._values.get(storage)
        value = self._new_value(tensor)
        if source is not None:
            name = "detach" if source.shape == value.shape else "view"
            self._operations.append(Operation(name, (source,), {}, (source,), (value,)))
        elif tensor.is_meta or _computes_itself(tensor):
            self.is_complete = False
            if self._sees_kernels and (storage in self._kernels.made or _computes_itself(tensor)):
                raise CaptureError(f"a {type(tensor).__name__} of unknown origin, which no recorded operation has made")
            if self._sees_kernels:
                _logger.warning(
                    "%s uses a tensor of unknown origin (shape %s), which counts as a constant: what other threads "
                    "compute is not recorded",
                    self.call or "the output",
                    "x".join(str(size) for size in tensor.shape),
                )
        return value

    def _new_value(self, tensor: Tensor) -> Value:
        value = Value(self._count, tuple(tensor.shape))
        self._count += 1
        storage = _storage(tensor)
        if id(tensor) not in self._known:
            self._kept.append(tensor)
        self._known[id(tensor)] = _Known(value, storage, _version(tensor))
        if storage is not None:
            if storage not in self._values:
                self._kept.append(_unwrapped(tensor).untyped_storage())
            self._values[storage] = value
        return value


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows kernels to a recorder, and notes the memory that they make."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: set[int | None] = set()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._recorder.kernel(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunction():
            self.made |= {_storage(tensor) for tensor in tensors_in(result)}
        return result


class _MetaByDefault(TorchFunctionMode):
    """New tensors are made on the meta device, as within `torch.device("meta")`, which is noted for all threads."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def tensors_in(result: Any, *, in_objects: bool = False) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples, sets and mappings, in order; if asked for, of attributes of objects, too."""
    return iter((result,)) if isinstance(result, Tensor) else _tensors_in(result, in_objects, ())


def _tensors_in(result: Any, in_objects: bool, owners: tuple[int, ...]) -> Iterator[Tensor]:
    """As `tensors_in`, of a part of the objects with these ids, which may refer to each other."""
    entries: Iterable[Any] = ()
    if id(result) in owners:
        return
    if isinstance(result, (list, tuple, set, frozenset, deque)):
        entries = result
    elif isinstance(result, Mapping):
        entries = result.values()
    elif in_objects and not isinstance(result, (type, nn.Module)):
        entries = getattr(result, "__dict__", {}).values()
        if is_dataclass(result):
            entries = [getattr(result, field.name, None) for field in fields(result)]
    for entry in entries:
        if isinstance(entry, Tensor):
            yield entry
        elif not isinstance(entry, _LEAVES):
            yield from _tensors_in(entry, in_objects, (*owners, id(result)))


def _as_called(name: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of the function of `torch.nn.functional` that stands for a kernel."""
    if name in ("convolution", "_convolution"):
        source, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
        rank = len(source.shape) - 2
        if transposed:
            rest = (stride, padding, output_padding, groups, dilation)
            return f"conv_transpose{rank}d", (source, weight, bias, *rest)
        return f"conv{rank}d", (source, weight, bias, stride, padding, dilation, groups)
    if name not in _KERNELS:
        return name, args
    name, positions = _KERNELS[name]
    return name, tuple(args[position] for position in positions if position < len(args))


def _real_device(device: torch.device) -> torch.device:
    return torch.device("meta") if device == _SEEN_DEVICE else device


def _unwrapped(tensor: Tensor) -> Tensor:
    """What `torch.vmap` and other transforms of `torch.func` have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _version(tensor: Tensor) -> int:
    """Counts writes in place; tensors of the inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _computes_itself(tensor: Tensor) -> bool:
    """Whether the class of a tensor has kernels of its own, which may compute with other tensors."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _storage(tensor: Tensor) -> int | None:
    """Equal for tensors that share memory, while one of them lives; None if the tensor has none of its own."""
    try:
        return int(_unwrapped(tensor).untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None
