"""The networks that a GHN is trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import timm_ghn
from timm_ghn.errors import TrainingError
from timm_ghn.ghn import GHN, GHNConfig, layout
from timm_ghn.initialize.plan import Assignment
from timm_ghn.orthogonalization import WeightLayer, weight_layers
from timm_ghn.seeding import seeded
from timm_ghn.settings import Source
from timm_ghn.training.architectures import Bounds, Network, count_macs, draw_architecture
from timm_ghn.training.conditioned import as_users_get
from timm_ghn.training.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_ghn() -> GHN:
    torch.manual_seed(0)
    return GHN(GHNConfig(max_shape=(16, 16, 11, 11), num_classes=10, hid=8, kernels="orthogonal"))


@pytest.fixture(scope="module")
def layer() -> WeightLayer:
    """Any layer."""
    network = Network(draw_architecture("test", 1, {"resnet": 1.0}, Bounds()), tiny_ghn())
    return next(assigned.layer for assigned in network.assignments.values() if assigned.layer is not None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_gives_networks_that_a_ghn_predicts(family: str) -> None:
    bounds = Bounds()
    architecture = draw_architecture("test", 0, {family: 1.0}, bounds)
    assert architecture.family == family
    with torch.device("meta"):
        model = architecture.build(10)
    assert sum(parameter.numel() for parameter in model.parameters()) <= max(bounds.of(family).max_params)

    ghn = tiny_ghn()
    network = Network(architecture, ghn)
    predicted = set(network.assignments)
    layers = {layer.parameter for layer in weight_layers(model)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes[name] for name in predicted & layers) > 0.95 * sum(sizes[name] for name in layers)
    with torch.no_grad():
        outputs_of, features = network(ghn([network.graph])[0], torch.randn(4, 3, 32, 32))
    assert outputs_of.shape == (4, 10)
    assert features.shape[0] == 4
    assert bool(torch.isfinite(outputs_of).all())


def test_draws_follow_the_shares_and_differ() -> None:
    drawn = [draw_architecture("test", index, {"resnet": 3.0, "vit": 1.0}, Bounds()) for index in range(24)]
    assert len(set(drawn)) == 24
    assert 12 <= sum(architecture.family == "resnet" for architecture in drawn) < 24
    assert drawn[5] == draw_architecture("test", 5, {"resnet": 3.0, "vit": 1.0}, Bounds())
    assert drawn[5] != draw_architecture("other", 5, {"resnet": 3.0, "vit": 1.0}, Bounds())


def test_a_network_that_takes_no_single_image_is_drawn_again() -> None:
    """A group norm of one value a group, as in the first draw of this number, refuses one image, which is recorded."""
    architecture = draw_architecture("0/train", 2042, {"resnetv2": 1.0}, Bounds())
    assert architecture.seed != "0/train/2042/0"
    Network(architecture, tiny_ghn())


def test_a_family_that_is_too_costly_is_named() -> None:
    with pytest.raises(TrainingError, match="no network of the family 'vgg' is within the bounds"):
        draw_architecture("test", 0, {"vgg": 1.0}, Bounds(max_params={10: 1.0}))


def test_multiply_adds_and_outputs_are_those_of_an_image() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 9))
    assert count_macs(model, 4) == (16 * 8 * 27 + 8 * 16 * 9 // 3, 8 * 16 + 9)


def test_a_network_keeps_no_memory_for_what_is_predicted_and_uses_the_statistics_of_the_batch() -> None:
    network = Network(draw_architecture("test", 1, {"resnet": 1.0}, Bounds()), tiny_ghn())
    predicted = set(network.assignments)
    held = {name for name, parameter in network.model.named_parameters() if not parameter.is_meta}
    assert predicted
    assert not predicted & held
    norms = [module for module in network.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.running_mean is None for norm in norms)


def test_what_is_not_predicted_depends_on_the_architecture_alone() -> None:
    architecture = draw_architecture("test", 0, {"cait": 1.0}, Bounds())
    torch.manual_seed(1)
    first = Network(architecture, tiny_ghn()).model
    torch.manual_seed(2)
    second = Network(architecture, tiny_ghn()).model
    kept = {name: parameter for name, parameter in first.named_parameters() if not parameter.is_meta}
    assert "cls_token" in kept
    assert all(torch.equal(parameter, second.get_parameter(name)) for name, parameter in kept.items())


def test_rows_of_class_tokens_are_timms_and_have_no_gradient() -> None:
    drawn = (draw_architecture("test", index, {"vit": 1.0}, Bounds()) for index in range(20))
    architecture = next(each for each in drawn if each.build(10).cls_token is not None)
    ghn = tiny_ghn()
    network = Network(architecture, ghn)
    with seeded(0):
        model: Any = architecture.build(10)
    images = torch.randn(2, 3, architecture.size, architecture.size)
    predicted = {name: value.detach().requires_grad_() for name, value in ghn([network.graph])[0].items()}
    outputs, _ = network(predicted, images)
    (grad,) = torch.autograd.grad(outputs.square().sum(), predicted["pos_embed"])
    rows = model.num_prefix_tokens
    assert not grad[:, :rows].any()
    assert grad[:, rows:].any()
    table = torch.cat([model.pos_embed[:, :rows], predicted["pos_embed"][:, rows:]], 1)
    model.load_state_dict({**predicted, "pos_embed": table}, strict=False)
    torch.testing.assert_close(model(images), outputs)


@pytest.mark.parametrize(
    ("start_layer", "noise", "signs"), [(None, None, False), (1, None, False), (1, 2.0, False), (1, None, True)]
)
def test_users_get_what_training_sees(start_layer: int | None, noise: float | None, signs: bool) -> None:
    """Of a network with layer norms, learned scales and residual branches, tensor by tensor."""
    architecture = draw_architecture("test", 0, {"maxxvit": 1.0}, Bounds())
    ghn = GHN(replace(tiny_ghn().config, start_layer=start_layer, noise=noise, signs=signs))
    network = Network(architecture, ghn)
    with torch.no_grad():
        seen = as_users_get(ghn([network.graph])[0], network.assignments, ghn.config, seed=0)
    model = architecture.build(10)
    size = (3, architecture.size, architecture.size)
    report = timm_ghn.init_model(model, "ghn-orth", ghn=ghn, input_size=size, cache=False)
    assert (report.start_layer == 1) == (start_layer == 1)
    assert report.provenance["noise"] == (noise or 3e-5)
    assert any(assigned.gains for assigned in network.assignments.values())
    for name in seen.keys() - {"head.fc.weight"}:  # a classifier of another scale is brought to the nominal one
        tensor = seen[name]
        torch.testing.assert_close(tensor, model.get_parameter(name).detach(), atol=1e-4, rtol=1e-3)


def test_orthogonalized_kernels_have_the_gradient_of_a_rotation(layer: WeightLayer) -> None:
    """Checked against finite differences of a small rotation, for which the orthogonal factor is exactly linear."""
    kernel = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0].float() * 3
    weight = kernel[:20].clone().requires_grad_()
    how = {"a": Assignment(Source.GHN, layer=layer), "b": Assignment(Source.GHN, factor=0.5)}
    turned = as_users_get({"a": weight, "b": torch.ones(3)}, how, GHNConfig(), 0)
    torch.testing.assert_close(turned["a"].detach(), kernel[:20] / 3, atol=1e-5, rtol=0)
    assert torch.equal(turned["b"], torch.full((3,), 0.5))
    (grad,) = torch.autograd.grad(turned["a"][4, 5], weight)
    expected = torch.zeros(20, 40)
    expected[4, 5] = 1 / 3
    torch.testing.assert_close(grad, expected, atol=1e-4, rtol=0)


def test_with_large_noise_the_gradient_is_that_of_the_part_that_is_predicted(layer: WeightLayer) -> None:
    weight = torch.linalg.qr(torch.randn(300, 100))[0].T.clone().requires_grad_()
    how = {"a": Assignment(Source.GHN, layer=layer)}
    result = as_users_get({"a": weight}, how, GHNConfig(max_shape=(16, 16, 11, 11), noise=0.5), 0)["a"]
    torch.testing.assert_close(result @ result.T, torch.eye(100), atol=1e-4, rtol=0)
    left = float((result.detach() * weight.detach()).sum() / 100)
    assert 0.5 < left < 0.95
    (grad,) = torch.autograd.grad(result.sum(), weight)
    torch.testing.assert_close(grad, torch.full_like(grad, left))


@pytest.mark.parametrize(("shape", "seen"), [((12, 40), (slice(8), slice(None))), ((40, 12), (slice(None), slice(8)))])
def test_vectors_that_repeat_have_no_gradient(
    shape: tuple[int, int], seen: tuple[slice, slice], layer: WeightLayer
) -> None:
    config = GHNConfig(max_shape=(8, 8, 11, 11))
    block = torch.randn(8, 8).repeat(5, 5)[: shape[0], : shape[1]]
    weight = block.clone().requires_grad_()
    result = as_users_get({"a": weight}, {"a": Assignment(Source.GHN, layer=layer)}, config, 0)["a"]
    gram = result @ result.T if shape[0] < shape[1] else result.T @ result
    torch.testing.assert_close(gram.detach(), torch.eye(12), atol=1e-4, rtol=0)
    (grad,) = torch.autograd.grad(result.sum(), weight)
    assert bool((grad[seen] != 0).all())
    assert int((grad != 0).sum()) == grad[seen].numel()


@pytest.mark.parametrize("signed", [False, True])
def test_all_vectors_of_a_stem_have_a_gradient(signed: bool, layer: WeightLayer) -> None:
    """More output channels than the inputs have elements, in several places."""
    weight = torch.randn(64, 3, 3, 3, requires_grad=True)
    result = as_users_get({"a": weight}, {"a": Assignment(Source.GHN, layer=layer)}, GHNConfig(signs=signed), 0)["a"]
    (grad,) = torch.autograd.grad(result.sum(), weight)
    assert bool((grad != 0).all())


@pytest.mark.parametrize(("shape", "count"), [((24, 40), 24), ((40, 24), 24), ((24, 8, 2, 2), 8)])
def test_with_signs_as_many_vectors_have_a_gradient_as_there_are_blocks(
    shape: tuple[int, ...], count: int, layer: WeightLayer
) -> None:
    config = GHNConfig(max_shape=(8, 8, 11, 11), signs=True)
    block = torch.randn(8, 8, *shape[2:]).repeat(5, 5, *(1 for _ in shape[2:]))[: shape[0], : shape[1]]
    weight = (block * layout.signs(shape, (8, 8))).requires_grad_()
    result = as_users_get({"a": weight}, {"a": Assignment(Source.GHN, layer=layer)}, config, 0)["a"].flatten(1)
    gram = result @ result.T if result.shape[0] < result.shape[1] else result.T @ result
    torch.testing.assert_close(gram.detach(), torch.eye(len(gram)), atol=1e-4, rtol=0)
    (grad,) = torch.autograd.grad(result.sum(), weight)
    assert int((grad != 0).flatten(1).any(1 if shape[0] <= 24 else 0).sum()) == count
