"""`timm-ghn graph`: show the graph that a GHN reads of a model."""

from __future__ import annotations

import argparse
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ghn.cli.common import add_model_kwargs, check_name, explained
from timm_ghn.errors import CommandError
from timm_ghn.request import split_method
from timm_ghn.text import did_you_mean, table

if TYPE_CHECKING:
    from torch import nn

    from timm_ghn.graph import Graph

HELP = "show the graph that a GHN reads of a model"
_TORCHVISION = "torchvision:"
_SUFFIXES = (".svg", ".png", ".pdf", ".json", ".txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.add_argument("name", metavar="NAME", help=f"name of a timm model, or {_TORCHVISION}NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--nodes", action="store_true", help="also list every node")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write it to a file ({', '.join(_SUFFIXES)})")
    parser.add_argument("--reading", choices=("default", "ppuda"), default="default", help="how the model is read")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="size of one image")
    add_model_kwargs(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the graph of a model, or write it to a file."""
    from timm_ghn.graph import to_graph

    if args.out is not None and args.out.suffix.lower() not in _SUFFIXES:
        raise CommandError(f"--out {args.out}: the suffix has to be one of {', '.join(_SUFFIXES)}")
    model = _create_on_meta(args.name, dict(args.model_kwargs))
    graph = to_graph(model, input_size=args.input_size, reading=args.reading)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    summary = _summary(args.name, graph, sizes)
    if args.json:
        print(json.dumps({**summary, **({"graph": graph.to_dict()} if args.nodes else {})}, indent=2))
    else:
        print("\n".join(_summary_lines(summary, graph, sizes)))
        if args.nodes:
            print(f"\n{graph.to_text()}")
    if args.out is not None:
        _write_graph(graph, args.out, args.name)
    return 0


def _create_on_meta(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model without memory.

    Raises:
        CommandError: If there is none of that name, or it cannot be built from these arguments.
    """
    from timm_ghn.trace.skeleton import build_on_meta

    if name.startswith(_TORCHVISION):
        from torchvision import models

        create: Callable[..., nn.Module] = models.get_model
        found = name.removeprefix(_TORCHVISION)
        if found not in (known := models.list_models()):
            raise CommandError(f"torchvision has no model {found!r}{did_you_mean(found, known)}")
        if "weights_backbone" in inspect.signature(models.get_model_builder(found)).parameters:
            kwargs = {"weights_backbone": None, **kwargs}  # else torchvision downloads them
    else:
        import timm

        check_name(name)
        create, (found, _) = timm.create_model, split_method(name)
    with explained(name):
        return build_on_meta(lambda: create(found, **kwargs))


def _summary(name: str, graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Numbers about a graph, JSON-compatible. Tied parameters count once."""
    predicted = sum(sizes.get(item, 0) for item in {target.name for target in graph.targets})
    return {
        "model": name,
        "parameters": sum(sizes.values()),
        "predicted_parameters": predicted,
        "nodes": len(graph),
        "edges": len(graph.edges),
        "max_distance": graph.max_distance,
        "distances": len(graph.distances),
        "distance_sum": int(graph.distances[:, 2].sum()),
        "operators": dict(graph.operators.most_common()),
        "unused": [{"name": item, "parameters": sizes.get(item, 0), "reason": why} for item, why in graph.unused],
        "digest": graph.digest,
    }


def _summary_lines(summary: Mapping[str, Any], graph: Graph, sizes: Mapping[str, int]) -> list[str]:
    total = max(summary["parameters"], 1)
    lines = [
        f"{summary['model']}: {summary['nodes']:,} nodes, {summary['edges']:,} edges; "
        f"{summary['distances']:,} distances up to {summary['max_distance']} hops, sum {summary['distance_sum']:,}",
        f"{summary['parameters']:,} parameters, {summary['predicted_parameters'] / total:.2%} can be predicted",
        "",
    ]
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        counts[node.op.value] += sum(sizes.get(target.name, 0) for target in node.targets)
    rows = [
        (op, f"{count:,}", f"{counts[op]:,}", f"{counts[op] / total:.2%}") for op, count in summary["operators"].items()
    ]
    lines += table(("operator", "nodes", "parameters", "share"), rows)
    if summary["unused"]:
        tensors = Counter(item["reason"] for item in summary["unused"])
        counts = Counter()
        for item in summary["unused"]:
            counts[item["reason"]] += item["parameters"]
        rows = [(f"{tensors[why]:,}", f"{count:,}", f"{count / total:.2%}", why) for why, count in counts.most_common()]
        lines += ["", *table(("tensors", "parameters", "share", "not predicted, because"), rows)]
    return lines


def _write_graph(graph: Graph, path: Path, title: str) -> None:
    from timm_ghn import drawing
    from timm_ghn.storage.atomic import write_atomically

    try:
        if path.suffix.lower() in drawing.SUFFIXES:
            drawing.save(graph, path, titles=title)
        else:
            text = graph.to_json() if path.suffix.lower() == ".json" else graph.to_text()
            write_atomically(path, f"{text}\n".encode())
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
