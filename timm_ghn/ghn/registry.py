"""GHNs by name: where the published ones are, how they are fetched and verified, and which one is the default.

The table of names needs no torch, so that `timm-ghn ghns` is quick; functions that load a GHN import it.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.resources
import logging
import multiprocessing
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from timm_ghn.errors import CheckpointError, DownloadError, UnknownGhnError
from timm_ghn.ghn.config import HUB_FILE
from timm_ghn.storage.paths import cache_directory, is_offline
from timm_ghn.text import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from timm_ghn.ghn.model import GHN

_logger = logging.getLogger(__name__)

DEFAULT_VARIABLE = "TIMM_GHN"
"""Environment variable that names the default GHN."""
URL_VARIABLE = "TIMM_GHN_GHN_URL"
"""Environment variable that names a mirror of the ppuda repository's files."""
PUBLISHED_URL = "https://raw.githubusercontent.com/facebookresearch/ppuda/4673a42507a9dcd0a5ae04e74599e8c92af689b9"
DEFAULT = "ghn2-imagenet"
BUNDLED = "bundled"
HUB_PREFIX = "hf-hub:"

MAX_DOWNLOAD_BYTES = 64 * 2**20
CONNECT_SECONDS = 3.0
READ_SECONDS = 10.0
TOTAL_SECONDS = 300.0


@dataclass(frozen=True)
class NamedGHN:
    """A GHN that is known by name.

    Attributes:
        name: The name.
        description: What it is, in a line.
        trained_on: Data set.
        path_in_repository: File in the ppuda repository; None for the one that is part of this package.
        git_blob_sha1: SHA-1 that git gives the file's content; None as well.
    """

    name: str
    description: str
    trained_on: str
    path_in_repository: str | None = None
    git_blob_sha1: str | None = None

    @property
    def path(self) -> Path:
        """File that the GHN is read from: in the cache, converted to safetensors, or inside of this package."""
        if self.path_in_repository is None:
            return Path(str(importlib.resources.files("timm_ghn.ghn") / "bundled" / HUB_FILE))
        return cache_directory() / "ghns" / f"{self.name}.safetensors"

    @property
    def manual_path(self) -> Path:
        """Where a user may put the published file by hand."""
        return self.path.with_name(Path(self.path_in_repository or self.path).name)

    @property
    def url(self) -> str:
        """Where the published file is downloaded from."""
        base = os.environ.get(URL_VARIABLE) or PUBLISHED_URL
        return f"{base.rstrip('/')}/{self.path_in_repository}"

    @property
    def on_disk(self) -> bool:
        """Whether the GHN can be loaded without the network."""
        return self.path.is_file() or self.manual_path.is_file()


NAMED_GHNS: dict[str, NamedGHN] = {
    entry.name: entry
    for entry in (
        NamedGHN(
            DEFAULT,
            "GHN-2 of Knyazev et al. 2021, the one of the GHN-Orth paper",
            "ImageNet",
            "checkpoints/ghn2_imagenet.pt",
            "7b5d6733e9fdf0069bc6186cad3a0b1b54fda68d",
        ),
        NamedGHN(
            "ghn1-imagenet",
            "GHN-1: no virtual edges, scaling or layer norm",
            "ImageNet",
            "checkpoints/ghn1_imagenet.pt",
            "985ebeb350c4ae79e0553d88c07d986fa69c227b",
        ),
        NamedGHN(
            "ghn2-cifar10",
            "GHN-2 for small images",
            "CIFAR-10",
            "checkpoints/ghn2_cifar10.pt",
            "4f290e0fad1b73066eeabb50be52e0c377d0b15b",
        ),
        NamedGHN(
            "ghn1-cifar10",
            "GHN-1 for small images",
            "CIFAR-10",
            "checkpoints/ghn1_cifar10.pt",
            "0c97a283aefc0445dd357c08f1b36698149b8013",
        ),
        NamedGHN(
            "mlp-cifar10",
            "Baseline whose nodes do not see each other",
            "CIFAR-10",
            "checkpoints/mlp_cifar10.pt",
            "3a987c98b437fd2dfc603668a846f2b632ed28a3",
        ),
        NamedGHN(BUNDLED, "Small GHN-2 that comes with timm-ghn", "Tiny-ImageNet, 32 x 32"),
    )
}
"""The GHNs that `load_ghn` knows by name."""


