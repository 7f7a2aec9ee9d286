"""Whether weights that somebody made are the ones that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from timm_ghn.hub.folder import tensor_table
from timm_ghn.hub.manifest import Manifest
from timm_ghn.initialize.plan import expected_origin
from timm_ghn.settings import Init

_LABELS = ("ghn",)
"""Parts of a provenance that are names of something whose hash stands beside it."""


@dataclass(frozen=True)
class Asked:
    """Everything that decides what a model's weights are going to be.

    Attributes:
        architecture: timm's name of the model.
        arguments: Arguments of `timm.create_model`, JSON-compatible.
        provenance: What an initialization would note.
        tensors: Type and shape of every tensor of the state dict.
    """

    architecture: str
    arguments: Mapping[str, Any]
    provenance: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, model: nn.Module, name: str, init: Init, arguments: Mapping[str, Any]) -> Asked:
        """What is asked for; nothing is computed, and the model may be on the meta device.

        Raises:
            TimmGhnError: If L lies outside of the model, or the GHN cannot be loaded.
        """
        return cls(name.partition(".")[0], arguments, expected_origin(model, init), tensor_table(model))

    def difference(self, manifest: Manifest) -> str:
        """What is different about weights that are offered; empty if they are the ones."""
        if manifest.architecture != self.architecture:
            return f"they are of {manifest.architecture}, not of {self.architecture}"
        if dict(manifest.arguments) != dict(self.arguments):
            return f"the model's arguments are {dict(manifest.arguments)} there and {dict(self.arguments)} here"
        for key in sorted({*self.provenance, *manifest.provenance} - set(_LABELS)):
            there, here = manifest.provenance.get(key), self.provenance.get(key)
            if there != here:
                return f"{key} is {there!r} there and {here!r} here"
        if dict(manifest.tensors) != dict(self.tensors):
            names = {*manifest.tensors, *self.tensors}
            first = min(name for name in names if manifest.tensors.get(name) != self.tensors.get(name))
            return f"{first} is {manifest.tensors.get(first)} there and {self.tensors.get(first)} here"
        return ""
