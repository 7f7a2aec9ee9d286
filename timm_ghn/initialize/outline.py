"""What the code of a model says of it, whatever values its parameters have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from timm_ghn.graph import Graph, Reading, capture, condense
from timm_ghn.graph.analyses import Analyses, analyse
from timm_ghn.orthogonalization import WeightLayer, weight_layers


@dataclass(frozen=True, slots=True)
class Outline:
    """The layers of a model, and what a forward pass shows of it.

    Attributes:
        layers: All conv and fully-connected layers.
        analyses: What is known of the values of the forward pass.
        graph: The graph that a GHN reads.
    """

    layers: tuple[WeightLayer, ...]
    analyses: Analyses
    graph: Graph


def read_outline(
    model: nn.Module,
    reading: Literal["default", "ppuda"],
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
) -> Outline:
    """Record a forward pass of a model, without touching the model, and read its layers and graph.

    Args:
        model: The model.
        reading: How the graph is read, as of `Init`.
        input_size: As of `init_model`.
        example_input: As of `init_model`.

    Raises:
        CaptureError: If the forward pass cannot be recorded.
        GraphError: If the model has no layer that can be predicted.
    """
    trace = capture(model, input_size=input_size, example_input=example_input)
    analyses = analyse(trace)
    graph = condense(trace, reading=Reading(reading), analyses=analyses)
    return Outline(weight_layers(model, trace=trace), analyses, graph)
