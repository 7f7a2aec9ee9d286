"""The scale of predictions: structure, factors, bounds, and what becomes of whole networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Literal

import pytest
import timm
import torch
import torchvision
from ghn_reference import seeded_ghn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_survey.activations import activation_ratio, measure_activations

import timm_ghn
from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.ghn import GHN, Prediction, load_ghn
from timm_ghn.graph import Layout, Role, Target, capture, to_graph
from timm_ghn.graph.analyses import analyse
from timm_ghn.initialize.hypernetwork import find_hypernetwork
from timm_ghn.initialize.plan import make_plan
from timm_ghn.initialize.report import Status
from timm_ghn.scale.batch_norms import MAX_AFFINE_CHAIN
from timm_ghn.scale.rule import (
    KERNEL_BAND,
    MAX_CHAIN,
    NORM_BAND,
    SMALLEST_NORM,
    Structure,
    bounding_factor,
    find_structure,
    gaining_norms,
    nominal_scale,
)


@pytest.fixture(scope="module")
def ghn() -> GHN:
    """A GHN whose kernels are four to five times too large."""
    return seeded_ghn()


# --- single tensors


def prediction(gain: float, role: Role = Role.WEIGHT, kernel: tuple[int, ...] = (8, 4, 3, 3)) -> Prediction:
    block = torch.randn(kernel, generator=torch.Generator().manual_seed(0))
    made = Prediction(Target("w", kernel, role), block, kernel)
    return replace(made, block=block * (gain * nominal_scale(made) / block.square().mean().sqrt()))


def bounded(made: Prediction, *, gains: bool = False) -> Prediction:
    factor = bounding_factor(made, gains)
    return made if factor == 1 else replace(made, block=made.block * factor)


@given(st.floats(-30, 30), st.sampled_from([Role.WEIGHT, Role.CLASS_WEIGHT, Role.NORM_WEIGHT, Role.BIAS, Role.POS_ENC]))
def test_scales_end_within_the_band_and_stay_where_they_are_within(exponent: float, role: Role) -> None:
    made = prediction(math.exp(exponent), role)
    result = bounded(made)
    gain = float(result.block.square().mean().sqrt()) / nominal_scale(made)
    is_norm = role is Role.NORM_WEIGHT
    high = NORM_BAND if is_norm else KERNEL_BAND
    low = SMALLEST_NORM if is_norm else 1 / high  # residual branches may start near zero
    assert gain <= high * 1.001
    if role in (Role.WEIGHT, Role.CLASS_WEIGHT, Role.NORM_WEIGHT):
        assert gain >= 0.999 * low
    assert bounded(result) is result
    if 1.01 * low < math.exp(exponent) < 0.99 * high:
        assert result is made


@given(st.floats(-30, 30))
def test_norms_that_multiply_what_follows_have_at_least_the_nominal_scale(exponent: float) -> None:
    made = prediction(math.exp(exponent), Role.NORM_WEIGHT, (8,))
    result = bounded(made, gains=True)
    assert 0.998 <= float(result.block.square().mean().sqrt()) <= NORM_BAND * 1.001
    assert bounded(result, gains=True) is result
    if 1 <= math.exp(exponent) < 0.99 * NORM_BAND:
        assert result is made


def test_layer_norms_gain_unless_they_end_a_branch() -> None:
    def gaining(name: str) -> frozenset[str]:
        with torch.device("meta"):
            return gaining_norms(to_graph(timm.create_model(name)))

    vit = gaining("test_vit")
    assert {"blocks.0.norm1.weight", "blocks.0.norm2.weight", "norm.weight"} <= vit
    assert not gaining("test_resnet")
    swin = gaining("swinv2_tiny_window8_256")  # its norms end the branches
    assert "norm.weight" in swin
    assert not {name for name in swin if ".blocks." in name}


def test_nominal_scales() -> None:
    assert nominal_scale(prediction(1.0)) == pytest.approx(math.sqrt(2 / 36))
    assert nominal_scale(prediction(1.0, kernel=(8, 1, 3, 3))) == pytest.approx(math.sqrt(1 / 9))
    assert nominal_scale(prediction(1.0, Role.CLASS_WEIGHT, (10, 32))) == pytest.approx(math.sqrt(2 / 32))
    assert nominal_scale(prediction(1.0, Role.BIAS, (8,))) == 1.0
    deep = Prediction(Target("w", (8, 4, 5, 3, 3), Role.WEIGHT, Layout.DEPTH), torch.ones(8, 4, 3, 3), (8, 4, 3, 3))
    assert nominal_scale(deep) == pytest.approx(math.sqrt(2 / 36) / 5)
    assert bounding_factor(replace(deep, block=torch.zeros(8, 4, 3, 3))) == 1.0


# --- structure


class Residual(nn.Module):
    """x + f(x), in ways that differ in what ends f."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.end = nn.LayerNorm(8) if end == "norm" else nn.Identity()
        self.gamma = nn.Parameter(torch.ones(8)) if end == "gate" else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.end(self.fc2(self.fc1(self.norm(x)).relu()))
        x = x if self.gamma is None else x * self.gamma
        return shortcut.view(x.shape) + x.clone()


