"""Writing an initialized model into a folder that plain timm loads.

timm.create_model("local-dir:DIR", pretrained=True)
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_ghn.errors import TimmGhnError
from timm_ghn.provenance import provenance

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class ExportError(TimmGhnError, OSError):
    """A model cannot be written in timm's form, or the folder cannot be written."""


def check_destination(directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Find out whether a model could be written, without writing anything.

    Args:
        directory: Folder to write to; it need not exist.
        overwrite: Whether a model that is there may be replaced.

    Raises:
        ExportError: If there is a model, or the folder or its closest existing parent cannot be written.
    """
    directory = Path(directory)
    existing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (directory / name).exists()]
    if existing and not overwrite:
        raise ExportError(f"{directory} holds {' and '.join(existing)} already; choose another folder, or overwrite it")
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ExportError(f"{directory} cannot be written: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ExportError(f"{directory} cannot be written: no permission to write to {place}")


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> Path:
    """Write a timm model as model.safetensors and config.json.

    Both files are complete under other names before they get their own, so a failure leaves none of them behind.
    A tensor that several names share (tied weights) is written once for each name, because plain timm asks for all
    of them; the loading model ties them again by itself.

    Args:
        model: A model from `timm.create_model`; its provenance, if there is one, goes into both files.
        directory: Folder; created if need be.
        overwrite: Whether a model that is there may be replaced.
        model_args: Arguments of `timm.create_model` that rebuild the model, for those that timm cannot write by
            itself, and for versions of timm that do not remember them.

    Returns:
        The folder.

    Raises:
        ExportError: If this is not a timm model that can be rebuilt, has no memory, or the folder cannot be written.
    """
    directory = Path(directory)
    check_destination(directory, overwrite=overwrite)
    tensors = _tensors(model)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    mark = f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporary = {name: directory / f".{name}{mark}" for name in (CONFIG_FILE, WEIGHTS_FILE)}
    placed: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_config(model, temporary[CONFIG_FILE], model_args)
        save_file(tensors, temporary[WEIGHTS_FILE], _metadata(model))
        # safetensors makes files that only their owner can read; config.json has the user's usual permissions.
        temporary[WEIGHTS_FILE].chmod(stat.S_IMODE(temporary[CONFIG_FILE].stat().st_mode))
        for path in temporary.values():
            _sync(path)
        for name, path in temporary.items():
            is_new = not (directory / name).exists()
            os.replace(path, directory / name)
            placed += [directory / name] if is_new else []
        made.clear()
    except (OSError, SafetensorError) as error:
        for path in placed:
            _ignore_failure(path.unlink)
        if isinstance(error, ExportError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{directory} cannot be written: {reason}") from error
    finally:
        for path in temporary.values():
            _ignore_failure(path.unlink)
        for folder in made:  # nothing was written into them
            _ignore_failure(folder.rmdir)
    return directory


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, no two tensors in the same memory, as safetensors wants it.

    Raises:
        ExportError: If a tensor is on the meta device.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ExportError(f"{name} is on the meta device: there is nothing to write")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if storage.data_ptr() in seen or not whole:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _metadata(model: nn.Module) -> dict[str, str]:
    facts = provenance(model)
    return {"format": "pt", **({} if facts is None else {"timm_ghn": json.dumps(facts)})}


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
        save_config_for_hf(model, str(path), model_args=dict(model_args) if model_args else None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"timm cannot describe {config['architecture']} ({type(model).__name__}) so that it could be built again: "
            f"{error}"
        ) from error


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _ignore_failure(remove: Callable[[], object]) -> None:
    try:
        remove()
    except OSError:
        return
