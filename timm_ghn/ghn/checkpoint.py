"""Reading and writing GHNs: ppuda's `.pt` files, safetensors, and live ppuda modules.

Whatever the file, the configuration and the shape of every tensor are checked before a GHN is built, and nothing in a
file is executed: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_ghn.errors import CheckpointError, TensorFileError
from timm_ghn.ghn import pickles
from timm_ghn.ghn.config import MAX_PARAMETERS, GHNConfig, GHNInfo
from timm_ghn.ghn.model import GHN
from timm_ghn.storage.atomic import save_atomically
from timm_ghn.storage.reader import TensorReader
from timm_ghn.storage.writer import write_file

CONFIG_KEY = "timm_ghn"
"""Metadata key of a safetensors file whose value is the GHN's configuration as JSON."""
HASH_KEY = "ghn_hash"
"""Metadata key whose value is the `content_hash` that the file had when it was written."""

_MAX_FILE_BYTES = 8 * MAX_PARAMETERS  # weights, and as much again for an optimizer's state beside them
_ADVICE = "get the file again, or name another GHN"
_LEGACY_PICKLES = 5
"""Number of pickles in a file of torch before 1.6: magic number, protocol, system, content, keys of the storages."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read(path: str | os.PathLike[str]) -> GHN:
    """Read a GHN from a file of either format; the content decides which, not the extension.

    Args:
        path: A ppuda checkpoint or a safetensors file.

    Returns:
        The GHN, float32 on the CPU and in eval mode, with `info` set.

    Raises:
        CheckpointError: If the file cannot be read, is damaged, or is not a GHN.
    """
    _check_file_size(path)
    start = _first_bytes(path, 9)
    if start[:2] == b"PK" or start[:1] == b"\x80":  # a zip archive, or a bare pickle as torch wrote before 1.6
        return read_ppuda(path)
    if start[8:9] == b"{":
        return read_safetensors(path)
    raise CheckpointError(f"{path} is not a GHN checkpoint: it is neither a torch nor a safetensors file")


def read_ppuda(path: str | os.PathLike[str]) -> GHN:
    """Read a checkpoint that ppuda saved with `torch.save`.

    Args:
        path: The `.pt` file.

    Returns:
        The GHN, float32 on the CPU and in eval mode. `info.metadata` has the training epoch.

    Raises:
        CheckpointError: If the file cannot be read, is damaged, holds code, or is not a GHN.
    """
    _check_file_size(path)
    try:
        with open(path, "rb") as file:
            return parse_ppuda(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_ppuda(file: BinaryIO | bytes, name: str) -> GHN:
    """Read a ppuda checkpoint from an open file or from memory; `name` is what errors call it.

    Raises:
        CheckpointError: As `read_ppuda`.
    """
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    _check_pickles(stream, name)
    try:
        data = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch and pickle raise almost anything
        raise CheckpointError(f"{name} is truncated or damaged; {_ADVICE}") from error
    if not isinstance(data, dict) or "state_dict" not in data or "config" not in data:
        raise CheckpointError(f"{name} is not a GHN checkpoint: it has no 'state_dict' and 'config'; {_ADVICE}")
    epoch = data.get("epoch")
    metadata = {"epoch": str(epoch)} if isinstance(epoch, int) and 0 <= epoch < 2**63 else {}
    return _build(_config(data["config"], name), data["state_dict"], name, metadata)


def read_safetensors(path: str | os.PathLike[str]) -> GHN:
    """Read a GHN from a file that `write_safetensors` wrote.

    Args:
        path: The `.safetensors` file.

    Returns:
        The GHN, float32 on the CPU and in eval mode. `info.metadata` has the file's metadata. A file that has not
        changed is read and verified once per process; every call returns a GHN of its own.

    Raises:
        CheckpointError: If the file cannot be read, is damaged, or is not a GHN.
    """
    _check_file_size(path)
    status = Path(path).stat()
    return _copy(_read_once(str(path), status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=2)
def _read_once(path: str, *_: int) -> GHN:
    """The GHN in a file of that inode, size and time. It is never handed out, so that nobody can change it."""
    try:
        with TensorReader(path) as file:
            metadata = dict(file.metadata)
            config = _config(_json(metadata.pop(CONFIG_KEY, None), str(path)), str(path))
            _check_shapes({key: spec.shape for key, spec in file.specs.items()}, config, str(path))
            tensors = {key: file.read(key) for key in file.specs}
    except TensorFileError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); {_ADVICE}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    expected = metadata.pop(HASH_KEY, None)
    ghn = _build(config, tensors, str(path), metadata)
    if expected is not None and ghn.info is not None and ghn.info.hash != expected:
        raise CheckpointError(
            f"{path} is damaged: its content does not have the hash that it was written with; {_ADVICE}"
        )
    return ghn


def write_safetensors(ghn: GHN, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a GHN as safetensors, all of it or nothing.

    Args:
        ghn: The GHN.
        path: File to write; its folder is created and an existing file replaced.
        metadata: Further facts to keep beside the configuration.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in ghn.state_dict().items()}
    facts = {"format": "pt", **(metadata or {})}
    facts[CONFIG_KEY] = json.dumps(ghn.config.to_dict())
    facts[HASH_KEY] = content_hash(ghn)
    save_atomically(path, lambda temporary: write_file(temporary, tensors, facts))


def from_module(module: nn.Module, name: str = "live module") -> GHN:
    """Copy a live ppuda GHN, wrapped in `DataParallel` or not.

    Args:
        module: A GHN-1 or GHN-2 of ppuda's `GHN` class; our own are copied as well.
        name: What `info` and errors call it.

    Returns:
        A GHN with copies of its weights, float32 on the CPU and in eval mode.

    Raises:
        CheckpointError: If the module is no such GHN.
    """
    inner = getattr(module, "module", None)
    module = inner if isinstance(inner, nn.Module) and not hasattr(module, "gnn") else module
    if isinstance(module, GHN):
        return _build(module.config, module.state_dict(), name, {})
    try:
        config = {
            "max_shape": tuple(int(size) for size in module.max_shape),  # type: ignore[union-attr]
            "num_classes": int(module.num_classes),  # type: ignore[arg-type]
            "hypernet": "gatedgnn" if hasattr(module.gnn, "gru") else "mlp",
            "decoder": "conv" if hasattr(module.decoder, "conv") else "mlp",
            "weight_norm": bool(module.weight_norm),
            "ve": bool(module.ve),
            "layernorm": bool(module.layernorm),
            "hid": int(module.embed.weight.shape[1]),  # type: ignore[union-attr, index]
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{type(module).__name__} is not a ppuda GHN: {error}") from error
    return _build(GHNConfig.from_dict(config), module.state_dict(), name, {})


def content_hash(ghn: GHN) -> str:
    """SHA-256 of a GHN's configuration and weights, whatever file it came from."""
    digest = hashlib.sha256(json.dumps(ghn.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(ghn.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"\0{name}\0{tuple(values.shape)}\0".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _build(config: GHNConfig, tensors: Any, name: str, metadata: Mapping[str, str]) -> GHN:
    """A GHN with copies of the tensors, which are checked first."""
    is_table = isinstance(tensors, Mapping) and all(isinstance(key, str) for key in tensors)
    if not is_table or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{name} is not a GHN checkpoint: its 'state_dict' is not a table of tensors")
    _check_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()}, config, name)
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(f"{name}: tensor {key} is not a plain tensor with values")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name}: tensor {key} is {tensor.dtype}, not a floating-point type")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: tensor {key} has NaN or infinite values; {_ADVICE}")
    ghn = _empty(config)
    copies = {key: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for key, tensor in tensors.items()}
    ghn.load_state_dict(copies, assign=True)
    ghn.info = GHNInfo(name, content_hash(ghn), dict(metadata))
    return ghn.eval()


