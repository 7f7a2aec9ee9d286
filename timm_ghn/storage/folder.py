"""Writing an initialized model into a folder that plain timm loads.

timm.create_model("local-dir:DIR", pretrained=True)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from timm_ghn.errors import ExportError
from timm_ghn.initialize.provenance import provenance
from timm_ghn.storage.atomic import staged, temporary_files
from timm_ghn.storage.header import TensorSpec, specs_of
from timm_ghn.storage.paths import closest_existing
from timm_ghn.storage.writer import INDEX_FILE, SINGLE_FILE, WeightFiles, split
from timm_ghn.text import format_size

CONFIG_FILE = "config.json"
MAX_SHARD_SIZE = "50GB"
"""Up to what the Hub recommends for a file the weights stay in one, which is all that plain timm loads."""
_SHARDS = "model-*-of-*.safetensors"


def check_destination(directory: str | os.PathLike[str], *, overwrite: bool = False, num_bytes: int = 0) -> None:
    """Find out whether a model could be written, without writing anything.

    Args:
        directory: Folder to write to; it need not exist.
        overwrite: Whether a model that is there may be replaced.
        num_bytes: Size of the weights.

    Raises:
        ExportError: If there is a model, the folder or its closest existing parent cannot be written, or the disk has
            not enough room.
    """
    directory = Path(directory)
    existing = [name for name in (SINGLE_FILE, INDEX_FILE, CONFIG_FILE) if (directory / name).exists()]
    if existing and not overwrite:
        raise ExportError(
            f"{directory} holds {' and '.join(existing)} already; choose another folder, or replace what is there "
            "(--force on the command line, overwrite=True in Python)"
        )
    place = closest_existing(directory)
    if not place.is_dir():
        raise ExportError(f"{directory} cannot be written: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ExportError(f"{directory} cannot be written: no permission to write to {place}")
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise ExportError(
            f"{directory} cannot be written: the weights take {format_size(num_bytes)}, and {format_size(free)} are "
            "free there; choose another disk, or a smaller dtype"
        )


def save(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> Path:
    """Write a timm model as model.safetensors and config.json.

    All files are complete under other names before they get their own, so a failure leaves none of them behind.
    A tensor that several names share (tied weights) is written once for each name, because plain timm asks for all
    of them; the loading model ties them again by itself.

    Args:
        model: A model from `timm.create_model`; its provenance, if there is one, goes into all files.
        directory: Folder; created if need be.
        **options: `overwrite`, `model_args` and `max_shard_size` of `model_folder`.

    Returns:
        The folder.

    Raises:
        ExportError: If this is not a timm model that can be rebuilt, has no memory, or the folder cannot be written.
        TensorFileError: If the model has a tensor of a type that safetensors does not hold.
    """
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ExportError(f"{name} is on the meta device: there is nothing to write")
    with model_folder(model, specs_of(tensors), directory, **options) as files:
        for name, tensor in tensors.items():
            files.write(name, tensor)
    return Path(directory)


@contextmanager
def model_folder(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    model_args: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Iterator[WeightFiles]:
    """A folder of a timm model whose tensors are written one after another, in any order.

    The files get their names when the context is left, if all tensors are there; after an error nothing remains.

    Args:
        model: The model, which describes itself; its values are not read.
        specs: What is going to be written, in the order of the state dict.
        directory: Folder; created if need be.
        overwrite: Whether a model that is there may be replaced.
        model_args: Arguments of `timm.create_model` that rebuild the model, for those that timm cannot write by
            itself, and for versions of timm that do not remember them.
        max_shard_size: Size, in bytes or as "5GB", beyond which weights are spread over several files in the format
            of the Hugging Face Hub. Plain timm loads a single file only; `huggingface_hub.load_torch_model` loads all.

    Yields:
        Where to write the tensors.

    Raises:
        ExportError: If the model cannot be rebuilt, or the folder cannot be written.
    """
    directory = Path(directory)
    check_destination(directory, overwrite=overwrite, num_bytes=sum(spec.num_bytes for spec in specs.values()))
    shards, facts = split(specs, max_shard_size), provenance(model)
    metadata = {"format": "pt", **({} if facts is None else {"timm_ghn": json.dumps(facts)})}
    try:
        with staged(directory) as place:
            for path in temporary_files(directory):
                path.unlink(missing_ok=True)
            _write_config(model, place(CONFIG_FILE), model_args)
            if shards.is_sharded:
                index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
                place(INDEX_FILE).write_text(json.dumps(index, indent=2))
            parts = shards.filename_to_tensors.items()
            files = WeightFiles({place(file): {n: specs[n] for n in names} for file, names in parts}, metadata)
            yield files
            files.check_complete()
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(f"{directory} cannot be written: {error.strerror or error}") from error
    kept = {*shards.filename_to_tensors, *([INDEX_FILE] if shards.is_sharded else [])}
    for path in (directory / SINGLE_FILE, directory / INDEX_FILE, *directory.glob(_SHARDS)):
        if path.name not in kept:  # of a model that was there before
            with suppress(OSError):
                path.unlink()


def _write_config(model: nn.Module, path: Path, model_args: Mapping[str, Any] | None) -> None:
    """Describe the model in timm's words.

    Raises:
        ExportError: If timm cannot.
        OSError: If the file cannot be written.
    """
    from timm.models._hub import save_config_for_hf

    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        raise ExportError(f"{type(model).__name__} is not a model of timm's registry, which is what can be written")
    try:
        # Some versions of timm say str and call path.open.
        save_config_for_hf(model, path, model_args=dict(model_args) if model_args else None)  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"timm cannot describe {config['architecture']} ({type(model).__name__}) so that it could be built again: "
            f"{error}"
        ) from error
