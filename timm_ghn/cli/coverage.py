"""`timm-ghn coverage`: for which models of timm how much is predicted."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from timm_ghn.cli.common import FAILED, select_names
from timm_ghn.text import table

if TYPE_CHECKING:
    from timm_ghn.diagnosis.coverage import Coverage

HELP = "how much of each of these models of timm is predicted"
_COLUMNS = ("model", "parameters", "nodes", "predicted", "orthogonalized", "L", "mostly kept")


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

    from timm_ghn.diagnosis.coverage import coverage_of

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
