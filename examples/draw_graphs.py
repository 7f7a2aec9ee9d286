"""Graphs of networks beside each other, as in figure 3 of arXiv 2207.10049.

    python examples/draw_graphs.py [--out FILE] [MODEL ...]

The models are built on the meta device, so that even the largest takes no memory. FILE ends in .svg, .png or .pdf;
give `--out` again for a second file. Needs the extra `plot`: pip install 'timm-ghn[plot]'.
"""

import argparse
from pathlib import Path

import timm
import torch

from timm_ghn import drawing
from timm_ghn.graph import Graph, to_graph

TITLES = {"resnet50": "ResNet-50", "convnext_base": "ConvNeXt-Base"}


def graph_of(name: str) -> Graph:
    """Graph of a timm model."""
    with torch.device("meta"):
        return to_graph(timm.create_model(name))


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="timm models (default: resnet50 convnext_base)")
    parser.add_argument("--out", action="append", type=Path, metavar="FILE", help="default: graphs.svg")
    args = parser.parse_args()
    names = args.models or list(TITLES)
    graphs = [graph_of(name) for name in names]
    for name, graph in zip(names, graphs, strict=True):
        print(f"{name}: {graph}")
    for path in args.out or [Path("graphs.svg")]:
        drawing.save(graphs, path, titles=[TITLES.get(name, name) for name in names])
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
