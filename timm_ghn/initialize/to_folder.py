"""Initialization straight into a folder, without ever holding the model: one tensor after another.

The model is built as always, but its large tensors are addresses without memory, and its random fills are put off.
Each parameter is then computed alone, written, and its memory given back. The files are those that `save` makes of
the model in memory, byte for byte.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_ghn.deferred import DeferredRandom, storage_id
from timm_ghn.errors import InitError
from timm_ghn.initialize.create import create
from timm_ghn.initialize.fill import fill_generated, fill_others
from timm_ghn.initialize.hypernetwork import find_hypernetwork
from timm_ghn.initialize.memory import LazyMemory
from timm_ghn.initialize.plan import make_plan, postprocess_settings
from timm_ghn.initialize.provenance import model_name, record_
from timm_ghn.initialize.report import Report
from timm_ghn.request import Request
from timm_ghn.settings import Init, Source
from timm_ghn.storage.folder import MAX_SHARD_SIZE, check_destination, model_folder, save
from timm_ghn.storage.header import TensorSpec, specs_of
from timm_ghn.storage.writer import WeightFiles

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
    folder = model_folder(model, specs, directory, model_args=_shaping(request, model), **options)
    with folder as files, closing(_Writer(model, files, memory)) as writer:
        queued = torch.get_num_threads()
        scaled = fill_generated(plan, deferred, writer.finished, queued=queued)
        fill_others(model, report, plan.processed, postprocess_settings(init), deferred, writer.finished, queued=queued)
        writer.write_buffers()
    return plan.report(report.model, scaled)


def _shaping(request: Request, model: nn.Module) -> dict[str, Any] | None:
    """Arguments that describe the model; None where timm remembers them, which older versions do not."""
    if hasattr(model, "_model_args"):
        return None
    return {key: value for key, value in request.arguments.items() if key not in ("dtype", "device")}


class _Writer:
    """Writes what has become final, under all its names, and gives its memory back.

    Args:
        model: The model.
        files: Where its tensors go.
        memory: What gives memory back.
    """

    def __init__(self, model: nn.Module, files: WeightFiles, memory: LazyMemory) -> None:
        self._files = files
        self._memory = memory
        self._parameters = dict(model.named_parameters())
        self._waiting = Counter(storage_id(parameter) for parameter in self._parameters.values())
        self._entries: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)  # by storage
        for name, tensor in model.state_dict().items():
            self._entries[storage_id(tensor)].append((name, tensor))
        size = sum(TensorSpec.of(tensor).num_bytes for entries in self._entries.values() for _, tensor in entries)
        self._bar = tqdm(desc="writing", total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=None)

    def finished(self, name: str, *_: object) -> None:
        """A parameter is final; it is written when all others in the same memory are, too."""
        storage = storage_id(self._parameters[name])
        self._waiting[storage] -= 1
        if self._waiting[storage] == 0:
            self._write(storage)
            self._memory.release(self._parameters[name])

    def write_buffers(self) -> None:
        """Write what belongs to no parameter."""
        for storage in self._entries.keys() - self._waiting.keys():
            self._write(storage)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _write(self, storage: int) -> None:
        for name, tensor in self._entries[storage]:
            self._files.write(name, tensor)
            self._bar.update(TensorSpec.of(tensor).num_bytes)
