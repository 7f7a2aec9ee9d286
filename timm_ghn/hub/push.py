"""Pushing to the Hub: initialized weights that plain timm loads, with a card that can be checked, and GHNs."""

from __future__ import annotations

import importlib.resources
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from tqdm import tqdm

from timm_ghn.errors import CheckpointError, DownloadError, InitError, PushError
from timm_ghn.ghn import checkpoint
from timm_ghn.ghn.config import HUB_FILE
from timm_ghn.ghn.model import GHN
from timm_ghn.ghn.registry import BUNDLED, PPUDA, NamedGHN, find_named, load_ghn
from timm_ghn.hub.card import CARD, ghn_card, model_card
from timm_ghn.hub.client import FileRecord, HubSource, Snapshot, api, hub_errors, look_up
from timm_ghn.hub.manifest import FILE, WEIGHTS, Manifest, dtype_of, versions
from timm_ghn.hub.pull import read_manifest
from timm_ghn.initialize.plan import expected_origin
from timm_ghn.initialize.to_folder import init_to_folder
from timm_ghn.request import Request
from timm_ghn.settings import Init, Source
from timm_ghn.storage.folder import CONFIG_FILE, MAX_SHARD_SIZE
from timm_ghn.storage.paths import file_sha256
from timm_ghn.storage.writer import INDEX_FILE
from timm_ghn.text import format_size

_logger = logging.getLogger(__name__)


class Outcome(str, Enum):
    """The ways in which a push can end."""

    PUSHED = "pushed"
    PROPOSED = "proposed"
    SKIPPED = "skipped"
    PLANNED = "to be pushed"
    FAILED = "failed"


