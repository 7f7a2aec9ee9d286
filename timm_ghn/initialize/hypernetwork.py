"""The GHN that an initialization asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from timm_ghn.ghn import GHN, Prediction, content_hash, default_ghn, load_ghn
from timm_ghn.graph import Graph
from timm_ghn.initialize.memo import Memo
from timm_ghn.settings import NOISE, Init, Source
from timm_ghn.threads import Workers, single_threaded

_MAX_REMEMBERED = 32 * 2**20
"""Bytes of blocks beyond which predictions are not remembered. Those of ResNet-50 by the bundled GHN take 30 MiB."""


@dataclass(frozen=True)
class Hypernetwork:
    """A GHN that is going to predict.

    Attributes:
        model: The GHN.
        name: What it is called in the provenance.
        hash: SHA-256 of its configuration and weights.
        memo: Predictions for other models; None to remember none.
    """

    model: GHN
    name: str
    hash: str
    memo: Memo | None = field(default=None, compare=False)

    def predict(self, graph: Graph, workers: Workers) -> Iterator[Prediction]:
        """Predict as `GHN.predict` does, or give again what was predicted for that graph; nobody may change a block."""
        key = (self.hash, graph)
        found: list[Prediction] | None = None if self.memo is None else self.memo.find(key)
        if found is not None:
            yield from found
            return
        made: list[Prediction] = []
        size = 0
        for prediction in self.model.predict(graph, workers):
            yield prediction
            size += prediction.block.nbytes
            if self.memo is not None and size <= _MAX_REMEMBERED:
                made.append(prediction)
        if self.memo is not None and size <= _MAX_REMEMBERED:
            self.memo.keep(key, made)


def noise_of(init: Init, hypernetwork: Hypernetwork | None) -> float:
    """Beta of the paper: what was asked for, else that of the GHN's training, else the paper's; 0 without a GHN."""
    if hypernetwork is None:
        return 0.0
    noise = hypernetwork.model.config.noise if init.noise is None else init.noise
    return NOISE if noise is None else float(noise)


def find_hypernetwork(init: Init, memo: Memo | None = None) -> Hypernetwork | None:
    """The GHN that an initialization asks for, and its hash; None for methods without one.

    One thread loads it, so that children that are forked later can use torch.

    Args:
        init: The settings.
        memo: Where its predictions are remembered.

    Raises:
        CheckpointError, UnknownGhnError, DownloadError: If it cannot be loaded.
    """
    if init.spec.source is not Source.GHN:
        return None
    with single_threaded():
        ghn = load_ghn(init.ghn, shared=True) if init.ghn is not None else default_ghn(shared=True)
        if isinstance(init.ghn, GHN) or ghn.info is None:  # its weights may have changed since it was loaded
            return Hypernetwork(ghn, ghn.info.name if ghn.info else "in memory", content_hash(ghn), memo)
    return Hypernetwork(ghn, ghn.info.name, ghn.info.hash, memo)
