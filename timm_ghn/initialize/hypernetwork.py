"""The GHN that an initialization asks for."""

from __future__ import annotations

from dataclasses import dataclass

from timm_ghn.ghn import GHN, content_hash, default_ghn, load_ghn
from timm_ghn.orthogonalization import single_threaded
from timm_ghn.settings import Init, Source


@dataclass(frozen=True)
class Hypernetwork:
    """A GHN that is going to predict.

    Attributes:
        model: The GHN.
        name: What it is called in the provenance.
        hash: SHA-256 of its configuration and weights.
    """

    model: GHN
    name: str
    hash: str


def find_hypernetwork(init: Init) -> Hypernetwork | None:
    """The GHN that an initialization asks for, and its hash; None for methods without one.

    One thread loads it: once torch has started threads, children that are forked later hang in their first parallel
    loop.

    Raises:
        CheckpointError, UnknownGhnError, DownloadError: If it cannot be loaded.
    """
    if init.spec.source is not Source.GHN:
        return None
    with single_threaded():
        ghn = load_ghn(init.ghn, shared=True) if init.ghn is not None else default_ghn(shared=True)
        if isinstance(init.ghn, GHN) or ghn.info is None:  # its weights may have changed since it was loaded
            return Hypernetwork(ghn, ghn.info.name if ghn.info else "in memory", content_hash(ghn))
    return Hypernetwork(ghn, ghn.info.name, ghn.info.hash)
