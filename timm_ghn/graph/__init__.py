"""Recording a model's forward pass and condensing it to the graph that a GHN reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from timm_ghn.graph.condense import Reading, condense
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Layout, Node, Op, Role, Target
from timm_ghn.trace.capture import capture

__all__ = ["Graph", "Layout", "Node", "Op", "Reading", "Role", "Target", "capture", "condense", "to_graph"]


def to_graph(
    model: nn.Module,
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
    reading: Reading | str = Reading.DEFAULT,
) -> Graph:
    """The graph that a GHN reads of a model. The model is not changed, moved, or run on data.

    Args:
        model: Any module.
        input_size: (channels, height, width) of one image, or the side of a square. Default: what a timm model says of
            itself, else 3 x 224 x 224.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors.
        reading: "default", or "ppuda" for exact comparison with ppuda (see `Reading`).

    Raises:
        CaptureError: If the forward pass cannot be recorded on meta tensors.
        GraphError: If the model has nothing that a GHN can predict.
    """
    return condense(capture(model, input_size=input_size, example_input=example_input), reading=Reading(reading))
