"""`timm-ghn coverage`: what works for models of timm, how well, and how long it takes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from timm_ghn.errors import CommandError
from timm_ghn.text import table

if TYPE_CHECKING:
    from timm_ghn.diagnosis.coverage import Coverage

HELP = "try models of timm: graph, predicted share, activations, time"
_NONE = "-"
_COLUMNS = (
    "model", "parameters", "nodes", "edges", "predicted", "orthogonalized", "L", "graph s", "init s", "timm s",
    "activations",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="names of timm models, with * and ?")
    parser.add_argument("--json", action="store_true", help="print JSON, everything that was found out")
    parser.add_argument("--graph-only", action="store_true", help="leave the weights out: only graphs, without memory")
    parser.add_argument("--ghn", help="name, path or hf-hub:organization/name of a GHN")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--memory", type=float, default=8.0, metavar="GIB", help="GiB for weights (default: 8)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for a model (default: 600)")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Try the models, each in a process of its own, and print what was found out."""
    from tqdm import tqdm

    from timm_ghn.diagnosis.coverage import Settings, collect, select_names
    from timm_ghn.diagnosis.coverage.pool import Limits
    from timm_ghn.diagnosis.coverage.survey import Plan, skipped, survey

    if args.jobs < 1 or args.memory <= 0 or args.timeout <= 0:
        raise CommandError("--jobs, --memory and --timeout have to be positive")
    names = select_names(args.patterns)
    limits = Limits(args.jobs, int(args.memory * 2**30), args.timeout)
    plan = Plan(Settings(args.ghn or _default_ghn()), limits, graph_only=args.graph_only)
    steps = len(names) * (1 if args.graph_only else 2)
    entries = list(tqdm(survey(names, plan), "trying", steps, unit="step", leave=False, delay=2, disable=None))
    models = collect(entries, skipped(entries, plan))
    print(json.dumps([model.to_dict() for model in models], indent=2) if args.json else "\n".join(_lines(models)))
    return 0


def _default_ghn() -> str:
    """Name or path of the GHN that `init=` uses; found out once, not in every process."""
    from timm_ghn.ghn import default_ghn
    from timm_ghn.ghn.registry import BUNDLED, DEFAULT_VARIABLE

    chosen = os.environ.get(DEFAULT_VARIABLE)
    if chosen:
        return chosen
    info = default_ghn().info
    return BUNDLED if info is None else info.name


def _lines(models: Sequence[Coverage]) -> list[str]:
    lines = table(_COLUMNS, [_row(model) for model in models])
    notes = [f"{model.name}: {item.error} ({item.step}): {item.message}" for model in models for item in model.failures]
    notes += [f"{model.name}: graph only, {model.skipped}" for model in models if _is_too_large(model)]
    return [*lines, "", *notes] if notes else lines


def _is_too_large(model: Coverage) -> bool:
    return model.graph is not None and model.skipped.startswith("needs")


def _row(model: Coverage) -> tuple[str, ...]:
    graph, init = model.graph, model.init
    if graph is None:
        return model.name, *[_NONE] * (len(_COLUMNS) - 1)
    row = (
        model.name,
        f"{graph.parameters:,}",
        f"{graph.nodes:,}",
        f"{graph.edges:,}",
        f"{graph.predictable_share:.2%}",
        f"{graph.orthogonalized_share:.2%}",
        f"{graph.start_layer}/{graph.layers}",
        f"{graph.seconds.graph:.2f}",
    )
    if init is None:
        return *row, *[_NONE] * 3
    return *row, f"{init.seconds.total:.2f}", f"{init.seconds.timm:.2f}", _activations(model)


def _activations(model: Coverage) -> str:
    """Smallest and largest ratio to those with timm's own weights."""
    found = model.init.activations if model.init is not None else None
    if found is None:
        return _NONE
    if not found.finite:
        return "not finite"
    return _NONE if found.low is None or found.high is None else f"x {found.low.ratio:.2g} to {found.high.ratio:.2g}"
