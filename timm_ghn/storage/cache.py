"""Results of initializations on disk: safetensors files, addressed by everything that determines them.

An entry holds post-processed weights as they are and predicted ones as the small blocks that they are tiled from, which
makes it a third of the model's size and quicker to read than the model is to fill with random numbers. It is written
under another name and renamed, so that it is there whole or not at all; everything in it is hashed, and one that does
not match is a logged miss, never a wrong weight. A lock beside it lets one of many processes compute while the others
wait. `upkeep.py` lists and removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from torch import Tensor

from timm_ghn import numerics
from timm_ghn.errors import CacheError
from timm_ghn.ghn.model import Prediction
from timm_ghn.graph import Layout, Role, Target
from timm_ghn.storage.atomic import save_atomically
from timm_ghn.storage.header import TensorSpec
from timm_ghn.storage.reader import TensorReader, bytes_of
from timm_ghn.storage.upkeep import (
    DESCRIPTION_KEY,
    DIGEST_KEY,
    UNREADABLE,
    CacheFolder,
    EntryInfo,
    read_description,
    reason_of,
)
from timm_ghn.storage.writer import write_file
from timm_ghn.threads import Workers

_logger = logging.getLogger(__name__)

FORMAT = 8
"""Version of the format of entries; part of their keys, so that versions do not see each other's."""
LOCK_PATIENCE_SECONDS = 900.0
"""After this wait a lock is taken for one that a dead machine left on a network file system."""
_MAX_TILE_RATIO = 64
"""Elements of what a block is tiled to, for each of the weight's: beyond it a description is damaged, not large."""


def cache_key(inputs: Mapping[str, Any]) -> str:
    """Name of the entry that these inputs determine: a SHA-256 over them as JSON, the format and the numerics."""
    return hashlib.sha256(json.dumps([FORMAT, numerics.VERSION, inputs], sort_keys=True).encode()).hexdigest()


class WeightCache(CacheFolder):
    """A folder of entries."""

    def verify(self) -> Iterator[EntryInfo]:
        """Read and hash all entries; yields each as soon as that is done, with the problem that was found."""
        for info in self.entries():
            try:
                Entry.open(info.path).verify()
            except FileNotFoundError:
                continue  # somebody removed it meanwhile
            except UNREADABLE as error:
                yield replace(info, problem=reason_of(error))
            else:
                yield info

    def open(self, key: str) -> Entry | None:
        """An entry, or None if there is none, or none that can be used."""
        path = self.path(key)
        try:
            entry = Entry.open(path)
            if entry.made_for != (FORMAT, key):
                raise CacheError("it was made by another version or for something else")
            return entry
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UNREADABLE as error:
            self.report_damage(path, error)
            return None

    def report_damage(self, path: Path, error: BaseException) -> None:
        """Log that an entry cannot be used, and remove it unless the disk is to blame."""
        if isinstance(error, OSError) and not isinstance(error, CacheError):
            _logger.warning("The cache entry %s cannot be read: %s", path, error)
            return
        _logger.warning("Removing a damaged cache entry, %s: %s. It will be computed again", path, error)
        with suppress(OSError):
            path.unlink()

    def write(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        blocks: Mapping[str, Prediction],
        report: Mapping[str, Any],
        *,
        model: str = "",
    ) -> None:
        """Keep an entry; a cache that cannot be written is a warning, not an error.

        Nothing is flushed to the disk: after a power failure a file may be there without its content, which its hashes
        give away.

        Args:
            key: Key of the entry.
            tensors: Weights that are stored as they are.
            blocks: Weights that are stored as blocks.
            report: JSON-compatible description.
            model: Name of the model, for those who look at the cache.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        stored.update({name: prediction.block.detach().cpu().contiguous() for name, prediction in blocks.items()})
        tiles = {
            name: {"shape": p.target.shape, "kernel": p.kernel, "layout": p.target.layout.value, "signed": p.signed}
            for name, p in blocks.items()
        }
        with Workers() as workers:
            found = workers.in_order(partial(digest_of, tensor) for tensor in stored.values())
            digests = dict(zip(stored, found, strict=True))
        described = {"format": FORMAT, "key": key, "model": model, "digests": digests, "tiles": tiles, "report": report}
        text = json.dumps(described, sort_keys=True)
        metadata = {DESCRIPTION_KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}
        try:
            save_atomically(self.path(key), lambda path: write_file(path, stored, metadata), durable=False)
        except (OSError, ValueError) as error:
            _logger.warning("The weights cannot be kept in the cache, %s: %s", self.path(key), error)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of an entry.

        A lock only saves work: entries are complete when they get their name, whoever writes them. So there is none
        where the file system allows none, and after `LOCK_PATIENCE_SECONDS` it is done without.
        """
        lock = FileLock(self.lock_path(key), mode=0o666)
        try:
            self.weights.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=LOCK_PATIENCE_SECONDS)
        except Timeout:
            _logger.warning("Going on without the lock %s, which is held for very long", lock.lock_file)
        except (OSError, NotImplementedError) as error:
            _logger.debug("No lock for %s: %s", key, error)
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class Entry:
    """An entry that is there, of the right format and with a sound description; copying verifies its tensors.

    Attributes:
        path: The file.
        made_for: Version of the format, and key.
        report: What was stored with the weights.
        digests: Hash of each tensor's type, shape and bytes, by name.
        tiles: Shape, kernel, layout and whether there are signs, by name, of weights that are stored as blocks.
    """

    path: Path
    made_for: tuple[int, str]
    report: Mapping[str, Any]
    digests: Mapping[str, str]
    tiles: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, path: Path) -> Entry:
        """Read the description of an entry.

        Raises:
            One of `UNREADABLE`: If the file cannot be read, or is damaged.
        """
        with TensorReader(path) as file:
            described = read_description(file.metadata)
            if file.specs.keys() != described["digests"].keys():
                raise CacheError("its tensors are not those of its description")
        made_for = described["format"], described["key"]
        return cls(path, made_for, described["report"], described["digests"], described["tiles"])

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights."""
        return frozenset(self.digests)

    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Verify all weights and write them into existing tensors; each is verified before it is written.

        Raises:
            One of `UNREADABLE`: If a weight is not what was written. Others may have been written by then, and have to
                be computed.
        """

        def copy(part: Sequence[str]) -> None:
            for name in part:
                self._place(name, self._read(file, name), parameters[name])

        names = sorted(self.digests, key=lambda name: -parameters[name].numel())
        with TensorReader(self.path) as file, Workers() as workers:
            for _ in workers.in_order(partial(copy, names[i :: workers.count]) for i in range(workers.count)):
                pass
        with suppress(OSError):
            os.utime(self.path)  # the time of the last use, where the file system allows that

    def verify(self) -> None:
        """Read all weights, and raise one of `UNREADABLE` if one is not what was written."""
        with TensorReader(self.path) as file:
            for name in self.digests:
                self._read(file, name)

    def _read(self, file: TensorReader, name: str) -> Tensor:
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
            Prediction(target, tensor, kernel, tile.get("signed", False)).write_(parameter)
        elif tensor.shape == parameter.shape:
            parameter.copy_(tensor)
        else:
            raise CacheError(f"{name} has another shape")


def digest_of(tensor: Tensor) -> str:
    """Hash of a contiguous CPU tensor: 128-bit XXH3 over type, shape and bytes.

    The hash is there to notice damage, at the speed of memory: whoever can write the file can write a matching hash as
    well, of any kind. SHA-256 takes three times as long as reading does.
    """
    spec = TensorSpec.of(tensor)
    digest = xxhash.xxh3_128(f"{spec.dtype} {spec.shape}\0".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()
