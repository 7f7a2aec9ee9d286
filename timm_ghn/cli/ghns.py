"""`timm-ghn ghns`: list the GHNs that are known by name."""

from __future__ import annotations

import argparse

from timm_ghn.cli.common import table

HELP = "list the GHNs that are known by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print a table of them."""
    from timm_ghn.ghn import list_ghns

    rows = [
        (row.name, "yes" if row.on_disk else "no", row.trained_on, row.description, row.path) for row in list_ghns()
    ]
    print("\n".join(table(("name", "on disk", "trained on", "what it is", "path"), rows)))
    return 0