def _copy(ghn: GHN) -> GHN:
    """A GHN with copies of the weights of another."""
    copied = _empty(ghn.config)
    copied.load_state_dict({name: tensor.clone() for name, tensor in ghn.state_dict().items()}, assign=True)
    copied.info = ghn.info
    return copied.eval()


class _SkipInitialization(TorchFunctionMode):
    """Leaves new parameters as they are: a meta tensor has no values, and the first draw into one costs seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in {"kaiming_uniform_", "uniform_", "normal_", "fill_", "zero_"}:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _empty(config: GHNConfig) -> GHN:
    """A GHN on the meta device: names and shapes only."""
    with torch.device("meta"), _SkipInitialization():
        return GHN(config)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: GHNConfig, name: str) -> None:
    """Raise CheckpointError unless the tensors are those of a GHN of that configuration; nothing is allocated."""
    expected = {key: tuple(tensor.shape) for key, tensor in _empty(config).state_dict().items()}
    wrong = [
        *(f"{key} is missing" for key in expected if key not in shapes),
        *(f"{key[:80]} is unknown" for key in shapes if key not in expected),
        *(
            f"{key} has shape {shapes[key]} instead of {expected[key]}"
            for key in expected
            if key in shapes and shapes[key] != expected[key]
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{name}: the tensors are not those of a GHN of its config: {', '.join(wrong[:3])}{more}; {_ADVICE}"
        )


def _config(data: Any, name: str) -> GHNConfig:
    try:
        return GHNConfig.from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _json(text: str | None, name: str) -> Any:
    if text is None:
        raise CheckpointError(
            f"{name} is a safetensors file without a GHN: its metadata have no {CONFIG_KEY!r}; {_ADVICE}"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: the metadata {CONFIG_KEY!r} are not JSON; {_ADVICE}") from error


def _check_pickles(stream: BinaryIO, name: str) -> None:
    """Refuse a checkpoint that holds code, unpacks to more than it holds, or lies about its tensors.

    Raises:
        CheckpointError: Likewise, or if it is damaged.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    is_zip = stream.read(2) == b"PK"
    stream.seek(0)
    try:
        if is_zip:
            with zipfile.ZipFile(stream) as archive:
                _check_archive(archive, size, name)
        else:
            for _ in range(_LEGACY_PICKLES):
                pickles.check(stream, lambda _, count: count <= size)
    except CheckpointError:
        raise
    except pickles.UnsafePickleError as error:
        reason = f"it holds pickled code or objects, which are never run ({error}); save only tensors and plain values"
        raise CheckpointError(f"{name} was refused: {reason}") from error
    except Exception as error:  # zipfile and pickletools raise many kinds on damaged files
        raise CheckpointError(f"{name} is truncated or damaged; {_ADVICE}") from error
    stream.seek(0)


def _check_archive(archive: zipfile.ZipFile, size: int, name: str) -> None:
    """Check the records of an archive; torch itself never compresses, and finds names whatever their case is."""
    records = archive.infolist()
    unpacked = sum(record.file_size for record in records)
    if unpacked > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(
            f"{name} was refused: it would unpack to {unpacked:,} bytes; torch does not compress GHNs"
        )
    sizes = {record.filename.lower(): record.file_size for record in records}
    if len(sizes) != len(records):
        raise CheckpointError(f"{name} was refused: two of its records have the same name")
    for record in records:
        if record.filename.lower().endswith(".pkl"):
            folder = record.filename.lower().rpartition("/")[0]

            def is_possible(key: str, count: int, folder: str = folder) -> bool:
                return count <= sizes[f"{folder}/data/{key}".lower()]

            pickles.check(io.BytesIO(archive.read(record)), is_possible)


def _check_file_size(path: str | os.PathLike[str]) -> None:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
        raise CheckpointError(f"{path} cannot be read: it is not a file")
    if size > _MAX_FILE_BYTES:
        raise CheckpointError(f"{path} was refused: {size:,} bytes are more than any GHN has")


def _first_bytes(path: str | os.PathLike[str], count: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
