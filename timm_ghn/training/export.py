"""From a training run to a GHN file, with what training networks did not have: sizes, and surroundings of layers."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.errors import CheckpointError, TrainingError
from timm_ghn.ghn.checkpoint import read, write_safetensors
from timm_ghn.ghn.model import GHN
from timm_ghn.training.architectures import seen_in_training
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.optimizer import make_optimizer


def export_run(folder: Path, path: Path) -> None:
    """Write the GHN of a run's last checkpoint as safetensors, with unseen sizes filled in, and a table of what it saw.

    The table has what the GHN saw that the run began with, too.

    Args:
        folder: The run's folder.
        path: File to write.

    Raises:
        TrainingError: If the folder holds no run, or a damaged one.
    """
    try:
        latest = Checkpoint.read(folder)
        if latest is None:
            raise TrainingError("there is no checkpoint")
        ghn = read(folder / latest.average)
    except (OSError, CheckpointError, TrainingError) as error:
        raise TrainingError(f"{folder} holds no training run that can be exported: {error}") from error
    state = torch.load(folder / latest.optimizer, map_location="cpu", weights_only=True)
    fill_unseen_sizes(ghn, state["optimizer"])
    seen = seen_in_training(latest.config, latest.step)
    ghn.seen = seen if ghn.seen is None else ghn.seen | seen
    facts = {"step": str(latest.step), "train_config": json.dumps(latest.config.to_dict(), sort_keys=True)}
    write_safetensors(ghn, path, facts)


@torch.no_grad()
def fill_unseen_sizes(ghn: GHN, optimizer: Mapping[str, Any]) -> None:
    """Give sizes that no training network had the embedding between those of the nearest sizes that some network had.

    Args:
        ghn: Trained GHN; changed in place.
        optimizer: State of its optimizer: rows of sizes that no network had never had a gradient.
    """
    order = [parameter for group in make_optimizer(ghn).param_groups for parameter in group["params"]]
    places = {id(parameter): index for index, parameter in enumerate(order)}
    encoder = ghn.shape_enc
    classes = int((encoder.channels.known == ghn.config.num_classes).argmax())
    tables = [
        (encoder.embed_channel, encoder.channels.known.tolist(), classes),
        (encoder.embed_spatial, encoder.kernels.known.tolist(), None),
    ]
    # Of a Graphormer: numbers of neighbours, and distances.
    numbers = (module for module in ghn.gnn.modules() if isinstance(module, nn.Embedding))
    tables += [(table, range(table.num_embeddings), None) for table in numbers]
    for table, sizes, special in tables:
        state = optimizer["state"].get(places[id(table.weight)])
        if state is None:
            continue  # before the first update
        seen = state["exp_avg_sq"].any(1)
        _fill(table.weight, sizes, set(torch.nonzero(seen).flatten().tolist()), special)


def _fill(weight: Tensor, known: Sequence[int], seen: set[int], special: int | None) -> None:
    """Interpolate the rows of sizes that were not seen, linearly in the logarithm of the size plus 1."""
    anchors = sorted(row for row in seen if row < len(known) and row != special)
    place = [math.log(size + 1) for size in known]
    for row in set(range(len(known))) - seen if anchors else ():
        right = bisect(anchors, row)
        low, high = anchors[max(right - 1, 0)], anchors[min(right, len(anchors) - 1)]  # at an end, the same
        share = (place[row] - place[low]) / (place[high] - place[low]) if low != high else 0.0
        weight[row] = torch.lerp(weight[low], weight[high], share)
