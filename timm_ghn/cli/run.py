"""`timm-ghn run`: run a script whose `timm.create_model` knows `init=`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm_ghn.cli.common import PROGRAM
from timm_ghn.errors import CommandError

_CHILDREN = Path(__file__).resolve().parent / "children"
"""Folder of the module that Python imports when a child of the script starts."""

HELP = "run a script whose timm.create_model knows init="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.usage = f"{PROGRAM} run [-h] (SCRIPT | -m MODULE) [ARGS ...]"
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as `python -m` does")
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(handler=run)


def prepare(args: argparse.Namespace) -> None:
    """Check that there is something to run.

    Raises:
        CommandError: If there is no such script or module.
    """
    if args.module is not None:
        if not args.module:
            raise CommandError("run -m needs the name of a module")
        with _as_program(str(Path.cwd()), args.module):
            _check_module(args.module[0])
    elif args.script is None:
        raise CommandError("run needs a script, or -m and a module")
    elif not Path(args.script).exists():
        raise CommandError(f"there is no script {args.script}")
    elif Path(args.script).is_dir() and not Path(args.script, "__main__.py").exists():
        raise CommandError(f"{args.script} is a folder without __main__.py; give the script to run")


def run(args: argparse.Namespace) -> int:
    """Run a script or module as python would; its exit status passes through as SystemExit."""
    import runpy

    from timm_ghn.hook import install

    install()
    if args.module is not None:
        name, *arguments = args.module
        with _as_program(str(Path.cwd()), [name, *arguments]):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0
    script = Path(args.script)
    with _as_program(str(script.resolve().parent), [args.script, *args.arguments]):
        runpy.run_path(str(script.absolute()), run_name="__main__")
    return 0


def _check_module(name: str) -> None:
    import importlib.util

    try:
        found = importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        raise CommandError(f"there is no module named {name}")


@contextmanager
def _as_program(folder: str, arguments: list[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as the program would find them; processes that it starts know `init=` as well."""
    before = sys.argv, list(sys.path)
    paths = os.environ.get("PYTHONPATH")
    sys.argv = arguments
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_CHILDREN), *([paths] if paths else [])])
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [folder]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if paths is None else {"PYTHONPATH": paths})
