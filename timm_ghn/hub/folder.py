"""The files of a repository, made in a local folder: weights, config.json, description, card, picture."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from timm_ghn.deferred import seeded
from timm_ghn.errors import PushError
from timm_ghn.export import WEIGHTS_FILE, save
from timm_ghn.graph import to_graph
from timm_ghn.graph.render import save as save_picture
from timm_ghn.header import sort_metadata
from timm_ghn.hook import install, is_installed, report_of, uninstall
from timm_ghn.hub.card import model_card
from timm_ghn.hub.client import file_sha256
from timm_ghn.hub.manifest import FILE, WEIGHTS, FileRecord, Manifest, versions
from timm_ghn.methods import Init
from timm_ghn.paths import write_atomically
from timm_ghn.report import Report

_logger = logging.getLogger(__name__)

INDEX = f"{WEIGHTS_FILE}.index.json"
CARD = "README.md"
PICTURES = ("graph.png", "graph.svg")
_PLACEMENT = ("device", "dtype")


@dataclass(frozen=True)
class Request:
    """A model to be initialized.

    Attributes:
        name: timm's name.
        init: Settings.
        arguments: Arguments of `timm.create_model`; `dtype` is that of the weights.
    """

    name: str
    init: Init
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain_arguments(self) -> dict[str, Any]:
        """What the model is built from, JSON-compatible, without type and device.

        Raises:
            PushError: If an argument is not plain data, and so nobody else could build the model.
        """
        given = {key: value for key, value in self.arguments.items() if key not in _PLACEMENT and value is not None}
        try:
            plain: dict[str, Any] = json.loads(json.dumps(given, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise PushError(f"{self.name}: an argument of the model is not plain data: {error}") from error
        return plain

    def create(self) -> tuple[nn.Module, Report]:
        """The model, initialized anew, and the report.

        Raises:
            PushError: If it was not initialized by this package.
            TimmGhnError: If it cannot be.
        """
        was_installed = is_installed()
        install()
        try:
            with seeded(self.init.seed):
                model = timm.create_model(self.name, init=self.init, **self.arguments)
        finally:
            if not was_installed:
                uninstall()
        report = report_of(model)
        if report is None:
            raise PushError(f"{self.name}: {self.init.method!r} is timm's own initialization; there is nothing to push")
        return model, report

    def skeleton(self) -> nn.Module:
        """The model without memory."""
        arguments = {key: value for key, value in self.arguments.items() if key != "device"}
        with torch.device("meta"):
            model: nn.Module = timm.create_model(self.name, **arguments)
        return model


def make_folder(
    request: Request, model: nn.Module, report: Report, folder: Path, *, repository: str, license: str, shard_bytes: int
) -> Manifest:
    """Write the files of a repository.

    Args:
        request: What was asked for.
        model: The initialized model.
        report: What every parameter got.
        folder: An empty folder.
        repository: "organization/name", for the card.
        license: SPDX name of the weights' licence.
        shard_bytes: Size above which weights are split.

    Raises:
        ExportError: If the model cannot be written.
    """
    save(model, folder, model_args=None if hasattr(model, "_model_args") else request.plain_arguments)
    if (folder / WEIGHTS_FILE).is_file():
        split(folder, shard_bytes)
    manifest = Manifest(
        architecture=report.model,
        arguments=request.plain_arguments,
        num_classes=int(getattr(model, "num_classes", 0)),
        license=license,
        provenance=report.provenance,
        parameters=report.parameters,
        tensors=tensor_table(model),
        versions=versions(),
        files={
            path.name: FileRecord(path.stat().st_size, file_sha256(path))
            for path in sorted(folder.iterdir())
            if WEIGHTS.fullmatch(path.name)
        },
    )
    picture = _draw(model, request, folder)
    write_atomically(folder / FILE, manifest.to_json().encode())
    write_atomically(folder / CARD, model_card(manifest, repository, picture).encode())
    return manifest


def tensor_table(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of the state dict."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def _draw(model: nn.Module, request: Request, folder: Path) -> str | None:
    """Draw the graph that a GHN reads; PNG if there is matplotlib, since the Hub shows no SVG in every place."""
    name = PICTURES[0 if importlib.util.find_spec("matplotlib") else 1]
    size = request.arguments.get("img_size")
    pixels = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
    channels = request.arguments.get("in_chans") or 3
    try:
        graph = to_graph(model, input_size=pixels and (channels, *pixels), reading=request.init.reading)
        save_picture(graph, folder / name, titles=request.name)
    except (ValueError, RuntimeError) as error:  # models that `orth` initializes without a graph
        _logger.info("no picture of %s: %s", request.name, error)
        return None
    return name


def split(folder: Path, shard_bytes: int) -> None:
    """Split a large model.safetensors into files of at most so many bytes (a larger tensor has a file of its own)."""
    whole = folder / WEIGHTS_FILE
    if whole.stat().st_size <= shard_bytes:
        return
    with safe_open(whole, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        names = list(file.keys())
        with torch.device("meta"):
            shapes = {name: file.get_slice(name) for name in names}
            skeleton = {
                name: torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()]) for name, part in shapes.items()
            }
        plan = split_torch_state_dict_into_shards(skeleton, max_shard_size=shard_bytes)
        for shard, members in plan.filename_to_tensors.items():
            save_file({name: file.get_tensor(name) for name in members}, folder / shard, metadata)
            sort_metadata(folder / shard)
    index = {"metadata": {"total_size": plan.metadata["total_size"]}, "weight_map": plan.tensor_to_filename}
    write_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
    os.unlink(whole)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
