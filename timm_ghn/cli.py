"""The `timm-ghn` command. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ghn._version import __version__
from timm_ghn.errors import TimmGhnError

if TYPE_CHECKING:
    from torch import nn

    from timm_ghn.graph import Graph
    from timm_ghn.report import Report

_logger = logging.getLogger(__name__)

PROGRAM = "timm-ghn"
FAILED, INTERRUPTED = 2, 130
_TORCHVISION = "torchvision:"
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_METHODS = ("ghn-orth", "ghn", "orth", "rand")
_GRAPH_SUFFIXES = (".svg", ".png", ".json", ".txt")


class CommandError(TimmGhnError):
    """A command cannot do what was asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        Exit status: 0, 2 after an error, 130 after an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((item for item in arguments if not item.startswith("-")), None)
    args = make_parser(with_train=command == "train").parse_args(arguments)
    # A script that `run` runs fails as it would without us.
    expected = (CommandError,) if args.command == "run" else (TimmGhnError, OSError)
    own_logging = args.command in ("run", "train") and not args.verbose
    try:
        with nullcontext() if own_logging else _logging(args.verbose):
            handler: Callable[[argparse.Namespace], int] = args.handler
            return handler(args)
    except expected as error:
        _logger.debug("where it failed", exc_info=True)
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser(*, with_train: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        with_train: Whether `train` gets its arguments, which takes an import of torch and of the training code.
    """
    parser = argparse.ArgumentParser(PROGRAM, description="Initialize timm models with weights that a GHN predicts.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more on stderr; twice for debugging")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_init(commands.add_parser("init", help="create a model with predicted weights and write it for plain timm"))
    _add_graph(commands.add_parser("graph", help="show the graph that a GHN reads of a model"))
    ghns = commands.add_parser("ghns", help="list the GHNs that are known by name")
    ghns.set_defaults(handler=_ghns)
    train = commands.add_parser("train", help="train a GHN")
    train.set_defaults(handler=_train)
    if with_train:
        from timm_ghn.training.cli import add_train_arguments

        add_train_arguments(train)
    _add_run(commands.add_parser("run", help="run a script whose timm.create_model knows init="))
    return parser


# --- init -----------------------------------------------------------------------------------------------------------


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of a timm model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the weights and config.json")
    parser.add_argument("--method", metavar="METHOD", help=f"{', '.join(_METHODS)} (default: {_METHODS[0]})")
    parser.add_argument("--ghn", help="name, path or hf-hub:organization/name of a GHN")
    parser.add_argument("--noise", type=float, help="beta, the scale of the noise before orthogonalization")
    parser.add_argument(
        "--start-layer",
        type=_start_layer,
        metavar="L",
        help="first layer to orthogonalize: its number from 1, a fraction of the depth, or the name of a module",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and of random weights (default: 0)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes")
    parser.add_argument("--in-chans", type=int, metavar="N", help="channels of the images")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, of the images")
    _add_model_kwargs(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="type of the weights (default: float32)")
    parser.add_argument("--no-cache", action="store_true", help="do not look into the cache or write to it")
    parser.add_argument("--force", action="store_true", help="replace a model that is in DIR")
    parser.add_argument("--parameters", action="store_true", help="list every parameter")
    parser.set_defaults(handler=_init)


def _add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        type=_key_value,
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model",
    )


def _init(args: argparse.Namespace) -> int:
    from timm_ghn.export import check_destination, save
    from timm_ghn.methods import Init

    check_destination(args.out, overwrite=args.force)
    given = {"ghn": args.ghn, "noise": args.noise, "start_layer": args.start_layer}
    settings = {key: value for key, value in given.items() if value is not None}
    method = args.method or _method_tag(args.name) or _METHODS[0]
    init = Init(method, seed=args.seed, cache=not args.no_cache, **settings)
    kwargs = _model_kwargs(args)
    model, report = _create_initialized(args.name, init, kwargs, args.dtype)
    save(model, args.out, overwrite=args.force, model_args=None if hasattr(model, "_model_args") else kwargs)
    print(f"{args.name}: timm's own initialization" if report is None else report.table(parameters=args.parameters))
    print(f"\nWritten to {args.out}. To load it: timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0


def _model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `timm.create_model` that the weights' shapes depend on.

    Raises:
        CommandError: If they contradict each other or are none that a model can be written with.
    """
    size = args.img_size
    if size is not None and len(size) > 2:
        raise CommandError(f"--img-size takes a side, or height and width, not {len(size)} numbers")
    options = {
        "num_classes": args.num_classes,
        "in_chans": args.in_chans,
        "img_size": size if size is None else size[0] if len(size) == 1 else tuple(size),
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    given = dict(args.model_kwargs)
    for key in ("init", "pretrained", "checkpoint_path", *chosen):
        if key in given:
            hint = f"give --{key.replace('_', '-')} only" if key in chosen else "the weights are what `init` makes"
            raise CommandError(f"--model-kwargs {key}={given[key]}: {hint}")
    return {**given, **chosen}


def _create_initialized(
    name: str, init: Any, kwargs: Mapping[str, Any], dtype: str | None
) -> tuple[nn.Module, Report | None]:
    """The model, and the report of its initialization if there was one to make."""
    import timm
    import torch

    from timm_ghn.deferred import seeded
    from timm_ghn.hook import install, report_of

    _check_name(name)
    install()
    types = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    with _explained(name), seeded(init.seed):
        model = timm.create_model(name, init=init, **types, **kwargs)
    return model, report_of(model)


# --- graph ----------------------------------------------------------------------------------------------------------


def _add_graph(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"name of a timm model, or {_TORCHVISION}NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--nodes", action="store_true", help="also list every node")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"write it to a file ({', '.join(_GRAPH_SUFFIXES)})")
    parser.add_argument("--reading", choices=("default", "ppuda"), default="default", help="how the model is read")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="size of one image")
    _add_model_kwargs(parser)
    parser.set_defaults(handler=_graph)


