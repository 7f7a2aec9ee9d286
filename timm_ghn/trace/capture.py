"""Recording the operations of a model's forward pass, on the meta device: no weights allocated, none changed.

A `TorchFunctionMode` sees every model as a short list of semantic calls (conv2d, linear, layer_norm, add, ...).
What is recorded refers to tensors by number, so a `Trace` holds no tensor and can outlive the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from timm_ghn.errors import CaptureError
from timm_ghn.trace.memo import PLAIN, Results, call_key
from timm_ghn.trace.records import Operation, Trace, Value
from timm_ghn.trace.skeleton import skeleton_of

__all__ = ["DEFAULT_INPUT_SIZE", "Operation", "Trace", "Value", "capture", "input_sizes", "operation_name"]

_logger = logging.getLogger(__name__)

DEFAULT_INPUT_SIZE = (3, 224, 224)
"""(channels, height, width) of the input when neither the caller nor the model says otherwise."""


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
            arguments of forward). Only shapes and dtypes matter, but a forward may read the values of integers and
            booleans (positions and masks of patches).

    Raises:
        CaptureError: If the forward pass fails on meta tensors; the message names the operation and the module.
    """
    skeleton = skeleton_of(model)
    if example_input is not None:
        candidates = [_as_call(example_input), _as_call(example_input, keep_values=True)]
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


def _as_call(example: Any, *, keep_values: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of forward, on the meta device; integers with their values if those are kept."""

    def to_meta(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        is_kept = keep_values and not (leaf.is_floating_point() or leaf.is_complex() or leaf.is_meta)
        return leaf.detach().cpu() if is_kept else torch.empty_like(leaf, device="meta")

    example = tree_map(to_meta, example)
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example,), {}


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    recorder = _Recorder(model)
    recorder.add_inputs((args, kwargs))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"), _autocast_on_meta(), recorder:
        output = model(*args, **kwargs)
    return recorder.trace(output)


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Lets `torch.autocast(tensor.device.type)` pass, which torch refuses for the meta device; others see no change."""
    original = torch.autocast.__init__

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


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


class _Recorder(TorchFunctionMode):
    """Numbers every tensor that it sees and writes down every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._operations: list[Operation] = []
        self._current: dict[int, Value] = {}  # by id of the tensor
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._wholes: dict[int, Tensor] = {}  # what a view was taken from, by id of the view
        self._results = Results()
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
        bare = torch._C.DisableTorchFunction if PLAIN.issuperset(types) else nullcontext
        with bare():
            if name in _SILENT:
                return func(*args, **kwargs)
            inputs: list[Value] = []
            recorded_args = tuple(self._replace(item, inputs) for item in args)
            recorded_kwargs = {word: self._replace(item, inputs) for word, item in kwargs.items()}
            key = call_key(name, func, args, kwargs)
            result = self._results.find(key, func, args, kwargs)
        is_called = result is None
        if is_called:
            result = _call(func, args, kwargs)
        with bare():
            if is_called:
                self._results.keep(key, result, (*args, *kwargs.values()))
            changed = [args[0]] if name == "setitem" else list(_tensors(result))
            if changed:
                outputs = tuple(self._new_value(tensor) for tensor in self._with_wholes(changed, args, kwargs))
                self._operations.append(Operation(name, recorded_args, recorded_kwargs, tuple(inputs), outputs))
        return result

    def _with_wholes(self, changed: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """What changed, and the tensors that a view which was written into is a view of."""
        views = [tensor for tensor in changed if tensor._base is not None]
        if not views:
            return changed
        operands = list(_tensors([*args, *kwargs.values()]))
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
        return self._current.get(id(tensor)) or self._new_value(tensor)

    def _new_value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._current:
            self._kept.append(tensor)
        value = Value(self._count, tuple(tensor.shape))
        self._count += 1
        self._current[id(tensor)] = value
        return value


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function; one that refuses tensors with values beside those without gets none with values."""
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        if all(tensor.is_meta for tensor in _tensors([*args, *kwargs.values()])):
            raise
        args, kwargs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return function(*args, **kwargs)


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
