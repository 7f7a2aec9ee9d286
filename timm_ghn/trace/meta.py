"""Building models without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from timm_ghn.deferred import DeferredRandom

_Model = TypeVar("_Model", bound=nn.Module)


def build_on_meta(create: Callable[[], _Model]) -> _Model:
    """A model on the meta device.

    Models of older timm read numbers from tensors while they are built (the steps of drop path rates), and meta
    tensors have none. Such a model is built on the CPU, without filling its parameters, and moved.

    Args:
        create: Builds the model; called a second time if it fails on the meta device.
    """
    try:
        with torch.device("meta"):
            return create()
    except RuntimeError:  # and NotImplementedError, which is one
        with DeferredRandom(seed=0):
            model = create()
        return model.to("meta")
