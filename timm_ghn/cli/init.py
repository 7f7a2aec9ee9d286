"""`timm-ghn init`: create a model with predicted weights and write it for plain timm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from timm_ghn.cli.common import add_init_settings, add_model_kwargs, check_name, explained, init_settings
from timm_ghn.errors import CommandError
from timm_ghn.request import split_method
from timm_ghn.settings import METHODS, Init

HELP = "create a model with predicted weights and write it for plain timm"
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.add_argument("name", metavar="NAME", help="name of a timm model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the weights and config.json")
    parser.add_argument("--method", metavar="METHOD", help=f"{', '.join(METHODS)} (default: {Init.method})")
    add_init_settings(parser)
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes")
    parser.add_argument("--in-chans", type=int, metavar="N", help="channels of the images")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side, or height and width, of the images")
    add_model_kwargs(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="type of the weights (default: float32)")
    parser.add_argument("--force", action="store_true", help="replace a model that is in DIR")
    parser.add_argument("--parameters", action="store_true", help="list every parameter")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Create the model and write it."""
    import torch

    from timm_ghn.initialize.to_folder import init_to_folder

    _, tag = split_method(args.name)
    init = Init(args.method or tag or Init.method, **init_settings(args))
    types = {} if args.dtype is None else {"dtype": getattr(torch, args.dtype)}
    kwargs = {**_model_kwargs(args), **types, "overwrite": args.force, "max_shard_size": args.max_shard_size}
    check_name(args.name)
    with explained(args.name):
        report = init_to_folder(args.name, args.out, init, **kwargs)
    print(report.table(parameters=args.parameters))
    print(f"\nWritten to {args.out}. {_how_to_load(args.out)}")
    return 0


def _how_to_load(directory: Path) -> str:
    """The call that loads what was written: timm's own reads a single file."""
    from timm_ghn.storage.writer import SINGLE_FILE

    if (directory / SINGLE_FILE).is_file():
        return f"To load it: timm.create_model('local-dir:{directory}', pretrained=True)"
    return (
        f"timm alone does not read several files. To load them: model = timm.create_model('local-dir:{directory}'); "
        f"huggingface_hub.load_torch_model(model, '{directory}', strict=True)"
    )


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
