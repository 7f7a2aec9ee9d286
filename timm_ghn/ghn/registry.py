"""The GHNs that are known by name, and loading one: by name, by path, from the Hub, or the default.

torch is imported when a GHN is loaded, so that `timm-ghn ghns` answers at once.
"""

from __future__ import annotations

import http.client
import importlib.resources
import io
import logging
import multiprocessing
import os
import threading
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from timm_ghn.errors import CheckpointError, DownloadError, TimmGhnError, UnknownGhnError
from timm_ghn.ghn.config import HUB_FILE, MAX_PARAMETERS
from timm_ghn.request import HUB_PREFIX
from timm_ghn.storage.paths import cache_directory, git_blob_sha1, is_offline
from timm_ghn.text import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from timm_ghn.ghn.model import GHN
    from timm_ghn.hub.client import HubSource

_logger = logging.getLogger(__name__)

DEFAULT = "ghn2-imagenet"
BUNDLED = "bundled"
URL_VARIABLE = "TIMM_GHN_GHN_URL"
"""Environment variable that names a mirror of the ppuda repository's files."""
PPUDA = "https://raw.githubusercontent.com/facebookresearch/ppuda/4673a42507a9dcd0a5ae04e74599e8c92af689b9"
GHN3 = "SamsungSAILMontreal/ghn3"
"""Hub repository of the authors of GHN-3."""
DEFAULT_VARIABLE = "TIMM_GHN"
"""Environment variable that names the default GHN."""
MAX_GHN_BYTES = 5 * MAX_PARAMETERS
"""Largest GHN that is taken from the Hub: float32, and a header."""
MAX_DOWNLOAD_BYTES = 64 * 2**20
"""Largest file that is taken from ppuda's repository."""
SILENCE_SECONDS = 5.0
"""How long that server may say nothing."""


@dataclass(frozen=True)
class NamedGHN:
    """A GHN that is known by name.

    Attributes:
        name: The name.
        description: What it is, in a line.
        trained_on: Data set.
        num_parameters: Number of its weights, 4 bytes each in the published file.
        license: SPDX name of its licence.
        accuracy: What its authors published, in percent; the networks were not trained unless it says so.
        file: Published file: a path in ppuda's repository, or in the Hub repository; None for the bundled GHN.
        git_blob_sha1: SHA-1 that git gives the content of a file of ppuda's; None elsewhere.
        repository: Hub repository; None for ppuda's files and the bundled GHN.
        revision: Branch, tag or commit of the Hub repository; None for its default branch.
    """

    name: str
    description: str
    trained_on: str
    num_parameters: int
    license: str = "mit"
    accuracy: str = ""
    file: str | None = None
    git_blob_sha1: str | None = None
    repository: str | None = None
    revision: str | None = None

    @property
    def full_name(self) -> str:
        """The name that `load_ghn` takes, with the revision."""
        return self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def path(self) -> Path:
        """File that the GHN is read from: in the cache, converted to safetensors, or inside of this package."""
        if self.file is None:
            return Path(str(importlib.resources.files("timm_ghn.ghn") / "bundled" / HUB_FILE))
        return cache_directory() / "ghns" / f"{self.full_name.replace('/', '-')}.safetensors"

    @property
    def manual_path(self) -> Path:
        """Where a user may put the published file by hand."""
        return self.path.with_name(Path(self.file or self.path).name)

    @property
    def url(self) -> str:
        """Where the published file is downloaded from."""
        if self.repository is not None:
            return f"hf-hub:{self.repository}{self.full_name.removeprefix(self.name)}/{self.file}"
        return f"{(os.environ.get(URL_VARIABLE) or PPUDA).rstrip('/')}/{self.file}"

    @property
    def on_disk(self) -> bool:
        """Whether the GHN can be loaded without the network."""
        if self.path.is_file() or self.manual_path.is_file():
            return True
        if self.repository is None or self.file is None:
            return False
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.repository, self.file, revision=self.revision), str)


