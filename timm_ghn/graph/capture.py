"""Recording the operations of a model's forward pass, on the meta device: no weights allocated, none changed.

A `TorchFunctionMode` sees every model as a short list of semantic calls (conv2d, linear, layer_norm, add, ...).
What is recorded refers to tensors by number, so a `Trace` holds no tensor and can outlive the model.
"""

from __future__ import annotations

import copy
import copyreg
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from timm_ghn.errors import CaptureError

_logger = logging.getLogger(__name__)

DEFAULT_INPUT_SIZE = (3, 224, 224)
"""(channels, height, width) of the input when neither the caller nor the model says otherwise."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor at one moment of the forward pass: an in-place operation makes a new value.

    Attributes:
        index: Number of the value in its trace.
        shape: Shape of the tensor.
    """

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One recorded call.

    Attributes:
        name: Name of the function without the marks of methods, operators and in-place variants: "add" stands for
            `torch.add`, `Tensor.add_`, `Tensor.__radd__` and so on.
        args: Positional arguments, with a `Value` in place of every tensor.
        kwargs: Keyword arguments, likewise.
        inputs: The values among the arguments, in order.
        outputs: The values that the call made or changed.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """The argument that was passed at a position or by its keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(keyword, default)


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward pass did.

    Attributes:
        operations: Recorded calls, in order.
        inputs: Indices of the values that are the model's input.
        outputs: Indices of the values that the model returned, in order.
        parameters: Names of the parameters by the index of their value (several for tied parameters).
        parameter_shapes: Shape by name of every parameter of the model, also of those that the pass did not use.
    """

    operations: tuple[Operation, ...]
    inputs: frozenset[int]
    outputs: tuple[int, ...]
    parameters: Mapping[int, tuple[str, ...]]
    parameter_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def capture(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
) -> Trace:
    """Record the operations of a model's forward pass in evaluation mode, without touching the model.

    Args:
        model: Any module, on any device, of any dtype; it is not moved, run on data, or left in another mode.
        input_size: (channels, height, width) of one input image. Default: what a timm model says of itself, else
            3 x 224 x 224.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors (positional or keyword
            arguments of forward). Only shapes and dtypes matter.

    Raises:
        CaptureError: If the forward pass fails on meta tensors; the message names the operation and the module.
    """
    skeleton = _skeleton(model)
    if example_input is not None:
        candidates = [_as_call(example_input)]
    else:
        dtype = next((p.dtype for p in skeleton.parameters() if p.is_floating_point()), torch.float32)
        sizes = [tuple(input_size)] if input_size is not None else input_sizes(skeleton)
        candidates = [((torch.empty((1, *size), dtype=dtype, device="meta"),), {}) for size in sizes]
    failure: Exception | None = None
    for args, kwargs in candidates:
        try:
            return _record(skeleton, args, kwargs)
        except Exception as error:  # noqa: BLE001 - any model code may run here; it is re-raised with its place
            failure = failure or error
            _logger.debug("forward pass with input %s failed: %s", _describe(args, kwargs), error)
    args, kwargs = candidates[0]
    raise CaptureError(_explain(skeleton, args, kwargs, failure)) from failure


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Input sizes (channels, height, width) worth trying, best first, from what a timm model says of itself."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(config.get("input_size") or DEFAULT_INPUT_SIZE)
    channels = _input_channels(model, config) or size[0]
    image_sizes = [getattr(getattr(model, "patch_embed", None), "img_size", None), getattr(model, "img_size", None)]
    found: list[tuple[int, ...]] = []
    for image_size in image_sizes:
        if isinstance(image_size, int) and image_size > 0:
            found.append((channels, image_size, image_size))
        elif isinstance(image_size, (tuple, list)) and len(image_size) == 2:
            found.append((channels, *image_size))
    # The layer that is named first does not always see the image itself (space-to-depth stems).
    found += [(channels, *size[1:]), size]
    return list(dict.fromkeys(found))


def _input_channels(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Input channels of the layer that timm's configuration names as the first, if it is there."""
    names = config.get("first_conv")
    for name in [names] if isinstance(names, str) else names or []:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    return None


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of forward, on the meta device."""

    def to_meta(leaf: Any) -> Any:
        return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf

    example = tree_map(to_meta, example)
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example,), {}


def _skeleton(model: nn.Module) -> nn.Module:
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
            if type(value) in _ATOMS:
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
_ATOMS = frozenset({type(None), bool, int, float, str, type, FunctionType, BuiltinFunctionType, torch.dtype})
_TABLES = {key: type(value) for key, value in vars(nn.Module()).items() if type(value) not in _ATOMS}


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy(value, memo)` with a short way for what modules consist of."""
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(entry) in _ATOMS for entry in value)):
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
            if key in _TABLES or type(attribute) in _ATOMS:
                continue
            for item in attribute if isinstance(attribute, (list, tuple)) else (attribute,):
                if isinstance(item, Tensor):
                    yield item


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    recorder = _Recorder(model)
    recorder.add_inputs((args, kwargs))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"), recorder:
        output = model(*args, **kwargs)
    return recorder.trace(output)


