"""`timm.create_model` with and without `init=`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import torch
from torch import nn

import timm_ghn
from timm_ghn import hook
from timm_ghn.errors import InitError


@pytest.fixture(autouse=True)
def _seeded_default(seeded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TIMM_GHN", str(seeded_checkpoint))
    yield
    timm_ghn.install()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_forms_give_the_same_model() -> None:
    first = timm.create_model("test_vit", init="ghn-orth")
    for model in (
        timm.create_model("test_vit", pretrained_cfg="ghn-orth"),
        timm.create_model("test_vit", pretrained=True, pretrained_cfg="ghn-orth"),
        timm.create_model("test_vit.ghn-orth", pretrained=True),
        timm.create_model("test_vit.ghn_orth", pretrained=True),
        timm.create_model("test_vit", init=timm_ghn.Init()),
        timm.create_model("test_vit", init={"method": "ghn-orth"}),
        timm.create_model("test_vit", False, "ghn-orth"),
        timm.models.create_model("test_vit", init="ghn-orth"),
    ):
        assert equal(first, model)


def test_the_description_says_what_was_done() -> None:
    model = timm.create_model("test_vit.r160_in1k", init=timm_ghn.Init(seed=5))
    facts = timm_ghn.provenance(model)
    assert facts is not None
    assert (facts["method"], facts["seed"], facts["noise"]) == ("ghn-orth", 5, 3e-5)
    assert len(facts["ghn_hash"]) == 64
    assert model.pretrained_cfg["tag"] == "ghn_orth"
    assert not any(key in model.pretrained_cfg for key in ("url", "hf_hub_id", "file"))
    timm.models.PretrainedCfg(**model.pretrained_cfg)  # plain timm reads it
    assert timm_ghn.provenance(timm.create_model("test_vit")) is None


def test_without_init_timm_is_unchanged_to_the_bit() -> None:
    def build(**kwargs: Any) -> nn.Module:
        torch.manual_seed(1)
        return timm.create_model("test_convnext", **kwargs)

    hooked, none, rand = build(), build(init=None), build(init="rand")
    state = torch.get_rng_state()
    timm_ghn.uninstall()
    plain = build()
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(plain, hooked)
    assert equal(plain, none)
    assert equal(plain, rand)
    assert plain.pretrained_cfg == hooked.pretrained_cfg


def test_install_and_uninstall() -> None:
    assert hook.is_installed()
    wrapper = timm.create_model
    timm_ghn.install()
    assert timm.create_model is wrapper
    timm_ghn.uninstall()
    timm_ghn.uninstall()
    bound = [timm.create_model, timm.models.create_model, timm.models._factory.create_model]
    assert len(set(bound)) == 1
    assert not hook.is_installed()
    with pytest.raises(TypeError, match="init"):
        timm.create_model("test_resnet", init="ghn-orth")
    timm_ghn.install()
    assert hook.is_installed()


def test_the_deprecated_module_is_patched_only_if_it_was_imported() -> None:
    script = "import timm, timm_ghn, sys; assert 'timm.models.factory' not in sys.modules"
    warning = "error:Importing from timm.models.factory:FutureWarning"
    subprocess.run([sys.executable, "-W", warning, "-c", script], check=True)


def test_the_rest_of_the_weights_are_timms_own_and_repeatable() -> None:
    first, second = (timm.create_model("test_vit", init="ghn-orth", num_classes=9) for _ in range(2))
    assert equal(first, second)
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=9)
    ours, theirs = first.head.weight, plain.head.weight
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)
    assert not torch.equal(ours, theirs)
    assert torch.equal(first.head.bias, plain.head.bias)
    assert torch.equal(first.norm.bias, first.norm.bias)


def test_layer_scale_and_buffers_are_timms() -> None:
    plain, model = timm.create_model("test_convnext"), timm.create_model("test_convnext", init="ghn-orth")
    for name, parameter in plain.named_parameters():
        if name.endswith("gamma"):
            assert torch.equal(parameter, model.get_parameter(name))
    swin = "swin_tiny_patch4_window7_224"
    for (name, ours), (_, theirs) in zip(
        timm.create_model(swin, init="ghn").named_buffers(), timm.create_model(swin).named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    timm.create_model("test_vit", init="ghn-orth")
    assert torch.equal(state, torch.get_rng_state())


knows_device_and_dtype = pytest.mark.skipif(
    "device" not in inspect.signature(timm.models.ResNet).parameters,
    reason="timm's models take no device and dtype yet",
)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_classes": 10, "in_chans": 1},
        {"num_classes": 0},
        {"global_pool": "", "num_classes": 0},
        {"drop_path_rate": 0.2},
        {"features_only": True},
        {"scriptable": True},
        {"exportable": True},
        {"drop_rate": None},
        pytest.param({"dtype": torch.bfloat16}, marks=knows_device_and_dtype),
        pytest.param({"device": "cpu"}, marks=knows_device_and_dtype),
    ],
)
def test_what_users_pass(kwargs: dict[str, Any]) -> None:
    model = timm.create_model("test_resnet", init="ghn-orth", **kwargs).eval()
    dtype = kwargs.get("dtype", torch.float32)
    output = model(torch.randn(2, kwargs.get("in_chans", 3), 64, 64, dtype=dtype))
    for tensor in output if isinstance(output, list) else [output]:
        assert torch.isfinite(tensor).all()
    assert next(model.parameters()).dtype is dtype
    assert all(p.requires_grad for p in model.parameters())


def test_image_size() -> None:
    model = timm.create_model("test_vit", init="ghn-orth", img_size=64)
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 64, 64))).all()


@pytest.mark.parametrize(
    ("arguments", "kwargs", "match"),
    [
        (("test_resnet",), {"init": "ghn-orth", "pretrained": True}, "pretrained=True.*'test_resnet.ghn-orth'"),
        (("test_resnet",), {"init": "ghn-orth", "checkpoint_path": "x.pth"}, "checkpoint_path"),
        (("test_resnet",), {"init": "ghn-ortho"}, "did you mean 'ghn-orth'"),
        (("test_resnet.ghn-orth",), {"init": "orth"}, "different weights"),
        (("test_resnet",), {"init": "ghn-orth", "device": "meta"}, "meta device"),
        (("test_resnet",), {"init": 7}, "int"),
    ],
)
def test_contradictions_are_refused(arguments: tuple[str, ...], kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(InitError, match=match):
        timm.create_model(*arguments, **kwargs)


def test_unknown_models_and_tags_are_timms_own_errors() -> None:
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("resnet_of_doom", init="ghn-orth")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("test_resnet.ghn-best")