def _ppuda(name: str, description: str, size: int, top1: str, sha1: str) -> NamedGHN:
    data, file = ("CIFAR-10" if name.endswith("cifar10") else "ImageNet"), f"checkpoints/{name.replace('-', '_')}.pt"
    return NamedGHN(name, description, data, size, "mit", f"ResNet-50 {top1}", file, sha1)


def _ghn3(name: str, description: str, size: int, accuracy: str, file: str) -> NamedGHN:
    return NamedGHN(name, description, "ImageNet", size, "mit", accuracy, file, repository=GHN3)


_GHN2 = "GHN-2 of Knyazev et al. 2021, the one of the GHN-Orth paper"
_GHN1 = "GHN-1: no virtual edges, scaling or layer norm"
_MLP = "Baseline whose nodes do not see each other"
_ALL = (
    _ppuda(DEFAULT, _GHN2, 1_749_464, "5.3 (top-5)", "7b5d6733e9fdf0069bc6186cad3a0b1b54fda68d"),
    _ghn3("ghn3-t", "GHN-3-T/m8 of Knyazev et al. 2023", 6_906_632, "ResNet-50 10.4", "ghn3tm8.pt"),
    _ghn3("ghn3-s", "GHN-3-S/m8", 35_810_368, "", "ghn3sm8.pt"),
    _ghn3("ghn3-l", "GHN-3-L/m8", 214_668_960, "", "ghn3lm8.pt"),
    _ghn3("ghn3-xl", "GHN-3-XL/m16, the strongest", 654_365_184, "ResNet-50 20.0; 43.7 after 1 epoch", "ghn3xlm16.pt"),
    _ghn3("ghn2", "GHN-2 as the authors of GHN-3 use it", 1_749_464, "ResNet-50 1.1", "ghn2.pt"),
    _ppuda("ghn1-imagenet", _GHN1, 1_749_368, "6.9 (top-5)", "985ebeb350c4ae79e0553d88c07d986fa69c227b"),
    _ppuda("ghn2-cifar10", "GHN-2 for small images", 1_620_764, "58.6", "4f290e0fad1b73066eeabb50be52e0c377d0b15b"),
    _ppuda("ghn1-cifar10", "GHN-1 for small images", 1_620_668, "19.2", "0c97a283aefc0445dd357c08f1b36698149b8013"),
    _ppuda("mlp-cifar10", _MLP, 1_614_396, "17.7", "3a987c98b437fd2dfc603668a846f2b632ed28a3"),
    NamedGHN(BUNDLED, "Small Graphormer that comes with timm-ghn", "Tiny-ImageNet, 32 x 32", 3_798_886, "apache-2.0"),
)
NAMED_GHNS: dict[str, NamedGHN] = {entry.name: entry for entry in _ALL}
"""The GHNs that `load_ghn` knows by name."""

FAILURES: list[TimmGhnError] = []
"""Why this process cannot have the published default GHN, once that was tried."""
_lock = threading.Lock()
"""Held while the default GHN is looked for."""


def list_ghns() -> list[NamedGHN]:
    """The GHNs that are known by name."""
    return list(NAMED_GHNS.values())


