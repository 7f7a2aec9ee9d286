"""Whether a published GHN predicts what its authors say: norms of the parameters of torchvision's networks.

The authors of GHN-3 publish the Euclidean norm of all parameters of 74 networks after a prediction, for three of their
files (github.com/SamsungSAILMontreal/ghn3 at b3289ac, ghn3_results.json). Those numbers are in `published_norms.json`.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping

import torch
import torchvision
from torch import nn

from timm_ghn.errors import CheckpointError
from timm_ghn.ghn.model import GHN
from timm_ghn.graph import to_graph
from timm_ghn.trace.meta import build_on_meta

ABSOLUTE, RELATIVE = 1e-2, 1e-4
"""Tolerances: that of ghn3's own check, and four digits for the largest norms."""
READ_DIFFERENTLY = ("squeezenet1_0", "squeezenet1_1")
"""Networks for which ghn3 moves the pooling in front of the classifier, because of their class; not to be compared."""


def is_right(found: float, published: float) -> bool:
    """Whether a norm agrees with the published one."""
    return math.isclose(found, published, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def published_norms(name: str) -> dict[str, float]:
    """Published norms by network, for a GHN of that name.

    Raises:
        CheckpointError: If there are none.
    """
    text = (importlib.resources.files("timm_ghn.ghn") / "published_norms.json").read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, float]] = json.loads(text)
    norms = {network: row[name] for network, row in table.items() if name in row}
    if not norms:
        known = ", ".join(sorted({column for row in table.values() for column in row}))
        raise CheckpointError(f"no norms are published for GHN {name}; there are some for {known}")
    return norms


def predicted_norm(ghn: GHN, model: nn.Module) -> float | None:
    """Euclidean norm of all parameters that a GHN predicts for a model; None if there are others."""
    graph = to_graph(model)
    if {name for name, _ in model.named_parameters()} != {target.name for target in graph.targets}:
        return None
    with torch.no_grad():
        return math.hypot(
            *(float(torch.linalg.vector_norm(item.materialize(), dtype=torch.float64)) for item in ghn.predict(graph))
        )


def build(network: str) -> nn.Module:
    """A network of torchvision without memory for its weights."""
    arguments = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}  # else a warning, and scipy
    model: nn.Module = build_on_meta(lambda: torchvision.models.get_model(network, weights=None, **arguments))
    return model
