"""Taking ready-made weights from the Hub: verified against their description before a model sees them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import CheckpointError, DownloadError, HubUnreachableError, InitError, TensorFileError
from timm_ghn.hub.client import HubSource, Snapshot, fetch, look_up_or_cached
from timm_ghn.hub.manifest import FILE, MAX_BYTES, Manifest, dtype_of
from timm_ghn.initialize.plan import expected_origin
from timm_ghn.initialize.provenance import record_
from timm_ghn.initialize.report import ParameterReport, Report, Status
from timm_ghn.orthogonalization import classifier_prefixes
from timm_ghn.request import HUB_PREFIX, Request
from timm_ghn.settings import Source
from timm_ghn.storage.header import specs_of
from timm_ghn.storage.paths import file_sha256
from timm_ghn.storage.reader import TensorReader

_logger = logging.getLogger(__name__)

ORGANIZATION_VARIABLE = "TIMM_GHN_HUB_ORG"
"""Environment variable that names an organization of the Hub, or with "@revision" one of its branches or tags, where
weights are looked for before they are computed."""
RETRY_SECONDS = 300.0
"""After so long an organization is asked again that kept a call waiting and gave no answer."""
_WAITED_SECONDS = 0.5
_ask_again: dict[str, float] = {}  # when, on the monotonic clock, by organization


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
    if manifest.report.model != architecture and ":" not in name:
        raise InitError(f"{snapshot} has weights of {manifest.report.model}, not of {architecture}")
    tensors = pull(snapshot, manifest)
    deferred = DeferredRandom(int(manifest.provenance["seed"]))
    with deferred:
        model = request.build()
    kept = _check_fit(model, tensors, manifest, snapshot)
    fill(model, {name: tensor for name, tensor in tensors.items() if name not in kept}, deferred)
    rows = tuple(
        ParameterReport(row.name, row.shape, Status.KEPT, "classifier of another size") if row.name in kept else row
        for row in manifest.report.parameters
    )
    seconds = time.perf_counter() - start
    report = replace(manifest.report, parameters=rows, seconds=seconds, source=str(snapshot))
    record_(model, report)
    return model, report


def read_manifest(snapshot: Snapshot) -> Manifest:
    """The description of a repository's weights.

    Raises:
        DownloadError: If there is no such repository, it has no weights made by timm-ghn, or it cannot be reached.
        CheckpointError: If the description is malformed.
    """
    if snapshot.is_online and FILE not in snapshot.files:
        raise DownloadError(
            f"{snapshot} has no weights that timm-ghn made (no {FILE}); "
            f"for others there is timm.create_model('{HUB_PREFIX}{snapshot.source.repository}', pretrained=True)"
        )
    path = fetch(snapshot, FILE, limit=MAX_BYTES)
    return Manifest.from_json(path.read_bytes(), f"{FILE} of {snapshot}")


def pull(snapshot: Snapshot, manifest: Manifest) -> dict[str, Tensor]:
    """Fetch and verify the weights, by name, before a model gets any of them.

    Raises:
        DownloadError: If they cannot be fetched.
        CheckpointError: If they are not what is described, or a value is not a number.
    """
    tensors: dict[str, Tensor] = {}
    for name, record in sorted(manifest.files.items()):
        path = fetch(snapshot, name, limit=record.size)
        # What the Hub describes was compared with its hash already.
        found = snapshot.files[name].sha256 if snapshot.is_online else None
        if path.stat().st_size != record.size or (found or file_sha256(path)) != record.sha256:
            raise CheckpointError(f"{name} of {snapshot} does not have the size and hash that {FILE} gives")
        try:
            with TensorReader(path) as file:
                tensors.update({key: file.read(key) for key in file.specs})
        except (TensorFileError, OSError) as error:
            raise CheckpointError(f"{snapshot}: {name} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{snapshot}: {name} has values that are not finite")
    for row in manifest.report.parameters:
        shape = tuple(tensors[row.name].shape) if row.name in tensors else "missing"
        if shape != row.shape:
            raise CheckpointError(
                f"{snapshot}: {row.name} is {shape} in the files of weights, and {row.shape} in their description"
            )
    return tensors


def _check_fit(model: nn.Module, there: Mapping[str, Tensor], manifest: Manifest, snapshot: Snapshot) -> frozenset[str]:
    """The tensors of a classifier of another size, which are not taken.

    Raises:
        InitError: If any other tensor is different.
    """
    here = model.state_dict()
    resized = getattr(model, "num_classes", None) != manifest.num_classes
    prefixes = classifier_prefixes(model) if resized else ()
    head = frozenset(name for name in {*here, *there} if name.startswith(prefixes))
    for name in sorted({*here, *there} - head):
        ours, theirs = (tuple(side[name].shape) if name in side else "missing" for side in (here, there))
        if ours != theirs:
            raise InitError(
                f"{snapshot} does not fit the model: {name} is {theirs} there and {ours} here. "
                f"timm adapts weights to other inputs: timm.create_model('{snapshot}', pretrained=True, ...)"
            )
    return head


def fill(model: nn.Module, tensors: Mapping[str, Tensor], deferred: DeferredRandom) -> None:
    """Give a model the weights, and what they do not cover the initialization that was put off."""
    state = model.state_dict(keep_vars=True)
    deferred.drop(state[name] for name in tensors)
    for name, parameter in model.named_parameters():
        deferred.replay(parameter, name)
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


# --- an organization that is looked into first ----------------------------------------------------------------------


def _look_up_patiently(source: HubSource) -> Snapshot:
    """`look_up_or_cached`, without asking again and again where a call had to wait for nothing."""
    organization, start = source.repository.partition("/")[0], time.monotonic()
    if start < _ask_again.get(organization, start):
        return Snapshot(source, None, {})
    snapshot = look_up_or_cached(source)
    if not snapshot.is_online and time.monotonic() - start > _WAITED_SECONDS:
        _ask_again[organization] = start + RETRY_SECONDS
    return snapshot


def from_organization(request: Request, model: nn.Module, deferred: DeferredRandom) -> Report | None:
    """Give a model ready-made weights of the organization, if it has exactly those that are asked for.

    Args:
        request: What is asked for.
        model: The model as it was built.
        deferred: What was put off while the model was built.

    Returns:
        The report, or None if the weights have to be computed.

    Raises:
        TimmGhnError: If what is asked for cannot be had either way: L lies outside of the model, or there is no GHN;
            or if the variable cannot be the name of an organization.
    """
    organization, sign, revision = os.environ.get(ORGANIZATION_VARIABLE, "").strip().partition("@")
    init, is_described = request.init, request.recipe() is not None and "pretrained_cfg" not in request.arguments
    if not organization or not init.cache or init.spec.source is Source.TIMM or not is_described:
        return None
    repository = f"{organization}/{request.name.partition('.')[0]}.{init.method.replace('-', '_')}"
    source, start = HubSource.parse(f"{repository}{sign}{revision}"), time.perf_counter()
    try:
        snapshot = _look_up_patiently(source)
        manifest = read_manifest(snapshot)
        origin = expected_origin(model, request.init)
        difference = manifest.difference(request, origin, dtype_of(model))
        if difference:
            _logger.warning(
                "The weights of %s are not those that are asked for, and are computed: %s", snapshot, difference
            )
            return None
        tensors = pull(snapshot, manifest)
        if specs_of(tensors) != specs_of(model.state_dict()):
            raise CheckpointError(f"{snapshot} has tensors of other names, types or shapes than the model")
    except (DownloadError, CheckpointError) as error:
        # Loudly if something is wrong, not if there are just none.
        harmless = isinstance(error, HubUnreachableError) or isinstance(error.__cause__, RepositoryNotFoundError)
        level = logging.INFO if harmless else logging.WARNING
        _logger.log(level, "Computing weights that %s may have: %s", source, error)
        return None
    fill(model, tensors, deferred)
    seconds = time.perf_counter() - start
    report = replace(manifest.report, provenance=origin, seconds=seconds, source=str(snapshot))
    record_(model, report)
    return report
