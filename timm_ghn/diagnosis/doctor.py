"""The state of an installation on one screen, for bug reports."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ghn._version import __version__
from timm_ghn.errors import CheckpointError, DownloadError, TimmGhnError
from timm_ghn.text import format_size

if TYPE_CHECKING:
    from timm_ghn.ghn.catalogue import NamedGHN

_REACHABLE = "reachable"
HUB_SECONDS = 3.0
"""How long the Hub may take to answer, and its name to be found."""
_PACKAGES = ("torch", "torchvision", "timm", "safetensors", "huggingface_hub", "filelock", "numpy")
_VARIABLES = ("TIMM_GHN", "TIMM_GHN_CACHE", "TIMM_GHN_GHN_URL", "TIMM_GHN_HUB_ORG", "HF_HOME", "HF_HUB_OFFLINE")
"""Settings that are shown. Tokens are not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        section: What it is about.
        name: What was looked at.
        value: What was found.
        is_problem: Whether something has to be done about it.
    """

    section: str
    name: str
    value: str
    is_problem: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All findings.

    Attributes:
        findings: In the order in which they are shown.
    """

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that something has to be done about."""
        return tuple(finding for finding in self.findings if finding.is_problem)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form: sections of names with values, and the problems."""
        sections: dict[str, dict[str, str]] = {}
        for finding in self.findings:
            sections.setdefault(finding.section, {})[finding.name] = finding.value
        problems = [f"{item.section}, {item.name}: {item.value}" for item in self.problems]
        return {"ok": not problems, "problems": problems, **sections}

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        lines, section = [], ""
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines.append(section)
            lines.append(f"{'!' if finding.is_problem else ' '} {finding.name.ljust(width)}  {finding.value}")
        count = len(self.problems)
        return "\n".join([*lines, "", "no problems found" if not count else f"problems (marked with !): {count}"])


