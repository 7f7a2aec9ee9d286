"""Safetensors files that are written one tensor at a time; the library's own writer wants all of them in memory.

The format is eight bytes with the length of a header, the header as JSON padded with spaces to eight bytes, and the
tensors' bytes after each other, so all offsets follow from names, types and shapes alone. A file is what
`safetensors.torch.save_file` makes of the same tensors, byte for byte.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64",
    torch.int64: "I64",
}  # fmt: skip
"""Names of types, in the reverse order in which tensors lie in a file, which keeps them aligned."""
_RANKS = {dtype: rank for rank, dtype in enumerate(TYPES)}
_ALIGNMENT = 8
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What has to be known of a tensor to give it a place in a file.

    Attributes:
        dtype: Type.
        shape: Shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The description of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """A file whose tensors are written in any order.

    Attributes:
        path: The file.
        specs: Its tensors by name.
        offsets: Where each of them begins, in bytes from the start of the file.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]

    @classmethod
    def create(cls, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> TensorFile:
        """Make a file with its header and room for the tensors.

        Raises:
            FileExistsError: If the file exists.
            OSError: If it cannot be written.
            ValueError: If a tensor has a type that the format does not know.
        """
        names = sorted(specs, key=lambda name: (-_rank(name, specs[name]), name))
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        begins: dict[str, int] = {}
        for name in names:
            begins[name], end = end, end + specs[name].num_bytes
            kind = TYPES[specs[name].dtype]
            header[name] = {"dtype": kind, "shape": list(specs[name].shape), "data_offsets": [begins[name], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        start = 8 + len(text)
        with open(path, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + end)
        return cls(path, specs, {name: start + begin for name, begin in begins.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, from any device and of any strides.

        Raises:
            ValueError: If it is of another type or shape than the file was made for.
            OSError: If the file cannot be written.
        """
        if TensorSpec.of(tensor) != self.specs[name]:
            raise ValueError(f"{name} is {TensorSpec.of(tensor)}, the file has room for {self.specs[name]}")
        if tensor.numel() == 0:
            return
        data = tensor.detach().to("cpu").contiguous()
        # A contiguous tensor of one element may have any stride.
        data = data.as_strided((data.numel(),), (1,)).view(torch.uint8)
        if sys.byteorder == "big":
            data = data.view(-1, tensor.element_size()).flip(1).contiguous().view(-1)
        with open(self.path, "r+b") as file:
            file.seek(self.offsets[name])
            file.write(data.numpy().data)


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file of tensors that are all there; the same content gives the same bytes.

    The package's own writer puts metadata of several keys into another order at every call.

    Raises:
        FileExistsError, OSError, ValueError: As `TensorFile.create`.
    """
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    file = TensorFile.create(path, specs, dict(sorted(metadata.items())))
    for name in sorted(specs, key=lambda name: file.offsets[name]):
        file.write(name, tensors[name])


@dataclass(frozen=True)
class Shards:
    """How the weights of a model are spread over files, in the format of the Hugging Face Hub.

    Attributes:
        files: Names of the tensors of each file, by its name; one file `model.safetensors` if they fit into it.
        index: Content of `model.safetensors.index.json`; None for a single file.
    """

    files: Mapping[str, tuple[str, ...]]
    index: str | None


def split(specs: Mapping[str, TensorSpec], max_shard_size: int | str) -> Shards:
    """Spread tensors over files, in their order.

    Args:
        specs: The tensors by name.
        max_shard_size: Size that no file exceeds, unless a single tensor does: bytes, or text such as "5GB".

    Raises:
        ValueError: If the size is not one.
    """
    found = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.num_bytes,
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    files = {file: tuple(names) for file, names in found.filename_to_tensors.items()}
    if not found.is_sharded:
        return Shards(files, None)
    return Shards(files, json.dumps({"metadata": found.metadata, "weight_map": found.tensor_to_filename}, indent=2))


class WeightFiles:
    """All files of a model's weights, under names that a caller chooses.

    Args:
        shards: What goes where.
        specs: The tensors by name.
        metadata: Metadata of every file.
        place: Gives the path under which a file is written.

    Raises:
        OSError: If a file cannot be made.
        ValueError: If a tensor has a type that the format does not know.
    """

    def __init__(
        self,
        shards: Shards,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        place: Callable[[str], Path],
    ) -> None:
        self._files: dict[str, TensorFile] = {}
        for file, names in shards.files.items():
            made = TensorFile.create(place(file), {name: specs[name] for name in names}, metadata)
            self._files.update(dict.fromkeys(names, made))
        if shards.index is not None:
            place(INDEX_FILE).write_text(shards.index)
        self._missing = set(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; see `TensorFile.write`."""
        self._files[name].write(name, tensor)
        self._missing.discard(name)

    def check_complete(self) -> None:
        """Raises ValueError unless every tensor has been written."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, {min(self._missing)} among them")


def _rank(name: str, spec: TensorSpec) -> int:
    if spec.dtype not in _RANKS:
        raise ValueError(f"{name} is {spec.dtype}, which a safetensors file does not hold")
    return _RANKS[spec.dtype]