def structure(model: nn.Module, *size: int, gate: float | None = None) -> Structure:
    return find_structure(analyse(capture(model, example_input=torch.randn(2, *size))), lambda _: gate)


def structure_of(model: nn.Module) -> Structure:
    return find_structure(analyse(capture(model)))


@pytest.mark.parametrize("end", ["layer", "norm", "gate"])
def test_branches_without_norm_or_gate_are_counted(end: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), *(Residual(end) for _ in range(3)), nn.Linear(8, 8), Residual(end))
    found = structure(model, 5, 4)
    if end != "layer":
        assert found.branches == {}
        return
    inner = {f"{i}.fc2.{kind}": 3 for i in (1, 2, 3) for kind in ("weight", "bias")}
    assert found.branches == {**inner, "5.fc2.weight": 1, "5.fc2.bias": 1}
    targets = [Target(name, (8,), Role.BIAS) for name in ("1.fc1.bias", "1.fc2.bias", "5.fc2.bias")]
    assert found.factors(targets, 4) == {"1.fc2.bias": 1 / 3}
    weights = [Target(f"1.{layer}.weight", (8, 16), Role.WEIGHT) for layer in ("fc1", "fc2")]
    assert found.factors(weights, 4) == {"1.fc2.weight": pytest.approx(1 / 6)}  # 4 copies of a block, 3 sums
    assert found.factors(weights, 64) == {"1.fc2.weight": pytest.approx(1 / 3)}


@pytest.mark.parametrize(("gate", "divisor"), [(None, 1), (0.0, 1), (1e-4, 1), (0.5, 1.5), (1.0, 3), (2.0, 6)])
def test_a_learned_scale_counts_as_large_as_it_starts(gate: float | None, divisor: float) -> None:
    model = nn.Sequential(nn.Linear(4, 8), *(Residual("gate") for _ in range(3)))
    factors = structure(model, 5, 4, gate=gate).factors([Target("2.fc2.bias", (8,), Role.BIAS)], 64)
    assert factors == ({} if divisor == 1 else {"2.fc2.bias": pytest.approx(1 / divisor)})


class Mixer(nn.Module):
    """x + (x A^T) (x B^T)^T (x C): a sum over all positions of products of activations."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        weights = self.query(x) @ self.key(x).transpose(1, 2)
        return x + (weights.softmax(-1) if self.normalize else weights) @ self.value(x)


def test_sums_of_products_of_activations_are_counted() -> None:
    found = structure(Mixer(normalize=False), 5, 8)
    assert found.products == {"query.weight": 8, "key.weight": 5, "value.weight": 1}
    assert structure(Mixer(normalize=True), 5, 8).products == {}


class Elementwise(nn.Module):
    """x + f(x) with a product in f, or none."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.product = product
        self.norm, self.fc1, self.gate, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.end = nn.LayerNorm(8) if product == "normalized" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        y, gate = self.fc1(normed), self.gate(normed)
        match self.product:
            case "square":
                y = y.relu() ** 2
            case "product" | "normalized":
                y = y * nn.functional.silu(gate)
            case "gate":
                y = y * gate.sigmoid()
            case "weights":
                y = y * gate.softmax(-1)
        return x + self.end(self.fc2(y))


