"""One model of every module of the installed timm, the smallest: its graph, its prediction, its starting layer.

Nothing here knows the name of a model; a new timm brings its own.
"""

from __future__ import annotations

import math
import statistics
import zlib
from typing import Any

import pytest
import timm
import torch
from ghn_reference import seeded_ghn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import MODULES, count_smallest_model, kept_count, models_of, on_meta, smallest_model

from timm_ghn.ghn import GHN
from timm_ghn.graph import Graph, Role, to_graph
from timm_ghn.graph.origins import LOOKED_UP
from timm_ghn.orthogonalization import (
    resolve_start_layer,
    selected_layers,
    weight_layers,
)
from timm_ghn.orthogonalization.layers import default_start_layer, is_pointwise

LARGE = 30_000_000
"""Number of parameters from which a model is not given memory of its own, or its values not compared."""


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn()


@pytest.mark.parametrize("module", MODULES)
def test_smallest_model_of(module: str, ghn: GHN) -> None:
    name = smallest_model(module)
    model = on_meta(name)
    graph = to_graph(model)
    check_graph(model, graph)
    check_layers(model, graph)
    check_prediction(model, graph, ghn)
    check_untouched(model, graph)


def shares(model: nn.Module, graph: Graph) -> tuple[float, float]:
    """Share of the parameters that is predicted, and that of tables which are looked up by index."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    predicted = sum(sizes[target.name] for target in graph.targets)
    looked_up = sum(sizes.get(name, 0) for name, reason in graph.unused if reason == LOOKED_UP)
    return predicted / total, looked_up / total


def check_graph(model: nn.Module, graph: Graph) -> None:
    """Every parameter is in one place, nearly all are predicted, and what is not has a true reason."""
    named = dict(model.named_parameters())
    targets = {target.name: target for target in graph.targets}
    reasons = dict(graph.unused)
    tied = {name for name, reason in reasons.items() if reason.startswith("tied to ")}
    assert len(targets) == len(graph.targets)
    assert not targets.keys() & reasons.keys()
    assert targets.keys() | (reasons.keys() - tied) == named.keys()
    assert all(tuple(named[name].shape) == target.shape for name, target in targets.items())
    predicted, looked_up = shares(model, graph)
    assert predicted + looked_up > 0.95
    assert not [name for name, reason in reasons.items() if reason.startswith("not on a path") and is_used(model, name)]


def is_used(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a convolution or linear layer, which every forward pass should read."""
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and name.endswith(".weight")


def check_layers(model: nn.Module, graph: Graph) -> None:
    """L lies in the network, leaves the classifier alone, and can be given in three ways."""
    layers = weight_layers(model)
    start = resolve_start_layer(layers)
    count = len(layers)
    assert 1 <= start == (1 if is_pointwise(layers) else default_start_layer(count)) <= count
    processed = count + 1 - start
    assert processed == count if is_pointwise(layers) else min(2, count) <= processed <= max(2, math.ceil(count / 3))
    classifier = {target.name for target in graph.targets if target.role is Role.CLASS_WEIGHT}
    assert classifier & {layer.parameter for layer in layers} <= {lay.parameter for lay in layers if lay.is_classifier}
    for chosen in (None, 1):
        selected = selected_layers(layers, resolve_start_layer(layers, chosen))
        assert not any(layer.is_classifier or layer.parameter in classifier for layer in selected)
    assert resolve_start_layer(layers, start) == start
    assert abs(resolve_start_layer(layers, start / count) - start) <= 1
    middle = layers[count // 2]
    if middle.module:
        assert layers[resolve_start_layer(layers, middle.module) - 1].module.startswith(middle.module)
    assert resolve_start_layer(layers, middle.parameter) <= middle.number


def check_prediction(model: nn.Module, graph: Graph, ghn: GHN) -> None:
    """Predicted tensors fit, are finite and not constant, and come out the same twice, bit for bit.

    Predictions of one shape are written in the same way, so that only the first of each is written.
    """
    space = torch.empty(max(math.prod(target.shape) for target in graph.targets))
    written: set[Any] = set()
    names: list[str] = []
    for prediction, again in zip(ghn.predict(graph), ghn.predict(graph), strict=True):
        target, block = prediction.target, prediction.block
        names.append(target.name)
        assert torch.isfinite(block).all(), target
        assert block.any(), target
        assert again.target == target
        assert torch.equal(again.block, block), target
        shapes = (target.shape, target.layout, prediction.kernel, block.shape)
        if shapes not in written:
            written.add(shapes)
            parameter = space[: math.prod(target.shape)].view(target.shape).fill_(0.0)
            prediction.write_(parameter)
            assert torch.isfinite(parameter).all(), target
            assert parameter.any(), target
    assert sorted(names) == sorted(target.name for target in graph.targets)


def digest(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy().tobytes())


def check_untouched(model: nn.Module, graph: Graph) -> None:
    """A model with memory of its own has the same graph, and is afterwards what it was before."""
    count = sum(parameter.numel() for parameter in model.parameters())
    model = model.to_empty(device="cpu") if count < LARGE else model
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = snapshot(model)
    assert to_graph(model).digest == graph.digest
    assert snapshot(model) == before


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a user would notice, in a form that can be compared; values as their bits."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    values = {name: digest(tensor.detach()) for name, tensor in tensors.items() if tensor.device.type == "cpu"}
    return {
        "values": values,
        "tensors": {name: (id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors.items()},
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "rng": digest(torch.get_rng_state()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_all_models_of(module: str) -> None:
    found = []
    for name in models_of(module):
        model = on_meta(name)
        graph = to_graph(model)
        check_graph(model, graph)
        check_layers(model, graph)
        found.append(sum(shares(model, graph)))
    assert statistics.mean(found) > 0.99


@pytest.mark.slow
def test_the_smallest_models_are_those_that_counting_finds() -> None:
    kept = kept_count()
    if kept["timm"] != timm.__version__:
        pytest.skip(f"counted for timm {kept['timm']}")
    assert kept["smallest"] == {module: count_smallest_model(module) for module in MODULES}


@given(st.integers(1, 3000))
def test_the_default_start_layer_grows_with_the_network(count: int) -> None:
    start, following = default_start_layer(count), default_start_layer(count + 1)
    assert 1 <= start <= count
    assert start <= following <= start + 1
    assert count + 1 - start <= max(2, math.ceil(count / 3))


def test_the_default_start_layer_of_the_paper() -> None:
    assert (default_start_layer(54), default_start_layer(113)) == (37, 94)
