"""All classification models of torchvision; in the default run the smallest of each of its modules."""

from __future__ import annotations

import pytest
import torchvision.models
from zoo import WithoutFills

from timm_ghn.graph import Role, to_graph
from timm_ghn.orthogonalization import weight_layers

NAMES = torchvision.models.list_models(module=torchvision.models)


def smallest_models() -> list[str]:
    """The model with the fewest parameters of each module of torchvision, as its own descriptions say."""
    found: dict[str, tuple[int, str]] = {}
    for name in NAMES:
        size = min(weights.meta["num_params"] for weights in torchvision.models.get_model_weights(name))
        module = torchvision.models.get_model_builder(name).__module__
        found[module] = min(found.get(module, (size, name)), (size, name))
    return sorted(name for _, name in found.values())


_SETTINGS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}  # no warning, no scipy


def test_there_are_models() -> None:
    assert {"resnet50", "swin_v2_t", "vit_b_16", "maxvit_t", "googlenet"} <= set(NAMES)
    assert {"resnet18", "squeezenet1_1", "googlenet", "maxvit_t"} <= set(smallest_models())


@pytest.mark.parametrize("name", smallest_models())
def test_smallest_graph_of_a_module(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_graph_of(name: str) -> None:
    check(name)


def check(name: str) -> None:
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
