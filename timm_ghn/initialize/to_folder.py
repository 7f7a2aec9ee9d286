"""Initialization straight into a folder, without ever holding the model: one tensor after another.

The model is built as always, but its large tensors are addresses without memory, and its random fills are put off.
Each parameter is then computed alone, written, and its memory given back. The files are those that `save` makes of
the model in memory, byte for byte.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.initialize.create import create
from timm_ghn.initialize.hypernetwork import find_hypernetwork
from timm_ghn.initialize.memory import LazyMemory
from timm_ghn.initialize.plan import make_plan
from timm_ghn.initialize.provenance import model_name, record_
from timm_ghn.initialize.report import Report
from timm_ghn.initialize.stream import stream
from timm_ghn.request import Request
from timm_ghn.settings import Init, Source
from timm_ghn.storage.folder import MAX_SHARD_SIZE, check_destination, model_folder, save
from timm_ghn.storage.header import specs_of

_logger = logging.getLogger(__name__)


def init_to_folder(
    model_name: str,
    directory: str | os.PathLike[str],
    init: str | Mapping[str, Any] | Init = "ghn-orth",
    *,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **kwargs: Any,
) -> Report:
    """Write an initialized timm model into a folder with a memory peak of a few of its largest tensors.

        timm_ghn.init_to_folder("vit_7b_patch16_dinov3", "weights", dtype=torch.bfloat16)

    The values are those of `timm.create_model(model_name, init=init, **kwargs)`, bit for bit. Neither the cache nor
    any device but the CPU is used. "rand" and the baselines ("lsuv", ...) need memory for the whole model.

    Args:
        model_name: Name of a timm model; a tag may name the method.
        directory: Folder; created if need be.
        init: A method by name, or `Init` with all settings.
        overwrite: Whether a model that is there may be replaced.
        max_shard_size: Size, in bytes or as "5GB", beyond which weights are spread over several files in the format
            of the Hugging Face Hub, which plain timm does not load.
        **kwargs: Arguments of `timm.create_model`: `num_classes`, `img_size`, `dtype`, ...

    Returns:
        What every parameter got.

    Raises:
        InitError: If a setting is wrong, or the arguments ask for other weights.
        ExportError: If timm cannot rebuild the model from its description, or the folder cannot be written.
        CaptureError, GraphError, CheckpointError, UnknownGhnError, DownloadError: As `init_model`.
    """
    start = time.perf_counter()
    check_destination(directory, overwrite=overwrite)
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        raise InitError(f"device={kwargs['device']!r}: weights are written to files from the CPU; leave it out")
    request = Request.parse(model_name, init, **kwargs)
    if request is None or request.source is not None:
        raise InitError(f"init={init!r}: expected a method or settings, to compute weights that are written to files")
    request = replace(request, init=replace(request.init, seed=request.init.seed or 0, cache=False))
    write = partial(_streamed if request.init.spec.source in (Source.GHN, Source.GAUSSIAN) else _saved, request)
    report = write(directory, overwrite=overwrite, max_shard_size=max_shard_size)
    report = replace(report, seconds=time.perf_counter() - start)
    _logger.info("%s", report)
    return report


def _saved(request: Request, directory: str | os.PathLike[str], **options: Any) -> Report:
    """Write a model that is in memory: a baseline looks at it as a whole, timm draws its numbers in timm's order."""
    with torch.device("cpu"):
        model, report = create(request)
    save(model, directory, model_args=_shaping(request, model), **options)
    return report


def _streamed(request: Request, directory: str | os.PathLike[str], **options: Any) -> Report:
    """Write a model tensor after tensor."""
    init, memory = request.init, LazyMemory()
    deferred = DeferredRandom(init.seed or 0)
    with torch.device("cpu"), deferred, memory:
        model = request.build()
    plan = make_plan(model, init, find_hypernetwork(init), input_size=request.input_size(model), deferred=deferred)
    report = plan.report(model_name(model))
    record_(model, report)
    specs = specs_of(model.state_dict())
    with model_folder(model, specs, directory, model_args=_shaping(request, model), **options) as files:
        return stream(plan, model, deferred, memory, model.state_dict(), files.write)


def _shaping(request: Request, model: nn.Module) -> dict[str, Any] | None:
    """Arguments that describe the model; None where timm remembers them, which older versions do not."""
    if hasattr(model, "_model_args"):
        return None
    return {key: value for key, value in request.arguments.items() if key not in ("dtype", "device")}
