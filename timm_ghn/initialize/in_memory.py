"""A model in memory: wrappers are looked through, and a sharded model goes its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from timm_ghn.initialize.model import initialize_
from timm_ghn.initialize.report import Report
from timm_ghn.initialize.sharded import initialize_sharded_
from timm_ghn.settings import Init, Source
from timm_ghn.trace.distributed import is_sharded, unwrapped
from timm_ghn.trace.inputs import check_model


def init_model(
    model: nn.Module,
    method: str | Mapping[str, Any] | Init = "ghn-orth",
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
    build: Callable[[], nn.Module] | None = None,
    **settings: Any,
) -> Report:
    """Initialize a model that is in memory, in place.

    Everything is checked before a weight is written: after an error the model is as it was. The cache is used as `Init`
    says, where settings are given by one (by default it is), and with the name of a method only if `cache=True` is
    given.

    Args:
        model: Any module, from timm or not. Its parameters may be DTensors (FSDP2, tensor parallelism); then all ranks
            have to call this with equal arguments. Of `DistributedDataParallel`, `DataParallel` and `torch.compile`,
            the model within is initialized. Parameters that are not predicted keep their values, and so do frozen ones
            (`requires_grad=False`) unless the settings say `frozen="init"`. Training mode, `requires_grad` and buffers
            stay as they are.
        method: A name of `METHODS`, such as "ghn-orth", "orth" or "lsuv", or `Init` with all settings.
        input_size: (channels, height, width) of one image, where the model does not say it itself; a number for the
            height and width of a square.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors (positional or keyword arguments
            of forward). "lsuv" measures on it.
        build: Builds the model once more, as `lambda: timm.create_model(name)` does, for models that were built on the
            meta device and got memory from `to_empty`: parameters that are not predicted and buffers get the values
            that they would have in `timm.create_model(name, init=...)`. The cache is not used then.
        **settings: Fields of `Init`: `ghn`, `noise`, `start_layer`, `seed`, ...

    Returns:
        What every parameter got; `timm_ghn.report_of(model)` finds it again.

    Raises:
        InitError: If a setting is wrong, or the model is on the meta device.
        CaptureError: If the forward pass cannot be recorded.
        GraphError: If the model has no layer that can be predicted.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
    """
    check_model(model)
    init = Init.of(method, **{**({"cache": False} if isinstance(method, str) else {}), **settings})
    model = unwrapped(model)
    if build is not None or is_sharded(model):
        return initialize_sharded_(model, init, build, input_size=input_size, example_input=example_input)
    if init.spec.source is Source.TIMM:
        init = replace(init, seed=None)  # nothing is drawn
    return initialize_(model, init, input_size=input_size, example_input=example_input)
