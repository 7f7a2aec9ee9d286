"""Graph hypernetworks: the model, its checkpoints, and the ones known by name."""

from timm_ghn.ghn.checkpoint import (
    content_hash,
    from_module,
    read,
    read_ppuda,
    read_safetensors,
    write_safetensors,
)
from timm_ghn.ghn.config import GHNConfig, GHNInfo
from timm_ghn.ghn.model import GHN, Prediction
from timm_ghn.ghn.registry import GHNRow, NamedGHN, default_ghn, list_ghns, load_ghn

__all__ = [
    "GHN",
    "GHNConfig",
    "GHNInfo",
    "GHNRow",
    "NamedGHN",
    "Prediction",
    "content_hash",
    "default_ghn",
    "from_module",
    "list_ghns",
    "load_ghn",
    "read",
    "read_ppuda",
    "read_safetensors",
    "write_safetensors",
]