@dataclass(frozen=True)
class PushOptions:
    """Options of a push.

    Attributes:
        private: Whether a new repository is private; None for the organization's default.
        create_pr: Whether to propose the change in a pull request instead of making it.
        revision: Branch; created if need be. None for the default branch.
        overwrite: Whether a model that timm-ghn did not make may be replaced, and weights are computed again even if
            the repository says that it has them.
        dry_run: Whether to find out what would be done, without computing, creating or sending anything.
        license: SPDX name of the licence of what is pushed.
        max_shard_size: Size, in bytes or as "5GB", above which weights are split into several files, which plain timm
            does not load.
    """

    private: bool | None = None
    create_pr: bool = False
    revision: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    license: str = "apache-2.0"
    max_shard_size: int | str = MAX_SHARD_SIZE


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        name: Name of the model, or of the GHN.
        repository: "organization/name".
        outcome: What was done.
        detail: Files and bytes that were sent, or why not.
        url: Commit or pull request, if there is one.
    """

    name: str
    repository: str
    outcome: Outcome
    detail: str = ""
    url: str | None = None


def push(
    model: str,
    repository: str,
    *,
    init: str | Mapping[str, Any] | Init | None = None,
    options: PushOptions | None = None,
    **arguments: Any,
) -> Pushed:
    """Push initialized weights to the Hub, where `timm.create_model("hf-hub:...", pretrained=True)` finds them.

    The weights are computed anew, so that what the card says of them is true.

    Args:
        model: Name of a timm model.
        repository: "organization/name"; it is created if need be.
        init: Method or settings, "ghn-orth" by default.
        options: How it is pushed; single options may be given by name: `private=True`, `create_pr=True`, ...
        **arguments: Options, and arguments of `timm.create_model`, such as `num_classes`.

    Returns:
        The result.

    Raises:
        PushError: If the Hub cannot be reached or refuses, or the model is given itself instead of its name.
        TimmGhnError: If the model cannot be initialized or written.
    """
    given = {entry.name: arguments.pop(entry.name) for entry in fields(PushOptions) if entry.name in arguments}
    options = replace(options or PushOptions(), **given)
    request = _request(model, init, arguments)
    source, remote = _destination(repository, options)
    if remote is not None and not options.overwrite and _is_there(request, remote, options):
        return Pushed(request.name, repository, Outcome.SKIPPED, "the repository has these weights already")
    if options.dry_run:
        return Pushed(request.name, repository, Outcome.PLANNED, f"about {_size(request.skeleton())}")
    with tempfile.TemporaryDirectory(prefix="timm-ghn-") as folder:
        _make_folder(request, Path(folder), repository, options)
        return _upload(request.name, Path(folder), source, remote, options, f"{request.init.method} weights")


def push_all(
    names: Iterable[str],
    organization: str,
    *,
    init: str | Mapping[str, Any] | Init = "ghn-orth",
    options: PushOptions | None = None,
) -> Iterator[Pushed]:
    """Push many models, each to "organization/name.method", and go on when one fails.

    Args:
        names: Names of timm models.
        organization: Organization or user.
        init: Method or settings.
        options: How they are pushed.

    Yields:
        The result of each.

    Raises:
        PushError: Before the first, if the token does not give access at all.
    """
    settings = Init.of(init)
    options = options or PushOptions()
    if not options.dry_run:
        with hub_errors("nothing was pushed", PushError):
            api().whoami()
    names = list(names)
    for name in tqdm(names, "pushing", unit="model", delay=2, leave=False, disable=None):
        repository = f"{organization}/{name}.{settings.method.replace('-', '_')}"
        try:
            yield push(name, repository, init=settings, options=options)
        except Exception as error:  # constructors of models raise anything, and the other models can be pushed
            _logger.debug("where %s failed", name, exc_info=True)
            detail = " ".join(str(error).split()) or type(error).__name__
            yield Pushed(name, repository, Outcome.FAILED, detail.removeprefix(f"{repository}: "))


def push_ghn(
    source: str | GHN,
    repository: str,
    *,
    options: PushOptions | None = None,
    license: str | None = None,
    description: str | None = None,
) -> Pushed:
    """Push a GHN to the Hub, where `ghn="hf-hub:organization/name"` finds it.

    Args:
        source: Name or path of a GHN, or a loaded one.
        repository: "organization/name"; it is created if need be.
        options: How it is pushed.
        license: SPDX name of its licence; known for the GHNs that have names.
        description: What it is, in a line.

    Raises:
        PushError: If the Hub cannot be reached or refuses, or the licence of a GHN without a name is not given.
        TimmGhnError: If the GHN cannot be loaded.
    """
    options = options or PushOptions()
    ghn = load_ghn(source)
    name = ghn.info.name if ghn.info else "in memory"
    entry = find_named(source) if isinstance(source, str) else None
    license = license or (entry.license if entry is not None else None)
    if license is None:
        raise PushError(f"{name}: say which licence it has, for example license='apache-2.0' (--license)")
    if entry is not None:
        description = description or f"{entry.description}; trained on {entry.trained_on}."
    target, remote = _destination(repository, options, mark=HUB_FILE)
    if options.dry_run:
        known = "replaces what is there" if remote is not None and HUB_FILE in remote.files else "new"
        return Pushed(name, repository, Outcome.PLANNED, f"{_size(ghn)}, {known}")
    with tempfile.TemporaryDirectory(prefix="timm-ghn-") as folder:
        root = Path(folder)
        checkpoint.write_safetensors(ghn, root / HUB_FILE, dict(ghn.info.metadata) if ghn.info else None)
        facts = {"model_type": "timm-ghn", "hash": checkpoint.content_hash(ghn), "ghn": ghn.config.to_dict()}
        (root / CONFIG_FILE).write_bytes(f"{json.dumps(facts, indent=2)}\n".encode())
        card = ghn_card(ghn, repository, license=license, description=description or "", notes=_notes(entry))
        (root / CARD).write_bytes(card.encode())
        return _upload(name, root, target, remote, options, f"GHN {name}")


def _notes(entry: NamedGHN | None) -> str:
    """Text about the origin of a GHN that has a name; empty for another one."""
    if entry is None:
        return ""
    if entry.name != BUNDLED:
        home = PPUDA if entry.repository is None else f"https://huggingface.co/{entry.repository}"
        return f"Converted from its authors' checkpoint ({home}, {entry.file}); the weights are theirs, unchanged."
    card = importlib.resources.files("timm_ghn.ghn") / "bundled" / "card.md"
    return card.read_text(encoding="utf-8").partition("\n")[2].strip()


# --- what is pushed -------------------------------------------------------------------------------------------------


def _request(name: str, init: str | Mapping[str, Any] | Init | None, arguments: Mapping[str, Any]) -> Request:
    if not isinstance(name, str):
        raise PushError(
            f"push takes the name of a timm model, not a {type(name).__name__}: weights are computed anew. Give the "
            "name with the same init= and arguments; a trained model goes with timm's own push_to_hf_hub"
        )
    request = Request.parse(name, init, **arguments) or Request(name, arguments=arguments)
    if request.source is not None or request.init.spec.source not in (Source.GHN, Source.GAUSSIAN):
        what = "timm's own initialization" if request.init.spec.source is Source.TIMM else "not what is pushed"
        raise PushError(f"{name}: {request.source or request.init.method!r} is {what}; there is nothing to push")
    try:
        request.plain_arguments()  # before anything is computed
    except InitError as error:
        raise PushError(str(error)) from error
    return replace(request, init=replace(request.init, cache=False))


def _make_folder(request: Request, folder: Path, repository: str, options: PushOptions) -> None:
    """Compute the weights, and write the files of a repository into an empty folder.

    Raises:
        TimmGhnError: If the model cannot be initialized or written.
    """
    size = options.max_shard_size
    report = init_to_folder(
        request.name, folder, request.init, overwrite=True, max_shard_size=size, **request.arguments
    )
    skeleton = request.skeleton()
    weights = [path for path in sorted(folder.iterdir()) if WEIGHTS.fullmatch(path.name)]
    manifest = Manifest(
        report=report,
        arguments=request.plain_arguments(),
        dtype=dtype_of(skeleton),
        num_classes=int(getattr(skeleton, "num_classes", 0)),
        license=options.license,
        max_shard_size=str(size),
        versions=versions(),
        files={path.name: FileRecord(path.stat().st_size, file_sha256(path)) for path in weights},
    )
    (folder / FILE).write_bytes(manifest.to_json().encode())
    (folder / CARD).write_bytes(model_card(manifest, repository).encode())


# --- what is there --------------------------------------------------------------------------------------------------


def _destination(repository: str, options: PushOptions, *, mark: str = FILE) -> tuple[HubSource, Snapshot | None]:
    """Where to push to, and what is there; None if there is no such repository, or no such branch yet.

    Args:
        repository: "organization/name".
        options: How.
        mark: A file that shows that what is there was pushed by this package.

    Raises:
        PushError: If there can be no such repository, a pull request is wanted against another branch, or something
            there would be lost or made public.
    """
    if options.create_pr and options.revision not in (None, "main"):
        raise PushError(f"{repository}: a pull request is made against the default branch; leave `revision` out")
    try:
        source = replace(HubSource.parse(repository), revision=options.revision)
        found = look_up(source)
    except DownloadError as error:
        cause = error.__cause__
        missing = isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError))
        if missing and not isinstance(cause, GatedRepoError):
            return source, None
        raise PushError(str(error)) from error
    if options.private and found.is_private is False:
        raise PushError(f"{source.repository} exists already and is public; make it private first, or leave that out")
    has_model = CONFIG_FILE in found.files or any(name.endswith((".safetensors", ".bin")) for name in found.files)
    if has_model and mark not in found.files and not options.overwrite:
        raise PushError(
            f"{source.repository} holds a model that timm-ghn did not make; choose another name, or replace it "
            "(--overwrite on the command line, overwrite=True in Python)"
        )
    return source, found


def _size(module: nn.Module) -> str:
    """Size of a module's tensors."""
    return format_size(sum(tensor.nbytes for tensor in module.state_dict().values()))


