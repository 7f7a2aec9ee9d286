"""Initialization of models in memory: values, reports, what stays, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
from ghn_reference import MODELS, SMALL, reference, seeded_ghn
from reference_data import samples, starting_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_ghn
from timm_ghn.errors import CaptureError, CheckpointError, GraphError, InitError, UnknownGhnError
from timm_ghn.ghn import GHN
from timm_ghn.initialize.report import Report, Status
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn()


@pytest.mark.parametrize("name", MODELS)
def test_predicted_weights_are_those_of_ppuda(ghn: GHN, name: str) -> None:
    model, data = starting_model(name), reference(name)
    report = timm_ghn.init_model(model, "ghn", ghn=ghn, rescale="off")
    for parameter, expected in data["predicted"].items():
        tensor = model.get_parameter(parameter)
        assert tensor.double().norm().item() == pytest.approx(expected["norm"], rel=1e-4)
        torch.testing.assert_close(samples(tensor), torch.tensor(expected["sample"]), rtol=1e-4, atol=1e-5)
    start = starting_model(name)
    for parameter in data["kept"]:
        assert torch.equal(model.get_parameter(parameter), start.get_parameter(parameter))
    assert {p.name for p in report.parameters if p.status is Status.KEPT} == set(data["kept"])


def test_late_layers_are_orthogonal_and_early_ones_predicted(ghn: GHN) -> None:
    raw, model = torchvision.models.resnet18(), torchvision.models.resnet18()
    timm_ghn.init_model(raw, "ghn", ghn=ghn)
    report = timm_ghn.init_model(model, "ghn-orth", ghn=ghn, start_layer=14)
    statuses = {p.name: p.status for p in report.parameters}
    layers = [name for name, p in raw.named_parameters() if p.dim() > 1]
    assert (report.num_layers, report.start_layer) == (21, 14)
    for number, name in enumerate(layers, start=1):
        weight = model.get_parameter(name).flatten(1)
        if number < 14 or number == 21:
            assert torch.equal(weight, raw.get_parameter(name).flatten(1))
            assert statuses[name] is Status.PREDICTED
        else:
            gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
            assert (gram - torch.eye(len(gram))).abs().max() <= 1e-5
            assert statuses[name] is Status.PREDICTED_ORTHOGONALIZED
    for name in (n for n, p in raw.named_parameters() if p.dim() == 1):
        assert torch.equal(model.get_parameter(name), raw.get_parameter(name))


def test_results_depend_on_seed_alone(ghn: GHN) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 3)
        model = timm.create_model("test_resnet")
        timm_ghn.init_model(model, "ghn-orth", ghn=ghn, seed=seed)
        return {name: p.detach() for name, p in model.named_parameters()}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_results_do_not_depend_on_threads(ghn: GHN) -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            model = timm.create_model("test_convnext")
            timm_ghn.init_model(model, "ghn-orth", ghn=ghn, start_layer=1)
            found.append([p.detach() for p in model.parameters() if p.dim() > 1])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True) if a.shape[0] != 1000)


def test_the_model_keeps_its_modes_buffers_and_generator(ghn: GHN) -> None:
    model = timm.create_model("test_resnet").train()
    for index, (parameter, module) in enumerate(zip(model.parameters(), model.modules(), strict=False)):
        parameter.requires_grad_(index % 2 == 0)
        module.training = index % 3 == 0
    model.get_buffer("bn1.running_mean").fill_(3.0)
    before = (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [id(p) for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        torch.get_rng_state(),
    )
    timm_ghn.init_model(model, ghn=ghn)
    assert before[0] == [p.requires_grad for p in model.parameters()]
    assert before[1] == [m.training for m in model.modules()]
    assert before[2] == [id(p) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before[3], model.buffers(), strict=True))
    assert torch.equal(before[4], torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_rounded_float32_result(ghn: GHN, dtype: torch.dtype) -> None:
    exact, model = timm.create_model("test_resnet"), timm.create_model("test_resnet").to(dtype)
    timm_ghn.init_model(exact, "ghn-orth", ghn=ghn, start_layer=1)
    timm_ghn.init_model(model, "ghn-orth", ghn=ghn, start_layer=1)
    # In float64 the sum of a tile and its noise is not rounded to float32, and Q is sensitive to that.
    tolerance = 5e-3 if dtype is torch.float64 else 0.0
    for name, parameter in model.named_parameters():
        assert parameter.dtype is dtype
        torch.testing.assert_close(parameter, exact.get_parameter(name).to(dtype), rtol=0, atol=tolerance)


def test_the_classifier_of_other_classes_is_kept(ghn: GHN) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    before = model.get_classifier().weight.detach().clone()
    report = timm_ghn.init_model(model, ghn=ghn)
    assert torch.equal(model.get_classifier().weight, before)
    reasons = {p.name: p.reason for p in report.parameters if p.status is Status.KEPT}
    assert reasons == dict.fromkeys(["fc.weight", "fc.bias"], "classifier of 7 classes, the GHN's has 1000")


def test_orth_alone() -> None:
    model = timm.create_model("test_vit")
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 1}
    report = timm_ghn.init_model(model, "orth", seed=3)
    assert report.start_layer == 1
    for parameter in report.parameters:
        weight = model.get_parameter(parameter.name).detach().flatten(1) if len(parameter.shape) > 1 else None
        if parameter.status is Status.ORTHOGONALIZED and weight is not None:
            tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
            assert (tall.T @ tall - torch.eye(tall.shape[1])).abs().max() <= 1e-5
    assert all(torch.equal(model.get_parameter(name), value) for name, value in norms.items())


def test_rand_changes_nothing() -> None:
    model = timm.create_model("test_vit")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = timm_ghn.init_model(model, timm_ghn.Init("rand", seed=1))
    assert report.provenance["seed"] is None  # nothing was drawn
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert report.share(Status.KEPT) == 1


def test_the_report_accounts_for_every_parameter(ghn: GHN) -> None:
    model = timm.create_model("test_vit")
    report = timm_ghn.init_model(model, ghn=ghn)
    assert [p.name for p in report.parameters] == [name for name, _ in model.named_parameters()]
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    assert sum(report.share(status) for status in Status) == pytest.approx(1)
    assert report.predicted_share > 0.99
    table = report.table()
    assert "predicted and orthogonalized" in table
    assert "learned token" in table
    assert "cls_token" in report.table(parameters=True)
    assert report.to_dict()["provenance"] == timm_ghn.provenance(model)


def test_a_torchvision_model_with_attention(ghn: GHN) -> None:
    model = torchvision.models.vit_b_16(num_classes=5)
    report = timm_ghn.init_model(model, ghn=ghn, input_size=(3, 224, 224))
    assert report.predicted_share > 0.99
    assert torch.isfinite(model.eval()(torch.zeros(1, 3, 224, 224))).all()


def test_tied_weights_stay_tied(ghn: GHN) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.second(self.first(x)))

    model = Tied()
    report = timm_ghn.init_model(model, ghn=ghn, example_input=torch.zeros(2, 16), start_layer=1)
    assert model.second.weight is model.first.weight
    assert "second.weight" not in {p.name for p in report.parameters}


def test_layers_that_are_not_predicted_are_still_orthogonalized(ghn: GHN) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.used(x))

    model = Unused()
    report = timm_ghn.init_model(model, ghn=ghn, example_input=torch.zeros(1, 8), start_layer=1)
    row = next(p for p in report.parameters if p.name == "unused.weight")
    assert (row.status, row.reason) == (Status.ORTHOGONALIZED, "not read by the forward pass in evaluation mode")
    weight = model.unused.weight.detach()
    assert (weight.T @ weight - torch.eye(8)).abs().max() <= 1e-5


def unchanged_after(model: nn.Module, error: type[Exception], match: str, **settings: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        timm_ghn.init_model(model, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"method": "ghn-ort"}, InitError, "did you mean 'ghn-orth'"),
        ({"method": 3}, InitError, "name of a method"),
        ({"ghn": "ghn2-imagent"}, UnknownGhnError, "ghn2-imagenet"),
        ({"start_layer": 0}, InitError, "start_layer"),
        ({"start_layer": 22}, InitError, "start_layer"),
        ({"start_layer": "layer9"}, InitError, "layer9"),
        ({"noise": -1}, InitError, "noise"),
        ({"noise": float("nan")}, InitError, "noise"),
        ({"seed": 0.5}, InitError, "seed"),
        ({"correlation": "x"}, InitError, "correlation"),
        ({"reading": "x"}, InitError, "reading"),
        ({"colour": "red"}, InitError, "colour"),
        ({"input_size": (9, 8, 8)}, CaptureError, "input_size"),
    ],
)
def test_wrong_settings_change_nothing(
    seeded_checkpoint: Path, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    unchanged_after(timm.create_model("test_resnet"), error, match, **{"ghn": str(seeded_checkpoint), **settings})


def test_damaged_checkpoints_change_nothing(seeded_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(seeded_checkpoint.read_bytes()[:100_000])
    unchanged_after(timm.create_model("test_resnet"), CheckpointError, "broken.pt", ghn=str(broken))


def test_models_without_memory_or_layers_are_refused(ghn: GHN) -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    with pytest.raises(InitError, match=r"conv1\.0\.weight is on the meta device.*outside of torch\.device"):
        timm_ghn.init_model(model, ghn=ghn)
    for buffers_only in (model, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False, device="meta"))):
        with pytest.raises(InitError, match="is on the meta device"):
            timm_ghn.init_model(buffers_only, "orth")
    with pytest.raises((GraphError, InitError), match="no "):
        timm_ghn.init_model(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), ghn=ghn)


def test_a_ghn_that_predicts_nan_is_refused() -> None:
    bad = seeded_ghn(SMALL)
    with torch.no_grad():
        bad.decoder_1d.fc[2].bias.fill_(float("nan"))
    with pytest.raises(InitError, match="not finite"):
        timm_ghn.init_model(timm.create_model("test_resnet"), ghn=bad)
    unchanged_after(timm.create_model("test_resnet"), InitError, "not finite", ghn=bad)


def test_a_kept_layer_that_is_not_finite_changes_nothing(ghn: GHN) -> None:
    model = Unused()
    with torch.no_grad():
        model.spare.weight[0, 0] = float("nan")
    before = model.layer.weight.detach().clone()
    with pytest.raises(InitError, match=r"spare\.weight holds NaN"):
        timm_ghn.init_model(model, ghn=ghn, example_input=torch.zeros(2, 8), start_layer=1)
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_var"])
def test_memory_without_values_is_not_kept(ghn: GHN, name: str) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    tensor = model.state_dict()[name]
    tensor.fill_(float("nan"))  # as `to_empty` leaves it under torch.use_deterministic_algorithms
    before = model.conv1[0].weight.detach().clone()
    with pytest.raises(InitError, match=rf"{name} holds NaN and would be kept.*to_empty"):
        timm_ghn.init_model(model, ghn=ghn)
    assert torch.equal(model.conv1[0].weight, before)
    tensor.fill_(1)
    timm_ghn.init_model(model, ghn=ghn)


def test_models_of_the_inference_mode_are_initialized_there_alone(ghn: GHN) -> None:
    with torch.inference_mode():
        model = timm.create_model("test_resnet")
    for method in ("ghn-orth", "orth", "lsuv"):
        settings = {"ghn": ghn} if method == "ghn-orth" else {}
        with pytest.raises(InitError, match=r"conv1\.0\.weight was made within torch\.inference_mode\(\)"):
            timm_ghn.init_model(model, method, **settings)
        with torch.inference_mode():
            timm_ghn.init_model(model, method, **settings)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x))


@pytest.mark.parametrize("method", ["ghn-orth", "orth", "lsuv"])
def test_frozen_parameters_are_kept_unless_asked_for(ghn: GHN, method: str) -> None:
    settings: dict[str, Any] = {"ghn": ghn, "start_layer": 1} if method == "ghn-orth" else {}
    model = timm.create_model("test_resnet", num_classes=7)
    model.layer1.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.layer1.named_parameters()}
    report = timm_ghn.init_model(model, method, **settings)
    assert all(torch.equal(p, before[name]) for name, p in model.layer1.named_parameters())
    rows = {row.name: (row.status, row.reason) for row in report.parameters}
    assert {rows[f"layer1.{name}"] for name in before} == {(Status.KEPT, "frozen: requires_grad is False")}
    assert rows["layer2.0.conv1.weight"][0] is not Status.KEPT
    timm_ghn.init_model(model, method, frozen="init", **settings)
    assert not torch.equal(model.layer1[0].conv1.weight, before["0.conv1.weight"])
    with pytest.raises(InitError, match=r"all parameters are frozen.*frozen='init'"):
        timm_ghn.init_model(model.requires_grad_(False), method, **settings)


def test_the_report_tells_every_factor(ghn: GHN) -> None:
    exact, model = timm.create_model("test_vit"), timm.create_model("test_vit")
    timm_ghn.init_model(exact, "ghn", ghn="bundled", rescale="off")
    report = timm_ghn.init_model(model, "ghn", ghn="bundled")
    rows = {row.name: row for row in report.parameters if row.status is Status.PREDICTED}
    factors = set()
    for name, row in rows.items():
        if name != "pos_embed":  # a part of it is kept
            torch.testing.assert_close(model.get_parameter(name), exact.get_parameter(name) * row.factor)
            assert bool(row.reason) == (row.factor != 1)
            factors.add(row.factor < 1 if row.factor != 1 else None)
    assert factors == {None, True, False}
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_side_is_a_square() -> None:
    model = timm.create_model("test_vit", in_chans=1)
    report = timm_ghn.init_model(model, "ghn", ghn="bundled", input_size=160)
    assert report.predicted_share > 0.5
    timm_ghn.init_model(model, "ghn", ghn="bundled", input_size=tuple(numpy.array([1, 160, 160])))
    for size in ("160", (3, -1, 2), (), 2.5, True):
        unchanged_after(model, InitError, "input_size=", ghn="bundled", input_size=size)


@pytest.mark.parametrize(
    ("method", "settings", "cached"),
    [
        ("ghn", {}, False),
        ("ghn", {"cache": True}, True),
        (timm_ghn.Init("ghn"), {}, True),
        (timm_ghn.Init("ghn"), {"cache": False}, False),
        ({"method": "ghn", "cache": False}, {}, False),
        ({"method": "ghn"}, {}, True),
    ],
)
def test_when_the_cache_is_used(seeded_checkpoint: Path, method: Any, settings: dict[str, Any], cached: bool) -> None:
    model = timm.create_model("test_resnet")
    reports = [timm_ghn.init_model(model, method, ghn=str(seeded_checkpoint), **settings) for _ in range(2)]
    assert [report.from_cache for report in reports] == [False, cached]


def test_compiled_models_are_initialized_without_a_word(ghn: GHN, capfd: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_resnet")
    model.layer1 = torch.compile(model.layer1)
    timm_ghn.init_model(model, ghn=ghn)
    model = timm.create_model("test_resnet")
    report = timm_ghn.init_model(torch.compile(model), ghn=ghn)
    assert [row.name for row in report.parameters] == [name for name, _ in model.named_parameters()]
    assert timm_ghn.report_of(model) == report
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: timm_ghn.init_model("resnet18"),
            "expected a model.*str 'resnet18'; timm.create_model\\('resnet18'\\) builds",
        ),  # type: ignore[arg-type]
        (lambda: timm_ghn.to_graph("resnet18"), "expected a model"),  # type: ignore[arg-type]
        (lambda: timm_ghn.orthogonalize_("resnet18"), "expected a model"),  # type: ignore[arg-type]
        (lambda: timm_ghn.Init(method=3), "method=3: expected the name"),  # type: ignore[arg-type]
        (lambda: timm_ghn.Init(ghn=3), "ghn=3: expected the name or path"),  # type: ignore[arg-type]
        (lambda: timm_ghn.Init(cache="x"), "cache='x': expected True or False"),  # type: ignore[arg-type]
        (lambda: timm_ghn.Init(seed=2**70), "seed=1180591620717411303424: expected an integer from"),
        (lambda: timm_ghn.Init(frozen="x"), "frozen='x': expected 'keep' or 'init'"),  # type: ignore[arg-type]
        (lambda: timm_ghn.Init(noise=True), "noise=True: expected a number"),
        (
            lambda: timm_ghn.init_model(nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64)), "orth"),
            r"0\.weight \(of type complex64\)",
        ),
    ],
)
def test_what_is_refused_says_what_is_expected(call: Callable[[], object], match: str) -> None:
    with pytest.raises(InitError, match=match):
        call()


def test_init_is_a_value() -> None:
    assert timm_ghn.Init("ghn_orth") == timm_ghn.Init("ghn-orth")
    assert timm_ghn.Init.of({"method": "orth", "seed": 3}) == timm_ghn.Init("orth", seed=3)
    assert timm_ghn.Init("ghn", ghn="bundled").to_dict()["ghn"] == "bundled"


def test_copies_and_wrappers_know_what_the_model_got(ghn: GHN) -> None:
    model = timm.create_model("test_resnet")
    report = timm_ghn.init_model(model, ghn=ghn)
    origin = timm_ghn.provenance(model)
    assert origin is not None
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model),
        ModelEmaV3(model),
        AveragedModel(model),
        nn.DataParallel(model),
    ):
        assert timm_ghn.report_of(other) == report
        assert timm_ghn.provenance(other) == origin
    assert timm_ghn.report_of(nn.DataParallel(nn.Linear(3, 3))) is None


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"features_only": True}, {"num_classes": 7}])
def test_the_backbone_hardly_depends_on_the_head(arguments: dict[str, Any]) -> None:
    """Another head is another graph, which moves predictions a little; L is the same layer."""
    init = timm_ghn.Init("ghn-orth", ghn="bundled", cache=False)
    whole = timm.create_model("test_resnet", init=init)
    other = timm.create_model("test_resnet", init=init, **arguments)
    one, two = timm_ghn.report_of(whole), timm_ghn.report_of(other)
    assert one is not None
    assert two is not None
    assert one.start_layer == two.start_layer
    expected, found = whole.layer2[0].conv1.weight.detach(), other.layer2[0].conv1.weight.detach()
    assert float((found - expected).norm() / expected.norm()) < 0.1


class Paired(nn.Module):
    """A scale of the size of its input, which is no layer, before a layer that no GHN predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.scale = nn.Module()
        self.scale.weight = nn.Parameter(torch.ones(8, 8))
        self.kept = nn.Bilinear(8, 8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.first(x) * self.scale.weight).mean((2, 3))
        return self.last(self.kept(x, x))


def test_layers_are_those_of_the_input_that_the_caller_gives(caplog: pytest.LogCaptureFixture) -> None:
    model = Paired()
    before = model.kept.weight.detach().clone()
    report = timm_ghn.init_model(model, ghn="bundled", fallback="off", start_layer=1, seed=3, input_size=8)
    rows = {row.name: row for row in report.parameters}
    assert report.num_layers == 3
    assert rows["scale.weight"].status is not Status.ORTHOGONALIZED
    assert rows["kept.weight"].status is Status.ORTHOGONALIZED
    layer = WeightLayer(2, "kept.weight", "kept")
    assert torch.equal(model.kept.weight, postprocess_tensor(before, layer, PostProcess(seed=3)))
    assert caplog.text == ""
