"""The cache knows the code of a model: what is changed in any way is computed again."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import timm_ghn
from timm_ghn.storage.fingerprint import fingerprint

SLOPE = 0.1


def activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


class Net(nn.Module):
    """A small network whose code the tests change."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 4
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        self.settings = {"scale": 1.0}
        self.function = functools.partial(torch.mul, other=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = activation(self.first(x))
        x = activation(self.second(x))
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@register_model
def ghn_test_net(pretrained: bool = False, **kwargs: object) -> nn.Module:
    return Net()


def residual(self: Net, x: Tensor) -> Tensor:
    x = self.stem(x)
    x = x + activation(self.first(x))
    x = x + activation(self.second(x))
    return self.head(self.pooled(x))


def create(name: str) -> timm_ghn.Report:
    init = timm_ghn.Init("ghn", ghn="bundled")
    model = timm.create_model(name, init=init)
    report = timm_ghn.report_of(model)
    assert report is not None
    return report


def test_a_changed_forward_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    init = timm_ghn.Init("ghn", ghn="bundled")
    first = timm.create_model("ghn_test_net", init=init)
    assert create("ghn_test_net").from_cache
    monkeypatch.setattr(Net, "forward", residual)
    assert not create("ghn_test_net").from_cache
    changed = timm.create_model("ghn_test_net", init=init)
    alone = timm.create_model("ghn_test_net", init=timm_ghn.Init.of(init, cache=False))
    assert torch.equal(changed.second.weight, alone.second.weight)
    assert not torch.equal(changed.second.weight, first.second.weight)


def test_a_replaced_method_of_timm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not create("test_resnet").from_cache
    assert create("test_resnet").from_cache

    def forward(self: BasicBlock, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))

    with monkeypatch.context() as replaced:
        replaced.setattr(BasicBlock, "forward", forward)
        assert not create("test_resnet").from_cache
    assert create("test_resnet").from_cache


def other_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return x.tanh()


def as_attribute(model: Net) -> None:
    model.settings["scale"] = 2.0


def as_function(model: Net) -> None:
    model.function = functools.partial(torch.mul, other=3.0)


def on_the_instance(model: Net) -> None:
    model.forward = MethodType(residual, model)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [as_attribute, as_function, on_the_instance])
def test_instances_are_told_apart(change: Callable[[Net], None]) -> None:
    one, two = Net(), Net()
    assert fingerprint(one) == fingerprint(two)
    change(two)
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (f"{__name__}.SLOPE", 0.2),
        (f"{__name__}.activation", F.relu),
        (f"{__name__}.Net.pooled", lambda self, x: x.amax((2, 3))),
        ("torch.nn.functional.leaky_relu", other_relu),
        ("torch.nn.Conv2d.forward", lambda self, x: F.conv2d(x, self.weight)),
    ],
)
def test_all_that_forward_calls_is_followed(target: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = fingerprint(model)
    with monkeypatch.context() as replaced:
        replaced.setattr(target, value)
        assert fingerprint(model) != before
    assert fingerprint(model) == before


def test_methods_by_names_that_are_put_together_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "forward", lambda self, x: self.head(getattr(self, "pool" + "ed")(self.stem(x))))
    model = Net()
    before = fingerprint(model)
    monkeypatch.setattr(Net, "pooled", lambda self, x: x.amax((2, 3)))
    assert fingerprint(model) != before


def test_what_layers_of_torch_call_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.LeakyReLU())
    before = fingerprint(model)
    with monkeypatch.context() as replaced:
        replaced.setattr("torch.nn.functional.leaky_relu", other_relu)
        assert fingerprint(model) != before
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 2)
    assert fingerprint(model) != before
    hook.remove()
    assert fingerprint(model) == before


def test_weights_and_mode_of_code_do_not_matter() -> None:
    one, two = Net(), Net()
    nn.init.zeros_(two.stem.weight)
    two(torch.zeros(1, 3, 8, 8))
    assert fingerprint(one) == fingerprint(two)


MODELS = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet")
PROGRAM = """
import json, sys, timm
from timm_ghn.storage.fingerprint import fingerprint
print(json.dumps({name: fingerprint(timm.create_model(name)) for name in sys.argv[1:]}))
"""


def test_the_same_in_every_process_and_order() -> None:
    found = []
    for seed, names in (("1", MODELS), ("2", MODELS[::-1])):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", PROGRAM, *names], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(MODELS)