def load_ghn(source: str | os.PathLike[str] | nn.Module, *, download: bool = True, shared: bool = False) -> GHN:
    """Load a GHN.

    Args:
        source: A name of `list_ghns` (for GHNs of the Hub also "name@revision"), the path of a checkpoint of ppuda's or
            ghn3's or of a safetensors file, "hf-hub:organization/name[@revision]", or a `GHN`, which is returned as it
            is.
        download: Whether the network may be used; `HF_HUB_OFFLINE=1` forbids it as well.
        shared: Whether the GHN may be one that this process keeps and hands out again. It must then not be changed.

    Returns:
        The GHN, float32 on the CPU and in eval mode, with `info` set.

    Raises:
        UnknownGhnError: If the source is neither a known name nor a file.
        DownloadError: If a published file is not on disk and cannot be fetched, or is not what was published.
        CheckpointError: If a file is damaged or is not a GHN.
    """
    from timm_ghn.ghn import checkpoint
    from timm_ghn.ghn.model import GHN

    if isinstance(source, GHN):
        return source
    if isinstance(source, os.PathLike):
        return checkpoint.read(source, shared=shared)
    if not isinstance(source, str):
        raise CheckpointError(f"{type(source).__name__} is not a GHN, nor the name or path of one")
    if source.startswith(HUB_PREFIX):
        from timm_ghn.hub.client import HubSource

        return _called(checkpoint.read(_fetch(HubSource.parse(source), HUB_FILE, download)), source)
    entry = find_named(source)
    if entry is not None:
        return _load_named(entry, download and not is_offline(), shared)
    path = Path(source).expanduser()
    if path.is_file():
        return checkpoint.read(path, shared=shared)
    raise UnknownGhnError(
        f"no GHN is named {source!r}, and there is no such file{did_you_mean(source, NAMED_GHNS) or '.'} "
        f"Known names: {', '.join(NAMED_GHNS)}; also a path or hf-hub:organization/name"
    )


def find_named(source: str) -> NamedGHN | None:
    """The entry of a name, or of "name@revision" for a GHN of the Hub; None if there is none."""
    name, _, revision = source.partition("@")
    entry = NAMED_GHNS.get(name)
    if entry is None or not revision:
        return NAMED_GHNS.get(source)
    return replace(entry, revision=revision) if entry.repository is not None else None


def default_ghn(*, shared: bool = False) -> GHN:
    """The GHN that is used when none is named.

    The environment variable `TIMM_GHN` names it. Otherwise it is "ghn2-imagenet" if that is on disk or can be
    fetched, which is tried once per process, and else the bundled one, with one warning
    per process that is not the child of another one.

    Args:
        shared: As of `load_ghn`.

    Raises:
        UnknownGhnError: If `TIMM_GHN` is neither a known name nor a file.
        DownloadError: If what `TIMM_GHN` names cannot be fetched, or if nothing is and there is no bundled GHN.
        CheckpointError: If a file is damaged or is not a GHN.
    """
    chosen = os.environ.get(DEFAULT_VARIABLE)
    if chosen:
        return load_ghn(chosen, shared=shared)
    with _lock:
        try:
            return load_ghn(DEFAULT, download=not FAILURES, shared=shared)
        except (DownloadError, CheckpointError) as error:
            is_first_failure = not FAILURES
            if is_first_failure:
                FAILURES.append(error)
        reason = FAILURES[0]
        if not NAMED_GHNS[BUNDLED].on_disk:
            raise DownloadError(f"{reason} (this installation has no bundled GHN to fall back on)") from reason
        if is_first_failure:
            is_main = multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0"
            _logger.log(
                logging.WARNING if is_main else logging.DEBUG,
                "Using the small GHN that comes with timm-ghn, because the published one is not available: %s. "
                "Set %s=%s to choose it without this message",
                reason,
                DEFAULT_VARIABLE,
                BUNDLED,
            )
    return load_ghn(BUNDLED, shared=shared)


def _fetch(source: HubSource, file: str, online: bool) -> Path:
    """A file of a repository in huggingface_hub's cache, downloaded there if need be."""
    from timm_ghn.hub.client import Snapshot, fetch, look_up_or_cached

    snapshot = look_up_or_cached(source) if online else Snapshot(source, None, {})
    if snapshot.is_online and file == HUB_FILE and file not in snapshot.files:
        raise DownloadError(
            f"{source} has no {HUB_FILE}. Pickled checkpoints (.pt) are not read from the Hub: "
            "download the file yourself, and load it by its path"
        )
    return fetch(snapshot, file, limit=MAX_GHN_BYTES)


