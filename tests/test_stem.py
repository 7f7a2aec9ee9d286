"""Stems of timm models adjusted to small images."""

from __future__ import annotations

import pytest
import timm
import torch
from stem import adjust_stem
from torch import nn

from timm_ghn.errors import FineTuneError

SIZE = (3, 32, 32)


def reduction(model: nn.Module) -> int:
    """How many times smaller the last feature map is than the image."""
    with torch.no_grad():
        return 64 // int(model.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape[-1])


@pytest.mark.parametrize(
    ("name", "change", "factor"),
    [
        ("resnet18", "conv1 7x7, stride 2 -> 3x3, stride 1; max-pool maxpool removed", 8),
        ("resnet18d", "conv1.0 3x3, stride 2 -> 3x3, stride 1; max-pool maxpool removed", 8),
        ("densenet121", "features.conv0 7x7, stride 2 -> 3x3, stride 1; max-pool features.pool0 removed", 8),
        ("mobilenetv3_small_050", "conv_stem 3x3, stride 2 -> 3x3, stride 1", 16),
        ("regnetx_002", "stem.conv 3x3, stride 2 -> 3x3, stride 1", 16),
        ("test_efficientnet", "conv_stem 3x3, stride 2 -> 3x3, stride 1", None),
    ],
)
def test_convolutional_stems(name: str, change: str, factor: int | None) -> None:
    model = timm.create_model(name, num_classes=10)
    assert adjust_stem(model, SIZE) == change
    if factor is not None:
        assert reduction(model) == factor


def test_the_kernel_is_the_center_of_what_it_was() -> None:
    model = timm.create_model("resnet18")
    before = model.conv1.weight.detach().clone()
    adjust_stem(model, SIZE)
    assert torch.equal(model.conv1.weight, before[:, :, 2:5, 2:5])
    assert isinstance(model.conv1.weight, nn.Parameter)
    assert "conv1.weight" in dict(model.named_parameters())
    assert isinstance(model.maxpool, nn.Identity)


def test_convnext_keeps_its_kernel_as_in_ppuda() -> None:
    model = timm.create_model("test_convnext", num_classes=10)
    before = model.stem[0].weight.detach().clone()
    assert adjust_stem(model, SIZE) == "stem.0 4x4, stride 4 -> 4x4, stride 1"
    assert torch.equal(model.stem[0].weight, before)
    assert model.stem(torch.zeros(1, *SIZE)).shape[-2:] == (29, 29)


def test_a_network_that_cannot_run_with_another_stem_stays_as_it_was() -> None:
    model = timm.create_model("dla46_c", num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FineTuneError, match=r"DLA cannot run with other first layers .*; use --stem original"):
        adjust_stem(model, SIZE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.eval()(torch.zeros(1, *SIZE)).shape == (1, 10)


def test_patch_embeddings_stay() -> None:
    model = timm.create_model("test_vit", img_size=32, patch_size=4, num_classes=10)
    assert adjust_stem(model, SIZE) == "unchanged"
    assert model(torch.zeros(1, *SIZE)).shape == (1, 10)


def test_nothing_but_the_stem_changes() -> None:
    model = timm.create_model("resnet18").train()
    model.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adjust_stem(model, SIZE)
    assert model.training
    assert not model.bn1.training
    for name, value in model.state_dict().items():
        assert name == "conv1.weight" or torch.equal(value, before[name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_networks_that_cannot_take_the_size() -> None:
    with pytest.raises(FineTuneError, match=r"cannot take images of 3x32x32: .*--model-kwargs img_size="):
        adjust_stem(timm.create_model("vit_tiny_patch16_224"), SIZE)
    with pytest.raises(FineTuneError, match="has no 2-D convolution to adjust: --stem original"):
        adjust_stem(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), SIZE)
