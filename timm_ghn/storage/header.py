"""The header of a safetensors file, checked and written without torch.

The format (https://github.com/huggingface/safetensors#format) is eight bytes with the length of a header, the header
as JSON padded with spaces to a multiple of eight bytes, and the bytes of the tensors after each other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from timm_ghn.errors import TensorFileError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 16 * 2**20
"""Longer headers are refused. That of a model of 10,000 tensors has about 3 MB with all that a cache notes."""
_TYPES = {
    "bool": ("BOOL", 1), "uint8": ("U8", 1), "int8": ("I8", 1), "int16": ("I16", 2), "float16": ("F16", 2),
    "bfloat16": ("BF16", 2), "int32": ("I32", 4), "float32": ("F32", 4), "complex64": ("C64", 8),
    "float64": ("F64", 8), "int64": ("I64", 8),
}  # fmt: skip
"""Name in the format and bytes of torch's types, in the reverse order of their tensors in a file (for alignment)."""
_RANKS = {dtype: rank for rank, dtype in enumerate(_TYPES)}
_TORCH_NAMES = {name: dtype for dtype, (name, _) in _TYPES.items()}
_MAX_RANK = 32
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of a tensor in a file.

    Attributes:
        dtype: torch's name of its type, such as "float32".
        shape: Shape.

    Raises:
        TensorFileError: If the format does not know the type.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise TensorFileError(f"a safetensors file holds no {self.dtype[:40]}")

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The description of a tensor."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _TYPES[self.dtype][1]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The descriptions of named tensors.

    Raises:
        TensorFileError: If the format does not know the type of one.
    """
    specs = {}
    for name, tensor in tensors.items():
        try:
            specs[name] = TensorSpec.of(tensor)
        except TensorFileError as error:
            raise TensorFileError(f"{name}: {error}") from error
    return specs


@dataclass(frozen=True)
class Header:
    """The beginning of a file: metadata, and the place of each tensor.

    Attributes:
        metadata: Texts by name.
        specs: The tensors by name.
        offsets: Where each of them begins, in bytes from the start of the file.
    """

    metadata: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]

    @classmethod
    def read(cls, file: BinaryIO | Any) -> Header:
        """Read and check the header of an open file. Memory is taken for the header alone.

        Raises:
            TensorFileError: If the header is damaged, or the file does not have exactly the data that it promises.
            OSError: If the file cannot be read.
        """
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise TensorFileError("the length of its header cannot be right")
        try:
            table = json.loads(file.read(length))
            metadata = table.pop(_METADATA, {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("the metadata are not texts")
            specs = {name: _spec(entry) for name, entry in table.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TensorFileError(f"its header is damaged: {str(error)[:200]}") from error
        offsets, end = {}, 8 + length
        for name in sorted(specs, key=lambda name: (table[name]["data_offsets"], specs[name].num_bytes)):
            offsets[name] = 8 + length + table[name]["data_offsets"][0]
            if offsets[name] != end:
                raise TensorFileError(f"tensor {name[:80]} does not begin where the one before it ends")
            end += specs[name].num_bytes
        if end != size:
            raise TensorFileError(f"it has {size:,} bytes, and its header promises others")
        return cls(metadata, specs, offsets)

    @classmethod
    def plan(cls, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[Header, bytes, int]:
        """The header for tensors that are going to be written, as the safetensors package would write it.

        Returns:
            The header, its bytes, and the size of the whole file.
        """
        table: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
        begins, end = {}, 0
        for name in sorted(specs, key=lambda name: (-_RANKS[specs[name].dtype], name)):
            begins[name], end = end, end + specs[name].num_bytes
            dtype, shape = _TYPES[specs[name].dtype][0], list(specs[name].shape)
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begins[name], end]}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        offsets = {name: start + begin for name, begin in begins.items()}
        return cls(dict(metadata), specs, offsets), len(text).to_bytes(8, "little") + text, start + end


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    """The checked entry of a tensor. Raises ValueError, TypeError or KeyError if there is no such tensor."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    for sizes, longest in ((shape, _MAX_RANK), (offsets, 2)):
        if len(sizes) > longest or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            raise ValueError("a shape or an offset is impossible")
    spec = TensorSpec(_TORCH_NAMES[entry["dtype"]], tuple(shape))
    if len(entry) != 3 or spec.num_bytes != offsets[1] - offsets[0]:
        raise ValueError("a tensor does not have the bytes of its shape")
    return spec
