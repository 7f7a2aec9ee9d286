"""`timm.create_model` with and without `init=`."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models
import torch
from fresh import printed
from timm.utils import ModelEmaV3
from torch import nn

import timm_ghn
from timm_ghn import hook
from timm_ghn.errors import InitError
from timm_ghn.initialize.report import Status


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


def run(script: str, **environment: str) -> str:
    """What another Python process prints."""
    variables = {**os.environ, **environment}
    script = f"import faulthandler\nfaulthandler.dump_traceback_later(100, exit=True)\n{script}"
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


ORDERS = (
    "import timm, timm_ghn",
    "import timm_ghn, timm",
    "import timm_ghn; timm_ghn.init_model; import timm",
    "import timm.models; import timm_ghn; import timm",
)
UNINSTALLED_BEFORE_TIMM = """
import timm_ghn; timm_ghn.uninstall()
import timm
print(hasattr(timm.create_model, "__timm_ghn__"))
"""
TIMM_FIRST = """
import inspect, pickle, sys, warnings
from timm import create_model as function
from timm.models import create_model as same
before = (function.__code__, function.__defaults__, function.__kwdefaults__, dict(vars(function)))
signature = inspect.signature(function)
warnings.filterwarnings("error", "Importing from timm.models.factory", FutureWarning)
import timm_ghn
assert same is function
assert "init" in inspect.signature(function).parameters
assert pickle.loads(pickle.dumps(function)) is function
print(function("test_resnet", init="orth").pretrained_cfg["tag"])
assert "timm.models.factory" not in sys.modules
timm_ghn.uninstall()
assert (function.__code__, function.__defaults__, function.__kwdefaults__, dict(vars(function))) == before
assert inspect.signature(function) == signature
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_it_does_not_matter_what_is_imported_first() -> None:
    """Names that are bound already get `init=`, the deprecated module is not imported, and all can be undone."""
    check = "\nprint(timm.create_model('test_resnet', init='orth').pretrained_cfg['tag'])"
    *orders, undone, last = printed(*(order + check for order in ORDERS), UNINSTALLED_BEFORE_TIMM, TIMM_FIRST)
    assert orders == ["orth\n"] * len(ORDERS)
    assert (undone, last) == ("False\n", "orth\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_can_initialize(seeded_checkpoint: Path) -> None:
    script = """
import os, timm, timm_ghn
init = timm_ghn.Init("ghn-orth", cache=False)
timm.create_model("test_resnet", init=init)
child = os.fork()
if child == 0:
    timm.create_model("test_vit", init=init)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(script, OMP_NUM_THREADS="2") == "7\n"


def test_a_seed_decides_timms_own_weights() -> None:
    torch.manual_seed(1)
    plain = timm.create_model("test_vit")
    state = torch.get_rng_state()
    seeded = timm.create_model("test_vit", init=timm_ghn.Init("rand", seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert equal(plain, seeded)
    report, found = timm_ghn.report_of(seeded), timm_ghn.provenance(seeded)
    assert report is not None
    assert found is not None
    assert (report.share(Status.KEPT), found["method"], found["seed"]) == (1, "rand", 1)
    assert timm_ghn.provenance(timm.create_model("test_vit", init="rand"))["seed"] is None  # type: ignore[index]


def test_copies_of_a_model_keep_its_report() -> None:
    model = timm.create_model("test_resnet", init="orth")
    report = timm_ghn.report_of(model)
    assert report is not None
    compiled = torch.compile(model, backend="eager")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module, compiled]
    assert [timm_ghn.report_of(copied) for copied in copies] == [report] * 4
    assert timm_ghn.report_of(timm.create_model("test_resnet")) is None


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"features_only": True}])
def test_the_backbone_does_not_depend_on_the_classifier(kwargs: dict[str, Any]) -> None:
    whole = timm.create_model("resnet18", init="orth")
    backbone = timm.create_model("resnet18", init="orth", **kwargs)
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    init = timm_ghn.Init("ghn-orth", cache=False)
    found = timm_ghn.report_of(timm.create_model("resnet18", init=init, **kwargs))
    assert found is not None
    assert (found.start_layer, found.num_layers) == (15, 20)


def test_the_rest_of_the_weights_are_timms_own_and_repeatable() -> None:
    first, second = (timm.create_model("test_vit", init="ghn-orth", num_classes=9) for _ in range(2))
    assert equal(first, second)
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=9)
    ours, theirs = first.head.weight, plain.head.weight
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)
    assert not torch.equal(ours, theirs)
    assert torch.equal(first.head.bias, plain.head.bias)


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
        (("test_resnet",), {"init": "hf-hub:a/b", "pretrained": True}, "'hf-hub:a/b' and pretrained=True"),
        (("test_resnet.ghn-orth",), {"init": "hf-hub:a/b"}, "init='hf-hub:a/b' and the tag 'ghn-orth'"),
        (("test_resnet", False, None, None, "x.pth"), {"init": "orth"}, "checkpoint_path"),
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
