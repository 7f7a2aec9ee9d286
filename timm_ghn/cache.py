"""Results of initializations on disk: safetensors files, addressed by everything that determines them.

An entry is one file, `<cache>/weights/<key>.safetensors`. It holds post-processed weights as they are and predicted
ones as the small blocks that they are tiled from, which makes it a third of the model's size and quicker to read than
the model is to fill with random numbers. It is written under another name and renamed, so that it is there whole or
not at all, and carries its key and the SHA-256 of every tensor: one that does not match is a logged miss, never a
wrong weight. A lock beside it lets one of many processes compute while the others wait.

`<cache>/recipes/<recipe>.json` remembers the key that a call of `create_model` led to, so that the next one need not
record the model's graph to find its entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from timm_ghn.errors import TimmGhnError
from timm_ghn.ghn.model import Prediction
from timm_ghn.graph import Layout, Role, Target
from timm_ghn.paths import cache_directory

_logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the entries' format; another one is a miss."""
_METADATA_KEY = "timm_ghn"
_LOCK_NOTICE_SECONDS = 2.0
_UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, TimmGhnError)
"""What reading a file of any content may raise."""


@dataclass(frozen=True)
class Entry:
    """An entry that is there and of the right format; its tensors are verified when they are copied.

    Attributes:
        path: The file.
        facts: What was stored with the weights.
        digests: SHA-256 by name.
        tiles: Shape, kernel and layout, by name, of weights that are stored as blocks.
    """

    path: Path
    facts: Mapping[str, Any]
    digests: Mapping[str, str]
    tiles: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights."""
        return frozenset(self.digests)

    def copy_to(self, parameters: Mapping[str, Tensor]) -> bool:
        """Verify all weights and write them into existing tensors.

        Returns:
            Whether all of them were written. If not, some may have been, and have to be computed.
        """
        workers = torch.get_num_threads()
        names = sorted(self.digests, key=lambda name: -parameters[name].numel())
        try:
            with ThreadPoolExecutor(max_workers=workers) as pool:
                for _ in pool.map(
                    lambda part: self._copy(part, parameters), [names[i::workers] for i in range(workers)]
                ):
                    pass
        except _UNREADABLE as error:
            _warn_damaged(self.path, error)
            return False
        _touch(self.path)
        return True

    def _copy(self, names: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
        """Write some of the weights; the file's header is read once.

        Raises:
            ValueError: If a hash or a shape is another one.
        """
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                tensor: Tensor = file.get_tensor(name)
                if _digest(tensor) != self.digests[name]:
                    raise ValueError(f"the content of {name} does not match its hash")
                self._place(name, tensor, parameters[name])

    def _place(self, name: str, tensor: Tensor, parameter: Tensor) -> None:
        tile = self.tiles.get(name)
        if tile is not None:
            target = Target(name, tuple(tile["shape"]), Role.WEIGHT, Layout(tile["layout"]))
            Prediction(target, tensor, tuple(tile["kernel"])).write_(parameter)
        elif tensor.shape == parameter.shape:
            parameter.copy_(tensor)
        else:
            raise ValueError(f"{name} has another shape")


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
        return cls(cache_directory())

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.root / "weights" / f"{key}.safetensors"

    def open(self, key: str) -> Entry | None:
        """An entry, or None if there is none of this format."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_METADATA_KEY])
                names = set(file.keys())
            if header["format"] != FORMAT or header["key"] != key or names != set(header["sha256"]):
                raise ValueError("it was made by another version or for something else")
            return Entry(path, dict(header["facts"]), dict(header["sha256"]), dict(header["tiles"]))
        except _UNREADABLE as error:
            _warn_damaged(path, error)
            return None

    def write(
        self, key: str, tensors: Mapping[str, Tensor], blocks: Mapping[str, Prediction], facts: Mapping[str, Any]
    ) -> bool:
        """Keep an entry; a cache that cannot be written is a warning, not an error.

        Args:
            key: Key of the entry.
            tensors: Weights that are stored as they are.
            blocks: Weights that are stored as blocks.
            facts: JSON-compatible description.

        Returns:
            Whether the entry was written.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        stored.update({name: prediction.block.detach().cpu().contiguous() for name, prediction in blocks.items()})
        tiles = {
            name: {"shape": p.target.shape, "kernel": p.kernel, "layout": p.target.layout.value}
            for name, p in blocks.items()
        }
        header = {"format": FORMAT, "key": key, "sha256": _digests(stored), "tiles": tiles, "facts": dict(facts)}

        def save(path: Path) -> None:
            save_file(stored, path, {_METADATA_KEY: json.dumps(header)})
            path.chmod(0o666 & ~_umask())  # save_file makes files private; a cache may be shared

        return _write(self.path(key), save)

    def find(self, recipe: str) -> str | None:
        """The key that a recipe led to before, if it is remembered."""
        try:
            key = json.loads((self.root / "recipes" / f"{recipe}.json").read_text())["key"]
        except _UNREADABLE:
            return None
        return key if isinstance(key, str) and key.isalnum() else None

    def remember(self, recipe: str, key: str) -> None:
        """Note the key that a recipe leads to."""
        data = json.dumps({"key": key}).encode()
        _write(self.root / "recipes" / f"{recipe}.json", lambda path: path.write_bytes(data))

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of an entry; without one where the file system allows none."""
        lock = FileLock(self.root / "weights" / f".{key}.lock")
        try:
            (self.root / "weights").mkdir(parents=True, exist_ok=True)
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


def _write(path: Path, save: Callable[[Path], object]) -> bool:
    """Have a file written under another name, and give it its own; a failure is a warning and leaves nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, path)
        return True
    except (OSError, SafetensorError) as error:
        _logger.warning("The weights cannot be kept in the cache, %s: %s", path, error)
        return False
    finally:
        _remove(temporary)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes; hashlib works outside of the interpreter's lock."""
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(tensors[name]), names), strict=True))


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _warn_damaged(path: Path, error: Exception) -> None:
    if isinstance(error, PermissionError):
        _logger.warning("The cache entry %s cannot be read: %s", path, error)
    else:
        _logger.warning("Ignoring a damaged cache entry, %s: %s. It will be computed again", path, error)


def _touch(path: Path) -> None:
    """Note the time of the last use, where the file system allows that."""
    try:
        os.utime(path)
    except OSError as error:
        _logger.debug("cannot touch %s: %s", path, error)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _logger.debug("cannot remove %s: %s", path, error)