@pytest.mark.parametrize(
    ("product", "layers"),
    [
        ("none", []),
        ("gate", []),
        ("weights", []),
        ("normalized", []),
        ("square", ["fc1"]),
        ("product", ["fc1", "gate"]),
    ],
)
def test_what_adds_up_in_phase_is_divided_in_front_of_products_and_squares(product: str, layers: list[str]) -> None:
    found = structure(Elementwise(product), 5, 8)
    assert found.products == {f"{layer}.{kind}": 1 for layer in layers for kind in ("weight", "bias")}
    weights = [Target(f"{layer}.weight", (16, 8), Role.WEIGHT) for layer in ("fc1", "gate")]
    biases = [Target(f"{layer}.bias", (16,), Role.BIAS) for layer in ("fc1", "gate")]
    expected = {f"{layer}.weight": pytest.approx(1 / math.sqrt(2)) for layer in layers}  # 2 copies of a block
    assert found.factors([*weights, *biases], 4) == expected
    assert found.factors([*weights, *biases], 8) == {}


class TalkingHeads(nn.Module):
    """Softmax attention of 2 heads that a layer mixes before the softmax, and another one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.before, self.after = nn.Linear(8, 24), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = self.before((query @ key.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(-2)
        mixed = self.after(weights).permute(0, 3, 1, 2) @ value
        return x + mixed.transpose(1, 2).flatten(2)


def test_mixed_heads_of_a_softmax_still_weight_a_mean() -> None:
    assert structure(TalkingHeads(), 5, 8).products == {}


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("efficientvim_m1", {"stages.0.blocks.0.mixer.out_proj.conv.weight": 49}),
        ("cait_xxs24_224", {}),
        ("xcit_nano_12_p16_224", {}),
        ("lambda_resnet26t", {}),
        ("coat_lite_tiny", {"serial_blocks1.0.factoratt_crpe.qkv.weight": math.sqrt(8)}),
        ("focalnet_tiny_srf", {"layers.0.blocks.0.modulation.f.weight": 1}),
        ("poolformerv2_s12", {"stages.0.blocks.0.mlp.fc1.weight": 1}),
        ("poolformer_s12", {}),
        ("convnextv2_atto", {}),
    ],
)
def test_products_of_real_networks(name: str, product: dict[str, float]) -> None:
    with torch.device("meta"):
        found = structure_of(timm.create_model(name))
    assert product.items() <= found.products.items()
    assert bool(found.products) == bool(product)


@pytest.mark.parametrize("name", ["convnext_zepto_rms", "eca_resnet33ts"])
def test_spelled_norms_and_gates_change_nothing(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    targets = [
        Target(parameter, tuple(p.shape), Role.WEIGHT) for parameter, p in model.named_parameters() if p.ndim > 1
    ]
    assert structure_of(model).factors(targets, 64) == {}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("efficientvit_b3", {0, 1, 2, 3}),
        ("efficientvit_l3", {0, 1, 2, 3}),
        ("efficientvit_m0", set()),
        ("levit_128s", set()),
    ],
)
def test_only_relu_attention_divides_batch_norms(name: str, stages: set[int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    norms = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    divided = norms & structure_of(model).branches.keys()
    assert {int(norm.split(".")[1]) for norm in divided if norm.startswith("stages")} == stages


def test_a_stream_that_is_raised_to_a_power_divides_the_batch_norms_that_end_its_branches() -> None:
    class Cubic(nn.Module):
        def __init__(self, cubic: bool) -> None:
            super().__init__()
            self.conv, self.bn, self.cubic = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), cubic

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return x + self.bn((y @ y.transpose(1, 2)) @ y if self.cubic else y)

    for cubic in (False, True):
        found = structure(nn.Sequential(Cubic(cubic), Cubic(cubic)), 8, 5)
        assert (found.branches.get("0.bn.weight"), "0.conv.weight" in found.branches) == (2 if cubic else None, False)


class Bottleneck(nn.Module):
    """x + f(x), f ending in a batch norm that may be gated by what it returned, or followed by a layer."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.gate = nn.Conv1d(4, 4, 1) if end == "gate" else None
        self.last = nn.Conv1d(4, 4, 1, bias=False) if end == "layer" else None
        self.gamma = nn.Parameter(torch.full((4, 1), 1e-5)) if end == "gamma" else None
        self.norm = nn.GroupNorm(1, 4) if end == "norm" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x if self.norm is None else self.norm(x)))
        y = y if self.gate is None else y * self.gate(y.mean(-1, keepdim=True)).sigmoid()
        y = y if self.last is None else self.last(y.relu())
        y = y if self.gamma is None else y * self.gamma
        return (x + y).relu()


