"""Files that appear as a whole or not at all.

Every file is written under a temporary name in its own folder, which then replaces the real name in one step. An error
or an interruption removes the temporary files. Those of a process that was killed outright are found by their names,
and are removed when the folder is written again, or in a cache when nobody has touched them for an hour.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_SECONDS = 3600.0
"""Age without a write at which a temporary file in a shared folder counts as left behind."""
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}\.tmp")


@contextmanager
def staged(directory: Path, *, durable: bool = True) -> Iterator[Callable[[str], Path]]:
    """Several files of a folder that appear together when the context is left, or not at all.

    Args:
        directory: The folder; created if need be, and removed again after an error if it was.
        durable: Whether to wait until the content is on the disk. Without it, a file may be there without its content
            after a power failure, though not after a crash of the program.

    Yields:
        A function that gives the path to write to for the name of a file.

    Raises:
        OSError: If the folder or a file cannot be written. Files that were there before are then left as they were.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    mark = f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporary: dict[str, Path] = {}
    placed: list[Path] = []

    def place(name: str) -> Path:
        return temporary.setdefault(name, directory / f".{name}{mark}")

    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield place
        for path in temporary.values() if durable else ():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for name, path in temporary.items():
            is_new = not (directory / name).exists()
            os.replace(path, directory / name)
            placed += [directory / name] if is_new else []
        made.clear()
        placed.clear()
    finally:
        for path in (*placed, *temporary.values()):
            with suppress(OSError):
                path.unlink()
        for folder in made:  # only an empty folder can be removed
            with suppress(OSError):
                folder.rmdir()


def save_atomically(path: str | os.PathLike[str], save: Callable[[Path], object], *, durable: bool = True) -> None:
    """Have one file written by `save`, which gets a path at which there is nothing; see `staged`."""
    path = Path(path)
    with staged(path.parent, durable=durable) as place:
        save(place(path.name))


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write one file with this content; see `staged`."""
    save_atomically(path, lambda temporary: temporary.write_bytes(data))


def temporary_files(directory: Path, age: float = 0.0) -> list[Path]:
    """Temporary files in a folder that nobody has written to for `age` seconds: killed processes leave theirs."""
    return [path for path in directory.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name) and is_stale(path, age)]


def is_stale(path: Path, age: float = STALE_SECONDS) -> bool:
    """Whether nobody has written to a file for `age` seconds."""
    try:
        return abs(time.time() - path.lstat().st_mtime) >= age  # a file from the far future is a wrong clock's
    except OSError:
        return False
