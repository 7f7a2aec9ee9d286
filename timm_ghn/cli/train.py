"""`timm-ghn train`: train a GHN. Its arguments are those of `timm_ghn.training.cli`, which imports torch."""

from __future__ import annotations

import argparse

HELP = "train a GHN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the handler; `add_all_arguments` declares the arguments when they are wanted."""
    parser.set_defaults(handler=run)


def add_all_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, which takes an import of torch and of the training code."""
    from timm_ghn.training.cli import add_train_arguments

    add_train_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train."""
    from timm_ghn.training.cli import run_train

    return run_train(args)
