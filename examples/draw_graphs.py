"""Graphs of networks beside each other, as in figure 3 of arXiv 2207.10049: writes docs/graphs.svg and docs/graphs.png.

    python examples/draw_graphs.py [--out FILE ...] [MODEL ...]

The models are built on the meta device, so that even the largest takes no memory. PNG needs the extra `plot`.
"""

import argparse
from pathlib import Path

import timm
import torch

from timm_ghn import drawing
from timm_ghn.graph import Graph, to_graph

DOCS = Path(__file__).resolve().parent.parent / "docs"
TITLES = {"resnet50": "ResNet-50", "convnext_base": "ConvNeXt-Base"}


def graph_of(name: str) -> Graph:
    """Graph of a timm model."""
    with torch.device("meta"):
        return to_graph(timm.create_model(name))


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="timm models (default: resnet50 convnext_base)")
    parser.add_argument("--out", nargs="+", type=Path, default=[DOCS / "graphs.svg", DOCS / "graphs.png"])
    args = parser.parse_args()
    names = args.models or list(TITLES)
    graphs = [graph_of(name) for name in names]
    for name, graph in zip(names, graphs, strict=True):
        print(f"{name}: {graph}")
    for path in args.out:
        drawing.save(graphs, path, titles=[TITLES.get(name, name) for name in names])
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
