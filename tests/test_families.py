"""One model of each family, end to end through `create_model` with the bundled GHN."""

from __future__ import annotations

import pytest
import timm
import torch

import timm_ghn
from timm_ghn.initialize.report import Status

FAMILIES = {
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "densenet": "densenet121",
    "mobilenetv2": "mobilenetv2_050",
    "mobilenetv3": "mobilenetv3_small_050",
    "efficientnet": "efficientnet_b0",
    "regnet": "regnetx_002",
    "regnet with gates": "regnety_002",
    "convnext": "convnext_atto",
    "convnextv2": "convnextv2_atto",
    "nfnet": "test_nfnet",
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_distilled_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "beit": "beit_base_patch16_224",
    "eva02": "eva02_tiny_patch14_224",
    "mixer": "mixer_s32_224",
    "maxvit": "maxvit_rmlp_pico_rw_256",
    "coatnet": "coatnet_pico_rw_224",
    "levit": "levit_128s",
    "mobilevit": "mobilevit_xxs",
    "hrnet": "hrnet_w18_small",
    "inception": "inception_v3",
    "vgg": "vgg11",
}
LARGE = ("vgg",)  # half a minute on a slow machine


def check(name: str) -> None:
    init = timm_ghn.Init("ghn-orth", ghn="bundled", fallback="off", cache=False)
    model = timm.create_model(name, init=init, num_classes=10)
    report = timm_ghn.report_of(model)
    assert report is not None
    assert report.predicted_share > 0.95
    assert report.share(Status.PREDICTED_ORTHOGONALIZED) > 0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    torch.manual_seed(0)
    batch = torch.randn(2, *model.pretrained_cfg["input_size"])
    for training in (False, True):
        with torch.no_grad():
            features, output = model.train(training).forward_features(batch), model(batch)
        for tensor in (*_tensors(features), *_tensors(output)):
            assert torch.isfinite(tensor).all()
        assert all(tensor.std() > 0 for tensor in _tensors(features))  # some heads start from zero


def _tensors(output: object) -> tuple[torch.Tensor, ...]:
    found = output if isinstance(output, (tuple, list)) else (output,)
    assert all(isinstance(tensor, torch.Tensor) for tensor in found)
    return tuple(found)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LARGE])
def test_family(family: str) -> None:
    check(FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(FAMILIES[family] for family in LARGE), "convnext_base", "vit_base_patch16_224"])
def test_large_models(name: str) -> None:
    check(name)