@dataclass(frozen=True)
class GHNRow:
    """A line of `list_ghns`.

    Attributes:
        name: Name for `load_ghn`.
        description: What it is.
        trained_on: Data set.
        on_disk: Whether it can be loaded without the network.
        path: File that it is read from, whether or not that exists yet.
    """

    name: str
    description: str
    trained_on: str
    on_disk: bool
    path: Path


class _State:
    """What this process has tried and said; guarded by `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.unreachable: DownloadError | CheckpointError | None = None
        self.warned = False


_state = _State()


def list_ghns() -> list[GHNRow]:
    """The GHNs that are known by name, and whether they are on disk."""
    return [
        GHNRow(entry.name, entry.description, entry.trained_on, entry.on_disk, entry.path)
        for entry in NAMED_GHNS.values()
    ]


def load_ghn(source: str | os.PathLike[str] | nn.Module, *, download: bool = True) -> GHN:
    """Load a GHN.

    Args:
        source: A name of `list_ghns`, a path of a ppuda checkpoint or safetensors file,
            "hf-hub:organization/name[@revision]", a live ppuda GHN, or a `GHN`, which is returned as it is.
        download: Whether the network may be used; `HF_HUB_OFFLINE=1` forbids it as well.

    Returns:
        The GHN, float32 on the CPU and in eval mode, with `info` set.

    Raises:
        UnknownGhnError: If the source is neither a known name nor a file.
        DownloadError: If a published file is not on disk and cannot be fetched, or is not what was published.
        CheckpointError: If a file is damaged or is not a GHN.
    """
    from torch import nn

    from timm_ghn.ghn import checkpoint
    from timm_ghn.ghn.model import GHN

    if isinstance(source, GHN):
        return source
    if isinstance(source, nn.Module):
        return checkpoint.from_module(source)
    if not isinstance(source, str):
        return checkpoint.read(source)
    if source.startswith(HUB_PREFIX):
        from timm_ghn.ghn.remote import pull_ghn

        return pull_ghn(source, download=download)
    if source in NAMED_GHNS:
        return _load_named(NAMED_GHNS[source], download and not is_offline())
    path = Path(source).expanduser()
    if path.is_file():
        return checkpoint.read(path)
    raise _unknown(source)


def default_ghn() -> GHN:
    """The GHN that is used when none is named.

    The environment variable `TIMM_GHN` names it. Otherwise it is "ghn2-imagenet" if that is on disk or can be
    fetched, which is tried once per process, and else the bundled one, with one warning
    per process that is not the child of another one.

    Raises:
        UnknownGhnError: If `TIMM_GHN` is neither a known name nor a file.
        DownloadError: If what `TIMM_GHN` names cannot be fetched, or if nothing is and there is no bundled GHN.
        CheckpointError: If a file is damaged or is not a GHN.
    """
    chosen = os.environ.get(DEFAULT_VARIABLE)
    if chosen:
        return load_ghn(chosen)
    published = NAMED_GHNS[DEFAULT]
    with _state.lock:
        if _state.unreachable is None or published.on_disk:
            try:
                return load_ghn(DEFAULT, download=_state.unreachable is None)
            except (DownloadError, CheckpointError) as error:
                _state.unreachable = error
        reason = _state.unreachable
        if not NAMED_GHNS[BUNDLED].on_disk:
            raise DownloadError(f"{reason} (this installation has no bundled GHN to fall back on)") from reason
        if not _state.warned:
            _state.warned = True
            is_first = multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0"
            _logger.log(
                logging.WARNING if is_first else logging.DEBUG,
                "Using the small GHN that comes with timm-ghn, because the published one is not available: %s. "
                "Set %s=%s to choose it without this message",
                reason,
                DEFAULT_VARIABLE,
                BUNDLED,
            )
    return load_ghn(BUNDLED)


def _load_named(entry: NamedGHN, online: bool) -> GHN:
    """Load from the cache, from a file put there by hand, or from the network, in this order."""
    from timm_ghn.ghn import checkpoint

    if entry.path_in_repository is None:
        return _named(checkpoint.read(entry.path), entry.name)
    if entry.path.is_file():
        try:
            return _named(checkpoint.read_safetensors(entry.path), entry.name)
        except CheckpointError as error:
            _logger.warning("Ignoring a damaged file in the cache: %s", error)
    if entry.manual_path.is_file():
        return _convert(entry, _read_bounded(entry.manual_path), str(entry.manual_path))
    if not online:
        raise _download_error(entry, "the network may not be used")
    return _convert(entry, _download(entry), "what arrived")


def _convert(entry: NamedGHN, data: bytes, origin: str) -> GHN:
    """Verify a published file, parse it, and keep it in the cache as safetensors."""
    from timm_ghn.ghn import checkpoint

    found = git_blob_sha1(data)
    if found != entry.git_blob_sha1:
        raise _download_error(entry, f"{origin} has git hash {found}, not the published {entry.git_blob_sha1}")
    ghn = checkpoint.parse_ppuda(data, entry.name)
    metadata = {**(ghn.info.metadata if ghn.info else {}), "git_blob_sha1": found}
    try:
        checkpoint.write_safetensors(ghn, entry.path, metadata)
    except OSError as error:
        _logger.warning("Cannot keep GHN %s in %s: %s", entry.name, entry.path, error)
    return _named(ghn, entry.name)


def git_blob_sha1(data: bytes) -> str:
    """The hash under which git stores a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _named(ghn: GHN, name: str) -> GHN:
    if ghn.info is not None:
        ghn.info = replace(ghn.info, name=name)
    return ghn


