"""Requests to the Hugging Face Hub, always through huggingface_hub's own client.

Endpoint, token, cache, offline mode, retries and timeouts are therefore those of huggingface_hub (`HF_ENDPOINT`,
`HF_TOKEN`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`). This module checks the
size of a file before its download and its hash before its use, limits the silence of the Hub, and tells failures in a
line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from timm_ghn._version import __version__
from timm_ghn.errors import DownloadError, HubUnreachableError, TimmGhnError
from timm_ghn.request import HUB_PREFIX
from timm_ghn.storage.paths import file_sha256, is_offline

_logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TIMEOUTS = ("TimeoutError", "TimeoutException", "Timeout")
_CONNECTIONS = ("ConnectionError", "NetworkError", "RemoteProtocolError", "ProxyError")
SILENT_SECONDS = 60.0
"""How long the Hub may be silent where huggingface_hub itself would wait for ever: in a push."""
_UNREACHABLE = {"LocalEntryNotFoundError", *_TIMEOUTS, *_CONNECTIONS}
"""Errors after which asking again may help, or what is on disk."""
_REASONS = {
    "OfflineModeIsEnabled": "it is not on disk, and HF_HUB_OFFLINE forbids the network",
    "LocalTokenNotFoundError": "a token is needed: run `hf auth login`, or set HF_TOKEN",
    "GatedRepoError": "access is restricted: ask for it on the page of the repository, and log in (`hf auth login`)",
    "RepositoryNotFoundError": "there is no such repository, or it is private and there is no token for it",
    "RevisionNotFoundError": "there is no such revision",
    "LocalEntryNotFoundError": "it is not on disk, and the Hub cannot be reached",
    "EntryNotFoundError": "there is no such file",
    **dict.fromkeys(_TIMEOUTS, "the Hub ({endpoint}) does not answer in time"),
    **dict.fromkeys(_CONNECTIONS, "the Hub ({endpoint}) cannot be reached: {error}"),
}
"""Explanations of errors of huggingface_hub and of the HTTP library below it; the first that applies counts.

