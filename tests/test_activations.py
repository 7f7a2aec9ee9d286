"""Measuring activations: what is measured, that nothing is changed, and comparisons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_survey.activations import Activations, BlockActivation, activation_ratio, measure_activations

from timm_ghn.errors import CaptureError, InitError


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a measurement must not change."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return (
        [m.training for m in model.modules()],
        hooks,
        {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()},
        [id(p) for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
    )


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[:2] == after[:2]
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    assert before[3:6] == after[3:6]
    assert torch.equal(before[6], after[6])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet", "levit_128s"])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_measuring_changes_nothing(name: str, batch_statistics: bool) -> None:
    model = timm.create_model(name, drop_rate=0.5).train()
    before, attributes = state(model), [set(vars(module)) for module in model.modules()]
    first = measure_activations(model, batch_statistics=batch_statistics)
    torch.rand(3)
    torch.set_rng_state(before[6])
    assert_same(before, state(model))
    assert attributes == [set(vars(module)) for module in model.modules()]
    if hasattr(model, "stages"):  # LeViT keeps biases that it has looked up
        caches = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
        assert not any(caches)
    assert measure_activations(model, batch_statistics=batch_statistics) == first


def test_blocks_are_found_by_structure() -> None:
    blocks = [block.name for block in measure_activations(timm.create_model("test_vit")).blocks]
    assert blocks == ["patch_embed", *(f"blocks.{i}" for i in range(6)), "blocks"]
    blocks = [block.name for block in measure_activations(timm.create_model("test_convnext")).blocks]
    assert {"stem", "stages.0", "stages.1.blocks.0", "head"} <= set(blocks)
    assert not any(name.endswith(("conv_dw", "norm", "mlp")) for name in blocks)


class Scaled(nn.Module):
    """Two blocks, the second of which is called twice, and outputs of several kinds."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(4, 4)}), Doubling()])
        self.head = nn.Linear(4, 3)
        self.gain = gain

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.blocks[1](self.blocks[1](x.mean((2, 3)).new_ones(2, 4) * self.gain))
        return {"logits": self.head(x), "index": torch.arange(3), "more": [(x * 0,)]}


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.inner.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x) * 2


def test_statistics_are_those_of_the_values() -> None:
    model = Scaled(3.0)
    found = measure_activations(model, input_size=(4, 2, 2))
    assert [(block.name, block.rms, block.std) for block in found.blocks] == [
        ("blocks.1", 6.0, 0.0),
        ("blocks.1#2", 12.0, 0.0),
    ]
    logits = torch.cat([model.head(torch.full((2, 4), 12.0)).flatten(), torch.zeros(8)])
    assert found.logits.rms == pytest.approx(float(logits.detach().square().mean().sqrt()), rel=1e-5)
    assert found.logits_std == pytest.approx(float(logits.detach().std(unbiased=False)), rel=1e-5)
    assert found.features == BlockActivation("features", 12.0, 0.0, True)


def test_infinite_activations_are_told() -> None:
    found = measure_activations(Scaled(math.inf), input_size=(4, 2, 2))
    assert not found.finite
    assert not found.blocks[0].finite
    ratio = activation_ratio(found, measure_activations(Scaled(1.0), input_size=(4, 2, 2)))
    assert not ratio.finite
    assert ratio.distance == math.inf
    assert not ratio.within(1e30)


@settings(max_examples=20)
@given(st.floats(1e-18, 1e18))
def test_ratios_are_those_of_the_scales(gain: float) -> None:
    reference = measure_activations(Scaled(1.0), input_size=(4, 2, 2))
    ratio = activation_ratio(measure_activations(Scaled(gain), input_size=(4, 2, 2)), reference)
    assert ratio.features == pytest.approx(gain, rel=1e-4)
    assert ratio.worst is not None
    assert ratio.worst.ratio == pytest.approx(gain, rel=1e-4)
    assert ratio.within(max(gain, 1 / gain) * 1e3)


def test_a_start_compared_with_itself_is_one() -> None:
    found = measure_activations(timm.create_model("test_convnext"))
    ratio = activation_ratio(found, found)
    assert ratio.within(1.0)
    assert ratio.logits == ratio.features == 1.0


def test_zero_references_are_left_out() -> None:
    zero = BlockActivation("a", 0.0, 0.0, True)
    reference = Activations((zero,), zero, zero)
    ratio = activation_ratio(Activations((BlockActivation("a", 1.0, 1.0, True),), zero, zero), reference)
    assert (ratio.logits, ratio.features, ratio.worst, ratio.distance) == (None, None, None, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = timm.create_model("test_resnet")
    exact = measure_activations(model)
    ratio = activation_ratio(measure_activations(model.to(dtype)), exact)
    assert ratio.within(1.05)


def test_batch_statistics_normalize() -> None:
    model = timm.create_model("test_resnet")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.mul_(100)
    assert measure_activations(model, batch_statistics=True).blocks[-2].rms < 10
    assert measure_activations(model).blocks[-2].rms > 1e3


def test_inputs_other_than_one_image() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2)
    patches = {"patches": torch.randn(2, 9, 16 * 16 * 3), "patch_coord": torch.zeros(2, 9, 2, dtype=torch.long),
               "patch_valid": torch.ones(2, 9, dtype=torch.bool)}  # fmt: skip
    found = measure_activations(model, example_input=(patches,))
    assert found.finite
    assert found.logits_std > 0
    assert measure_activations(timm.create_model("test_resnet"), example_input=torch.randn(1, 3, 64, 64)).finite
    assert measure_activations(timm.create_model("test_resnet", features_only=True)).features is not None


def test_refusals() -> None:
    with torch.device("meta"):
        on_meta = timm.create_model("test_resnet")
    with pytest.raises(InitError, match="is on the meta device and has no values; initialize the model first"):
        measure_activations(on_meta)
    with pytest.raises(CaptureError, match=r"forward pass of ResNet on noise images of size \(5, 8, 8\) failed"):
        measure_activations(timm.create_model("test_resnet"), input_size=(5, 8, 8))
    vit, resnet = (measure_activations(timm.create_model(name)) for name in ("test_vit", "test_resnet"))
    with pytest.raises(InitError, match="activations of different networks cannot be compared"):
        activation_ratio(vit, resnet)


def test_json_form_and_text() -> None:
    found = measure_activations(timm.create_model("test_resnet"))
    data = found.to_dict()
    assert data["finite"] is True
    assert data["blocks"][0]["name"] == found.blocks[0].name
    ratio = activation_ratio(found, found)
    assert ratio.to_dict()["distance"] == 1.0
    assert str(ratio).startswith("finite, logits x 1, features x 1, worst block ")
