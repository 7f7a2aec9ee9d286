"""Taking ready-made weights from the Hub: verified against their description before a model sees them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import CheckpointError, DownloadError, HubUnreachableError, InitError
from timm_ghn.hub.client import (
    PREFIX,
    HubSource,
    Snapshot,
    fetch,
    look_up,
    look_up_or_cached,
)
from timm_ghn.hub.manifest import FILE, MAX_BYTES, Manifest
from timm_ghn.hub.match import Asked
from timm_ghn.initialize.provenance import record_
from timm_ghn.initialize.report import ParameterReport, Report, Status
from timm_ghn.orthogonalization import weight_layers
from timm_ghn.request import Request
from timm_ghn.settings import Init, Source
from timm_ghn.storage.paths import file_sha256, is_offline

_logger = logging.getLogger(__name__)

ORGANIZATION_VARIABLE = "TIMM_GHN_HUB_ORG"
"""Environment variable that names an organization of the Hub, where weights are looked for before they are computed."""
_RETRY_SECONDS = 300.0
"""How long a Hub that could not be reached is not asked again by the same process."""


@dataclass(frozen=True)
class Pulled:
    """Weights on disk that are what their repository describes.

    Attributes:
        source: Where they come from, with the commit.
        manifest: What they are.
        paths: Files of weights.
    """

    source: str
    manifest: Manifest
    paths: tuple[Path, ...]

    def check(self) -> None:
        """Compare names, shapes, types and values with the description.

        Raises:
            CheckpointError: If something is missing, too much, of another shape or type, or not a number.
        """
        found: set[str] = set()
        for path in self.paths:
            with self._opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    self._check(name, file.get_tensor(name))
                    found.add(name)
        missing = self.manifest.tensors.keys() - found
        if missing:
            raise CheckpointError(f"{self.source}: {min(missing)} is missing in the files of weights")

    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Write weights that were checked into existing tensors of their shapes.

        Raises:
            CheckpointError: If a file cannot be read any more.
        """
        for path in self.paths:
            with self._opened(path) as file:
                for name in set(file.keys()) & tensors.keys():
                    tensors[name].copy_(file.get_tensor(name))

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.source}: {path.name} cannot be read: {error}") from error

    def _check(self, name: str, tensor: Tensor) -> None:
        expected = self.manifest.tensors.get(name)
        if expected is None:
            raise CheckpointError(f"{self.source}: {name[:100]} is not in the description of the weights")
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != expected:
            raise CheckpointError(f"{self.source}: {name} is {found}, and {expected} in the description")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.source}: {name} has values that are not finite")


# --- init="hf-hub:..." ----------------------------------------------------------------------------------------------


def create_from_hub(request: Request) -> tuple[nn.Module, Report]:
    """Build a model and give it ready-made weights.

    A classifier of another size keeps timm's initialization.

    Args:
        request: The model, with the source of its weights.

    Raises:
        DownloadError: If there are no such weights, or they cannot be fetched.
        CheckpointError: If they are not what is described beside them.
        InitError: If they are those of another model.
    """
    start = time.perf_counter()
    name = request.name
    snapshot = look_up_or_cached(HubSource.parse(str(request.source)))
    manifest = read_manifest(snapshot)
    architecture = name.rpartition(":")[2].partition(".")[0]
    if manifest.architecture != architecture and ":" not in name:
        raise InitError(f"{snapshot} has weights of {manifest.architecture}, not of {architecture}")
    pulled = pull(snapshot, manifest)
    deferred = DeferredRandom(int(manifest.provenance["seed"]))
    with deferred:
        model = request.build()
    kept = _check_fit(model, pulled)
    fill(model, pulled, deferred, skip=kept)
    report = _report(pulled, time.perf_counter() - start, kept)
    record_(model, report)
    return model, report


def read_manifest(snapshot: Snapshot) -> Manifest:
    """What a repository says of its weights.

    Raises:
        DownloadError: If there is no such repository, it has no weights made by timm-ghn, or it cannot be reached.
        CheckpointError: If the description is malformed.
    """
    if snapshot.is_online and FILE not in snapshot.files:
        raise DownloadError(
            f"{snapshot} has no weights that timm-ghn made (no {FILE}); "
            f"for others there is timm.create_model('{PREFIX}{snapshot.source.repository}', pretrained=True)"
        )
    path = fetch(snapshot, FILE, limit=MAX_BYTES)
    return Manifest.from_json(path.read_bytes(), f"{FILE} of {snapshot}")


def pull(snapshot: Snapshot, manifest: Manifest) -> Pulled:
    """Fetch and verify the weights.

    Raises:
        DownloadError: If they cannot be fetched.
        CheckpointError: If they are not what is described.
    """
    paths = []
    for name, record in sorted(manifest.files.items()):
        path = fetch(snapshot, name, limit=record.size)
        # What the Hub describes was compared with its hash already.
        found = snapshot.files[name].sha256 if snapshot.is_online else None
        if path.stat().st_size != record.size or (found or file_sha256(path)) != record.sha256:
            raise CheckpointError(f"{name} of {snapshot} does not have the size and hash that {FILE} gives")
        paths.append(path)
    pulled = Pulled(str(snapshot), manifest, tuple(paths))
    pulled.check()
    return pulled