_ARITHMETIC = {
    "add", "sub", "mul", "truediv", "floordiv", "div", "matmul", "pow", "mod", "and", "or", "xor", "lshift", "rshift",
}  # fmt: skip


def operation_name(function: Callable[..., Any]) -> str:
    """Name of a torch function, alike for its function, method, operator, in-place and property forms."""
    name: str = getattr(function, "__name__", type(function).__name__)
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


# Calls that make no new tensor of the computation although they may return one, or that only ask for a size.
_SILENT = {
    "size",
    "shape",
    "dim",
    "ndim",
    "device",
    "dtype",
    "numel",
    "stride",
    "is_contiguous",
    "requires_grad",
    "len",
}


# Functions that only compute new tensors. On meta tensors many of them run Python code, for up to some milliseconds.
_COMPUTING = {
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "add", "avg_pool1d", "avg_pool2d", "batch_norm", "bmm", "cat",
    "clamp", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "div", "einsum",
    "exp", "gelu", "group_norm", "hardsigmoid", "hardswish", "hardtanh", "instance_norm", "interpolate", "layer_norm",
    "leaky_relu", "linear", "log_softmax", "lstm", "matmul", "max_pool2d", "mean", "mul", "neg", "norm", "normalize",
    "pow", "relu", "relu6", "rms_norm", "roll", "rsqrt", "scaled_dot_product_attention", "sigmoid", "silu", "softmax",
    "sqrt", "stack", "sub", "sum", "tanh", "var",
}  # fmt: skip

_PLAIN = frozenset({Tensor, nn.Parameter})


class _Results:
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

    def keep(self, key: Hashable | None, result: Any, args: Sequence[Any]) -> None:
        """Note what a call made, unless it gave back an argument or a part of one."""
        if key is not None and _is_new(result, [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]):
            self._layouts[key] = _layout(result)


