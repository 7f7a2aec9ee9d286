"""How the cost of a graph grows with the number of its nodes, for deeper and deeper variants of timm's models.

    python benchmarks/speed/graph_cost.py --repeats 3 --out benchmarks/results/graph_cost.md

Each family is a class of timm with as many blocks as the wanted number of nodes takes. The steps are timed one by one:
the recorded forward pass, the condensation to the vocabulary, the distances of all pairs of nodes up to 50 hops, and
the GNN over them. `whole` is `timm_ghn.init_model` with ghn-orth and without the cache: those steps, decoding, writing
and post-processing. The networks are narrow ones. What the graph costs does not depend on the width of the layers, the
rest does, so that the share of distances and GNN is less in all wider networks.

The table holds medians of CPU time, so that it can be measured on a busy machine; the last lines fit a power of the
number of nodes to each column.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_ghn import Init, init_model
from timm_ghn.ghn import GHN, load_ghn
from timm_ghn.graph import capture, condense
from timm_ghn.storage.atomic import write_atomically

STEPS = ("capture", "condense", "distances", "gnn", "whole")
NODES = (250, 500, 1000, 2000, 3000)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Cost:
    """Seconds of each step for one model.

    Attributes:
        family: Kind of network.
        nodes: Nodes of the graph.
        edges: Edges without virtual ones.
        seconds: In the order of `STEPS`.
    """

    family: str
    nodes: int
    edges: int
    seconds: tuple[float, ...]

    @property
    def graph_share(self) -> float:
        """Share of distances and GNN in the whole initialization."""
        return (self.seconds[2] + self.seconds[3]) / self.seconds[4]


def resnet(factor: int) -> nn.Module:
    """Bottleneck ResNet with `factor` times the blocks of ResNet-50, of a fourth of the width inside the blocks."""
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [count * factor for count in (3, 4, 6, 3)], base_width=16)


def vit(factor: int) -> nn.Module:
    """ViT of `12 * factor` blocks, a third as wide as ViT-Ti."""
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", depth=12 * factor, embed_dim=64, num_heads=2)
    return model


def convnext(factor: int) -> nn.Module:
    """ConvNeXt with `factor` times the blocks of ConvNeXt-A, the narrowest."""
    model: nn.Module = timm.create_model("convnext_atto", depths=[count * factor for count in (2, 2, 6, 2)])
    return model


def densenet(factor: int) -> nn.Module:
    """DenseNet, where everything sees everything: edges grow with the square of a block's layers."""
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=tuple(count * factor for count in (3, 6, 12, 8)))


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "resnet": resnet,
    "vit": vit,
    "convnext": convnext,
    "densenet": densenet,
}


def timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    """What a call returns, and the CPU time that it took."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


@torch.no_grad()
def measure(family: str, nodes: int, ghn: GHN, name: str, repeats: int) -> Cost:
    """Medians over several runs for one model of about as many nodes."""
    build = FAMILIES[family]
    with torch.device("meta"):
        single, double = (len(condense(capture(build(factor)))) for factor in (1, 2))
    model = build(1 + max(0, round((nodes - single) / (double - single))))
    init = Init("ghn-orth", ghn=name, cache=False)
    rows: list[list[float]] = []
    for _ in range(repeats):
        trace, capturing = timed(lambda: capture(model))
        graph, condensing = timed(lambda trace=trace: condense(trace))  # type: ignore[misc]
        _, distances = timed(lambda graph=graph: graph.distance_matrix)  # type: ignore[misc]
        _, gnn = timed(lambda graph=graph: ghn.embed_nodes(graph))  # type: ignore[misc]
        _, whole = timed(lambda: init_model(model, init))
        rows.append([capturing, condensing, distances, gnn, whole])
    seconds = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    return Cost(family, len(graph), len(graph.edges), seconds)


def exponent(costs: list[Cost], step: int) -> float:
    """The power of the number of nodes that fits the seconds of a step best, by least squares of logarithms."""
    nodes = np.log([cost.nodes for cost in costs])
    return float(np.polyfit(nodes, np.log([max(cost.seconds[step], 1e-6) for cost in costs]), 1)[0])


def table(costs: list[Cost]) -> str:
    """Markdown."""
    lines = [
        f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads; milliseconds (CPU)",
        "",
        f"| family | nodes | edges | {' | '.join(STEPS)} | distances and GNN |",
        "|---|" + "---:|" * (len(STEPS) + 3),
    ]
    for cost in costs:
        cells = " | ".join(f"{1000 * value:.1f}" for value in cost.seconds)
        lines.append(f"| {cost.family} | {cost.nodes:,} | {cost.edges:,} | {cells} | {cost.graph_share:.0%} |")
    lines += ["", f"| exponent of the nodes | {' | '.join(STEPS)} |", "|---|" + "---:|" * len(STEPS)]
    for family in dict.fromkeys(cost.family for cost in costs):
        own = [cost for cost in costs if cost.family == family]
        if len(own) > 1:
            lines.append(f"| {family} | " + " | ".join(f"{exponent(own, i):.2f}" for i in range(len(STEPS))) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all families and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--nodes", nargs="+", type=int, default=list(NODES), help="wanted numbers of nodes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ghn", default="bundled")
    parser.add_argument("--out", type=Path, help="Markdown file; printed if not given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ghn = load_ghn(arguments.ghn)
    pairs = [(family, nodes) for family in arguments.families for nodes in arguments.nodes]
    costs = [measure(*pair, ghn, arguments.ghn, arguments.repeats) for pair in tqdm(pairs, disable=None)]
    text = table(costs)
    print(text)
    if arguments.out is not None:
        write_atomically(arguments.out, f"{text}\n".encode())


if __name__ == "__main__":
    main()
