"""The folder of entries: finding, writing, locking."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from timm_ghn.ghn.model import Prediction
from timm_ghn.storage.atomic import save_atomically
from timm_ghn.storage.cache import upkeep
from timm_ghn.storage.cache.entry import FORMAT, UNREADABLE, Entry, warn_damaged, write_entry
from timm_ghn.storage.cache.folder import CacheFolder, read_recipe, recipe_digest
from timm_ghn.storage.paths import cache_directory

_logger = logging.getLogger(__name__)

_LOCK_NOTICE_SECONDS = 2.0
_LOCK_PATIENCE_SECONDS = 900.0
"""After this wait a lock is taken for one that a dead machine left on a network file system."""


@dataclass(frozen=True)
class WeightCache(CacheFolder):
    """A folder of entries."""

    @classmethod
    def default(cls) -> WeightCache:
        """The cache in `timm_ghn.storage.paths.cache_directory()`."""
        return cls(cache_directory())

    def open(self, key: str) -> Entry | None:
        """An entry, or None if there is none, or none that can be used."""
        path = self.path(key)
        try:
            return Entry.open(path, key)
        except FileNotFoundError:
            return None
        except UNREADABLE as error:
            if os.path.isdir(path.parent):  # else there is no cache at all
                warn_damaged(path, error)
            return None

    def write(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        blocks: Mapping[str, Prediction],
        facts: Mapping[str, Any],
        *,
        model: str = "",
    ) -> bool:
        """Keep an entry; a cache that cannot be written is a warning, not an error.

        Args:
            key: Key of the entry.
            tensors: Weights that are stored as they are.
            blocks: Weights that are stored as blocks.
            facts: JSON-compatible description.
            model: Name of the model, for those who look at the cache.

        Returns:
            Whether the entry was written.
        """
        return _write(self.path(key), lambda path: write_entry(path, key, tensors, blocks, facts, model))

    def find(self, recipe: str) -> str | None:
        """The key that a recipe led to before, if it is remembered."""
        try:
            return read_recipe(self.recipe_path(recipe))
        except UNREADABLE:
            return None

    def remember(self, recipe: str, key: str) -> None:
        """Note the key that a recipe leads to."""
        data = json.dumps({"key": key, "sha256": recipe_digest(recipe, key)}).encode()
        _write(self.recipe_path(recipe), lambda path: path.write_bytes(data))

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of an entry.

        A lock only saves work: entries are complete when they get their name, whoever writes them. So there is none
        where the file system allows none, and after `_LOCK_PATIENCE_SECONDS` it is done without.
        """
        lock = FileLock(self.lock_path(key), mode=0o666)
        held = self._acquire(lock, key)
        try:
            yield
        finally:
            if held:
                lock.release()

    def _acquire(self, lock: FileLock, key: str) -> bool:
        try:
            self.weights.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=_LOCK_NOTICE_SECONDS)
            except Timeout:
                _logger.info("Waiting for another process that computes the same weights (%s)", lock.lock_file)
                lock.acquire(timeout=_LOCK_PATIENCE_SECONDS)
        except Timeout:
            _logger.warning("Going on without the lock %s, which is held for very long", lock.lock_file)
            return False
        except (OSError, NotImplementedError) as error:
            _logger.debug("No lock for %s: %s", key, error)
            return False
        return True

    # --- upkeep, for `timm-ghn cache` ---

    def entries(self) -> list[upkeep.EntryInfo]:
        """All entries, the last used first."""
        return upkeep.list_entries(self)

    def verify(self) -> Iterator[upkeep.Damage | upkeep.EntryInfo]:
        """Read and hash all entries and recipes; yields each as soon as it is done, as it is or as what is wrong."""
        return upkeep.verify(self)

    def prune(
        self, *, max_bytes: int | None = None, max_age: float | None = None, dry_run: bool = False
    ) -> upkeep.Pruned:
        """Remove what was not used for longest, and what killed processes left. See `upkeep.prune`."""
        return upkeep.prune(self, max_bytes=max_bytes, max_age=max_age, dry_run=dry_run)

    def remove(self, keys: Collection[str], *, dry_run: bool = False) -> upkeep.Pruned:
        """Remove entries with their recipes; those that are in use stay."""
        return upkeep.remove(self, keys, dry_run=dry_run)


def cache_key(inputs: Mapping[str, Any]) -> str:
    """Name of the entry that is determined by these inputs: a SHA-256 over their JSON form and the format."""
    return hashlib.sha256(json.dumps([FORMAT, inputs], sort_keys=True).encode()).hexdigest()


def _write(path: Path, save: Callable[[Path], object]) -> bool:
    """Write a file, all of it or nothing; a failure is a warning.

    Nothing is flushed to the disk here: after a power failure a file may be there without its content, which its
    hash gives away.
    """
    try:
        save_atomically(path, save, durable=False)
    except (OSError, ValueError) as error:
        _logger.warning("The weights cannot be kept in the cache, %s: %s", path, error)
        return False
    return True
