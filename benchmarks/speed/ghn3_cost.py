#!/usr/bin/env python3
"""Seconds and peak memory of predicting a network with a random GHN-2 and with random GHN-3 of published sizes.

    python benchmarks/speed/ghn3_cost.py [--ghn ghn2 ghn3-t] [--models resnet50 convnext_base]
    python benchmarks/speed/ghn3_cost.py --nodes 250 500 1000 2000 3000    # the encoder alone, on chains

Each case runs in a process of its own, on one thread. Memory is the peak of the process beyond what it had before the
GHN was made, so the weights of the GHN count. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

SIZES = {"ghn2": None, "ghn3-t": (64, 3, 8), "ghn3-s": (128, 5, 16), "ghn3-l": (256, 12, 16), "ghn3-xl": (384, 24, 16)}


def measure(name: str, model: str | None, nodes: int) -> None:
    """Print one line of the table."""
    import timm
    import torch

    from timm_ghn.ghn import GHN, GHNConfig
    from timm_ghn.graph import to_graph
    from timm_ghn.graph.graph import Graph, Node, Op

    torch.set_num_threads(1)
    if model is None:
        edges = tuple((i, i + 1) for i in range(nodes - 1))
        graph = Graph((Node(Op.INPUT), *[Node(Op.CONV, (64, 64, 3, 3))] * (nodes - 1)), edges)
    else:
        with torch.device("meta"):
            graph = to_graph(timm.create_model(model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = SIZES[name]
    ghn = GHN(GHNConfig() if size is None else GHNConfig.graphormer(*size)).eval()
    weights = sum(parameter.numel() for parameter in ghn.parameters()) * 4
    start = time.perf_counter()
    with torch.no_grad():
        ghn.embed_nodes(graph)
    encoded = time.perf_counter() - start
    if model is not None:
        for _ in ghn.predict(graph):
            pass
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{name:8s} {model or 'chain':24s} {len(graph):5d} nodes  encoder {encoded:6.2f} s  "
        f"prediction {seconds - encoded:6.2f} s  peak {peak / 1e9:5.2f} GB, of which {weights / 1e9:5.2f} GB weights",
        flush=True,
    )


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghn", nargs="+", choices=SIZES, default=["ghn2", "ghn3-t", "ghn3-xl"])
    parser.add_argument("--models", nargs="+", default=["resnet50", "convnext_base", "vit_base_patch16_224"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[])
    args = parser.parse_args()
    cases = [(None, nodes) for nodes in args.nodes] or [(model, 0) for model in args.models]
    for name in args.ghn:
        for model, nodes in cases:
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, model, nodes))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
