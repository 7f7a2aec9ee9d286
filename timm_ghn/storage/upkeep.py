"""The folder of a cache: what is there, and making it smaller. Nothing here needs torch.

`<cache>/weights/<key>.safetensors` is an entry, `<cache>/weights/.<key>.lock` is held while one is computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ghn.errors import CacheError, TimmGhnError
from timm_ghn.storage.atomic import STALE_SECONDS, is_stale, temporary_files
from timm_ghn.storage.header import Header
from timm_ghn.storage.paths import cache_directory

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger(__name__)

DESCRIPTION_KEY, DIGEST_KEY = "timm_ghn", "timm_ghn_sha256"
"""Metadata of an entry: its description as JSON, and the SHA-256 of that text."""
UNREADABLE = (
    OSError,
    TimmGhnError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,  # RecursionError, and what torch raises for impossible shapes
    MemoryError,
    ArithmeticError,  # sizes of zero, or beyond all bounds
)
"""Errors that reading a file of any content may raise."""


@dataclass(frozen=True)
class EntryInfo:
    """An entry as `timm-ghn cache ls` shows it.

    Attributes:
        key: Its name.
        path: Its file.
        size: Bytes.
        last_use: Seconds since the epoch; not later than now, whatever the clocks said when it was used.
        made: What made it, as far as known: the name of the model, and the provenance.
        problem: Why it cannot be used; empty if nothing is known against it.
    """

    key: str
    path: Path
    size: int
    last_use: float
    made: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Pruned:
    """Entries and files that were removed, or would be.

    Attributes:
        removed: Entries.
        failed: Entries that could not be removed.
        leftovers: Temporary files, and locks of no entry.
        freed: Bytes of all that was removed.
        kept: Bytes of the entries that stay.
    """

    removed: tuple[EntryInfo, ...]
    failed: tuple[EntryInfo, ...]
    leftovers: tuple[Path, ...]
    freed: int
    kept: int


@dataclass(frozen=True)
class CacheFolder:
    """The folder of a cache.

    Attributes:
        root: The folder; it need not exist.
    """

    root: Path

    @classmethod
    def default(cls) -> Self:
        """The cache in `timm_ghn.storage.paths.cache_directory()`."""
        return cls(cache_directory())

    @property
    def weights(self) -> Path:
        """Folder of the entries and their locks."""
        return self.root / "weights"

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.weights / f"{key}.safetensors"

    def lock_path(self, key: str) -> Path:
        """Lock file of an entry."""
        return self.weights / f".{key}.lock"

    def entries(self) -> list[EntryInfo]:
        """All entries, the last used first. Tensors are not read."""
        found = [_info(path) for path in self.weights.glob("[!.]*.safetensors")]
        return sorted((info for info in found if info is not None), key=lambda info: (-info.last_use, info.key))

    def leftovers(self) -> list[Path]:
        """Temporary files, and locks of no entry, that nobody has touched for an hour."""
        locks = [path for path in self.weights.glob(".*.lock") if not self.path(path.name[1:-5]).exists()]
        return sorted([*temporary_files(self.weights, STALE_SECONDS), *filter(is_stale, locks)])

    def prune(self, *, max_bytes: int | None = None, max_age: float | None = None, dry_run: bool = False) -> Pruned:
        """Remove what was not used for longest, and what killed processes left.

        Args:
            max_bytes: Size that all entries together may keep; None for any.
            max_age: Seconds since the last use after which an entry goes; None for any.
            dry_run: Whether nothing is removed.
        """
        now, infos, chosen = time.time(), self.entries(), []
        kept = sum(info.size for info in infos)
        for info in reversed(infos):
            if (max_age is not None and now - info.last_use > max_age) or (max_bytes is not None and kept > max_bytes):
                chosen.append(info)
                kept -= info.size
        return self._remove(chosen, infos, dry_run)

    def remove(self, keys: Collection[str], *, dry_run: bool = False) -> Pruned:
        """Remove entries, and what killed processes left.

        Args:
            keys: Keys, or beginnings of at least 4 characters that belong to one entry.
            dry_run: Whether nothing is removed.

        Raises:
            CacheError: If a key belongs to no entry or to several. Nothing is removed then.
        """
        infos = self.entries()
        found = {key: [info for info in infos if len(key) >= 4 and info.key.startswith(key)] for key in keys}
        for key, matches in found.items():
            if len(matches) != 1:
                raise CacheError(
                    f"{len(matches) or 'no'} entries have a key that begins with {key} (4 characters at least)"
                )
        return self._remove({info.key: info for (info,) in found.values()}.values(), infos, dry_run)

    def _remove(self, chosen: Collection[EntryInfo], infos: Collection[EntryInfo], dry_run: bool) -> Pruned:
        """Remove entries with their locks, and leftovers.

        Whether a process holds the lock does not matter: who reads the entry has the file open, and who waits for the
        lock computes once more than needed.
        """
        leftovers = self.leftovers()
        freed = {path: _discard(path, dry_run) for path in [*(info.path for info in chosen), *leftovers]}
        removed = tuple(info for info in chosen if freed[info.path] is not None)
        for info in removed:
            _discard(self.lock_path(info.key), dry_run)
        return Pruned(
            removed=removed,
            failed=tuple(info for info in chosen if freed[info.path] is None),
            leftovers=tuple(path for path in leftovers if freed[path] is not None),
            freed=sum(size or 0 for size in freed.values()),
            kept=sum(info.size for info in infos if info not in removed),
        )


def read_description(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The description in a file's metadata.

    Raises:
        CacheError: If there is none, or it does not have its hash.
    """
    text = metadata.get(DESCRIPTION_KEY)
    if text is None or metadata.keys() != {DESCRIPTION_KEY, DIGEST_KEY}:
        raise CacheError("it is no cache entry, or was made by another version")
    if hashlib.sha256(text.encode(errors="replace")).hexdigest() != metadata[DIGEST_KEY]:
        raise CacheError("its description does not match its hash")
    description = json.loads(text)
    if not isinstance(description, dict):
        raise CacheError("its description is not a table")
    return description


def _info(path: Path) -> EntryInfo | None:
    """Description of an entry; None if it is gone."""
    made: dict[str, Any] = {}
    problem = ""
    try:
        status = path.lstat()
        with open(path, "rb") as file:
            description = read_description(Header.read(file).metadata)
        made = {"model": description["model"], **description["report"]["provenance"]}
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        problem = reason_of(error)
    return EntryInfo(path.stem, path, status.st_size, min(status.st_mtime, time.time()), made, problem)


def _discard(path: Path, dry_run: bool) -> int | None:
    """Remove a file. Returns its size, or None if it cannot be removed."""
    try:
        size = path.lstat().st_size
        if not dry_run:
            path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        _logger.warning("%s cannot be removed: %s", path, error.strerror or error)
        return None
    return size


def reason_of(error: BaseException) -> str:
    """Why an entry cannot be used, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return "it is not JSON"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
