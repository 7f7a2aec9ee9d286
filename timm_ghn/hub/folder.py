"""The files of a repository, made in a local folder: weights, config.json, description, card, picture."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from timm_ghn.drawing import save as save_picture
from timm_ghn.errors import MissingDependencyError
from timm_ghn.graph import to_graph
from timm_ghn.hub.card import model_card
from timm_ghn.hub.client import FileRecord
from timm_ghn.hub.manifest import FILE, WEIGHTS, Manifest, dtype_of, versions
from timm_ghn.initialize.to_folder import init_to_folder
from timm_ghn.request import Request
from timm_ghn.storage.paths import file_sha256

_logger = logging.getLogger(__name__)

CARD = "README.md"
PICTURE = "graph.png"


def make_folder(request: Request, folder: Path, *, repository: str, license: str, max_shard_size: int | str) -> None:
    """Compute the weights and write the files of a repository.

    Args:
        request: The model and the settings.
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
        report=report,
        arguments=request.plain_arguments(),
        dtype=dtype_of(skeleton),
        num_classes=int(getattr(skeleton, "num_classes", 0)),
        license=license,
        max_shard_size=str(max_shard_size),
        versions=versions(),
        files={
            path.name: FileRecord(path.stat().st_size, file_sha256(path))
            for path in sorted(folder.iterdir())
            if WEIGHTS.fullmatch(path.name)
        },
    )
    picture = _draw(skeleton, request, folder)
    (folder / FILE).write_bytes(manifest.to_json().encode())
    (folder / CARD).write_bytes(model_card(manifest, repository, picture).encode())


def _draw(skeleton: nn.Module, request: Request, folder: Path) -> str | None:
    """Draw the graph that a GHN reads; None without matplotlib, or if the model has no graph (`orth` needs none)."""
    try:
        size = request.input_size(skeleton)
        graph = to_graph(skeleton, input_size=size, reading=request.init.reading)
        save_picture(graph, folder / PICTURE, titles=request.name)
    except (ValueError, RuntimeError, MissingDependencyError) as error:
        _logger.info("no picture of %s: %s", request.name, error)
        return None
    return PICTURE
