"""A file of results, one JSON line for each stage of a model, that a later run goes on with."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout

from timm_ghn._version import __version__
from timm_ghn.errors import TimmGhnError
from zoo_survey.examine import Settings
from zoo_survey.records import Entry

_logger = logging.getLogger(__name__)


class ResultsError(TimmGhnError, ValueError):
    """A file of results belongs to another run."""


@dataclass(frozen=True)
class RunInfo:
    """Where results come from.

    Attributes:
        command: How the script was called.
        date: Day on which it was started, in UTC.
        machine: Processor and system.
        cores: Cores that could be used.
        versions: Of python, torch, timm and timm-ghn.
        settings: How models were examined.
    """

    command: str
    date: str
    machine: str
    cores: int
    versions: Mapping[str, str]
    settings: Settings

    @classmethod
    def now(cls, command: str, settings: Settings) -> RunInfo:
        """A run that starts now, here."""
        versions = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "timm-ghn": __version__,
        }
        day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        return cls(command, day, _machine(), _cores(), versions, settings)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunInfo:
        """Reads what `dataclasses.asdict` gives."""
        return cls(**{**data, "settings": Settings(**data["settings"])})

    def belongs_to(self, other: RunInfo, *, mixed: bool = False) -> bool:
        """Whether results of both may stand side by side: of equal settings, and of equal versions.

        Args:
            other: The other run.
            mixed: Whether versions other than timm's may differ.
        """
        compared = ("timm",) if mixed else tuple(self.versions)
        same = all(self.versions.get(name) == other.versions.get(name) for name in compared)
        return same and self.settings == other.settings


def _machine() -> str:
    return f"{platform.machine()} {platform.system()}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclass(frozen=True)
class Results:
    """What a file of results holds.

    Attributes:
        runs: The runs that wrote it, in order; those that add nothing but their date count once.
        entries: All entries, in order.
        damaged: Number of lines that could not be read.
    """

    runs: tuple[RunInfo, ...]
    entries: tuple[Entry, ...]
    damaged: int = 0


def read_results(path: Path) -> Results:
    """Read a file of results. Lines that are torn, as a killed run leaves them, are counted and left out.

    Raises:
        OSError: If there is no such file or it cannot be read.
    """
    runs, entries, damaged = list[RunInfo](), list[Entry](), 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if "run" in data:
                run = RunInfo.from_dict(data["run"])
                if not runs or replace(run, command="", date="") != replace(runs[-1], command="", date=""):
                    runs.append(run)
            else:
                entries.append(Entry.from_dict(data))
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    return Results(tuple(runs), tuple(entries), damaged)


class ResultsWriter:
    """Appends entries to a file of results; each is on the disk before `add` returns.

    Attributes:
        known: What the file held when it was opened.
    """

    def __init__(self, path: Path, known: Results) -> None:
        self.known = known
        self._path = path

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self._append(entry.to_dict())

    def begin(self, info: RunInfo) -> None:
        """Note that a run begins."""
        self._append({"run": asdict(info)})

    def _append(self, data: Mapping[str, Any]) -> None:
        line = f"{json.dumps(data)}\n".encode()
        with open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def open_results(path: Path, info: RunInfo, *, fresh: bool = False, mixed: bool = False) -> Iterator[ResultsWriter]:
    """Open a file of results for a run, to go on with what is in it.

    Args:
        path: The file; it and its folder are created.
        info: The run.
        fresh: Whether what the file holds is thrown away.
        mixed: Whether what other versions of anything but timm have written counts.

    Raises:
        ResultsError: If the file was written with other versions or settings, or another run writes to it now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ResultsError(f"{path}: another run writes to it now; wait for it, or choose another file") from error
    try:
        if fresh:
            path.unlink(missing_ok=True)
        known = read_results(path) if path.exists() else Results((), ())
        for run in known.runs:
            if not info.belongs_to(run, mixed=mixed):
                raise ResultsError(
                    f"{path} was written with {_differences(run, info)}; begin anew, choose another file, or mix "
                    "versions (timm's must be the same)"
                )
        if known.damaged:
            _logger.warning("%s: %d damaged lines are left out and done again", path, known.damaged)
        _end_last_line(path)
        writer = ResultsWriter(path, known)
        writer.begin(info)
        yield writer
    finally:
        lock.release()


def _differences(old: RunInfo, new: RunInfo) -> str:
    """What differs, such as "timm 1.0.15 instead of 1.0.31"."""
    before = {**old.versions, **asdict(old.settings)}
    after = {**new.versions, **asdict(new.settings)}
    names = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)} instead of {after.get(name)}" for name in names)


def _end_last_line(path: Path) -> None:
    """Make sure that what is appended begins a line."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def without_failures(results: Results) -> Results:
    """Results whose failures are forgotten, so that they are tried again."""
    return replace(results, entries=tuple(entry for entry in results.entries if entry.failure is None))
