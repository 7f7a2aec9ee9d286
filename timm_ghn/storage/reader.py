"""Safetensors files, read without trust and without memory mapping.

The reader of the safetensors package maps files into memory. A mapped file that is truncated, or removed by another
client of a network file system, ends the process with SIGBUS; a read that fails raises.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from timm_ghn.errors import TensorFileError
from timm_ghn.storage.header import Header


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
            header = Header.read(self._file)
        except BaseException:
            self._file.close()
            raise
        self.metadata, self.specs, self.offsets = header.metadata, header.specs, header.offsets

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor, in new memory. Threads may read at once.

        Raises:
            TensorFileError: If the file has become shorter, or torch cannot have such a tensor.
            OSError: If it cannot be read.
        """
        spec = self.specs[name]
        try:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="cpu")
        except (RuntimeError, OverflowError) as error:
            raise TensorFileError(f"tensor {name} of shape {spec.shape} cannot be made: {error}") from error
        buffer, offset = bytes_of(tensor), self.offsets[name]
        while len(buffer):
            count = self._read_at(buffer, offset)
            if count == 0:
                raise TensorFileError(f"the file ends inside of tensor {name}")
            buffer, offset = buffer[count:], offset + count
        return tensor

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
    # A contiguous tensor of one element may have any stride.
    return memoryview(tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)
