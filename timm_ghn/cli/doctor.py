"""`timm-ghn doctor`: the state of this installation, for bug reports."""

from __future__ import annotations

import argparse
import json

HELP = "say what is installed, which GHNs are there, and whether cache and Hub can be used"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit status 1 if one of them is a problem."""
    from timm_ghn.diagnosis.doctor import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else diagnosis)
    return 1 if diagnosis.problems else 0