def _graph(args: argparse.Namespace) -> int:
    from timm_ghn.graph import to_graph

    if args.out is not None and args.out.suffix.lower() not in _GRAPH_SUFFIXES:
        raise CommandError(f"--out {args.out}: the suffix has to be one of {', '.join(_GRAPH_SUFFIXES)}")
    model = _create_on_meta(args.name, dict(args.model_kwargs))
    graph = to_graph(model, input_size=args.input_size, reading=args.reading)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    summary = _summary(args.name, graph, sizes)
    if args.json:
        print(json.dumps({**summary, **({"graph": graph.to_dict()} if args.nodes else {})}, indent=2))
    else:
        print("\n".join(_summary_lines(summary, graph, sizes)))
        if args.nodes:
            print(f"\n{graph.to_text()}")
    if args.out is not None:
        _write_graph(graph, args.out, args.name)
    return 0


def _create_on_meta(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model without memory.

    Raises:
        CommandError: If there is none of that name, or it cannot be built from these arguments.
    """
    import torch

    if name.startswith(_TORCHVISION):
        from torchvision import models

        create: Callable[..., nn.Module] = models.get_model
        found = name.removeprefix(_TORCHVISION)
        if found not in (known := models.list_models()):
            raise CommandError(f"torchvision has no model {found!r}{_close_matches(found, known)}")
    else:
        import timm

        create, found = timm.create_model, name
        _check_name(name)
        if _method_tag(name):
            found = name.partition(".")[0]
    with _explained(name), torch.device("meta"):
        return create(found, **kwargs)


def _summary(name: str, graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What is said of a graph, JSON-compatible. Tied parameters count once."""
    predicted = sum(sizes.get(item, 0) for item in {target.name for target in graph.targets})
    return {
        "model": name,
        "parameters": sum(sizes.values()),
        "predicted_parameters": predicted,
        "nodes": len(graph),
        "edges": len(graph.edges),
        "max_distance": graph.max_distance,
        "distances": len(graph.distances),
        "distance_sum": int(graph.distances[:, 2].sum()),
        "operators": dict(graph.operators.most_common()),
        "unused": [{"name": item, "parameters": sizes.get(item, 0), "reason": why} for item, why in graph.unused],
        "digest": graph.digest,
    }


def _summary_lines(summary: Mapping[str, Any], graph: Graph, sizes: Mapping[str, int]) -> list[str]:
    total = max(summary["parameters"], 1)
    lines = [
        f"{summary['model']}: {summary['nodes']:,} nodes, {summary['edges']:,} edges; "
        f"{summary['distances']:,} distances up to {summary['max_distance']} hops, sum {summary['distance_sum']:,}",
        f"{summary['parameters']:,} parameters, {summary['predicted_parameters'] / total:.2%} can be predicted",
        "",
    ]
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        counts[node.op.value] += sum(sizes.get(target.name, 0) for target in node.targets)
    rows = [
        (op, f"{count:,}", f"{counts[op]:,}", f"{counts[op] / total:.2%}") for op, count in summary["operators"].items()
    ]
    lines += _table(("operator", "nodes", "parameters", "share"), rows)
    if summary["unused"]:
        tensors = Counter(item["reason"] for item in summary["unused"])
        counts = Counter()
        for item in summary["unused"]:
            counts[item["reason"]] += item["parameters"]
        rows = [(f"{tensors[why]:,}", f"{count:,}", f"{count / total:.2%}", why) for why, count in counts.most_common()]
        lines += ["", *_table(("tensors", "parameters", "share", "not predicted, because"), rows)]
    return lines


def _write_graph(graph: Graph, path: Path, title: str) -> None:
    from timm_ghn.graph import render
    from timm_ghn.paths import write_atomically

    try:
        if path.suffix.lower() in render.SUFFIXES:
            render.save(graph, path, titles=title)
        else:
            text = graph.to_json() if path.suffix.lower() == ".json" else graph.to_text()
            write_atomically(path, f"{text}\n".encode())
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error


# --- ghns, train ----------------------------------------------------------------------------------------------------


def _ghns(args: argparse.Namespace) -> int:
    from timm_ghn.ghn import list_ghns

    rows = [
        (row.name, "yes" if row.on_disk else "no", row.trained_on, row.description, row.path) for row in list_ghns()
    ]
    print("\n".join(_table(("name", "on disk", "trained on", "what it is", "path"), rows)))
    return 0


def _train(args: argparse.Namespace) -> int:
    from timm_ghn.training.cli import run_train

    return run_train(args)


# --- run ------------------------------------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{PROGRAM} run [-h] (SCRIPT | -m MODULE) [ARGS ...]"
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as `python -m` does")
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(handler=_run)


def _run(args: argparse.Namespace) -> int:
    """Run a script or module as python would; its exit status passes through as SystemExit."""
    import runpy

    from timm_ghn.hook import install

    install()
    if args.module is not None:
        if not args.module:
            raise CommandError("run -m needs the name of a module")
        name, *arguments = args.module
        with _as_program(str(Path.cwd()), [name, *arguments]):
            _check_module(name)
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0
    if args.script is None:
        raise CommandError("run needs a script, or -m and a module")
    script = Path(args.script)
    if not script.exists():
        raise CommandError(f"there is no script {args.script}")
    with _as_program(str(script.resolve().parent), [args.script, *args.arguments]):
        runpy.run_path(args.script, run_name="__main__")
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
    """`sys.argv` and `sys.path` as the program would find them."""
    before = sys.argv, list(sys.path)
    sys.argv = arguments
    if not getattr(sys.flags, "safe_path", False):
        sys.path[:1] = [folder]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


# --- arguments, names, output ---------------------------------------------------------------------------------------


def _key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, where the value is a Python literal or else text, as timm's scripts read it."""
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _start_layer(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _method_tag(name: str) -> str | None:
    """The method in a name like "resnet50.ghn-orth"."""
    tag = name.partition(".")[2].replace("_", "-").lower()
    return tag if ":" not in name and tag in _METHODS else None


def _check_name(name: str) -> None:
    """Raise an error that suggests other names if timm has no model of this one.

    Raises:
        CommandError: Likewise.
    """
    import timm

    if ":" in name:  # hf-hub:, local-dir:
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise CommandError(f"unknown model {architecture!r}{_close_matches(architecture, timm.list_models())}")
    if tag and not _method_tag(name):
        try:
            timm.models.get_pretrained_cfg(name)
        except RuntimeError as error:
            known = [item.partition(".")[2] for item in timm.list_models(f"{architecture}.*", pretrained=True)]
            hint = _close_matches(tag, [*known, *_METHODS])
            raise CommandError(f"model {architecture} has no tag {tag!r}{hint}") from error


def _close_matches(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what timm or torchvision raises while it builds a model into an error of a line."""
    try:
        yield
    except (TimmGhnError, MemoryError):
        raise
    except Exception as error:  # constructors of models raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommandError(f"{name} cannot be created: {reason[0]} (-vv shows where)") from error


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Aligned columns, numbers to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").removesuffix("%").isdigit()


@contextmanager
def _logging(verbosity: int) -> Iterator[None]:
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
