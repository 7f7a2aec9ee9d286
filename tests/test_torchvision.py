"""All classification models of torchvision."""

from __future__ import annotations

import pytest
import torchvision.models
from zoo import WithoutFills

from timm_ghn.graph import Role, to_graph
from timm_ghn.postprocess import weight_layers

NAMES = torchvision.models.list_models(module=torchvision.models)
_SETTINGS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}  # no warning, no scipy


def test_there_are_models() -> None:
    assert {"resnet50", "swin_v2_t", "vit_b_16", "maxvit_t", "googlenet"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_graph_of(name: str) -> None:
    with WithoutFills():  # some RegNets of torchvision cannot be built on the meta device
        model = torchvision.models.get_model(name, weights=None, **_SETTINGS.get(name, {}))
    graph = to_graph(model)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    training_only = {key for key, reason in graph.unused if reason.endswith("in evaluation mode")}
    assert all(key.lower().startswith("aux") for key in training_only)  # heads of GoogLeNet and Inception
    total = sum(size for key, size in sizes.items() if key not in training_only)
    assert sum(sizes[target.name] for target in graph.targets) / total > 0.95
    classifier = [target.name for target in graph.targets if target.role is Role.CLASS_WEIGHT]
    assert len(classifier) == 1
    assert [layer.parameter for layer in weight_layers(model) if layer.is_classifier] == classifier
