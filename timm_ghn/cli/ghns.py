"""`timm-ghn ghns`: list the GHNs that are known by name, and push one to the Hub."""

from __future__ import annotations

import argparse

from timm_ghn.cli.push import add_push_arguments, print_results, push_options
from timm_ghn.text import table

HELP = "list the GHNs that are known by name, or push one to the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handlers."""
    parser.set_defaults(handler=run)
    commands = parser.add_subparsers(dest="ghns_command", metavar="")
    push = commands.add_parser("push", help="push a GHN to the Hugging Face Hub")
    push.add_argument("ghn", metavar="NAME", help="name or path of a GHN")
    push.add_argument("repository", metavar="ORG/NAME", help="repository to push to; created if need be")
    push.add_argument("--license", help="licence of the GHN; needed for those that have no name")
    push.add_argument("--description", help="what it is, in a line")
    add_push_arguments(push)
    push.set_defaults(handler=run_push)


def run(args: argparse.Namespace) -> int:
    """Print a table of them."""
    from timm_ghn.ghn import list_ghns

    rows = [
        (row.name, "yes" if row.on_disk else "no", row.trained_on, row.description, row.path) for row in list_ghns()
    ]
    print("\n".join(table(("name", "on disk", "trained on", "what it is", "path"), rows)))
    return 0


def run_push(args: argparse.Namespace) -> int:
    """Push a GHN."""
    from timm_ghn.hub.ghns import push_ghn

    result = push_ghn(
        args.ghn, args.repository, options=push_options(args), license=args.license, description=args.description
    )
    print_results([result])
    return 0
