"""GHNs from repositories of the Hub."""

from __future__ import annotations

from dataclasses import replace

from timm_ghn.errors import DownloadError
from timm_ghn.ghn import checkpoint
from timm_ghn.ghn.config import HUB_FILE, MAX_PARAMETERS
from timm_ghn.ghn.model import GHN
from timm_ghn.hub.client import HubSource, Snapshot, fetch, look_up_or_cached

MAX_GHN_BYTES = 5 * MAX_PARAMETERS
"""Float32, and a header."""


def pull_ghn(source: str, *, download: bool = True) -> GHN:
    """Load `ghn.safetensors` of a repository.

    Args:
        source: "hf-hub:organization/name[@revision]".
        download: Whether the network may be used.

    Raises:
        DownloadError: If there is none, or it cannot be fetched.
        CheckpointError: If it is damaged or is not a GHN.
    """
    parsed = HubSource.parse(source)
    snapshot = look_up_or_cached(parsed) if download else Snapshot(parsed, None, {})
    if snapshot.is_online and HUB_FILE not in snapshot.files:
        raise DownloadError(
            f"{source} has no {HUB_FILE}. Pickled checkpoints (.pt) are not read from the Hub: "
            "download the file yourself, and load it by its path"
        )
    ghn = checkpoint.read(fetch(snapshot, HUB_FILE, limit=MAX_GHN_BYTES))
    if ghn.info is not None:
        ghn.info = replace(ghn.info, name=source)
    return ghn
