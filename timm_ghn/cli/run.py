"""`timm-ghn run`: run a script whose `timm.create_model` knows `init=`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from timm_ghn.cli.common import PROGRAM
from timm_ghn.errors import CommandError

_CHILDREN = Path(__file__).resolve().parent / "children"
"""Folder of the module that Python imports when the script, or a process that it starts, begins."""

HELP = "run a script whose timm.create_model knows init="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.usage = f"{PROGRAM} run [-h] (SCRIPT | -m MODULE) [ARGS ...]"
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as `python -m` does")
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Have Python run a script or module in the place of this program, or where there is no such thing, below it."""
    program = [args.script, *args.arguments] if args.module is None else ["-m", *args.module]
    if program in ([None], ["-m"]):
        raise CommandError("run needs a script, or -m and a module")
    folders = os.pathsep.join(filter(None, [str(_CHILDREN), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": folders, "TIMM_GHN_VERBOSITY": str(args.verbose)}
    if os.name == "posix":
        os.execve(sys.executable, [sys.executable, *program], environment)
    return subprocess.run([sys.executable, *program], env=environment).returncode
