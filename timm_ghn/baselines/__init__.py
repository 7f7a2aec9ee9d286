"""Initializations that a user would weigh against a GHN's, in closed form or from one batch.

They work on modules and tensors, by type and shape. Each says which parameters of a model it computes, after having
checked that it applies, and computes them without changing the model. `timm_ghn.init_model` and
`timm.create_model(..., init=...)` know them by the names in `BASELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from timm_ghn.baselines.covariance import covariance
from timm_ghn.baselines.fixup import fixup
from timm_ghn.baselines.lsuv import lsuv
from timm_ghn.baselines.mimetic import mimetic
from timm_ghn.baselines.setting import Computation, Setting

__all__ = ["BASELINES", "Computation", "Setting"]

BASELINES: Mapping[str, Callable[[Setting], Computation]] = {
    "lsuv": lsuv,
    "fixup": fixup,
    "covariance": covariance,
    "mimetic": mimetic,
}
"""The baselines by name. Each raises InitError if it does not apply to the model."""
