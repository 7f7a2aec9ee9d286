"""Safetensors files that are written one tensor at a time; the library's own writer wants all of them in memory.

All offsets follow from names, types and shapes alone. A file is what `safetensors.torch.save_file` makes of the same
tensors, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from timm_ghn.errors import ExportError
from timm_ghn.storage.header import Header, TensorSpec, specs_of
from timm_ghn.storage.reader import bytes_of

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WeightFiles:
    """New files whose tensors are written one after another, in any order.

    Args:
        files: The tensors of each file, by name.
        metadata: Metadata of every file.

    Raises:
        FileExistsError: If a file exists.
        OSError: If a file cannot be written.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, TensorSpec]], metadata: Mapping[str, str]) -> None:
        self._missing: dict[str, tuple[Path, Header]] = {}
        for path, specs in files.items():
            header, content, size = Header.plan(specs, metadata)
            with open(path, "xb") as file:
                file.write(content)
                file.truncate(size)
            self._missing.update(dict.fromkeys(specs, (path, header)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that has not been written yet, from any device and of any strides.

        Raises:
            ValueError: If it is of another type or shape than its file was made for.
            OSError: If the file cannot be written.
        """
        path, header = self._missing[name]
        if TensorSpec.of(tensor) != header.specs[name]:
            raise ValueError(f"{name} is {TensorSpec.of(tensor)}, the file has room for {header.specs[name]}")
        with open(path, "r+b") as file:
            file.seek(header.offsets[name])
            file.write(bytes_of(tensor.detach().to("cpu").contiguous()))
        del self._missing[name]

    def check_complete(self) -> None:
        """Raises ValueError unless every tensor has been written."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, {min(self._missing)} among them")


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file of tensors that are all there; the same content gives the same bytes.

    The package's own writer puts metadata of several keys into another order at every call.

    Raises:
        FileExistsError, OSError: As `WeightFiles`.
        TensorFileError: If the format does not know the type of a tensor.
    """
    header, content, _ = Header.plan(specs_of(tensors), dict(sorted(metadata.items())))
    with open(path, "xb") as file:
        file.write(content)
        for name in header.offsets:  # in the order of the file
            file.write(bytes_of(tensors[name].detach().to("cpu").contiguous()))


def split(specs: Mapping[str, TensorSpec], max_shard_size: int | str) -> StateDictSplit:
    """Spread the tensors of a model over files, in their order and in the format of the Hugging Face Hub.

    Args:
        specs: The tensors by name.
        max_shard_size: Size that no file exceeds, unless a single tensor does: bytes, or text such as "5GB".

    Raises:
        ExportError: If the size is not one.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # which every first initialization would wait for

    try:
        return split_state_dict_into_shards_factory(
            dict(specs),
            get_storage_size=lambda spec: spec.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ExportError(f"max_shard_size={max_shard_size!r}: expected bytes, or a size such as '5GB'") from error
