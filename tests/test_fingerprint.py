"""The cache knows the code of a model: what is changed in any way is computed again."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import FunctionType, MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import register_model, resnet
from timm.models.resnet import BasicBlock, get_padding
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
    init = timm_ghn.Init("ghn", ghn="bundled", fallback="off")
    model = timm.create_model(name, init=init)
    report = timm_ghn.report_of(model)
    assert report is not None
    return report


def test_a_changed_forward_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    init = timm_ghn.Init("ghn", ghn="bundled", fallback="off")
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


def pooling(self: nn.Module, x: Tensor) -> Tensor:
    return x.amax((2, 3))


def with_hook(model: nn.Module) -> None:
    model.get_submodule("layer1.0").register_forward_hook(lambda module, args, output: output * 2)


def on_the_instance(model: nn.Module) -> None:
    model.forward = MethodType(pooling, model)  # type: ignore[method-assign]


def with_activation(model: nn.Module) -> None:
    model.get_submodule("layer1.0").act1 = Net()


def with_function(model: nn.Module) -> None:
    model.function = functools.partial(pooling, model)  # type: ignore[assignment]


@pytest.mark.parametrize("change", [with_hook, on_the_instance, with_activation, with_function])
def test_a_model_with_code_of_others_has_no_fingerprint(change: Callable[[nn.Module], None]) -> None:
    model = timm.create_model("test_resnet")
    assert fingerprint(model) is not None
    change(model)
    assert fingerprint(model) is None
    assert fingerprint(Net()) is None


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("timm.models.resnet.ResNet.forward_head", lambda self, x: self.fc(x.amax((2, 3)))),
        ("timm.models.resnet.BasicBlock.forward", functools.partialmethod(pooling)),
        ("timm.models.resnet.get_padding", lambda kernel_size, stride, dilation=1: 0),
        ("timm.layers.adaptive_avgmax_pool.adaptive_avgmax_pool2d", pooling),
        ("torch.nn.functional.leaky_relu", other_relu),
        ("torch.nn.Conv2d.forward", lambda self, x: F.conv2d(x, self.weight)),
        ("torch.Tensor.flatten", pooling),
    ],
)
def test_replaced_code_of_timm_and_torch(target: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet")
    before = fingerprint(model)
    with monkeypatch.context() as replaced:
        replaced.setattr(target, value)
        assert fingerprint(model) is None
    assert fingerprint(model) == before


def test_hooks_of_all_modules() -> None:
    model = timm.create_model("test_resnet")
    before = fingerprint(model)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 2)
    assert fingerprint(model) is None
    hook.remove()
    assert fingerprint(model) == before


def test_edited_code_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm of the same version whose files were edited: the names are the same, the code and constants are not."""
    model = timm.create_model("test_resnet")
    before = fingerprint(model)
    edited = FunctionType(other_relu.__code__, vars(resnet), "get_padding", get_padding.__defaults__)
    with monkeypatch.context() as replaced:
        replaced.setattr(resnet, "get_padding", edited)
        assert fingerprint(model) not in (before, None)
    monkeypatch.setattr(BasicBlock.forward, "__code__", pooling.__code__)
    assert fingerprint(model) not in (before, None)


def test_attributes_are_told_apart() -> None:
    one, two = timm.create_model("test_resnet"), timm.create_model("test_resnet")
    nn.init.zeros_(two.conv1[0].weight)
    two(torch.zeros(2, 3, 32, 32))
    assert fingerprint(one) == fingerprint(two)
    two.get_submodule("layer1.0").conv1.stride = (2, 2)  # type: ignore[assignment]
    assert fingerprint(one) != fingerprint(two)


MODELS = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet")
PROGRAM = """
import json, sys, timm
from timm_ghn.storage.fingerprint import fingerprint
print(json.dumps({name: fingerprint(timm.create_model(name)) for name in sys.argv[1:]}))
"""


def test_the_same_in_every_process_and_order() -> None:
    here = {name: fingerprint(timm.create_model(name)) for name in MODELS}
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", PROGRAM, *MODELS[::-1]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here
    assert len(set(here.values())) == len(MODELS)


def test_the_same_after_torch_compile() -> None:
    before = {name: fingerprint(timm.create_model(name)) for name in MODELS}
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    assert hasattr(nn.Module, "___needs_generation_tag_patch")  # compiling did replace something
    assert {name: fingerprint(timm.create_model(name)) for name in MODELS} == before
