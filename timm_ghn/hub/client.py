"""What is asked of the Hugging Face Hub, always through huggingface_hub's own client.

Endpoint, token, cache, offline mode and timeouts are therefore those of huggingface_hub (`HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`). What this module adds: sizes are
checked before something is downloaded, hashes before it is used, and failures are told in a line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_ghn._version import __version__
from timm_ghn.errors import DownloadError, HubUnreachableError, TimmGhnError
from timm_ghn.storage.paths import file_sha256, git_blob_sha1, is_offline

_logger = logging.getLogger(__name__)

PREFIX = "hf-hub:"
API_TIMEOUTS = 6
"""Longest silence of the Hub while something is pushed, where huggingface_hub itself would wait for ever; in units of
`HF_HUB_DOWNLOAD_TIMEOUT`, which is 10 seconds: a commit takes the Hub longer than the start of a download."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./-]*")
# What the client and the HTTP library below it raise; the latter's own base class differs from version to version.
_FAILURES: tuple[type[BaseException], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    KeyError,
    AttributeError,
    *HfHubHTTPError.__bases__,
)


_REASONS = {  # the first that applies
    OfflineModeIsEnabled: "it is not on disk, and HF_HUB_OFFLINE forbids the network",
    LocalTokenNotFoundError: "a token is needed: run `hf auth login`, or set HF_TOKEN",
    GatedRepoError: "access is restricted: ask for it on the page of the repository, and log in (`hf auth login`)",
    RepositoryNotFoundError: "there is no such repository, or it is private and there is no token for it",
    RevisionNotFoundError: "there is no such revision",
    LocalEntryNotFoundError: "it is not on disk, and the Hub cannot be reached",
    EntryNotFoundError: "there is no such file",
}
_STATUSES = {
    401: "the token is missing or wrong: run `hf auth login`, or set HF_TOKEN",
    403: "the token does not give the right to do this (it needs to be allowed to write)",
    409: "somebody else changed the repository at the same time; try again",
    412: "somebody else changed the repository at the same time; try again",
    413: "the Hub refuses files of this size",
    429: "too many requests; try again later",
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
        repository, sign, revision = text.removeprefix(PREFIX).partition("@")
        with hub_errors(f"{text!r} names no repository of the Hub (organization/name[@revision])"):
            if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
                raise ValueError("letters, digits, '-', '_' and '.' on both sides of one '/'")
            if sign and (not _REVISION.fullmatch(revision) or ".." in revision):
                raise ValueError(f"{revision!r} is no revision")
        return cls(repository, revision or None)

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file.

    Attributes:
        size: Bytes.
        sha256: Hash of the content, for files in large-file storage.
        git_oid: Hash under which git stores the file.
    """

    size: int
    sha256: str | None
    git_oid: str | None

    def matches(self, path: Path) -> bool:
        """Whether a local file has this content."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return file_sha256(path) == self.sha256
        return self.git_oid == git_blob_sha1(path.read_bytes())


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        source: What was asked for.
        commit: The commit; None where the Hub was not asked, because it cannot be reached or must not be.
        files: The files by name; empty likewise.
        token: Token, or None for huggingface_hub's own choice.
        is_private: Whether the repository is private; None if that is not known.
    """

    source: HubSource
    commit: str | None
    files: Mapping[str, RemoteFile]
    token: str | None = field(default=None, repr=False)
    is_private: bool | None = None

    @property
    def is_online(self) -> bool:
        """Whether the Hub may be asked for files."""
        return self.commit is not None

    def __str__(self) -> str:
        return f"{PREFIX}{self.source.repository}@{self.commit or self.source.revision or constants.DEFAULT_REVISION}"


def api(token: str | None = None) -> HfApi:
    """The client, which says who is asking."""
    return HfApi(token=token, library_name="timm-ghn", library_version=__version__)


def look_up(source: HubSource, *, token: str | None = None) -> Snapshot:
    """Ask for the commit of a revision and for the sizes and hashes of its files.

    Raises:
        DownloadError: If there is no such repository or revision, or access is denied.
        HubUnreachableError: If the Hub does not answer, or must not be asked.
    """
    with hub_errors(str(source)):
        if is_offline():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE forbids it")
        info = api(token).model_info(
            source.repository,
            revision=source.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if not _COMMIT.fullmatch(info.sha or ""):
            raise ValueError(f"the server names no commit, but {str(info.sha)[:60]!r}")
        files = {
            item.rfilename: RemoteFile(int(item.size), item.lfs.sha256 if item.lfs else None, item.blob_id)
            for item in info.siblings or ()
            if item.size is not None
        }
        return Snapshot(source, info.sha, files, token, info.private)


def look_up_or_cached(source: HubSource, *, token: str | None = None) -> Snapshot:
    """`look_up`, or what huggingface_hub has on disk of it where the Hub cannot be reached.

    Raises:
        DownloadError: If there is no such repository or revision, or access is denied.
    """
    try:
        return look_up(source, token=token)
    except HubUnreachableError as error:
        _logger.debug("looking on disk instead: %s", error)
        return Snapshot(source, None, {}, token)


def fetch(snapshot: Snapshot, name: str, *, limit: int) -> Path:
    """A file of a repository, on disk and verified.

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
    repository = snapshot.source.repository
    with hub_errors(f"{name} of {snapshot}"):
        if not snapshot.is_online:
            revision = snapshot.source.revision
            path = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=True))
            _check_size(path.stat().st_size, limit)
            return path
        remote = snapshot.files.get(name)
        if remote is None:
            raise DownloadError(f"there is no file {name}")
        _check_size(remote.size, limit)
        path = _cached(snapshot, name) or _download(snapshot, name)
        if remote.matches(path):
            return path
        _remove(path)
        path = _download(snapshot, name)
        if remote.matches(path):
            return path
        _remove(path)
        raise DownloadError("what arrived does not have the hash that the Hub gives; it was removed")


