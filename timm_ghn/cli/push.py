"""`timm-ghn push`: initialize models and push them to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING

from timm_ghn.cli.common import add_init_settings, init_settings, select_names
from timm_ghn.settings import METHODS, Init, Source
from timm_ghn.text import table

if TYPE_CHECKING:
    from timm_ghn.hub.push import Pushed, PushOptions

HELP = "initialize models and push them to the Hugging Face Hub"
_PUSHED = [name for name, method in METHODS.items() if method.source in (Source.GHN, Source.GAUSSIAN)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="names of timm models, or patterns: 'convnext*'")
    parser.add_argument(
        "--org", required=True, metavar="ORG", help="organization or user; repositories are ORG/NAME.METHOD"
    )
    parser.add_argument("--method", choices=_PUSHED, default=Init.method, help=f"(default: {Init.method})")
    add_init_settings(parser)
    add_push_arguments(parser)
    parser.add_argument("--license", default="apache-2.0", help="licence of the weights (default: apache-2.0)")
    parser.set_defaults(handler=run)


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how something is pushed."""
    parser.add_argument("--private", action="store_true", default=None, help="make new repositories private")
    parser.add_argument("--create-pr", action="store_true", help="open pull requests instead of pushing")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; created if need be")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, whoever made it")
    parser.add_argument("--dry-run", action="store_true", help="say what would be pushed, and do nothing")


def run(args: argparse.Namespace) -> int:
    """Push the models and print a table of what became of them."""
    from timm_ghn.ghn import load_ghn
    from timm_ghn.hub.push import Outcome, push_all

    names = select_names(args.patterns)
    settings = init_settings(args)
    if "ghn" in settings:
        settings["ghn"] = load_ghn(settings["ghn"])
    results = list(push_all(names, args.org, init=Init(args.method, **settings), options=push_options(args)))
    print_results(results)
    return 1 if any(result.outcome is Outcome.FAILED for result in results) else 0


def push_options(args: argparse.Namespace) -> PushOptions:
    """The options of a push among the arguments; those that are not given have their defaults."""
    from timm_ghn.hub.push import PushOptions

    known = {entry.name for entry in fields(PushOptions)}
    return PushOptions(**{key: value for key, value in vars(args).items() if key in known and value is not None})


def print_results(results: list[Pushed]) -> None:
    """Print a line for each result, and how many there are of each kind."""
    rows = [(found.name, found.outcome.value, found.repository, found.url or found.detail) for found in results]
    print("\n".join(table(("model", "outcome", "repository", "what"), rows)))
    outcomes = [found.outcome.value for found in results]
    print("\n" + ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)))
