"""The `timm-ghn` command: a module for each of its commands, `common` for what they share.

What a command needs is imported when it runs, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from timm_ghn._version import __version__
from timm_ghn.cli import cache, compare, coverage, doctor, ghns, graph, init, push, run, train
from timm_ghn.cli.common import PROGRAM, exit_status, logging_to_stderr

_COMMANDS = {
    "init": init,
    "graph": graph,
    "coverage": coverage,
    "compare": compare,
    "ghns": ghns,
    "push": push,
    "cache": cache,
    "doctor": doctor,
    "train": train,
    "run": run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        Exit status: 0, 2 after an error, 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((item for item in arguments if not item.startswith("-")), None)
    args = make_parser(command).parse_args(arguments)

    def handle() -> int:  # `train` sets up logging itself
        with nullcontext() if args.command == "train" and not args.verbose else logging_to_stderr(args.verbose):
            handler: Callable[[argparse.Namespace], int] = args.handler
            return handler(args)

    return exit_status(PROGRAM, handle)


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of one: those of `train` take an import of torch."""
    parser = argparse.ArgumentParser(PROGRAM, description="Initialize timm models with weights that a GHN predicts.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more on stderr; twice for debugging")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        own = commands.add_parser(name, help=module.HELP)
        if name == command:
            module.add_arguments(own)
    return parser