By the names of their classes, because the HTTP library is another one from version to version.
"""
_STATUSES = {
    401: "the token is missing or wrong: run `hf auth login`, or set HF_TOKEN",
    403: "the token does not give the right to do this (it needs to be allowed to write)",
    409: "somebody else changed the repository at the same time; try again",
    412: "somebody else changed the repository at the same time; try again",
    413: "the Hub refuses files of this size",
    429: "too many requests; try again later",
    **dict.fromkeys((500, 502, 503, 504), "the Hub fails; try again later"),
}


@dataclass(frozen=True)
class HubSource:
    """A repository at a revision, written "hf-hub:organization/name[@revision]".

    Attributes:
        repository: "organization/name".
        revision: Branch, tag or commit; None for the default branch.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSource:
        """Read "hf-hub:organization/name[@revision]"; the prefix may be missing.

        Raises:
            DownloadError: If this names no repository.
        """
        repository, _, revision = text.removeprefix(HUB_PREFIX).partition("@")
        if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
            raise DownloadError(
                f"{text!r} names no repository of the Hub (organization/name[@revision]): letters, digits, '-', '_' "
                "and '.' on both sides of one '/'"
            )
        return cls(repository, revision or None)

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file, as the Hub or the description beside weights gives them.

    Attributes:
        size: Bytes.
        sha256: Hash of the content; the Hub gives it for files in large-file storage, which come from another host.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        source: What was asked for.
        commit: The commit; None where the Hub was not asked, because it cannot be reached or must not be.
        files: The files by name; empty where the Hub was not asked.
        is_private: Whether the repository is private; None if that is not known.
    """

    source: HubSource
    commit: str | None
    files: Mapping[str, FileRecord]
    is_private: bool | None = None

    @property
    def is_online(self) -> bool:
        """Whether the Hub may be asked for files."""
        return self.commit is not None

    def __str__(self) -> str:
        return str(replace(self.source, revision=self.commit or self.source.revision or constants.DEFAULT_REVISION))


def api() -> HfApi:
    """The client, which says who is asking."""
    return HfApi(library_name="timm-ghn", library_version=__version__)


def look_up(source: HubSource) -> Snapshot:
    """Ask for the commit of a revision and for the sizes and hashes of its files.

    Raises:
        DownloadError: If there is no such repository or revision, or access is denied.
        HubUnreachableError: If the Hub does not answer, or must not be asked.
    """
    with hub_errors(str(source)):
        if is_offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE forbids it")
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = api().model_info(source.repository, revision=source.revision, files_metadata=True, timeout=timeout)
        files = {
            item.rfilename: FileRecord(int(item.size), item.lfs.sha256 if item.lfs else None)
            for item in info.siblings or ()
            if item.size is not None
        }
        return Snapshot(source, info.sha, files, info.private)


def look_up_or_cached(source: HubSource) -> Snapshot:
    """`look_up`, or with a warning what huggingface_hub has on disk of it where the Hub cannot be reached.

    Raises:
        DownloadError: If there is no such repository or revision, or access is denied.
    """
    try:
        return look_up(source)
    except HubUnreachableError as error:
        _logger.log(logging.DEBUG if is_offline() else logging.WARNING, "%s. Looking on disk instead", error)
        return Snapshot(source, None, {})


def fetch(snapshot: Snapshot, name: str, *, limit: int) -> Path:
    """A file of a repository, on disk and verified.

    The file is asked for by the name of its branch or tag, so that huggingface_hub finds it by that when it is offline.

    Args:
        snapshot: The repository.
        name: The file.
        limit: Largest size in bytes.

    Returns:
        Its path in huggingface_hub's cache.

    Raises:
        DownloadError: If there is no such file, it is larger, it cannot be fetched, or it is not what the Hub
            describes; in the last case it is removed from the cache.
    """
    source, remote = snapshot.source, snapshot.files.get(name)
    with hub_errors(f"{name} of {snapshot}"):
        if snapshot.is_online and remote is None:
            raise DownloadError(f"there is no file {name}")
        if remote is not None:
            _check_size(remote.size, limit)
        from_disk = not snapshot.is_online
        path = Path(hf_hub_download(source.repository, name, revision=source.revision, local_files_only=from_disk))
        _check_size(path.stat().st_size, limit)
        if remote is not None and remote.sha256 not in (None, file_sha256(path)):
            _remove(path)
            raise DownloadError("what arrived does not have the hash that the Hub gives; it was removed, try again")
        return path


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise DownloadError(f"{size:,} bytes are more than the {limit:,} that are read here")


def _remove(path: Path) -> None:
    """Remove a file of huggingface_hub's cache, and what a link there points to within the same repository."""
    target = path.resolve()
    path.unlink(missing_ok=True)
    if target.parent.name == "blobs" and target.parent.parent in path.parents:
        target.unlink(missing_ok=True)


# --- failures -------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(what: str, kind: type[TimmGhnError] = DownloadError) -> Iterator[None]:
    """Turns what the client raises into an error of a line, and gives up after a minute without an answer.

    Args:
        what: What could not be had; start of the message.
        kind: Class of the error. `DownloadError` becomes `HubUnreachableError` where asking again may help.
    """
    session: Any = get_session()
    before = getattr(session, "timeout", None)  # of httpx; huggingface_hub before version 1 has none
    if getattr(before, "read", 0) is None:
        session.timeout = SILENT_SECONDS
    try:
        yield
    except Exception as error:  # of several libraries, and a server may answer with anything
        found = HubUnreachableError if kind is DownloadError and _is_unreachable(error) else kind
        raise found(f"{what}: {explain(error)}") from error
    finally:
        if before is not None:
            session.timeout = before


def explain(error: BaseException) -> str:
    """The cause of an error and its remedy, in a line."""
    cause = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    if isinstance(error, TimmGhnError):
        return str(error)
    if isinstance(error, LocalEntryNotFoundError) and cause:
        return explain(cause)
    names, status = _names(error), _status(error)
    for name, reason in _REASONS.items():
        if name in names:
            return reason.format(endpoint=constants.ENDPOINT, error=line)
    if status:
        return f"{_STATUSES.get(status, line)} (HTTP {status})"
    return f"{line} {explain(cause)}" if isinstance(error, RuntimeError) and cause else line  # an upload, in a thread


def _is_unreachable(error: BaseException) -> bool:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return _is_unreachable(error.__cause__)
    return bool(_names(error) & _UNREACHABLE) or _status(error) == 429 or _status(error) >= 500


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int:
    """Status of the answer that an error is about; 0 if there was none."""
    return int(getattr(getattr(error, "response", None), "status_code", None) or 0)