@pytest.mark.parametrize(
    ("end", "deepest", "found"),
    [
        ("bn", MAX_AFFINE_CHAIN, True),
        ("gate", MAX_AFFINE_CHAIN - 1, True),  # the gate is a layer more, but a bounded one
        ("layer", MAX_AFFINE_CHAIN // 2, True),
        ("gamma", MAX_AFFINE_CHAIN, False),
        ("norm", MAX_AFFINE_CHAIN, False),
    ],
)
def test_the_last_batch_norms_of_branches_count_in_deep_networks(end: str, deepest: int, found: bool) -> None:
    for blocks in (deepest - 1, deepest):
        stem = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
        model = nn.Sequential(stem, *(Bottleneck(end) for _ in range(blocks)))
        branches = structure(model, 4, 6).branches
        norms = {f"{1 + i}.bn.{kind}": blocks for i in range(blocks) for kind in ("weight", "bias")}
        others = {f"{1 + i}.last.weight": blocks for i in range(blocks)} if end == "layer" else {}
        assert branches == {**others, **(norms if found and blocks == deepest else {})}


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("seresnet152", {"layer1.1.bn3": 2, "layer2.7.bn3": 7, "layer3.35.bn3": 35, "layer4.2.bn3": 2}),
        ("starnet_s4", {"stages.2.1.g.bn": 12}),
        ("starnet_s3", {}),
        ("resnet50", {}),
    ],
)
def test_which_batch_norms_real_networks_divide(name: str, norms: dict[str, int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    branches = structure_of(model).branches
    assert {f"{norm}.{kind}": n for norm, n in norms.items() for kind in ("weight", "bias")}.items() <= branches.items()
    modules = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert bool(norms) == any(parameter.rpartition(".")[0] in modules for parameter in branches)


def test_a_shared_layer_counts_its_longest_stream() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.conv(x) + x
            return x

    assert structure(Shared(), 3, 8, 8).branches == {"conv.weight": 4, "conv.bias": 4}


@given(st.integers(1, 2 * MAX_CHAIN))
def test_biases_of_long_chains_are_divided(length: int) -> None:
    layers = [layer for _ in range(length) for layer in (nn.Linear(4, 4), nn.ReLU())]
    found = structure(nn.Sequential(*layers, nn.LayerNorm(4), nn.Linear(4, 4)), 4)
    name = f"{2 * length - 2}.bias"
    assert found.chains[name] == length
    assert found.chains[f"{2 * length + 1}.bias"] == 1
    expected = {name: 1 / length} if length > MAX_CHAIN else {}
    assert found.factors([Target(name, (4,), Role.BIAS)], 64) == expected
    assert found.factors([Target(name, (4, 4), Role.WEIGHT)], 64) == {}
    repeated = found.factors([Target("0.weight", (4, 4), Role.WEIGHT)], 1)
    assert repeated == ({"0.weight": 0.5} if length > MAX_CHAIN else {})


class Gated(nn.Module):
    """A layer, and a residual branch with a scale that starts at 1, or at random."""

    def __init__(self, fill: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.norm, self.layer = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.gate, self.head = nn.Parameter(torch.ones(1)), nn.Linear(16, 10)
        with torch.no_grad():
            fill(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = x + self.layer(self.norm(x)) * self.gate
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("fill", "factor"),
    [
        (nn.init.ones_, 0.5),
        (lambda gate: nn.init.constant_(gate, -1.0), 0.5),
        (nn.init.zeros_, 1.0),
        (nn.init.normal_, 1.0),
    ],
)
def test_a_scale_whose_values_were_put_off_is_unknown(fill: Callable[[Tensor], Tensor], factor: float) -> None:
    deferred = DeferredRandom(0)
    with deferred:
        model = Gated(fill)
    init = timm_ghn.Init("ghn", ghn="bundled", fallback="off")
    plan = make_plan(model, init, find_hypernetwork(init), example_input=torch.randn(1, 4, 16), deferred=deferred)
    assert plan.assignments["layer.bias"].factor == factor


class Spectral(nn.Module):
    """A residual branch that is multiplied in the frequencies, with complex numbers or with none at all."""

    def __init__(self, value: complex | None) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.scale = nn.Parameter(torch.empty(0) if value is None else torch.full((9,), value))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            scale = self.scale if self.scale.numel() else self.scale.sum()
            x = x + torch.fft.irfft(torch.fft.rfft(self.layer(x)) * scale, n=16)
        return self.head(x.mean(1))


@pytest.mark.parametrize(("value", "factor"), [(3 + 4j, 0.1), (1j, 0.5), (0j, 1.0), (None, 1.0)])
def test_a_complex_scale_counts_by_its_absolute_value(value: complex | None, factor: float) -> None:
    init = timm_ghn.Init("ghn", ghn="bundled", fallback="off")
    plan = make_plan(Spectral(value), init, find_hypernetwork(init), example_input=torch.randn(1, 4, 16))
    assert plan.assignments["layer.bias"].factor == pytest.approx(factor)


@pytest.mark.parametrize("name", ["resnet50", "convnext_base"])
def test_the_networks_of_the_paper_are_left_alone(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    found = find_structure(analyse(capture(model)))
    targets = [Target(parameter, (1,), Role.BIAS) for parameter, _ in model.named_parameters()]
    assert found.factors(targets, 64) == {}
    assert not any(found.needs_orthogonal(parameter) for parameter, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_ghn_of_sane_scale_is_not_rescaled_where_structure_does_not_ask_for_it(name: str) -> None:
    exact, model = timm.create_model(name), timm.create_model(name)
    model.load_state_dict(exact.state_dict())
    for each, rescale in ((exact, "off"), (model, "auto")):
        timm_ghn.init_model(each, "ghn-orth", ghn="bundled", fallback="off", rescale=rescale)
    pairs = zip(exact.named_parameters(), model.parameters(), strict=True)
    changed = {parameter for (parameter, a), b in pairs if not torch.equal(a, b)}
    assert changed <= gaining_norms(to_graph(exact))


# --- whole networks


def test_standardized_kernels_of_a_network_without_norms_are_orthogonalized() -> None:
    model = timm.create_model("test_nfnet")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    late = timm_ghn.Init("ghn-orth", ghn="bundled", fallback="off", start_layer=0.7)
    report = timm_ghn.init_model(model, late)
    statuses = {row.name: row.status for row in report.parameters}
    assert statuses["stem.conv1.weight"] is Status.PREDICTED_ORTHOGONALIZED
    kept = timm_ghn.init_model(model, replace(late, rescale="off"))
    assert {row.name: row.status for row in kept.parameters}["stem.conv1.weight"] is Status.PREDICTED
    gains = [row.name for row in kept.parameters if row.status is Status.KEPT]
    assert gains
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in gains)


def test_the_report_and_the_provenance_tell() -> None:
    report = timm_ghn.init_model(timm.create_model("test_vit"), "ghn", ghn="bundled", fallback="off")
    reasons = {row.name: row.reason for row in report.parameters}
    assert reasons["blocks.0.mlp.fc2.weight"] == (
        "smaller, as similar layers would add up to large values and no norm layer follows"
    )
    assert reasons["blocks.0.mlp.fc1.weight"] == ""
    assert report.provenance["rescale"] == "auto"
    with pytest.raises(InitError, match="rescale='on': expected 'auto' or 'off'"):
        timm_ghn.Init(rescale="on")  # type: ignore[arg-type]


SMALL = (
    "test_resnet", "test_vit", "test_convnext", "test_nfnet", "test_mambaout", "test_byobnet", "test_efficientnet",
    "resnetv2_18", "mobilenetv3_small_050", "starnet_s050", "edgenext_xx_small", "mobilevit_xxs",
)  # fmt: skip


def check(name: str, ghn: GHN, factor: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    reference = measure_activations(model, batch_statistics=True)
    timm_ghn.init_model(model, "ghn-orth", ghn=ghn, fallback="off")
    ratio = activation_ratio(measure_activations(model, batch_statistics=True), reference)
    assert measure_activations(model).finite
    assert ratio.within(factor), f"{name}: {ratio}"


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_start_sane(name: str) -> None:
    # Standardized kernels without norm layers keep what is in phase; the classifier starts small there.
    # Residual streams of transformers grow more, and are normalized at their end.
    check(name, load_ghn("bundled"), {"test_nfnet": 100.0, "test_vit": 20.0}.get(name, 10.0))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "efficientvim_m1", "focalnet_tiny_srf", "xcit_nano_12_p16_224"]
)
def test_residual_streams_of_transformers_stay_near_timms(name: str) -> None:
    check(name, load_ghn("bundled"), 20.0)


def smallest_of_each_module() -> list[str]:
    """The model with the fewest parameters of every timm module."""
    sizes: dict[str, dict[str, int]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                sizes.setdefault(module, {})[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return [min(names, key=names.__getitem__) for names in sizes.values()]


@pytest.mark.slow
def test_every_module_starts_finite() -> None:
    for name, fallback in product(smallest_of_each_module(), ("auto", "off")):
        model = timm.create_model(name)
        timm_ghn.init_model(model, "ghn-orth", ghn="bundled", fallback=fallback)
        for batch_statistics in (False, True):
            assert measure_activations(model, batch_statistics=batch_statistics).finite, name


@pytest.mark.parametrize(
    "name",
    [
        "starnet_s4",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("efficientvit_b3", "repvit_m2_3", "seresnet152")),
    ],
)
def test_what_batch_norms_do_not_hold_back_yet_stays_finite(name: str) -> None:
    model = timm.create_model(name)
    timm_ghn.init_model(model, "ghn-orth", ghn="bundled", fallback="off")
    for batch_statistics in (False, True):
        assert measure_activations(model, batch_statistics=batch_statistics).finite


@pytest.mark.parametrize("name", ["repghostnet_050", "efficientvit_b0", "test_vit"])
def test_activations_are_finite_with_a_ghn_that_was_never_trained(name: str, ghn: GHN) -> None:
    model = timm.create_model(name)
    timm_ghn.init_model(model, "ghn-orth", ghn=ghn)
    for batch_statistics in (False, True):
        assert measure_activations(model, batch_statistics=batch_statistics).finite


# --- channels that a batch norm silences for another one


@pytest.mark.parametrize("name", ["mobileone_s1", "repvgg_a0"])
def test_batch_norms_do_not_silence_channels_for_the_batch_norms_of_the_next_block(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = [("stem", model.stem)]
    blocks += [(path, block) for path, block in model.named_modules() if path.count(".") == 2 and "stages" in path]
    expected = {
        f"{path}.{inner}.bias"
        for (path, block), (_, after) in pairwise(blocks)
        if after.identity is not None
        for inner, module in block.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert len(expected) > 40
    assert structure_of(model).silencing == expected


@pytest.mark.parametrize(
    ("name", "found"), [("densenet121", {"features.norm0.bias"}), ("resnet18", set()), ("mobilenetv2_035", set())]
)
def test_which_batch_norms_read_what_another_one_could_silence(name: str, found: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert structure_of(model).silencing == found


def test_no_channel_that_a_batch_norm_reads_is_silent_in_mobileone() -> None:
    lower = load_ghn("bundled")  # with lower biases: more to mend, however the bundled GHN was trained
    with torch.no_grad():
        lower.decoder_1d.linear(1).bias.view(2, -1)[1] -= 0.5

    def start(rescale: Literal["auto", "off"], ghn: str | GHN = lower) -> nn.Module:
        init = timm_ghn.Init("ghn-orth", ghn=ghn, rescale=rescale, cache=False)
        return timm.create_model("mobileone_s1", init=init, num_classes=10).train()

    def silent_share(model: nn.Module) -> float:
        variances: list[Tensor] = []
        for path, module in model.named_modules():
            if path.endswith("identity"):
                module.register_forward_hook(lambda _, inputs, __: variances.append(inputs[0].var((0, 2, 3))))
        with torch.no_grad():
            model(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        return float((torch.cat(variances) < 1e-6).float().mean())

    def clamped(model: nn.Module) -> list[Tensor]:
        report = timm_ghn.report_of(model)
        assert report is not None
        named = dict(model.named_parameters())
        return [named[row.name].detach() for row in report.parameters if "silence" in row.reason]

    model, as_predicted = start("auto"), start("off")
    assert silent_share(as_predicted) > 0.2
    assert silent_share(model) < 0.01
    assert silent_share(start("auto", "bundled")) < 0.01
    assert len(clamped(model)) == 82
    assert all(bool((bias >= 0).all()) for bias in clamped(model))
    assert any(bool((bias > 0).any()) for bias in clamped(model))
    assert clamped(as_predicted) == []
