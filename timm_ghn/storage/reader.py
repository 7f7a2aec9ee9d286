"""Safetensors files, read without trust and without memory mapping.

The format is that of the safetensors package (https://github.com/huggingface/safetensors#format). Two things are done
differently from its readers, for files that many machines share:

- Nothing is mapped into memory. A mapped file that is truncated, or removed by another client of a network file
  system, ends the process with SIGBUS; a read that fails raises.
- A tensor is read straight into memory that exists already, by several threads if need be.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from timm_ghn.errors import TensorFileError
from timm_ghn.storage.writer import TYPES, TensorSpec

MAX_HEADER_BYTES = 16 * 2**20
"""Longer headers are refused. That of a model of 10,000 tensors has about 3 MB with all that a cache notes."""
_MAX_RANK = 32
_METADATA = "__metadata__"
_DTYPES = {name: dtype for dtype, name in TYPES.items()}


class TensorReader:
    """An open safetensors file, whose header has been checked: every tensor lies inside of it, and none overlap.

    Args:
        path: A regular file, or a link to one.

    Raises:
        TensorFileError: If the header is damaged, or promises other data than the file has. Nothing is allocated
            beyond the header.
        OSError: If the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise TensorFileError(f"{path} is not a regular file")
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            self.metadata, self.specs, self.offsets = _read_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory.

        Raises:
            TensorFileError: If the file has become shorter, or torch cannot have such a tensor.
            OSError: If it cannot be read.
        """
        spec = self.specs[name]
        try:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
        except (RuntimeError, OverflowError) as error:
            raise TensorFileError(f"tensor {name} of shape {spec.shape} cannot be made: {error}") from error
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Read a tensor into a contiguous one on the CPU, of the same shape and type. Threads may do so at once.

        Raises:
            TensorFileError: If the tensor is another one, or the file has become shorter.
            OSError: If the file cannot be read.
        """
        spec = self.specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape) or not tensor.is_contiguous():
            raise TensorFileError(f"tensor {name} is {spec.dtype} of shape {spec.shape} in the file")
        buffer, offset = bytes_of(tensor), self.offsets[name]
        while len(buffer):
            count = self._read_at(buffer, offset)
            if count == 0:
                raise TensorFileError(f"the file ends inside of tensor {name}")
            buffer, offset = buffer[count:], offset + count

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; writable.

    Raises:
        TensorFileError: On a big-endian machine, where it is not what the format wants.
    """
    if sys.byteorder != "little":
        raise TensorFileError("big-endian machines are not supported")
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return memoryview(tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)


def _write_to(file: BinaryIO, header: bytes, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    file.write(header)
    for name in names:
        file.write(bytes_of(tensors[name].detach().cpu().contiguous()))


def _read_header(file: BinaryIO | Any) -> tuple[dict[str, str], dict[str, TensorSpec], dict[str, int]]:
    """Metadata, tensors, and where in the file they begin.

    Raises:
        TensorFileError: If the header is damaged or promises other data than there are.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise TensorFileError("the length of its header cannot be right")
    try:
        table = json.loads(_read_exactly(file, length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise TensorFileError("its header is not JSON") from error
    if not isinstance(table, dict):
        raise TensorFileError("its header is not a table")
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError("its metadata are not texts")
    specs = {name: _spec(name, entry) for name, entry in table.items()}
    offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in table.items()}
    end = 8 + length
    for name in sorted(specs, key=lambda name: (offsets[name], specs[name].num_bytes)):
        if offsets[name] != end:
            raise TensorFileError(f"tensor {_short(name)} does not begin where the one before it ends")
        end += specs[name].num_bytes
    if end != size:
        raise TensorFileError(f"it has {size:,} bytes, and its header promises {_short(end)}")
    return metadata, specs, offsets


def _spec(name: str, entry: Any) -> TensorSpec:
    """A checked entry of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"the header's entry of {_short(name)} is none of a tensor")
    dtype, shape, offsets = (entry[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise TensorFileError(f"tensor {_short(name)} has the unknown type {_short(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise TensorFileError(f"tensor {_short(name)} has no possible shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise TensorFileError(f"tensor {_short(name)} has no possible offsets")
    spec = TensorSpec(_DTYPES[dtype], tuple(shape))
    if spec.num_bytes != offsets[1] - offsets[0]:
        raise TensorFileError(f"tensor {_short(name)} does not have the bytes of its shape")
    return spec


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _read_exactly(file: BinaryIO | Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = file.read(count - len(data))
        if not part:
            raise TensorFileError("it ends inside of its header")
        data += part
    return data


def _short(value: Any) -> str:
    """A value of a file for a message, which it must not flood."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) and abs(value) < 2**128 else "..."
    return text if len(text) <= 80 else f"{text[:77]}..."
