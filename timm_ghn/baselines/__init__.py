"""Initializations that a user would weigh against a GHN's, in closed form or from one batch.

They work on modules and tensors, by type and shape, and change parameters in place. `timm_ghn.init_model` and
`timm.create_model(..., init=...)` know them by the names in `BASELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.baselines.covariance import covariance_
from timm_ghn.baselines.fixup import fixup_
from timm_ghn.baselines.lsuv import lsuv_
from timm_ghn.baselines.mimetic import mimetic_
from timm_ghn.errors import InitError
from timm_ghn.seeding import derived_seed

__all__ = ["BASELINES", "apply_baseline", "covariance_", "fixup_", "lsuv_", "mimetic_"]

_BATCH = 32
"""Inputs of standard normal noise where no batch is given."""


def apply_baseline(
    name: str, model: nn.Module, seed: int, *, input_size: Sequence[int] | None = None, example_input: Any = None
) -> tuple[str, ...]:
    """Initialize a model in place.

    Args:
        name: One of `BASELINES`.
        model: The model.
        seed: Seed of whatever is drawn.
        input_size: (channels, height, width) of one image.
        example_input: A batch of inputs instead; "lsuv" measures on it, and otherwise on noise of that size.

    Returns:
        Names of the parameters that changed.

    Raises:
        InitError: If it does not apply to the model, which is then unchanged.
    """
    changed = BASELINES[name](model, seed, input_size, example_input)
    if not changed:
        raise InitError(f"{name} has nothing to initialize in {type(model).__name__}: {_NEEDS[name]}")
    return changed


_NEEDS: Mapping[str, str] = {
    "covariance": "it has no depthwise convolutions with odd kernels of 3 x 3 or more",
    "mimetic": "it has no self-attention with stacked query, key and value weights",
    "lsuv": "it has no convolutions or linear layers",
    "fixup": "it has no layers",
}


def _lsuv(model: nn.Module, seed: int, input_size: Sequence[int] | None, example_input: Any) -> tuple[str, ...]:
    return lsuv_(model, _batch(model, seed, input_size, example_input), seed)


def _batch(model: nn.Module, seed: int, input_size: Sequence[int] | None, example_input: Any) -> Tensor:
    """The example if there is one, else standard normal noise.

    Raises:
        InitError: If neither says what the model takes.
    """
    parameter = next(model.parameters())
    if isinstance(example_input, Tensor) and not example_input.is_meta:
        return example_input.to(parameter.device, parameter.dtype)
    size = input_size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise InitError("lsuv measures on a batch of inputs: give example_input=images, or input_size=(3, 224, 224)")
    generator = torch.Generator().manual_seed(derived_seed("lsuv batch", seed))
    return torch.randn(_BATCH, *size, generator=generator).to(parameter.device, parameter.dtype)


BASELINES: Mapping[str, Callable[[nn.Module, int, Sequence[int] | None, Any], tuple[str, ...]]] = {
    "lsuv": _lsuv,
    "fixup": lambda model, seed, size, example: fixup_(model, seed, input_size=size, example_input=example),
    "covariance": lambda model, seed, *_: covariance_(model, seed),
    "mimetic": lambda model, seed, *_: mimetic_(model, seed),
}
"""The baselines by name; each takes model, seed, input size and example input, and returns what it changed."""
