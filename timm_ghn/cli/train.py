"""`timm-ghn train`: train a GHN. Its arguments are those of `timm_ghn.training.cli`, which imports torch."""

from __future__ import annotations

import argparse

HELP = "train a GHN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    from timm_ghn.training.cli import add_train_arguments, run_train

    add_train_arguments(parser)
    parser.set_defaults(handler=run_train)