def _check_fit(model: nn.Module, pulled: Pulled) -> frozenset[str]:
    """The tensors of a classifier of another size, which are not taken.

    Raises:
        InitError: If any other tensor is different.
    """
    state = model.state_dict()
    offered = pulled.manifest.tensors
    resized = getattr(model, "num_classes", None) != pulled.manifest.num_classes
    classifiers = tuple(f"{layer.module}." for layer in weight_layers(model) if layer.is_classifier and resized)
    head = (
        frozenset(name for name in {*state, *offered} if name.startswith(classifiers)) if classifiers else frozenset()
    )
    for name in sorted({*state, *offered} - head):
        here = tuple(state[name].shape) if name in state else None
        there = offered[name][1] if name in offered else None
        if here != there:
            raise InitError(
                f"{pulled.source} does not fit the model: {name} is {there or 'missing'} there and {here or 'missing'} "
                f"here. timm adapts weights to other inputs: timm.create_model('{pulled.source}', pretrained=True, ...)"
            )
    return head


def fill(model: nn.Module, pulled: Pulled, deferred: DeferredRandom, *, skip: frozenset[str] = frozenset()) -> None:
    """Give a model the weights, and what they do not cover the initialization that was put off."""
    tensors = {name: tensor.data for name, tensor in model.state_dict(keep_vars=True).items() if name not in skip}
    parameters = dict(model.named_parameters())
    deferred.drop(tensors.values())
    for name, parameter in parameters.items():
        deferred.replay(parameter, name)
    with torch.no_grad():
        pulled.copy_to(tensors)


def _report(pulled: Pulled, seconds: float, kept: frozenset[str] = frozenset()) -> Report:
    rows = tuple(
        ParameterReport(row.name, row.shape, Status.KEPT, "classifier of another size") if row.name in kept else row
        for row in pulled.manifest.parameters
    )
    manifest = pulled.manifest
    return Report(manifest.architecture, dict(manifest.provenance), rows, seconds=seconds, source=pulled.source)


# --- an organization that is looked into first ----------------------------------------------------------------------


class _Unreachable:
    """When this process could not reach the Hub; guarded by `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.until = 0.0

    def note(self) -> None:
        """Do not ask for a while."""
        with self.lock:
            self.until = time.monotonic() + _RETRY_SECONDS

    @property
    def now(self) -> bool:
        """Whether it is better not to ask."""
        with self.lock:
            return time.monotonic() < self.until


_unreachable = _Unreachable()


def organization_repository(architecture: str, init: Init) -> HubSource | None:
    """Where weights are looked for before they are computed; None if nowhere.

    `TIMM_GHN_HUB_ORG` names an organization, with "@revision" one of its branches or tags.

    Raises:
        DownloadError: If it cannot be the name of one.
    """
    organization, sign, revision = os.environ.get(ORGANIZATION_VARIABLE, "").strip().partition("@")
    if not organization or not init.cache or init.spec.source is Source.TIMM:
        return None
    return HubSource.parse(f"{organization}/{architecture}.{init.method.replace('-', '_')}{sign}{revision}")


def from_organization(request: Request, model: nn.Module, deferred: DeferredRandom) -> Report | None:
    """Give a model ready-made weights of the organization, if it has exactly those that are asked for.

    Args:
        request: What is asked for.
        model: The model as it was built.
        deferred: What was put off while the model was built.

    Returns:
        The report, or None if the weights have to be computed.

    Raises:
        TimmGhnError: If what is asked for cannot be had either way: L lies outside of the model, or there is no GHN.
    """
    source = organization_repository(request.name.partition(".")[0], request.init)
    if source is None or request.recipe() is None or "pretrained_cfg" in request.arguments:
        return None
    start = time.perf_counter()
    try:
        snapshot = _look_up_patiently(source)
        manifest = read_manifest(snapshot)
        asked = Asked.of(model, request.name, request.init, request.plain_arguments())
        difference = asked.difference(manifest)
        if difference:
            _logger.warning(
                "The weights of %s are not those that are asked for, and are computed: %s", snapshot, difference
            )
            return None
        pulled = pull(snapshot, manifest)
    except (DownloadError, CheckpointError) as error:
        _tell(source, error)
        return None
    fill(model, pulled, deferred)
    report = replace(_report(pulled, time.perf_counter() - start), provenance=dict(asked.provenance))
    record_(model, report)
    return report


def _look_up_patiently(source: HubSource) -> Snapshot:
    """The repository; what is on disk of it while the Hub cannot be reached, which is found out once in a while."""
    cached = Snapshot(source, None, {})
    if _unreachable.now:
        return cached
    try:
        return look_up(source)
    except HubUnreachableError as error:
        if not is_offline():
            _unreachable.note()
            _logger.warning("%s. Weights that are not on disk are computed", error)
        return cached


def _tell(source: HubSource, error: DownloadError | CheckpointError) -> None:
    """That weights are computed, and why; loudly if something is wrong, not if there are just none."""
    harmless = isinstance(error, HubUnreachableError) or isinstance(error.__cause__, RepositoryNotFoundError)
    _logger.log(logging.INFO if harmless else logging.WARNING, "Computing weights that %s may have: %s", source, error)