def _call_key(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Hashable | None:
    """Equal for calls with results of equal layouts; None if that is not known of the function or its arguments."""
    if name not in _COMPUTING or torch.is_grad_enabled():
        return None
    try:
        return function, _layout(args), *((key, _layout(item)) for key, item in kwargs.items())
    except _UnusualError:
        return None


_LIKE_INPUT: Mapping[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    F.gelu: ("input",),
    F.hardsigmoid: ("input", "inplace"),
    F.hardswish: ("input", "inplace"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
}  # slow functions that many models call with ever other shapes, and the names of their first parameters


def _like_input(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a few functions make of an input whose elements are in order: a tensor like it.

    None if the function is another one, or if anything about the arguments is unusual or may be wrong.
    """
    if function not in _LIKE_INPUT:
        return None
    named = dict(zip(_LIKE_INPUT[function], args, strict=False)) | dict(kwargs)
    source = named.pop("input", None)
    if not isinstance(source, Tensor) or not source.is_floating_point():
        return None
    shape: tuple[int, ...] = ()  # of the other tensors
    if function is F.layer_norm:
        normalized = named["normalized_shape"]
        shape = tuple(normalized) if isinstance(normalized, (tuple, list)) else ()
        is_usual = len(shape) > 0 and shape == source.shape[-len(shape) :]
    elif function is F.batch_norm:  # with the mean and variance that it has kept, not with the batch's
        shape = source.shape[1:2]
        kept = (named.get("running_mean"), named.get("running_var"))
        is_usual = len(shape) > 0 and named.get("training") is False and all(isinstance(item, Tensor) for item in kept)
    else:
        is_usual = not named.get("inplace") and named.get("approximate", "none") in ("none", "tanh")
    others = [item for item in named.values() if isinstance(item, Tensor)]
    is_usual = is_usual and all(item.shape == shape and item.dtype == source.dtype for item in others)
    result = torch.empty(source.shape, dtype=source.dtype, device="meta")
    return result if is_usual and result.stride() == source.stride() else None


class _UnusualError(Exception):
    """An argument whose influence on a result is not known."""


def _layout(item: Any) -> Hashable:
    """What there is to know of meta tensors, alone or in lists and tuples, and of constants among them."""
    kind = type(item)
    if kind in _PLAIN:
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


class _Recorder(TorchFunctionMode):
    """Numbers every tensor that it sees and writes down every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._operations: list[Operation] = []
        self._current: dict[int, Value] = {}  # by id of the tensor
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._results = _Results()
        self._count = 0
        self._inputs: frozenset[int] = frozenset()
        self._parameters: dict[int, tuple[str, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            value = self._value(parameter)
            self._parameters[value.index] = (*self._parameters.get(value.index, ()), name)
            self._shapes[name] = value.shape

    def add_inputs(self, tree: Any) -> None:
        tensors = [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
        self._inputs = frozenset(self._value(tensor).index for tensor in tensors)

    def trace(self, output: Any) -> Trace:
        leaves = list(_tensors(output))
        return Trace(
            operations=tuple(self._operations),
            inputs=self._inputs,
            outputs=tuple(dict.fromkeys(self._value(leaf).index for leaf in leaves)),
            parameters=self._parameters,
            parameter_shapes=self._shapes,
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        # What is asked of plain tensors here need not pass the modes below (the device's).
        bare = torch._C.DisableTorchFunction if _PLAIN.issuperset(types) else nullcontext
        with bare():
            if name in _SILENT:
                return func(*args, **kwargs)
            inputs: list[Value] = []
            recorded_args = tuple(self._replace(item, inputs) for item in args)
            recorded_kwargs = {word: self._replace(item, inputs) for word, item in kwargs.items()}
            key = _call_key(name, func, args, kwargs)
            result = self._results.find(key, func, args, kwargs)
        is_called = result is None
        if is_called:
            result = func(*args, **kwargs)
        with bare():
            if is_called:
                self._results.keep(key, result, (*args, *kwargs.values()))
            changed = [args[0]] if name == "setitem" else list(_tensors(result))
            if changed:
                outputs = tuple(self._new_value(tensor) for tensor in self._with_bases(changed, args))
                self._operations.append(Operation(name, recorded_args, recorded_kwargs, tuple(inputs), outputs))
        return result

    @staticmethod
    def _with_bases(changed: list[Tensor], args: tuple[Any, ...]) -> list[Tensor]:
        """What changed, and the tensors that a view which was written into belongs to."""
        first = args[0] if args else None
        if isinstance(first, Tensor) and first._base is not None and any(first is tensor for tensor in changed):
            return [*changed, first._base]
        return changed

    def _replace(self, item: Any, inputs: list[Value]) -> Any:
        if isinstance(item, Tensor):
            value = self._value(item)
            inputs.append(value)
            return value
        if isinstance(item, (list, tuple)) and any(isinstance(entry, (Tensor, list, tuple)) for entry in item):
            return tuple(self._replace(entry, inputs) for entry in item)
        return item

    def _value(self, tensor: Tensor) -> Value:
        return self._current.get(id(tensor)) or self._new_value(tensor)

    def _new_value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._current:
            self._kept.append(tensor)
        value = Value(self._count, tuple(tensor.shape))
        self._count += 1
        self._current[id(tensor)] = value
        return value


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for entry in result.values():
            yield from _tensors(entry)
    elif isinstance(result, (list, tuple)):
        for entry in result:
            yield from _tensors(entry)


def _describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    shapes = ["x".join(str(size) for size in tensor.shape) for tensor in _tensors([*args, *kwargs.values()])]
    return ", ".join(shapes) or "nothing"


def _explain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failure: Exception | None) -> str:
    """Where and why a forward pass failed, found by running it once more with a note of the module in progress."""
    stack: list[str] = []
    failed = _FailedFunction()
    with _noted_modules(model, stack):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"), failed:
                model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the failure that is being explained
            failure = error
    place = stack[-1] if stack and stack[-1] else type(model).__name__
    operation = f" in {failed.name}" if failed.name else ""
    reason = str(failure).strip().splitlines()
    detail = reason[0] if reason else type(failure).__name__
    return (
        f"the forward pass of {type(model).__name__} on meta tensors (input {_describe(args, kwargs)}) failed "
        f"at module '{place}'{operation}: {detail}. If the input size is wrong, pass input_size=(channels, height, "
        "width); if forward takes something else than one image, pass example_input=; a forward that reads values "
        "of tensors (item(), tolist(), numpy()) has to avoid that in eval mode"
    )


class _FailedFunction(TorchFunctionMode):
    """Keeps the name of the call that raised first."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.name = self.name or operation_name(func)
            raise


@contextmanager
def _noted_modules(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules whose forward is running; `stack` stays as it was at a failure."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