def _load_named(entry: NamedGHN, online: bool, shared: bool) -> GHN:
    """Load from the cache, from a file put there by hand, or from the network, in this order."""
    from timm_ghn.ghn import checkpoint

    if entry.file is None or entry.path.is_file():
        try:
            return _called(checkpoint.read(entry.path, shared=shared), entry.full_name)
        except CheckpointError as error:
            if entry.file is None:
                raise
            _logger.warning("Ignoring a damaged file in the cache: %s", error)
    if entry.manual_path.is_file():
        return _convert(entry, entry.manual_path)
    if entry.repository is not None and entry.file is not None:
        from timm_ghn.hub.client import HubSource

        try:
            return _convert(entry, _fetch(HubSource(entry.repository, entry.revision), entry.file, online))
        except DownloadError as error:
            raise _download_error(entry, str(error)) from error
    if not online:
        raise _download_error(entry, "the network may not be used")
    return _convert(entry, None)


def _convert(entry: NamedGHN, path: Path | None) -> GHN:
    """Verify a published file, or a download without one, parse it, and keep it in the cache as safetensors."""
    from timm_ghn.ghn import checkpoint

    origin = "what arrived" if path is None else str(path)
    try:
        with io.BytesIO(_download(entry)) if path is None else open(path, "rb") as file:
            metadata = {}
            if entry.git_blob_sha1 is not None:
                found = git_blob_sha1(file.read(MAX_DOWNLOAD_BYTES + 1))
                if found != entry.git_blob_sha1:
                    reason = f"{origin} has git hash {found}, not the published {entry.git_blob_sha1}"
                    raise _download_error(entry, reason)
                metadata = {"git_blob_sha1": found}
            ghn = checkpoint.parse(file, origin if entry.git_blob_sha1 is None else entry.name)
    except DownloadError:
        raise
    except OSError as error:
        raise CheckpointError(f"{origin} cannot be read: {error.strerror or error}") from error
    metadata = {**(ghn.info.metadata if ghn.info else {}), **metadata}
    try:
        checkpoint.write_safetensors(ghn, entry.path, metadata)
    except OSError as error:
        _logger.warning("Cannot keep GHN %s in %s: %s", entry.name, entry.path, error)
    return _called(ghn, entry.full_name)


def _called(ghn: GHN, name: str) -> GHN:
    """The GHN with the name that loads it again."""
    if ghn.info is not None:
        ghn.info = replace(ghn.info, name=name)
    return ghn


def _download_error(entry: NamedGHN, reason: str) -> DownloadError:
    return DownloadError(
        f"GHN {entry.name} could not be fetched from {entry.url}: {reason}. "
        f"You can put the file there by hand: {entry.manual_path}"
    )


def _download(entry: NamedGHN) -> bytes:
    """The content of a file of ppuda's repository, bounded in size and silence.

    Raises:
        DownloadError: If the server cannot be reached, stalls, or sends too much or too little.
    """
    _logger.info("Downloading GHN %s from %s", entry.name, entry.url)
    data, announced = bytearray(), 0
    try:
        with urllib.request.urlopen(entry.url, timeout=SILENCE_SECONDS) as response:
            announced = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=announced, desc=entry.name, unit="B", unit_scale=True, delay=2, disable=None) as progress:
                while max(announced, len(data)) <= MAX_DOWNLOAD_BYTES and (chunk := response.read(1 << 16)):
                    data += chunk
                    progress.update(len(chunk))
    except TimeoutError as error:
        raise _download_error(entry, "the server does not answer") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise _download_error(entry, str(error) or type(error).__name__) from error
    if max(announced, len(data)) > MAX_DOWNLOAD_BYTES:
        raise _download_error(entry, "the server sends more than any published GHN has")
    if len(data) < announced:
        raise _download_error(entry, f"the connection ended after {len(data):,} of {announced:,} bytes")
    return bytes(data)
