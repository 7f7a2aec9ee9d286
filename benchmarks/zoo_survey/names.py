"""Where models of timm come from."""

from __future__ import annotations

import timm


def module_of(name: str) -> str:
    """The module of timm that builds a model, such as "resnet"."""
    entrypoint: str = timm.models.model_entrypoint(name).__module__
    return entrypoint.rpartition(".")[2]