def _is_there(request: Request, remote: Snapshot, options: PushOptions) -> bool:
    """Whether the repository has the weights already, so that nothing has to be computed."""
    try:
        manifest = read_manifest(remote)
    except (DownloadError, CheckpointError) as error:
        _logger.info("%s; it is going to be replaced", error)
        return False
    complete = {CARD, CONFIG_FILE, *manifest.files} <= remote.files.keys() and all(
        (remote.files[name].sha256, remote.files[name].size) == (record.sha256, record.size)
        for name, record in manifest.files.items()
    )
    found = manifest.license, manifest.max_shard_size, dict(manifest.versions)
    if not complete or found != (options.license, str(options.max_shard_size), versions()):
        return False
    skeleton = request.skeleton()
    difference = manifest.difference(request, expected_origin(skeleton, request.init), dtype_of(skeleton))
    if difference:
        _logger.info("%s: %s", remote, difference)
    return not difference


# --- sending --------------------------------------------------------------------------------------------------------


def _upload(
    name: str, folder: Path, source: HubSource, remote: Snapshot | None, options: PushOptions, what: str
) -> Pushed:
    """Send the files of a folder in one commit; huggingface_hub leaves out those that are there already.

    Raises:
        PushError: If the Hub cannot be reached or refuses.
    """
    repository = source.repository
    files = sorted(folder.iterdir())
    gone = remote.files.keys() - {path.name for path in files} if remote and FILE in remote.files else set()
    obsolete = sorted(name for name in gone if WEIGHTS.fullmatch(name) or name == INDEX_FILE)
    client = api()
    with hub_errors(repository, PushError):
        client.create_repo(repository, private=options.private, exist_ok=True)
        if source.revision is not None and remote is None:
            client.create_branch(repository, branch=source.revision, exist_ok=True)
        commit = client.create_commit(
            repository,
            [*map(CommitOperationDelete, obsolete), *(CommitOperationAdd(path.name, path) for path in files)],
            commit_message=f"{what} of {name}",
            revision=source.revision,
            create_pr=options.create_pr,
            parent_commit=remote.commit if remote else None,
        )
    if remote is not None and commit.oid == remote.commit:
        return Pushed(name, repository, Outcome.SKIPPED, "the repository has these files already")
    size = sum(path.stat().st_size for path in files)
    outcome = Outcome.PROPOSED if options.create_pr else Outcome.PUSHED
    detail = f"{len(files)} files, {format_size(size)}"
    return Pushed(name, repository, outcome, detail, commit.pr_url or str(commit.commit_url))
