"""What a process remembers of a model never gives other weights than reading the model again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from ghn_reference import seeded_ghn
from test_fingerprint import Net, residual
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import timm_ghn
from timm_ghn.initialize import outline
from timm_ghn.initialize.create import create
from timm_ghn.initialize.memo import Memo
from timm_ghn.request import Request


def settings(seed: int = 0, method: str = "ghn-orth") -> timm_ghn.Init:
    return timm_ghn.Init(method, ghn="bundled", fallback="off", seed=seed, cache=False)


def alone(name: str, init: timm_ghn.Init) -> dict[str, Tensor]:
    """The weights that a process gives that remembers nothing."""
    return create(Request(name, init), None)[0].state_dict()


def assert_equal(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    capture = outline.capture
    monkeypatch.setattr(outline, "capture", lambda *args, **kw: (counted.append(1), capture(*args, **kw))[1])
    return counted


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_many_seeds_are_read_once_and_each_is_as_if_alone(name: str, captures: list[int]) -> None:
    models = [timm.create_model(name, init=settings(seed), num_classes=7) for seed in range(3)]
    assert len(captures) == 1
    for seed, model in enumerate(models):
        expected = create(Request(name, settings(seed), arguments={"num_classes": 7}), None)
        assert_equal(model, expected[0].state_dict())
        report, other = timm_ghn.report_of(model), expected[1]
        assert report is not None
        assert (report.parameters, report.provenance) == (other.parameters, other.provenance)


def test_settings_other_than_the_seed_are_heeded() -> None:
    for init in (
        timm_ghn.Init.of(settings(), reading="ppuda"),
        timm_ghn.Init.of(settings(), rescale="off"),
        timm_ghn.Init.of(settings(), start_layer=2, noise=0.1),
        settings(method="ghn"),
    ):
        timm.create_model("test_vit", init=settings())
        assert_equal(timm.create_model("test_vit", init=init), alone("test_vit", init))


def test_a_changed_forward_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = timm.create_model("ghn_test_net", init=settings())
    monkeypatch.setattr(Net, "forward", residual)
    after = timm.create_model("ghn_test_net", init=settings())
    assert_equal(after, alone("ghn_test_net", settings()))
    assert not torch.equal(after.stem.weight, before.stem.weight)


def test_a_replaced_method_of_timm_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: BasicBlock, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))

    before = timm.create_model("test_resnet", init=settings())
    monkeypatch.setattr(BasicBlock, "forward", forward)
    after = timm.create_model("test_resnet", init=settings())
    assert_equal(after, alone("test_resnet", settings()))
    assert not torch.equal(after.conv1[0].weight, before.conv1[0].weight)


def test_a_ghn_that_changes_predicts_again() -> None:
    ghn = seeded_ghn()
    init = timm_ghn.Init("ghn", ghn=ghn, cache=False)
    first = timm.create_model("test_resnet", init=init)
    with torch.no_grad():
        ghn.embed.weight.add_(0.5)
    second = timm.create_model("test_resnet", init=init)
    assert_equal(second, alone("test_resnet", init))
    assert not torch.equal(first.conv1[0].weight, second.conv1[0].weight)


def test_threads_share_what_is_remembered() -> None:
    names = ["test_resnet", "test_vit"] * 3
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda job: timm.create_model(job[1], init=settings(job[0])), enumerate(names)))
    for seed, (name, model) in enumerate(zip(names, models, strict=True)):
        assert_equal(model, alone(name, settings(seed)))


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_makes_no_difference(first: bool) -> None:
    with torch.inference_mode(first):
        timm.create_model("test_vit", init=settings(0))
    with torch.inference_mode(not first):
        model = timm.create_model("test_vit", init=settings(1))
    assert_equal(model, alone("test_vit", settings(1)))
    assert model.blocks[0].attn.qkv.weight.is_inference() is not first


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    memo = Memo(size=2)
    memo.keep("a", 1)
    memo.keep("b", 2)
    assert memo.find("a") == 1
    memo.keep("c", 3)
    assert [memo.find(key) for key in "abc"] == [1, None, 3]
