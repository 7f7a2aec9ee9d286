"""Arguments, names of models, and errors that several commands share."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from timm_ghn.errors import CommandError, TimmGhnError
from timm_ghn.request import is_method
from timm_ghn.settings import METHODS
from timm_ghn.text import did_you_mean

PROGRAM = "timm-ghn"

FAILED, INTERRUPTED, NO_READER = 2, 130, 141

_logger = logging.getLogger(__name__)


def exit_status(program: str, command: Callable[[], int | None]) -> int:
    """Run a command; what a user can mend becomes one line on stderr.

    A request to end (SIGTERM, SIGHUP) raises SystemExit, so that temporary files are removed on the way out.

    Args:
        program: What the line begins with.
        command: Returns an exit status, or None for 0.

    Returns:
        The command's status, 2 after an error, 130 after an interruption, 141 if nobody reads what is printed.
    """
    try:
        with _terminable():
            status = command() or 0
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return NO_READER
    except (TimmGhnError, OSError) as error:
        _logger.debug("where it failed", exc_info=True)
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) raise SystemExit, where they would end the process at once."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    is_ours = threading.current_thread() is threading.main_thread()
    requests = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in requests if is_ours and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def add_model_kwargs(parser: argparse._ActionsContainer) -> None:
    """Declare --model-kwargs KEY=VALUE ..., whose values are Python literals or text."""
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model",
    )


def key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where the value is a Python literal or else text, as timm's scripts read it."""
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, literal(value)


def literal(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def add_init_settings(parser: argparse.ArgumentParser) -> None:
    """Declare the settings of an initialization other than its method, and how its weights are written."""
    parser.add_argument("--ghn", help="name, path or hf-hub:organization/name of a GHN")
    parser.add_argument("--noise", type=float, help="beta, the scale of the noise before orthogonalization")
    parser.add_argument(
        "--start-layer",
        type=literal,
        metavar="L",
        help="first layer to orthogonalize: its number from 1, a fraction of the depth, or the name of a module",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and of random weights (default: 0)")
    parser.add_argument(
        "--max-shard-size",
        default="50GB",
        metavar="SIZE",
        help="spread larger weights over several files, which plain timm does not load (default: 50GB)",
    )


def init_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the settings of `add_init_settings` that were given, as arguments of `Init`."""
    given = {name: getattr(args, name) for name in ("ghn", "noise", "start_layer", "seed")}
    return {name: value for name, value in given.items() if value is not None}


def select_names(patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of timm models that match one of the patterns, each once, in the order of the patterns.

    Args:
        patterns: Names, or patterns with `*`, `?` and `[...]`. None at all stands for every model.

    Raises:
        CommandError: If a pattern matches nothing; the message names close matches.
    """
    import timm

    known: list[str] = timm.list_models()
    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        matches = [pattern] if timm.is_model(pattern) else fnmatch.filter(known, pattern)
        if not matches:
            hint = did_you_mean(pattern.strip("*?"), known) or "; `*` stands for any letters, as in 'resnet*'"
            raise CommandError(f"timm has no model {pattern!r}{hint}")
        found.update(dict.fromkeys(matches))
    return tuple(found)


def check_name(name: str) -> None:
    """Raise an error that suggests other names if timm has no model of this one.

    Raises:
        CommandError: If timm has no model of this name, or the model has no such tag.
    """
    import timm

    if ":" in name:  # hf-hub:, local-dir:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise CommandError(f"unknown model {architecture!r}{did_you_mean(architecture, timm.list_models())}")
    if tag and not is_method(tag):
        try:
            timm.models.get_pretrained_cfg(name)
        except RuntimeError as error:
            known = [item.partition(".")[2] for item in timm.list_models(f"{architecture}.*", pretrained=True)]
            hint = did_you_mean(tag, [*known, *METHODS])
            raise CommandError(f"model {architecture} has no tag {tag!r}{hint}") from error


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what timm or torchvision raises while it builds a model into an error of a line."""
    try:
        yield
    except (TimmGhnError, MemoryError):
        raise
    except Exception as error:  # constructors of models raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(f"{name} cannot be created: {reason[0]} (-vv shows where)") from error


@contextmanager
def logging_to_stderr(verbosity: int) -> Iterator[None]:
    """Messages of this package on stderr: warnings, with -v what it does, with -vv all."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(levelname)s: %(message)s"))
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler.setLevel(level)
    logger = logging.getLogger("timm_ghn")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