def _cached(snapshot: Snapshot, name: str) -> Path | None:
    """The file, if huggingface_hub has it on disk, and knows that it is the one of this revision."""
    revision = snapshot.source.revision or constants.DEFAULT_REVISION
    found = huggingface_hub.try_to_load_from_cache(snapshot.source.repository, name, revision=revision)
    return Path(found) if isinstance(found, str) and snapshot.commit in Path(found).parts else None


def _download(snapshot: Snapshot, name: str) -> Path:
    """Have huggingface_hub download a file.

    It is asked for by the name of its branch or tag, so that huggingface_hub finds it by that when it is offline.
    """
    source = snapshot.source
    path = Path(
        huggingface_hub.hf_hub_download(source.repository, name, revision=source.revision, token=snapshot.token)
    )
    if snapshot.commit not in path.parts:
        raise DownloadError("the repository was changed in the meantime; try again")
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
    """Turns what the client raises into an error of a line.

    Args:
        what: What could not be had; start of the message.
        kind: Class of the error. `DownloadError` becomes `HubUnreachableError` where asking again may help.
    """
    try:
        yield
    except _FAILURES as error:
        if isinstance(error, kind) and str(error).startswith(what):
            raise
        found = HubUnreachableError if kind is DownloadError and _is_unreachable(error) else kind
        raise found(f"{what}: {explain(error)}") from error


@contextmanager
def bounded_silence() -> Iterator[None]:
    """Give up when the Hub says nothing for so long, where neither huggingface_hub nor the user has set a limit."""
    session: Any = get_session()
    before = getattr(session, "timeout", None)
    if before is None or before.read is not None:
        yield
        return
    session.timeout = float(API_TIMEOUTS * constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        session.timeout = before


def explain(error: BaseException) -> str:
    """What went wrong, and what to do about it, in a line."""
    if isinstance(error, TimmGhnError):
        return str(error)
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return explain(error.__cause__)
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return reason
    status = _status(error)
    if status is not None:
        reason = _STATUSES.get(status) or ("the Hub fails; try again later" if status >= 500 else _first_line(error))
        return f"{reason} (HTTP {status})"
    if _is_timeout(error):
        return f"the Hub ({constants.ENDPOINT}) does not answer in time"
    if _is_connection(error):
        return f"the Hub ({constants.ENDPOINT}) cannot be reached: {_first_line(error)}"
    if isinstance(error, RuntimeError) and error.__cause__:  # an upload, in a thread
        return f"{_first_line(error)} {explain(error.__cause__)}"
    return _first_line(error)


def _status(error: BaseException) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _is_unreachable(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _is_unreachable(error.__cause__)
    return isinstance(error, (HubUnreachableError, OfflineModeIsEnabled, LocalEntryNotFoundError)) or (
        _is_timeout(error) or _is_connection(error)
    )


def _kinds(error: BaseException) -> set[str]:
    """Names of an error's classes: those of the HTTP library change their module from version to version."""
    return {kind.__name__ for kind in type(error).__mro__}


def _is_timeout(error: BaseException) -> bool:
    return bool(_kinds(error) & {"TimeoutError", "TimeoutException", "Timeout"})


def _is_connection(error: BaseException) -> bool:
    return bool(_kinds(error) & {"ConnectionError", "NetworkError", "RemoteProtocolError", "ProxyError"})


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
