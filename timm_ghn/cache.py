"""Results of initializations on disk: safetensors files, addressed by everything that determines them.

An entry is one file, `<cache>/weights/<key>.safetensors`. It is written under another name and renamed, so that it is
there whole or not at all, and carries its key and the SHA-256 of every tensor: one that does not match is a logged
miss, never a wrong weight. A lock beside it lets one of many processes compute while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_ghn.paths import cache_directory

_logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the entries' format; another one is a miss."""
_METADATA_KEY = "timm_ghn"
_LOCK_NOTICE_SECONDS = 2.0


@dataclass(frozen=True)
class WeightCache:
    """A folder of entries.

    Attributes:
        root: The folder; it need not exist.
    """

    root: Path

    @classmethod
    def default(cls) -> WeightCache:
        """The cache in `timm_ghn.paths.cache_directory()`."""
        return cls(cache_directory() / "weights")

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.root / f"{key}.safetensors"

    def load(self, key: str, destinations: Mapping[str, Tensor]) -> bool:
        """Copy the tensors of an entry, each verified, into existing ones.

        Args:
            key: Key of the entry.
            destinations: Tensors to write by name; the entry has to have these names and shapes and no others.

        Returns:
            Whether all of them were written. If not, some may have been, and have to be computed.
        """
        path = self.path(key)
        if not path.is_file():
            return False
        try:
            header = self._header(path, key, destinations)
            with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
                jobs = [
                    pool.submit(_load_verified, path, name, destination, header["sha256"][name])
                    for name, destination in destinations.items()
                ]
                for job in jobs:
                    job.result()
            os.utime(path)  # the time of the last use
        except PermissionError as error:
            if not os.access(path, os.R_OK):
                _logger.warning("The cache entry %s cannot be read: %s", path, error)
                return False
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _logger.warning("Ignoring a damaged cache entry, %s: %s. It will be computed again", path, error)
            return False
        return True

    @staticmethod
    def _header(path: Path, key: str, destinations: Mapping[str, Tensor]) -> dict[str, Any]:
        """The entry's own description.

        Raises:
            ValueError: If the entry is of another format or for something else.
        """
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA_KEY])
            if header["format"] != FORMAT or header["key"] != key or set(file.keys()) != set(destinations):
                raise ValueError("it was made by another version or for something else")
        return header

    def write(self, key: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> bool:
        """Keep an entry; a cache that cannot be written is a warning, not an error.

        Returns:
            Whether the entry was written.
        """
        path = self.path(key)
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        header = {"format": FORMAT, "key": key, "sha256": _digests(contiguous), "provenance": dict(provenance)}
        temporary = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(contiguous, temporary, {_METADATA_KEY: json.dumps(header)})
            os.replace(temporary, path)
            return True
        except (OSError, SafetensorError) as error:
            _logger.warning("The weights cannot be kept in the cache, %s: %s", path, error)
            return False
        finally:
            _remove(temporary)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of an entry; without one where the file system allows none."""
        lock = FileLock(self.root / f".{key}.lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=_LOCK_NOTICE_SECONDS)
            except Timeout:
                _logger.info("Waiting for another process that computes the same weights (%s)", lock.lock_file)
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            _logger.debug("No lock for %s: %s", key, error)
            yield
            return
        try:
            yield
        finally:
            lock.release()


def cache_key(inputs: Mapping[str, Any]) -> str:
    """Name of the entry that is determined by these inputs: a SHA-256 over their JSON form."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes; hashlib works outside of the interpreter's lock."""
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(tensors[name]), names), strict=True))


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()


def _load_verified(path: Path, name: str, destination: Tensor, digest: str) -> None:
    """Copy one tensor of a file.

    Raises:
        ValueError: If its shape or its hash is another one.
    """
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    if tensor.shape != destination.shape or _digest(tensor) != digest:
        raise ValueError(f"the content of {name} does not match its hash")
    destination.copy_(tensor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _logger.debug("cannot remove %s: %s", path, error)
