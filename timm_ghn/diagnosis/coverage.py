"""How much of a timm model a GHN predicts. The graph alone answers: no weights, no GHN, no download."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import timm

from timm_ghn.graph import to_graph
from timm_ghn.orthogonalization import resolve_start_layer, selected_layers, weight_layers
from timm_ghn.trace.meta import build_on_meta


@dataclass(frozen=True)
class Coverage:
    """How much of a model is predicted.

    Attributes:
        name: Name of the model.
        parameters: Elements of all parameters, shared ones once.
        nodes: Nodes of the graph.
        predicted: Elements that a GHN of the model's number of classes predicts.
        orthogonalized: Elements of the layers from L on, without the classifier.
        start_layer: L, the first layer that is orthogonalized, counted from 1.
        layers: Number of convolutional and fully-connected layers.
        kept: Elements that are not predicted, by reason, the most first.
    """

    name: str
    parameters: int
    nodes: int
    predicted: int
    orthogonalized: int
    start_layer: int
    layers: int
    kept: dict[str, int]


def coverage_of(name: str) -> Coverage:
    """How much of a model of timm is predicted.

    Raises:
        CaptureError: If its forward pass cannot be recorded.
        GraphError: If it has no layer that can be predicted.
    """
    model = build_on_meta(lambda: timm.create_model(name))
    graph = to_graph(model)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    layers = weight_layers(model)
    start_layer = resolve_start_layer(layers)
    kept: Counter[str] = Counter()
    for parameter, reason in graph.unused:
        kept[reason] += sizes.get(parameter, 0)
    targets = {target.name for target in graph.targets}
    return Coverage(
        name=name,
        parameters=sum(sizes.values()),
        nodes=len(graph),
        predicted=sum(size for parameter, size in sizes.items() if parameter in targets),
        orthogonalized=sum(sizes[layer.parameter] for layer in selected_layers(layers, start_layer)),
        start_layer=start_layer,
        layers=len(layers),
        kept=dict(kept.most_common()),
    )
