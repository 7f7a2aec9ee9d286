"""`timm-ghn coverage`: for which models of timm how much is predicted."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass

from timm_ghn.cli.common import FAILED, select_names
from timm_ghn.text import table

HELP = "how much of each of these models of timm is predicted"
_COLUMNS = ("model", "parameters", "nodes", "predicted", "orthogonalized", "L", "mostly kept")


@dataclass(frozen=True)
class Coverage:
    """How much of a model is predicted.

    Attributes:
        name: Name of the model.
        parameters: Elements of all parameters, shared ones once.
        nodes: Nodes of the graph.
        predicted: Elements that a GHN of the model's number of classes predicts.
        orthogonalized: Elements of the layers from L on, without the classifier.
        start_layer: L, the first layer that is orthogonalized, counted from 1.
        layers: Number of convolutional and fully-connected layers.
        kept: Elements that are not predicted, by reason, the most first.
    """

    name: str
    parameters: int
    nodes: int
    predicted: int
    orthogonalized: int
    start_layer: int
    layers: int
    kept: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.description = (
        "Reads the graph of each model, without weights and without a GHN. Predicted: share of the parameters, for a "
        "GHN of the model's number of classes; any other GHN keeps the classifier."
    )
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="names of timm models, with * and ?")
    parser.add_argument("--json", action="store_true", help="print JSON, with all reasons why parameters are kept")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print a row for each model; what fails is named below, and makes the exit status 2."""
    from tqdm import tqdm

    found: list[Coverage] = []
    failures: dict[str, str] = {}
    for name in tqdm(select_names(args.patterns), unit="model", leave=False, delay=2, disable=None):
        try:
            found.append(coverage_of(name))
        except Exception as error:  # noqa: BLE001 - constructors and forward passes of models raise anything
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if args.json:
        print(json.dumps({"models": [asdict(model) for model in found], "failures": failures}, indent=2))
    else:
        print("\n".join(table(_COLUMNS, [_row(model) for model in found])))
        print("".join(f"{name} failed: {reason}\n" for name, reason in failures.items()), end="")
    return FAILED if failures else 0


def coverage_of(name: str) -> Coverage:
    """How much of a model of timm is predicted: the graph alone answers, without weights and without a GHN.

    Raises:
        CaptureError: If its forward pass cannot be recorded.
        GraphError: If it has no layer that can be predicted.
    """
    import timm

    from timm_ghn.graph import to_graph
    from timm_ghn.orthogonalization import resolve_start_layer, selected_layers, weight_layers
    from timm_ghn.trace.skeleton import build_on_meta

    model = build_on_meta(lambda: timm.create_model(name))
    graph = to_graph(model)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    layers = weight_layers(model)
    start_layer = resolve_start_layer(layers)
    kept: Counter[str] = Counter()
    for parameter, reason in graph.unused:
        kept[reason] += sizes.get(parameter, 0)
    targets = {target.name for target in graph.targets}
    return Coverage(
        name=name,
        parameters=sum(sizes.values()),
        nodes=len(graph),
        predicted=sum(size for parameter, size in sizes.items() if parameter in targets),
        orthogonalized=sum(sizes[layer.parameter] for layer in selected_layers(layers, start_layer)),
        start_layer=start_layer,
        layers=len(layers),
        kept=dict(kept.most_common()),
    )


def _row(model: Coverage) -> tuple[str, ...]:
    reason, size = next(iter(model.kept.items()), ("", 0))
    return (
        model.name,
        f"{model.parameters:,}",
        f"{model.nodes:,}",
        f"{model.predicted / max(model.parameters, 1):.2%}",
        f"{model.orthogonalized / max(model.parameters, 1):.2%}",
        f"{model.start_layer}/{model.layers}",
        f"{reason} ({size:,})" if reason else "-",
    )
