"""Random fills that are put off: dropped, replayed, or carried out when somebody reads."""

from __future__ import annotations

import threading

import pytest
import timm
import torch
from torch import nn

from timm_ghn import Init
from timm_ghn.deferred import DeferredRandom
from timm_ghn.seeding import PrivateRandom, derived_seed


def test_replayed_fills_have_timms_distributions() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("test_efficientnet")
    deferred = DeferredRandom(0)
    with deferred:
        model = timm.create_model("test_efficientnet")
    for name, parameter in model.named_parameters():
        deferred.replay(parameter, name)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if ours.numel() > 500:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.25), name
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_dropped_is_never_filled() -> None:
    deferred = DeferredRandom(0)
    with deferred:
        tensor = torch.full((8, 8), 7.0)
        nn.init.kaiming_uniform_(tensor)
        tensor.mul_(2)
    deferred.drop([tensor])
    deferred.replay(tensor, "tensor")
    assert torch.equal(tensor, torch.full((8, 8), 7.0))


def test_replays_depend_on_seed_and_label_alone() -> None:
    def draw(seed: int, label: str, before: int) -> torch.Tensor:
        torch.rand(before)
        deferred = DeferredRandom(seed)
        with deferred:
            others = [torch.empty(5).normal_() for _ in range(before)]
            tensor = torch.empty(50)
            nn.init.xavier_normal_(tensor.view(5, 10))
        for index, other in enumerate(others):
            deferred.replay(other, str(index))
        deferred.replay(tensor, label)
        return tensor

    assert torch.equal(draw(0, "a", 1), draw(0, "a", 4))
    assert not torch.equal(draw(0, "a", 1), draw(0, "b", 1))
    assert not torch.equal(draw(0, "a", 1), draw(1, "a", 1))


def test_a_read_carries_out_what_was_put_off() -> None:
    with DeferredRandom(0):
        tensor = torch.zeros(100).normal_()
        tensor.add_(5)
        copied = tensor.clone()
        assert tensor.mean().item() == pytest.approx(5, abs=1)
    assert torch.equal(copied, tensor)


def test_later_constant_fills_win() -> None:
    deferred = DeferredRandom(0)
    with deferred:
        layer = nn.Linear(4, 4)
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 2.0)
    for name, parameter in layer.named_parameters():
        deferred.replay(parameter, name)
    assert layer.weight.abs().sum() == 0
    assert torch.equal(layer.bias, torch.full((4,), 2.0))


def test_fills_through_views_and_data() -> None:
    deferred = DeferredRandom(0)
    with deferred:
        weight = nn.Parameter(torch.zeros(4, 6))
        weight.data[:2].normal_()
        weight.data.mul_(3)
    assert weight.abs().sum() == 0
    deferred.replay(weight, "weight")
    assert (weight[:2] != 0).all()
    assert weight[2:].abs().sum() == 0


def test_orthogonal_and_other_derived_initializations() -> None:
    deferred = DeferredRandom(0)
    with deferred:
        weight = torch.empty(6, 6)
        nn.init.orthogonal_(weight)
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)


def test_derived_seeds() -> None:
    assert derived_seed(0, "a") == derived_seed(0, "a") != derived_seed(0, "b")
    assert 0 <= derived_seed("x") < 2**63


def test_private_draws_are_those_of_the_global_generator() -> None:
    def draw() -> list[torch.Tensor]:
        like = torch.empty(3, 4)
        return [
            torch.rand(5),
            torch.randn(2, 3),
            torch.randint(0, 9, (4,)),
            torch.randperm(6),
            torch.rand_like(like),
            torch.randn_like(like),
            torch.normal(0.0, 1.0, (3,)),
            torch.bernoulli(torch.full((9,), 0.5)),
            nn.functional.dropout(torch.ones(50), 0.5),
            nn.init.orthogonal_(torch.empty(4, 4)),
            nn.Linear(3, 2).weight.detach(),
        ]

    torch.manual_seed(7)
    expected = draw()
    state = torch.get_rng_state()
    with PrivateRandom(7):
        found = draw()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_building_in_one_thread_does_not_touch_the_draws_of_another() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2000)
    torch.manual_seed(3)
    built, drawn = threading.Event(), []

    def build() -> None:
        for _ in range(3):
            timm.create_model("test_vit", init=Init("orth", cache=False))
        built.set()

    thread = threading.Thread(target=build)
    thread.start()
    while not built.is_set() and len(drawn) < 1999:
        drawn.append(torch.rand(1))
    thread.join()
    drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected[: len(drawn)])


def test_a_generator_that_is_named_as_none_is_none() -> None:
    """timm 1.0.16 passes `generator=None` on to the methods that draw."""
    found = torch.empty(3)
    PrivateRandom(7).call(torch.Tensor.normal_, (found, 0.0, 1.0), {"generator": None})
    assert torch.equal(found, torch.randn(3, generator=torch.Generator().manual_seed(7)))
