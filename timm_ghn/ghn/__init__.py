"""Graph hypernetworks: the model, its checkpoints, and the ones known by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_ghn.ghn.config import GHNConfig
from timm_ghn.ghn.registry import default_ghn, list_ghns, load_ghn

if TYPE_CHECKING:
    from timm_ghn.ghn.checkpoint import content_hash, read, write_safetensors
    from timm_ghn.ghn.model import GHN, Prediction

__all__ = [
    "GHN",
    "GHNConfig",
    "Prediction",
    "content_hash",
    "default_ghn",
    "list_ghns",
    "load_ghn",
    "read",
    "write_safetensors",
]

_IN_MODEL = ("GHN", "Prediction")


def __getattr__(name: str) -> Any:
    """What needs torch, imported when it is used: the table of names does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'model' if name in _IN_MODEL else 'checkpoint'}"), name)
