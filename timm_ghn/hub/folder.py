"""The files of a repository, made in a local folder: weights, config.json, description, card, picture."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import nn

from timm_ghn.drawing import save as save_picture
from timm_ghn.errors import PushError
from timm_ghn.graph import to_graph
from timm_ghn.hub.card import model_card
from timm_ghn.hub.manifest import FILE, WEIGHTS, FileRecord, Manifest, versions
from timm_ghn.initialize.stream import init_to_folder
from timm_ghn.request import input_size_of
from timm_ghn.settings import Init
from timm_ghn.storage.atomic import write_atomically
from timm_ghn.storage.paths import file_sha256
from timm_ghn.trace.meta import build_on_meta

_logger = logging.getLogger(__name__)

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

    def skeleton(self) -> nn.Module:
        """The model without memory."""
        arguments = {key: value for key, value in self.arguments.items() if key != "device"}
        model: nn.Module = build_on_meta(lambda: timm.create_model(self.name, **arguments))
        return model


def make_folder(
    request: Request, folder: Path, *, repository: str, license: str, max_shard_size: int | str
) -> Manifest:
    """Compute the weights and write the files of a repository.

    Args:
        request: What is asked for.
        folder: An empty folder.
        repository: "organization/name", for the card.
        license: SPDX name of the weights' licence.
        max_shard_size: Size above which weights are split.

    Raises:
        TimmGhnError: If the model cannot be initialized or written.
    """
    report = init_to_folder(
        request.name, folder, request.init, overwrite=True, max_shard_size=max_shard_size, **request.arguments
    )
    skeleton = request.skeleton()
    manifest = Manifest(
        architecture=report.model,
        arguments=request.plain_arguments,
        num_classes=int(getattr(skeleton, "num_classes", 0)),
        license=license,
        max_shard_size=str(max_shard_size),
        provenance=report.provenance,
        parameters=report.parameters,
        tensors=tensor_table(skeleton),
        versions=versions(),
        files={
            path.name: FileRecord(path.stat().st_size, file_sha256(path))
            for path in sorted(folder.iterdir())
            if WEIGHTS.fullmatch(path.name)
        },
    )
    picture = _draw(skeleton, request, folder)
    write_atomically(folder / FILE, manifest.to_json().encode())
    write_atomically(folder / CARD, model_card(manifest, repository, picture).encode())
    return manifest


def tensor_table(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of the state dict."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def first_difference(model: nn.Module, folder: Path) -> str | None:
    """Name of a tensor of a model that is not, bit for bit, the one in the files of weights; None if all are."""
    state = model.state_dict()
    for path in sorted(folder.iterdir()):
        if not WEIGHTS.fullmatch(path.name):
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                ours, written = state.pop(name, None), file.get_tensor(name)
                if ours is None or ours.dtype != written.dtype or not torch.equal(ours.cpu(), written):
                    return str(name)
    return next(iter(state), None)


def _draw(skeleton: nn.Module, request: Request, folder: Path) -> str | None:
    """Draw the graph that a GHN reads; PNG if there is matplotlib, since the Hub shows no SVG in every place."""
    name = PICTURES[0 if importlib.util.find_spec("matplotlib") else 1]
    try:
        size = input_size_of(skeleton, request.arguments)
        graph = to_graph(skeleton, input_size=size, reading=request.init.reading)
        save_picture(graph, folder / name, titles=request.name)
    except (ValueError, RuntimeError) as error:  # models that `orth` initializes without a graph
        _logger.info("no picture of %s: %s", request.name, error)
        return None
    return name