def _unknown(source: str) -> UnknownGhnError:
    return UnknownGhnError(
        f"no GHN is named {source!r}, and there is no such file{did_you_mean(source, NAMED_GHNS) or '.'} "
        f"Known names: {', '.join(NAMED_GHNS)}; also a path or hf-hub:organization/name"
    )


def _download_error(entry: NamedGHN, reason: str) -> DownloadError:
    return DownloadError(
        f"GHN {entry.name} could not be fetched from {entry.url}: {reason}. "
        f"You can put the file there by hand: {entry.manual_path}"
    )


def _read_bounded(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_DOWNLOAD_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _download(entry: NamedGHN) -> bytes:
    """The content of a published file, bounded in size and time.

    Raises:
        DownloadError: If the server cannot be reached, stalls, or sends too much or too little.
    """
    _logger.info("Downloading GHN %s from %s", entry.name, entry.url)
    try:
        with _opener().open(entry.url, timeout=CONNECT_SECONDS) as response:
            return b"".join(_bounded_body(entry, response))
    except DownloadError:
        raise
    except TimeoutError as error:
        raise _download_error(entry, "the server does not answer") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise _download_error(entry, str(error) or type(error).__name__) from error


def _bounded_body(entry: NamedGHN, response: Any) -> Iterator[bytes]:
    deadline = time.monotonic() + TOTAL_SECONDS
    expected = int(response.headers.get("Content-Length") or -1)
    if expected > MAX_DOWNLOAD_BYTES:
        raise _download_error(entry, f"{expected:,} bytes are more than any published GHN has")
    received = 0
    with tqdm(total=max(expected, 0) or None, desc=entry.name, unit="B", unit_scale=True, disable=None) as progress:
        while chunk := response.read1(1 << 16) if hasattr(response, "read1") else response.read(1 << 16):
            received += len(chunk)
            if received > MAX_DOWNLOAD_BYTES:
                raise _download_error(entry, "the server sends more than any published GHN has")
            if time.monotonic() > deadline:
                raise _download_error(entry, f"it took more than {TOTAL_SECONDS:.0f} seconds")
            progress.update(len(chunk))
            yield chunk
    if 0 <= expected != received:
        raise _download_error(entry, f"the connection ended after {received:,} of {expected:,} bytes")


def _connect(address: tuple[str, int], timeout: float, source_address: Any = None) -> socket.socket:
    """Connect to the first address of a host that answers, within `timeout` for all of them together."""
    deadline = time.monotonic() + timeout
    failure: OSError = TimeoutError("timed out")
    for *_, found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        try:
            return socket.create_connection((str(found[0]), address[1]), remaining, source_address)
        except OSError as error:
            failure = error
    raise failure


class _HTTPConnection(http.client.HTTPConnection):
    """Waits `timeout` for a connection in all, and then `READ_SECONDS` whenever it reads."""

    def connect(self) -> None:
        self._create_connection = _connect
        super().connect()
        self.sock.settimeout(READ_SECONDS)


class _HTTPSConnection(http.client.HTTPSConnection):
    """Likewise, over TLS."""

    def connect(self) -> None:
        self._create_connection = _connect
        super().connect()
        self.sock.settimeout(READ_SECONDS)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, req)


def _opener() -> urllib.request.OpenerDirector:
    """Opens http, https and file URLs; takes proxies from the environment."""
    return urllib.request.build_opener(_HTTPHandler, _HTTPSHandler)
