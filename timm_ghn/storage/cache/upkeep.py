"""What people do with a cache: look at it, verify it, make it smaller."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from timm_ghn.errors import CacheError
from timm_ghn.storage.cache.entry import UNREADABLE, Entry, read_header
from timm_ghn.storage.cache.folder import CacheFolder, read_recipe
from timm_ghn.storage.reader import TensorReader

_logger = logging.getLogger(__name__)

STALE_SECONDS = 3600.0
"""Age at which a temporary file is taken for one that a killed process left."""
_TEMPORARY = re.compile(r"\..*\.[0-9]+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class EntryInfo:
    """An entry as `timm-ghn cache ls` shows it.

    Attributes:
        key: Its name.
        path: Its file.
        size: Bytes.
        last_use: Seconds since the epoch; not later than now, whatever the clocks said when it was used.
        made: What made it, as far as known: model, method, version, ghn, ghn_hash, noise, start_layer, num_layers and
            seed.
        problem: Why it cannot be used; empty if nothing is known against it.
    """

    key: str
    path: Path
    size: int
    last_use: float
    made: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what was written.

    Attributes:
        path: The file.
        problem: What is wrong with it.
    """

    path: Path
    problem: str


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be.

    Attributes:
        removed: Entries.
        in_use: Entries that should go, but are locked by a process or cannot be removed.
        leftovers: Temporary files, unused locks, and recipes of entries that are gone.
        freed: Bytes of all that was removed.
        kept: Bytes of the entries that stay.
    """

    removed: tuple[EntryInfo, ...]
    in_use: tuple[EntryInfo, ...]
    leftovers: tuple[Path, ...]
    freed: int
    kept: int


def list_entries(cache: CacheFolder) -> list[EntryInfo]:
    """All entries, the last used first. Tensors are not read."""
    now = time.time()
    found = [_info(path, now) for path in _files(cache.weights) if _is_entry(path)]
    return sorted((info for info in found if info is not None), key=lambda info: (-info.last_use, info.key))


def verify(cache: CacheFolder) -> Iterator[Damage | EntryInfo]:
    """Read and hash all entries and recipes; yields each as soon as it is done, as it is or as what is wrong."""
    for info in list_entries(cache):
        try:
            Entry.open(info.path, info.key).verify()
        except FileNotFoundError:
            continue  # somebody removed it meanwhile
        except UNREADABLE as error:
            yield Damage(info.path, _reason(error))
        else:
            yield info
    for path in _files(cache.recipes):
        if path.suffix == ".json":
            try:
                read_recipe(path)
            except FileNotFoundError:
                continue
            except UNREADABLE as error:
                yield Damage(path, _reason(error))


def prune(
    cache: CacheFolder, *, max_bytes: int | None = None, max_age: float | None = None, dry_run: bool = False
) -> Pruned:
    """Remove what was not used for longest, and what killed processes left.

    Args:
        cache: The cache.
        max_bytes: Size that all entries together may keep; None for any.
        max_age: Seconds since the last use after which an entry goes; None for any. An entry whose last use lies in
            the future, because a clock was wrong, counts as used now, and its time is corrected.
        dry_run: Whether nothing is removed.

    Returns:
        What was removed, or would be.
    """
    now = time.time()
    infos = list_entries(cache)
    if not dry_run:
        _correct_times(infos, now)
    total = sum(info.size for info in infos)
    chosen: list[EntryInfo] = []
    in_use: list[EntryInfo] = []
    for info in reversed(infos):
        too_old = max_age is not None and now - info.last_use > max_age
        too_much = max_bytes is not None and total > max_bytes
        if not (too_old or too_much):
            continue
        if _remove_entry(cache, info, dry_run):
            chosen.append(info)
            total -= info.size
        else:
            in_use.append(info)
    return _finish(cache, chosen, in_use, infos, dry_run)


def remove(cache: CacheFolder, keys: Collection[str], *, dry_run: bool = False) -> Pruned:
    """Remove entries with their recipes; those that are in use stay.

    Args:
        cache: The cache.
        keys: Keys, or beginnings of at least 4 characters that belong to one entry.
        dry_run: Whether nothing is removed.

    Raises:
        CacheError: If a key belongs to no entry or to several. Nothing is removed then.
    """
    infos = list_entries(cache)
    wanted = {_match(key, infos).key for key in keys}
    chosen: list[EntryInfo] = []
    in_use: list[EntryInfo] = []
    for info in infos:
        if info.key in wanted:
            (chosen if _remove_entry(cache, info, dry_run) else in_use).append(info)
    return _finish(cache, chosen, in_use, infos, dry_run)


def leftovers(cache: CacheFolder) -> list[Path]:
    """Temporary files that nobody writes any more."""
    now = time.time()
    return [path for folder in (cache.weights, cache.recipes) for path in _files(folder) if _is_stale(path, now)]


@dataclass
class _Sizes:
    """Adds up what is removed."""

    freed: int = 0
    paths: list[Path] = field(default_factory=list)


def _finish(
    cache: CacheFolder,
    removed: Collection[EntryInfo],
    in_use: Collection[EntryInfo],
    infos: Collection[EntryInfo],
    dry_run: bool,
) -> Pruned:
    """Remove what belongs to no entry any more, and sum up."""
    gone = {info.key for info in removed}
    staying = {info.key for info in infos} - gone
    sizes = _Sizes(sum(info.size for info in removed))
    for path in [*leftovers(cache), *_dangling_recipes(cache, gone)]:
        _discard(path, sizes, dry_run)
    for path in _files(cache.weights):
        key = path.name[1:].removesuffix(".lock")
        if path.suffix == ".lock" and path.name.startswith(".") and key not in staying:
            _discard_lock(path, sizes, dry_run)
    kept = sum(info.size for info in infos if info.key in staying)
    return Pruned(tuple(removed), tuple(in_use), tuple(sizes.paths), sizes.freed, kept)


def _info(path: Path, now: float) -> EntryInfo | None:
    """Description of an entry; None if it is gone."""
    try:
        status = path.lstat()
    except OSError:
        return None
    made: dict[str, Any] = {}
    problem = ""
    try:
        with TensorReader(path) as file:
            made = _made(read_header(file.metadata))
    except UNREADABLE as error:
        problem = _reason(error)
    return EntryInfo(path.stem, path, status.st_size, min(status.st_mtime, now), made, problem)


def _made(header: Mapping[str, Any]) -> dict[str, Any]:
    facts = header["facts"]
    names = ("method", "version", "ghn", "ghn_hash", "noise", "start_layer", "num_layers", "seed")
    provenance = facts["provenance"]
    return {"model": header.get("model"), **{name: provenance.get(name) for name in names}}


def _remove_entry(cache: CacheFolder, info: EntryInfo, dry_run: bool) -> bool:
    """Remove an entry unless it is locked; returns whether it is gone, or could go."""
    lock = _unlocked(cache.lock_path(info.key))
    if lock is None:
        return False
    try:
        if not dry_run:
            info.path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("%s cannot be removed: %s", info.path, error.strerror or error)
        return False
    finally:
        lock.release()
    return True


def _unlocked(path: Path) -> FileLock | None:
    """A lock that nobody else holds, which has to be released; None if somebody does.

    No lock file is created for the sake of asking, and where locks do not work, nobody holds any.
    """
    lock = FileLock(path, mode=0o666)
    if path.exists():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except (OSError, NotImplementedError) as error:
            _logger.debug("no lock %s: %s", path, error)
    return lock


def _discard_lock(path: Path, sizes: _Sizes, dry_run: bool) -> None:
    """Remove a lock file that nobody holds.

    Somebody who waits for it meanwhile gets a lock that no longer excludes others; then the same is computed twice.
    """
    lock = _unlocked(path)
    if lock is not None:
        try:
            _discard(path, sizes, dry_run)
        finally:
            lock.release()


def _discard(path: Path, sizes: _Sizes, dry_run: bool) -> None:
    try:
        size = path.lstat().st_size
        if not dry_run:
            path.unlink()
    except OSError as error:
        _logger.debug("cannot remove %s: %s", path, error)
        return
    sizes.freed += size
    sizes.paths.append(path)


def _dangling_recipes(cache: CacheFolder, gone: Collection[str]) -> Iterator[Path]:
    """Recipes that are damaged, or whose entry is not there any more."""
    for path in _files(cache.recipes):
        if path.suffix == ".json":
            try:
                key = read_recipe(path)
            except FileNotFoundError:
                continue
            except UNREADABLE:
                yield path
                continue
            if key in gone or not cache.path(key).exists():
                yield path


def _match(key: str, infos: Iterable[EntryInfo]) -> EntryInfo:
    """The entry of a key or of its beginning.

    Raises:
        CacheError: If there is none, or several.
    """
    found = [info for info in infos if info.key == key or (len(key) >= 4 and info.key.startswith(key))]
    if len(found) != 1:
        raise CacheError(
            f"{key} belongs to {len(found)} entries; `timm-ghn cache ls` lists them"
            if found
            else f"no entry has the key {key} (or begins with it, in 4 characters at least)"
        )
    return found[0]


def _correct_times(infos: Iterable[EntryInfo], now: float) -> None:
    """Set a last use that lies in the future to now."""
    for info in infos:
        try:
            if info.path.lstat().st_mtime > now:
                os.utime(info.path, (now, now))
        except OSError as error:
            _logger.debug("cannot touch %s: %s", info.path, error)


def _is_entry(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.name.startswith(".")


def _is_stale(path: Path, now: float) -> bool:
    """Whether a file is a temporary one that has not been written to for long, or was made in the far future."""
    if not _TEMPORARY.fullmatch(path.name):
        return False
    try:
        return abs(now - path.lstat().st_mtime) > STALE_SECONDS
    except OSError:
        return False


def _files(folder: Path) -> list[Path]:
    """Files of a folder in the order of their names; none if it cannot be listed."""
    try:
        return sorted(Path(item.path) for item in os.scandir(folder) if not item.is_dir(follow_symlinks=False))
    except OSError as error:
        _logger.debug("cannot list %s: %s", folder, error)
        return []


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "it is not JSON"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
