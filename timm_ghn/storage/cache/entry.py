"""One entry of the cache: a safetensors file of which every byte is verified."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from timm_ghn.errors import CacheError, TimmGhnError
from timm_ghn.ghn.model import Prediction
from timm_ghn.graph import Layout, Role, Target
from timm_ghn.storage.reader import TensorReader, bytes_of
from timm_ghn.storage.writer import write_file

_logger = logging.getLogger(__name__)

FORMAT = 7
"""Version of the entries: of their format, and of what the rest of a key does not tell of how weights are computed.

It is part of their keys, so that versions do not see each other's. Raise it with every change of numbers for the same
inputs that is made between two versions of the package.
"""
HEADER_KEY = "timm_ghn"
"""Metadata key of the description, as JSON."""
DIGEST_KEY = "timm_ghn_sha256"
"""Metadata key of the SHA-256 of that text."""

UNREADABLE = (
    OSError,
    TimmGhnError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,  # RecursionError, and what torch raises for impossible shapes
    MemoryError,
    OverflowError,
)
"""What reading a file of any content may raise."""

_MAX_TILE_RATIO = 64
"""Elements of what a block is tiled to, for each of the weight's: beyond it a description is damaged, not large."""


@dataclass(frozen=True)
class Entry:
    """An entry that is there, of the right format and with a sound description; copying verifies its tensors.

    Attributes:
        path: The file.
        facts: What was stored with the weights.
        digests: Hash of each tensor's type, shape and bytes, by name.
        tiles: Shape, kernel and layout, by name, of weights that are stored as blocks.
    """

    path: Path
    facts: Mapping[str, Any]
    digests: Mapping[str, str]
    tiles: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, path: Path, key: str) -> Entry:
        """Read the description of an entry.

        Raises:
            CacheError: If it is damaged, of another format, or the entry of another key.
            OSError, TensorFileError: If the file cannot be read, or its header is damaged.
        """
        with TensorReader(path) as file:
            header = read_header(file.metadata)
            if header.get("format") != FORMAT or header.get("key") != key:
                raise CacheError("it was made by another version or for something else")
            facts, digests, tiles = (_table(header, field) for field in ("facts", "digests", "tiles"))
            if set(file.specs) != set(digests) or not set(tiles) <= set(digests):
                raise CacheError("its tensors are not those of its description")
            _check_tiles(tiles)
        return cls(path, facts, digests, tiles)

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights."""
        return frozenset(self.digests)

    def copy_to(self, parameters: Mapping[str, Tensor]) -> bool:
        """Verify all weights and write them into existing tensors; each is verified before it is written.

        Returns:
            Whether all of them were written. If not, some may have been, and have to be computed.
        """
        workers = torch.get_num_threads()
        try:
            names = sorted(self.digests, key=lambda name: -parameters[name].numel())
            parts = [names[i::workers] for i in range(workers)]
            with TensorReader(self.path) as file, ThreadPoolExecutor(max_workers=workers) as pool:
                for _ in pool.map(lambda part: self._copy(file, part, parameters), parts):
                    pass
        except UNREADABLE as error:
            warn_damaged(self.path, error)
            return False
        _touch(self.path)
        return True

    def verify(self) -> None:
        """Read and hash every tensor, one after the other.

        Raises:
            CacheError, TensorFileError, OSError: If one does not have its hash, or cannot be read.
        """
        with TensorReader(self.path) as file:
            for name in file.specs:
                self._verified(file, name)

    def _copy(self, file: TensorReader, names: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
        for name in names:
            self._place(name, self._verified(file, name), parameters[name])

    def _verified(self, file: TensorReader, name: str) -> Tensor:
        """A tensor of the file that has its hash.

        Raises:
            CacheError: If it does not.
        """
        tensor = file.read(name)
        if digest_of(tensor) != self.digests[name]:
            raise CacheError(f"the content of {name} does not match its hash")
        return tensor

    def _place(self, name: str, tensor: Tensor, parameter: Tensor) -> None:
        tile = self.tiles.get(name)
        if tile is not None:
            kernel = tuple(tile["kernel"])
            if math.prod(kernel) > _MAX_TILE_RATIO * max(parameter.numel(), 1):
                raise CacheError(f"{name} would be tiled to {kernel}")
            target = Target(name, tuple(tile["shape"]), Role.WEIGHT, Layout(tile["layout"]))
            Prediction(target, tensor, kernel).write_(parameter)
        elif tensor.shape == parameter.shape:
            parameter.copy_(tensor)
        else:
            raise CacheError(f"{name} has another shape")


def write_entry(
    path: Path,
    key: str,
    tensors: Mapping[str, Tensor],
    blocks: Mapping[str, Prediction],
    facts: Mapping[str, Any],
    model: str,
) -> None:
    """Write an entry to a file that does not exist yet; the arguments are those of `WeightCache.write`.

    Raises:
        OSError, TensorFileError: If it cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored.update({name: prediction.block.detach().cpu().contiguous() for name, prediction in blocks.items()})
    tiles = {
        name: {"shape": p.target.shape, "kernel": p.kernel, "layout": p.target.layout.value}
        for name, p in blocks.items()
    }
    header = {
        "format": FORMAT,
        "key": key,
        "model": model,
        "digests": _digests(stored),
        "tiles": tiles,
        "facts": dict(facts),
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {"format": "pt", HEADER_KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}
    write_file(path, stored, metadata)


def read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description in a file's metadata.

    Raises:
        CacheError: If there is none, or it does not have its hash.
    """
    text = metadata.get(HEADER_KEY)
    if text is None:
        raise CacheError("it is no cache entry")
    if hashlib.sha256(text.encode(errors="replace")).hexdigest() != metadata.get(DIGEST_KEY):
        raise CacheError("its description does not match its hash, or it was made by another version")
    if dict(metadata) != {"format": "pt", HEADER_KEY: text, DIGEST_KEY: metadata.get(DIGEST_KEY)}:
        raise CacheError("its header says more than a description")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise CacheError("its description is not a table")
    return header


def digest_of(tensor: Tensor) -> str:
    """128-bit XXH3 of a contiguous CPU tensor's type, shape and bytes.

    It is there to notice damage, at the speed of memory: whoever can write the file can write a matching hash as well,
    of any kind. SHA-256 takes three times as long as reading does.
    """
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def warn_damaged(path: Path, error: BaseException) -> None:
    """Log that an entry cannot be used."""
    if isinstance(error, PermissionError):
        _logger.warning("The cache entry %s cannot be read: %s", path, error)
    else:
        _logger.warning("Ignoring a damaged cache entry, %s: %s. It will be computed again", path, error)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: digest_of(tensors[name]), names), strict=True))


def _check_tiles(tiles: Mapping[str, Any]) -> None:
    """Raises CacheError, KeyError, TypeError or ValueError unless every tile has two shapes and a layout."""
    for name, tile in tiles.items():
        Layout(tile["layout"])
        for size in (*tile["shape"], *tile["kernel"]):
            if type(size) is not int or not 0 < size < 2**63:
                raise CacheError(f"the tiling of {name} is impossible")


def _table(header: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = header.get(field)
    if not isinstance(value, dict):
        raise CacheError(f"its description has no table {field!r}")
    return value


def _touch(path: Path) -> None:
    """Note the time of the last use, where the file system allows that."""
    try:
        os.utime(path)
    except OSError as error:
        _logger.debug("cannot touch %s: %s", path, error)
