"""Recording the operations of a model's forward pass, on the meta device: no weights allocated, none changed."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from timm_ghn.errors import CaptureError
from timm_ghn.trace.inputs import Call, check_model, possible_calls
from timm_ghn.trace.recorder import Recorder, tensors_in
from timm_ghn.trace.records import Trace
from timm_ghn.trace.skeleton import skeleton_of

_logger = logging.getLogger(__name__)


def capture(
    model: nn.Module,
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
) -> Trace:
    """Record the operations of a model's forward pass in evaluation mode, without touching the model.

    Args:
        model: Any module, on any device, of any dtype; it is not moved, run on data, or left in another mode. Its
            forward hooks run on a copy.
        input_size: (channels, height, width) of one input image, or the side of a square. Default: what a timm model
            says of itself, else 3 x 224 x 224.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors (positional or keyword
            arguments of forward). Only shapes and dtypes matter, but a forward may read the values of integers and
            booleans (positions and masks of patches).

    Raises:
        CaptureError: If the forward pass fails on meta tensors; the message names the operation and the module.
        InitError: If this is no model, or the size is none.
    """
    check_model(model)
    with torch.inference_mode(False):  # tensors of the inference mode do not count what is written into them
        skeleton, tensors = skeleton_of(model)
        calls = possible_calls(skeleton, input_size, example_input)
        message, failure = "", None
        for call in calls:
            recorder = Recorder(skeleton, tensors)
            try:
                with _uncompiled():
                    trace = recorder.run(skeleton, *call)
                    if not recorder.is_complete:
                        recorder = Recorder(skeleton, tensors, sees_kernels=True)
                        trace = recorder.run(skeleton, *call)
                    return trace
            except Exception as error:  # noqa: BLE001 - any model code may run here; it is re-raised with its place
                _logger.debug("forward pass with input %s failed: %s", _shapes(call), error)
                if failure is None:
                    message, failure = _explain(skeleton, recorder.call, call, error), error
        raise CaptureError(message) from failure


def failed_module(model: nn.Module, error: BaseException) -> str:
    """Name of the innermost module of a model that was running when an error was raised; "" for the model itself."""
    names = {id(module): name for name, module in model.named_modules()}
    running = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((names[module] for module in reversed(running) if module in names), "")


def _uncompiled() -> AbstractContextManager[object]:
    """Lets parts of a model that torch.compile wraps run as they are: they would be compiled for the recorder."""
    is_used = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # torch 2.6
    return torch.compiler.set_stance("force_eager") if is_used else nullcontext()


def _explain(model: nn.Module, operation: str, call: Call, failure: Exception) -> str:
    """Where and why a forward pass failed."""
    place = failed_module(model, failure) or type(model).__name__
    operation = f" in {operation}" if operation else ""
    detail = next(iter(str(failure).strip().splitlines()), type(failure).__name__).rstrip(".")
    advice = (
        "If the input size is wrong, pass input_size=(channels, height, width); if forward takes something else than "
        "one image, pass example_input=; a forward that reads values of tensors (item(), tolist(), numpy()) has to "
        "avoid that in eval mode"
    )
    if isinstance(getattr(model, "backbone", None), nn.Module):
        advice += "; of a model that detects objects, give the part that works without values: model.backbone"
    return (
        f"the forward pass of {type(model).__name__} on meta tensors (input {_shapes(call)}) failed at module "
        f"'{place}'{operation}: {detail}. {advice}"
    )


def _shapes(call: Call) -> str:
    args, kwargs = call
    shapes = ["x".join(str(size) for size in tensor.shape) for tensor in tensors_in([*args, *kwargs.values()])]
    return ", ".join(shapes) or "nothing"