def diagnose(*, network: bool = True) -> Diagnosis:
    """Look at everything; nothing is changed, but for a file that is written into the cache and removed.

    Args:
        network: Whether to try to reach the Hub; `HF_HUB_OFFLINE=1` forbids it as well.
    """
    return Diagnosis((*_versions(), *_device(), _hook(), *_ghns(), _default_ghn(network), *_cache(), _hub(network)))


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "timm-ghn", __version__)
    yield Finding("versions", "python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("versions", "system", platform.platform())
    found = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, version in found.items() if version is None]
    yield Finding("versions", "packages", ", ".join(f"{name} {version}" for name, version in found.items() if version))
    if missing:
        yield Finding("versions", "missing", ", ".join(missing), is_problem=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[Finding]:
    import torch

    # Not in torch 2.2.
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown instructions")()
    yield Finding("device", "cpu", f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("Apple MPS")
    yield Finding("device", "gpu", ", ".join(gpus) or "none")


def _hook() -> Finding:
    from timm_ghn.hook import is_installed

    installed = is_installed()
    text = "timm.create_model knows init=" if installed else "timm.create_model does not know init="
    return Finding("hook", "state", text, is_problem=not installed)


def _ghns() -> Iterator[Finding]:
    from timm_ghn.ghn.catalogue import NAMED_GHNS

    for entry in NAMED_GHNS.values():
        if not entry.on_disk:
            is_bundled = entry.file is None
            yield Finding("GHNs", entry.name, "not on disk", is_problem=is_bundled)
            continue
        try:
            yield Finding("GHNs", entry.name, _verify_ghn(entry))
        except (TimmGhnError, OSError) as error:
            yield Finding("GHNs", entry.name, str(error), is_problem=True)


def _default_ghn(network: bool) -> Finding:
    """Which GHN an initialization uses that names none, and whether that can be had."""
    from timm_ghn.ghn.catalogue import BUNDLED, DEFAULT
    from timm_ghn.ghn.registry import DEFAULT_VARIABLE, HUB_PREFIX, find_named, load_ghn

    chosen = os.environ.get(DEFAULT_VARIABLE)
    name = chosen or DEFAULT
    why = f" ({DEFAULT_VARIABLE})" if chosen else ""
    entry = find_named(name)
    try:
        load_ghn(name, download=False, shared=True)
    except DownloadError:
        is_hub = name.startswith(HUB_PREFIX) or (entry is not None and entry.repository is not None)
        answer = _answer(_endpoint() if is_hub or entry is None else entry.url, network)
        if answer == _REACHABLE:
            return Finding("GHNs", "default", f"{name}{why}, not on disk: it is downloaded when it is first used")
        lost = f"{name}{why} is not on disk, and cannot be fetched ({answer})"
        if not chosen:
            lost = f"{BUNDLED}, a small one, because {lost}; {DEFAULT_VARIABLE}={BUNDLED} chooses it for good"
        return Finding("GHNs", "default", lost, is_problem=True)
    except (TimmGhnError, OSError) as error:
        return Finding("GHNs", "default", f"{name}{why} cannot be used: {error}", is_problem=True)
    return Finding("GHNs", "default", f"{name}{why}")


def _verify_ghn(entry: NamedGHN) -> str:
    """What is known of a GHN on disk, which is read and hashed.

    Raises:
        TimmGhnError, OSError: If it is damaged or cannot be read.
    """
    from timm_ghn.ghn.checkpoint import read
    from timm_ghn.storage.paths import git_blob_sha1

    if entry.path.is_file():
        info = read(entry.path, shared=True).info
        return f"sound, sha256 {info.hash[:12] if info else '?'}, {entry.path}"
    if not entry.manual_path.is_file():
        return f"downloaded, not yet converted, {entry.hub_path}"
    if entry.git_blob_sha1 is None:
        return f"put there by hand, not yet converted, {entry.manual_path}"
    if git_blob_sha1(entry.manual_path.read_bytes()) != entry.git_blob_sha1:
        raise CheckpointError(f"{entry.manual_path} is not the published file")
    return f"the published file, put there by hand, {entry.manual_path}"


def _cache() -> Iterator[Finding]:
    from timm_ghn.storage.upkeep import CacheFolder

    cache = CacheFolder.default()
    settings = [f"{name}={_without_login(os.environ[name])}" for name in _VARIABLES if os.environ.get(name)]
    yield Finding("cache", "settings", " ".join(settings) or "none in the environment")
    access, is_writable = _access(cache.root)
    yield Finding("cache", "folder", f"{cache.root} ({access})", is_problem=not is_writable)
    infos = cache.entries()
    size = sum(info.size for info in infos)
    yield Finding("cache", "entries", f"{len(infos)}, {format_size(size)}{_free(cache.root)}")
    problems = [info for info in infos if info.problem]
    if problems:
        more = f"{len(problems)} of the entries are damaged or of another version, and not used: {problems[0].path}"
        yield Finding("cache", "health", f"{more}: {problems[0].problem}", is_problem=True)
    else:
        yield Finding("cache", "health", "all headers are sound (`timm-ghn cache verify` reads the rest)")
    stale = cache.leftovers()
    if stale:
        yield Finding("cache", "leftovers", f"{len(stale)} files of killed processes; `timm-ghn cache prune`")


def _access(folder: Path) -> tuple[str, bool]:
    """Whether a file can be written into a folder that exists, or the folder be made: in words, and as a truth."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".timm-ghn-doctor."):
            return ("writable" if place == folder.absolute() else "does not exist yet, can be made"), True
    except OSError as error:
        return f"not writable: {error.strerror or error}; nothing new is kept there", False


def _free(folder: Path) -> str:
    for place in (folder, *folder.parents):
        try:
            return f"; {format_size(shutil.disk_usage(place).free)} free on the disk"
        except OSError:
            continue
    return ""


def _hub(network: bool) -> Finding:
    return Finding("Hub", _without_login(_endpoint()), _answer(_endpoint(), network))


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _answer(url: str, network: bool) -> str:
    """Whether a server can be reached."""
    from timm_ghn.storage.paths import is_offline

    if is_offline() or not network:
        return "not tried (HF_HUB_OFFLINE)" if is_offline() else "not tried"
    answers: list[str] = []
    # In a thread, because looking up a name takes no timeout.
    thread = threading.Thread(target=lambda: answers.append(_reach(url)), daemon=True)
    thread.start()
    thread.join(2 * HUB_SECONDS)
    return answers[0] if answers else "not reachable: no answer in time"


def _without_login(text: str) -> str:
    """A URL without the name and password that it may have."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _reach(endpoint: str) -> str:
    """Whether a server answers; whatever its answer is."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return _REACHABLE
    except urllib.error.HTTPError:
        return _REACHABLE
    except (OSError, ValueError) as error:
        return f"not reachable: {getattr(error, 'reason', None) or error}"
