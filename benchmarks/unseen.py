#!/usr/bin/env python3
"""How far networks are from what a GHN was trained on, beside what it gains on them.

    python benchmarks/unseen.py --ghn run/ghn.safetensors --out results/panel [--quick]
    python benchmarks/unseen.py --ghn run/ghn.safetensors --families        # each family as if it were held out

Two measures for each model of the panel (`benchmarks/panel.py`, whose finished runs are read), or for one new network
of each family of training networks:

- unseen: share of the predicted tensors in surroundings that no training network had (`timm_ghn.ghn.seen`);
- distance: median over the nodes, of the distance between the GHN's embedding of a node and the nearest embedding of a
  node of the same operator in training networks, in units of the root mean square of the features.

Both are small where predictions are no guess. A measure is worth something if gains over `orth` fall as it rises: the
last line has the rank correlation of each with the gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from panel import LRS, PANEL, collect, gains, read
from torch import Tensor
from tqdm import tqdm

from timm_ghn.errors import TrainingError
from timm_ghn.ghn import GHN, load_ghn
from timm_ghn.ghn.seen import Seen
from timm_ghn.graph import Graph, Op, to_graph
from timm_ghn.trace.skeleton import build_on_meta
from timm_ghn.training.architectures import Architecture, Bounds, draw_architecture, training_architecture
from timm_ghn.training.config import TrainConfig

Embeddings = Mapping[Op, Tensor]


def graph_of(architecture: Architecture) -> Graph:
    """The graph of a network of training."""
    return to_graph(build_on_meta(lambda: architecture.build(100)), input_size=architecture.size)


@torch.no_grad()
def embeddings(ghn: GHN, graph: Graph) -> Embeddings:
    """Embeddings of the nodes of a graph, by operator."""
    rows, ops = ghn.embed_nodes(graph), [node.op for node in graph.nodes]
    return {op: rows[[index for index, other in enumerate(ops) if other is op]] for op in dict.fromkeys(ops)}


def distance(ghn: GHN, graph: Graph, known: Iterable[Embeddings]) -> float:
    """Median distance of a network's nodes to the nearest known one; infinite for an operator that is not known."""
    parts = list(known)
    nearest = []
    for op, rows in embeddings(ghn, graph).items():
        others = [part[op] for part in parts if op in part]
        far = torch.full((len(rows),), torch.inf)
        nearest.append(torch.cdist(rows, torch.cat(others)).amin(1) if others else far)
    return float(torch.cat(nearest).median()) / ghn.config.hid**0.5


def unseen(graph: Graph, seen: Seen) -> float:
    """Share of the predicted tensors in surroundings that were not seen."""
    return len(seen.unseen(graph)) / max(len(graph.targets), 1)


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(ranks)[0, 1]) if len(x) > 2 else float("nan")


def panel_gains(args: argparse.Namespace) -> dict[str, float]:
    """Mean gain of `ghn-orth` over `orth` by model, in points."""
    args.models, args.inits = list(PANEL), ("orth", "ghn-orth")
    args.lrs, args.epochs, args.seeds = ((1e-3,), 6, (0,)) if args.quick else (LRS, 12, (0, 1))
    cells = collect(args, args.label, read(args.out / "runs.jsonl"))
    return {model: statistics.fmean(values) for model, values in gains(cells, "ghn-orth", args.quick).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghn", required=True, help="a GHN that `timm-ghn train` exported")
    parser.add_argument("--out", type=Path, default=Path("results/panel"), help="folder of the panel's results")
    parser.add_argument("--label", default="", help="what runs from this GHN are kept under")
    parser.add_argument("--quick", action="store_true", help="the runs of panel.py --quick")
    parser.add_argument("--families", action="store_true", help="measure each family of training networks instead")
    parser.add_argument("--networks", type=int, default=300, help="training networks that are compared with")
    args = parser.parse_args()
    ghn = load_ghn(args.ghn)
    if ghn.info is None or "train_config" not in ghn.info.metadata:
        raise TrainingError(f"{args.ghn} does not say on which networks it was trained")
    config = TrainConfig.from_dict(json.loads(ghn.info.metadata["train_config"]))
    drawn = [training_architecture(config, index) for index in tqdm(range(args.networks), desc="training networks")]
    graphs = [graph_of(architecture) for architecture in tqdm(drawn, desc="their graphs")]
    embedded = [embeddings(ghn, graph) for graph in graphs]
    rows: list[tuple[str, float, float, float]] = []
    if args.families:
        for family in tqdm(sorted(config.families), desc="families"):
            rest = [index for index, architecture in enumerate(drawn) if architecture.family != family]
            graph = graph_of(draw_architecture("unseen", 0, {family: 1.0}, Bounds()))
            share = unseen(graph, Seen.of(graphs[index] for index in rest))
            far = distance(ghn, graph, [embedded[index] for index in rest])
            rows.append((family, float("nan"), share, far))
    else:
        seen = ghn.seen or Seen.of(graphs)
        for model, gain in tqdm(panel_gains(args).items(), desc="models"):
            model_on_meta = build_on_meta(lambda model=model: timm.create_model(model, **PANEL[model]))
            graph = to_graph(model_on_meta, input_size=32)
            rows.append((model, gain, unseen(graph, seen), distance(ghn, graph, embedded)))
    print(f"{'network':28s}{'gain':>8s}{'unseen':>10s}{'distance':>10s}")
    for name, gain, share, far in sorted(rows, key=lambda row: -row[2]):
        print(f"{name:28s}{gain:8.1f}{share:10.1%}{far:10.3f}")
    known_gains = [row[1] for row in rows]
    for measure, column in (("unseen", 2), ("distance", 3)):
        print(f"rank correlation of the gain with {measure}: "
              f"{rank_correlation(known_gains, [row[column] for row in rows]):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
