"""`timm-ghn doctor`: the state of an installation on one screen, for bug reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from timm_ghn._version import __version__
from timm_ghn.errors import DownloadError, TimmGhnError
from timm_ghn.storage.paths import closest_existing, is_offline
from timm_ghn.text import format_size

HELP = "say what is installed, which GHNs are there, and whether cache and Hub can be used"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handler."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit status 1 if one of them is a problem."""
    findings = diagnose()
    problems = [f"{item.section}, {item.name}: {item.value}" for item in findings if item.is_problem]
    sections: dict[str, list[Finding]] = {}
    for finding in findings:
        sections.setdefault(finding.section, []).append(finding)
    if args.json:
        values = {name: {item.name: item.value for item in section} for name, section in sections.items()}
        print(json.dumps({"ok": not problems, "problems": problems, **values}, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for name, section in sections.items():
            print(name)
            for item in section:
                print(f"{'!' if item.is_problem else ' '} {item.name.ljust(width)}  {item.value}")
        print(f"\nproblems (marked with !): {len(problems)}" if problems else "\nno problems found")
    return 1 if problems else 0


def diagnose() -> list[Finding]:
    """Look at everything; nothing is changed, but for a file that is written into the cache and removed."""
    return [*_versions(), *_device(), _hook(), *_ghns(), _default_ghn(), *_cache(), _hub()]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "timm-ghn", __version__)
    yield Finding("versions", "python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("versions", "system", platform.platform())
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("versions", "packages", ", ".join(found))
    if missing:
        yield Finding("versions", "missing", ", ".join(missing), is_problem=True)


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

    verb = "knows" if is_installed() else "does not know"
    return Finding("hook", "state", f"timm.create_model {verb} init=", is_problem=not is_installed())


def _ghns() -> Iterator[Finding]:
    """The GHNs that have names; published files that were put there by hand are verified and converted."""
    from timm_ghn.ghn.checkpoint import read
    from timm_ghn.ghn.registry import NAMED_GHNS, load_ghn

    for entry in NAMED_GHNS.values():
        if not entry.on_disk:
            yield Finding("GHNs", entry.name, "not on disk", is_problem=entry.file is None)
            continue
        try:
            ghn = read(entry.path, shared=True) if entry.path.is_file() else load_ghn(entry.name, download=False)
            yield Finding("GHNs", entry.name, f"sound, sha256 {ghn.info.hash[:12] if ghn.info else '?'}, {entry.path}")
        except (TimmGhnError, OSError) as error:
            yield Finding("GHNs", entry.name, str(error), is_problem=True)


def _default_ghn() -> Finding:
    """Which GHN an initialization uses that names none, and whether that can be had."""
    from timm_ghn.ghn.registry import BUNDLED, DEFAULT, DEFAULT_VARIABLE, find_named, load_ghn
    from timm_ghn.request import HUB_PREFIX

    chosen = os.environ.get(DEFAULT_VARIABLE)
    name = f"{chosen} ({DEFAULT_VARIABLE})" if chosen else DEFAULT
    entry = find_named(chosen or DEFAULT)
    try:
        load_ghn(chosen or DEFAULT, download=False, shared=True)
    except DownloadError:
        is_hub = name.startswith(HUB_PREFIX) or (entry is not None and entry.repository is not None)
        answer = _answer(_endpoint() if is_hub or entry is None else entry.url)
        if answer == _REACHABLE:
            return Finding("GHNs", "default", f"{name}, not on disk: it is downloaded when it is first used")
        lost = f"{name} is not on disk, and cannot be fetched ({answer})"
        if not chosen:
            lost = f"{BUNDLED}, a small one, because {lost}; {DEFAULT_VARIABLE}={BUNDLED} chooses it for good"
        return Finding("GHNs", "default", lost, is_problem=True)
    except (TimmGhnError, OSError) as error:
        return Finding("GHNs", "default", f"{name} cannot be used: {error}", is_problem=True)
    return Finding("GHNs", "default", name)


def _cache() -> Iterator[Finding]:
    from timm_ghn.storage.upkeep import CacheFolder

    cache = CacheFolder.default()
    settings = [f"{name}={_without_login(os.environ[name])}" for name in _VARIABLES if os.environ.get(name)]
    yield Finding("cache", "settings", " ".join(settings) or "none in the environment")
    folders = (cache.root, cache.weights, cache.root / "ghns")
    folder, problem = next(((path, why) for path in folders if (why := _why_not_writable(path))), (cache.root, ""))
    yield Finding("cache", "folder", f"{folder} ({problem or 'writable'})", is_problem=bool(problem))
    infos = cache.entries()
    free = shutil.disk_usage(closest_existing(cache.root)).free
    total = format_size(sum(info.size for info in infos))
    yield Finding("cache", "entries", f"{len(infos)}, {total}; {format_size(free)} free on the disk")
    damaged = [info for info in infos if info.problem]
    if damaged:
        more = f"{len(damaged)} of the entries are damaged or of another version, and not used: {damaged[0].path}"
        yield Finding("cache", "health", f"{more}: {damaged[0].problem}", is_problem=True)
    else:
        yield Finding("cache", "health", "all headers are sound (`timm-ghn cache verify` reads the rest)")
    stale = cache.leftovers()
    if stale:
        yield Finding("cache", "leftovers", f"{len(stale)} files of killed processes; `timm-ghn cache prune`")


def _why_not_writable(folder: Path) -> str:
    """Why no file can be written into a folder, or into that in which it would be made; empty if one can."""
    try:
        with tempfile.NamedTemporaryFile(dir=closest_existing(folder), prefix=".timm-ghn-doctor."):
            return ""
    except OSError as error:
        return f"not writable: {error.strerror or error}; nothing new is kept there"


def _hub() -> Finding:
    return Finding("Hub", _without_login(_endpoint()), _answer(_endpoint()))


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _answer(url: str) -> str:
    """Whether a server can be reached."""
    if is_offline():
        return "not tried (HF_HUB_OFFLINE)"
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
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return _REACHABLE
    except urllib.error.HTTPError:
        return _REACHABLE
    except (OSError, ValueError) as error:
        return f"not reachable: {getattr(error, 'reason', None) or error}"
