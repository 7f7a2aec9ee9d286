#!/usr/bin/env python3
"""Seconds and peak memory of predicting a network with a random GHN-2, and with random GHN-3 of published sizes.

    python benchmarks/speed/ghn3_cost.py [--ghn ghn2 ghn3-t] [--models resnet50 convnext_base]
    python benchmarks/speed/ghn3_cost.py --ghn3 GHN3 PPUDA          # beside the code of GHN-3's authors
    python benchmarks/speed/ghn3_cost.py --nodes 250 500 1000 2000 3000    # the encoder alone, on chains

GHN3 and PPUDA are checkouts of github.com/SamsungSAILMontreal/ghn3 and github.com/facebookresearch/ppuda. Models are
torchvision's, which ghn3 reads. Each case runs in a process of its own, on one thread. Memory is the peak of the
process beyond what it had before the GHN was made, so the weights of the GHN count. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

from tqdm import tqdm

SIZES = {"ghn2": None, "ghn3-t": (64, 3, 8), "ghn3-s": (128, 5, 16), "ghn3-l": (256, 12, 16), "ghn3-xl": (384, 24, 16)}


def random_ghn(make: Callable[[], Any]) -> Any:
    """A GHN with cheap random weights: torch's own draws take longer than a prediction for the largest."""
    import torch

    with contextlib.ExitStack() as stack:
        for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        ghn = make().eval()
    values = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for parameter in ghn.parameters():
        for part in parameter.data.view(-1).split(len(values)):
            part.copy_(values[: len(part)])
    return ghn


def ours(name: str, model: Any, nodes: int) -> tuple[int, float, Callable[[], Any], Any]:
    """Number of nodes, seconds of reading the graph, what predicts, and the GHN."""
    from timm_ghn.ghn import GHN, GHNConfig
    from timm_ghn.graph import Graph, Node, Op, to_graph

    size, start = SIZES[name], time.perf_counter()
    if model is None:
        edges = tuple((i, i + 1) for i in range(nodes - 1))
        graph = Graph((Node(Op.INPUT), *[Node(Op.CONV, (64, 64, 3, 3))] * (nodes - 1)), edges)
    else:
        graph = to_graph(model)
    seconds = time.perf_counter() - start
    config = GHNConfig()
    if size is not None:
        hid, layers, heads = size
        shape = (hid, hid, 16, 16)
        config = GHNConfig(shape, hypernet="graphormer", hid=hid, layers=layers, heads=heads, cut="centre")
    ghn = random_ghn(lambda: GHN(config))

    def predict() -> None:
        if model is None:
            ghn.embed_nodes(graph)
        else:
            for prediction in ghn.predict(graph):
                prediction.write_(model.get_parameter(prediction.target.name))

    return len(graph), seconds, predict, ghn


def theirs(name: str, model: Any, _: int) -> tuple[int, float, Callable[[], Any], Any]:
    """The same with the code of GHN-3's authors, which must be importable."""
    ghn3 = importlib.import_module("ghn3")
    hid, layers, heads = SIZES[name] or (32, 0, 0)
    start = time.perf_counter()
    graph = ghn3.Graph(model, ve_cutoff=50)
    seconds = time.perf_counter() - start
    rest = {"weight_norm": True, "ve": True, "layernorm": True, "pretrained": False}
    shape = (hid, hid, 16, 16)
    ghn = random_ghn(lambda: ghn3.GHN3(shape, 1000, hid, heads=heads, layers=layers, **rest))
    return graph.n_nodes, seconds, lambda: ghn(model, graphs=ghn3.GraphBatch([graph], dense=True)), ghn


def measure(code: str, name: str, model: str | None, nodes: int, paths: list[str], results: Any) -> None:
    """Put one line of the table into a queue."""
    import torch
    import torchvision

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # ghn3 is written for an older torch
    sys.path[:0] = paths
    network = None if model is None else torchvision.models.get_model(model).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        count, read, predict, ghn = (ours if code == "timm-ghn" else theirs)(name, network, nodes)
        start = time.perf_counter()
        predict()
    seconds = time.perf_counter() - start
    weights = sum(parameter.numel() for parameter in ghn.parameters()) * 4
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    results.put(
        f"{code:8s} {name:8s} {model or 'chain':16s} {count:5d} nodes  graph {read:6.2f} s  prediction {seconds:6.2f} s"
        f"  peak {peak / 1e9:5.2f} GB, of which {weights / 1e9:5.2f} GB weights"
    )


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ghn", nargs="+", choices=SIZES, default=["ghn2", "ghn3-t", "ghn3-xl"])
    parser.add_argument("--models", nargs="+", default=["resnet50", "convnext_base", "vit_b_16"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[])
    parser.add_argument("--ghn3", nargs="+", default=[], metavar="DIR", help="folders to import ghn3 and ppuda from")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a case is ended")
    args = parser.parse_args()
    networks = [(None, nodes) for nodes in args.nodes] or [(model, 0) for model in args.models]
    cases = [("timm-ghn", name, *network) for name in args.ghn for network in networks]
    if args.ghn3 and not args.nodes:
        cases += [("ghn3", name, *network) for name in args.ghn if SIZES[name] for network in networks]
    for case in tqdm(cases, unit="case"):
        context = multiprocessing.get_context("spawn")
        results: Any = context.SimpleQueue()
        process = context.Process(target=measure, args=(*case, args.ghn3, results))
        process.start()
        process.join(args.limit)
        if process.is_alive():
            process.kill()
            process.join()
            tqdm.write(f"{case[0]:8s} {case[1]:8s} {case[2] or 'chain':16s} ended after {args.limit:g} s")
        elif process.exitcode == 0:
            tqdm.write(results.get())


if __name__ == "__main__":
    main()
