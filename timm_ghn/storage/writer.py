"""Safetensors files that are written one tensor at a time; the library's own writer wants all of them in memory.

All offsets follow from names, types and shapes alone. A file is what `safetensors.torch.save_file` makes of the same
tensors, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor

from timm_ghn.errors import ExportError
from timm_ghn.storage.header import Header, TensorSpec, specs_of
from timm_ghn.storage.reader import bytes_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorFile:
    """A file whose tensors are written in any order.

    Attributes:
        path: The file.
        header: What it holds.
    """

    path: Path
    header: Header

    @classmethod
    def create(cls, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> TensorFile:
        """Make a file with its header and room for the tensors.

        Raises:
            FileExistsError: If the file exists.
            OSError: If it cannot be written.
        """
        header, content, size = Header.plan(specs, metadata)
        with open(path, "xb") as file:
            file.write(content)
            file.truncate(size)
        return cls(path, header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, from any device and of any strides.

        Raises:
            ValueError: If it is of another type or shape than the file was made for.
            OSError: If the file cannot be written.
        """
        spec, expected = TensorSpec.of(tensor), self.header.specs[name]
        if spec != expected:
            raise ValueError(f"{name} is {spec}, the file has room for {expected}")
        with open(self.path, "r+b") as file:
            file.seek(self.header.offsets[name])
            file.write(bytes_of(tensor.detach().to("cpu").contiguous()))


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file of tensors that are all there; the same content gives the same bytes.

    The package's own writer puts metadata of several keys into another order at every call.

    Raises:
        FileExistsError, OSError: As `TensorFile.create`.
        TensorFileError: If the format does not know the type of a tensor.
    """
    file = TensorFile.create(path, specs_of(tensors), dict(sorted(metadata.items())))
    for name, tensor in tensors.items():
        file.write(name, tensor)


def split(specs: Mapping[str, TensorSpec], max_shard_size: int | str) -> StateDictSplit:
    """Spread the tensors of a model over files, in their order and in the format of the Hugging Face Hub.

    Args:
        specs: The tensors by name.
        max_shard_size: Size that no file exceeds, unless a single tensor does: bytes, or text such as "5GB".

    Raises:
        ExportError: If the size is not one.
    """
    try:
        return split_state_dict_into_shards_factory(
            dict(specs),
            get_storage_size=lambda spec: spec.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ExportError(f"max_shard_size={max_shard_size!r}: expected bytes, or a size such as '5GB'") from error


class WeightFiles:
    """All files of a model's weights: `model.safetensors`, or several and their index.

    Args:
        shards: What goes where.
        specs: The tensors by name.
        metadata: Metadata of every file.
        place: Gives the path under which a file is written.

    Raises:
        OSError: If a file cannot be made.
    """

    def __init__(
        self,
        shards: StateDictSplit,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        place: Callable[[str], Path],
    ) -> None:
        self._files: dict[str, TensorFile] = {}
        for file, names in shards.filename_to_tensors.items():
            made = TensorFile.create(place(file), {name: specs[name] for name in names}, metadata)
            self._files.update(dict.fromkeys(names, made))
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            place(INDEX_FILE).write_text(json.dumps(index, indent=2))
        self._missing = set(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; see `TensorFile.write`."""
        self._files[name].write(name, tensor)
        self._missing.discard(name)

    def check_complete(self) -> None:
        """Raises ValueError unless every tensor has been written."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, {min(self._missing)} among them")
