"""From a training run to a GHN file, and the size embeddings of sizes that no training architecture had."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from timm_ghn.errors import CheckpointError, TrainingError
from timm_ghn.ghn.checkpoint import read_safetensors, write_safetensors
from timm_ghn.ghn.model import GHN
from timm_ghn.graph.graph import Graph
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.pool import ArchitecturePool, PoolConfig


def export_run(folder: Path, path: Path) -> GHN:
    """Write the GHN of a run's last checkpoint as safetensors, its unseen sizes filled in.

    Args:
        folder: The run's folder.
        path: File to write.

    Returns:
        The GHN that was written.

    Raises:
        TrainingError: If the folder holds no run, or a damaged one.
    """
    try:
        latest = Checkpoint.read(folder)
        if latest is None:
            raise TrainingError("there is no checkpoint")
        ghn = read_safetensors(folder / latest.exported)
    except (OSError, CheckpointError, TrainingError) as error:
        raise TrainingError(f"{folder} holds no training run that can be exported: {error}") from error
    config = latest.config
    pool = ArchitecturePool.load(
        folder / "pool-train.jsonl.gz", PoolConfig(config.pool_size, config.seed, "train", config.sampler)
    )
    fill_unseen_sizes(ghn, [member.graph for member in pool])
    facts = {"step": str(latest.step), "train_config": json.dumps(config.to_dict(), sort_keys=True)}
    write_safetensors(ghn, path, facts)
    return ghn


@torch.no_grad()
def fill_unseen_sizes(ghn: GHN, graphs: Sequence[Graph]) -> int:
    """Give sizes that no graph has the embedding between those of the nearest sizes that some graph has.

    Args:
        ghn: Trained GHN; changed in place.
        graphs: Graphs that it was trained on.

    Returns:
        Number of rows that were filled in.
    """
    encoder = ghn.shape_enc
    channels, kernels = set(), set()
    for graph in graphs:
        for shape in {node.shape for node in graph.nodes if node.shape is not None}:
            out_channels, in_channels, height, width = encoder.indices(shape)
            channels |= {out_channels, in_channels}
            kernels |= {height, width}
    classes = int((encoder.channels.known == ghn.config.num_classes).argmax())
    return _fill(encoder.embed_channel.weight, encoder.channels.known.tolist(), channels, classes) + _fill(
        encoder.embed_spatial.weight, encoder.kernels.known.tolist(), kernels
    )


def _fill(weight: Tensor, known: list[int], seen: set[int], special: int | None = None) -> int:
    """Interpolate the rows of sizes that were not seen, linearly in the logarithm of the size."""
    anchors = sorted(row for row in seen if row < len(known) and row != special)
    if not anchors:
        return 0
    count = 0
    for row, size in enumerate(known):
        if row in seen:
            continue
        lower = [anchor for anchor in anchors if anchor < row]
        upper = [anchor for anchor in anchors if anchor > row]
        count += 1
        if not lower or not upper:
            weight[row] = weight[lower[-1] if lower else upper[0]]
            continue
        low, high = lower[-1], upper[0]
        share = math.log(size / known[low]) / math.log(known[high] / known[low])
        weight[row] = torch.lerp(weight[low], weight[high], share)
    return count
