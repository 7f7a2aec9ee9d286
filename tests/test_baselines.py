"""The closed-form initializations: what they promise, where they apply, what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import timm_ghn
from timm_ghn.baselines import BASELINES
from timm_ghn.baselines.covariance import kernel_covariance, sample_kernels
from timm_ghn.baselines.fixup import fixup_scales, residual_branches
from timm_ghn.baselines.mimetic import factors, find_attention
from timm_ghn.errors import InitError
from timm_ghn.initialize.report import Status
from timm_ghn.trace.capture import capture


def changed_parameters(model: nn.Module, method: str, **settings: Any) -> set[str]:
    """Initialize, and return names of what changes; it has to be what is told, and buffers and modes stay."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    report = timm_ghn.init_model(model, method, **settings)
    told = {row.name for row in report.parameters if row.status is Status.COMPUTED}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= told <= {name for name, _ in model.named_parameters()}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    return changed


# --- LSUV -----------------------------------------------------------------------------------------------------------


def output_variances(model: nn.Module, images: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def measure(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found.setdefault(name, float(output.var()))

        return measure

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "vgg"])
def test_lsuv_gives_every_layer_outputs_of_variance_one(name: str) -> None:
    torch.manual_seed(0)
    if name == "vgg":
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 28 * 28, 10)
        )
        images = torch.randn(16, 3, 32, 32) * 7 + 2
    else:
        model = timm.create_model(name, drop_path_rate=0.2)
        images = torch.rand(8, *model.pretrained_cfg["input_size"])
    changed = changed_parameters(model, "lsuv", example_input=images)
    variances = output_variances(model.eval(), images)
    assert len(variances) >= 3
    assert all(0.98 < value < 1.02 for value in variances.values()), variances
    assert {f"{layer}.weight" for layer in variances} <= changed
    for layer in variances:
        matrix = model.get_parameter(f"{layer}.weight").detach().flatten(1).double()
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        gram = gram / gram.diagonal().mean()
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-4)


def test_lsuv_of_weights_that_are_standardized_stays_orthonormal() -> None:
    model = timm.create_model("test_nfnet")
    images = torch.rand(4, *model.pretrained_cfg["input_size"])
    timm_ghn.init_model(model, "lsuv", example_input=images)
    weight = model.stem[0].weight.detach().flatten(1)
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-4)
    assert bool(torch.isfinite(model(images)).all())


def test_lsuv_needs_a_batch_or_its_size() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InitError, match="give example_input=images, or input_size="):
        timm_ghn.init_model(model, "lsuv")
    timm_ghn.init_model(model, "lsuv", input_size=(4,))
    timm_ghn.init_model(model, "lsuv", example_input=torch.randn(9, 4))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, words: Tensor, scale: Tensor) -> Tensor:
        assert not words.is_floating_point()
        return self.last(F.relu(self.first(self.table(words)))) * scale


class Spectral(nn.Module):
    """Multiplies by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(8, dtype=torch.complex64))
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first((x * self.filter).real)))


def test_lsuv_measures_with_the_type_of_the_real_parameters() -> None:
    changed = {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert changed_parameters(Spectral(), "lsuv", input_size=(8,)) == changed


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_lsuv_takes_what_forward_takes(kind: str) -> None:
    model = TwoInputs()
    words, scale = torch.randint(0, 10, (64, 5)), torch.ones(1)
    example = (words, scale) if kind == "tuple" else {"words": words, "scale": scale}
    assert changed_parameters(model, "lsuv", example_input=example) == {
        "first.weight", "first.bias", "last.weight", "last.bias",
    }  # fmt: skip
    assert float(model(words, scale).detach().var()) == pytest.approx(1, rel=0.02)


def test_lsuv_measures_on_the_size_that_the_model_takes() -> None:
    model = timm.create_model("test_vit", init="lsuv", in_chans=1, img_size=64)
    assert 0.3 < float(model.patch_embed(torch.randn(8, 1, 64, 64)).var()) < 3


def test_lsuv_leaves_out_what_has_no_weight_of_its_own() -> None:
    layers = (nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 0), nn.Linear(0, 5), nn.Linear(5, 4))
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    model[3].weight.requires_grad_(False)
    assert changed_parameters(model, "lsuv", input_size=(6,)) == {"4.weight", "4.bias"}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2)), {"input_size": (4,)}),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), {"example_input": torch.randn(1, 4)}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), {"input_size": (1, 8, 8)}),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {"example_input": torch.full((8, 4), torch.nan)}),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {"example_input": torch.eye(8, 4) / 0}),
    ],
)
def test_lsuv_changes_nothing_if_the_forward_pass_fails(model: nn.Module, settings: dict[str, Any]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InitError, match=r"forward pass failed at module '\d'.*Nothing was changed"):
        timm_ghn.init_model(model, "lsuv", **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model[0]._forward_hooks


def test_lsuv_measures_in_full_precision_within_autocast() -> None:
    alone, within = nn.Linear(4, 4), nn.Linear(4, 4)
    timm_ghn.init_model(alone, "lsuv", input_size=(4,))
    with torch.autocast("cpu", torch.bfloat16):
        timm_ghn.init_model(within, "lsuv", input_size=(4,))
    assert torch.equal(alone.weight, within.weight)


@pytest.mark.parametrize("example", [torch.zeros(8, 4), torch.ones(8, 4), torch.empty(0, 4), ()])
def test_lsuv_refuses_an_example_in_which_nothing_varies(example: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = model[0].weight.clone()
    with pytest.raises(InitError, match="is empty or holds the same number everywhere"):
        timm_ghn.init_model(model, "lsuv", example_input=example)
    assert torch.equal(model[0].weight, before)


# --- Fixup ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block without normalization, with two layers and a shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


class Residual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(16, 16) for _ in range(depth - 1)), Block(16, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def test_fixup_finds_branches_and_scales_them() -> None:
    model = Residual(5)
    branches = residual_branches(capture(model, input_size=(3, 16, 16)))
    expected = [(f"blocks.{index}.first.weight", f"blocks.{index}.second.weight") for index in range(5)]
    assert list(branches) == expected
    assert fixup_scales(branches)["blocks.0.first.weight"] == pytest.approx(5**-0.5)
    changed_parameters(model, "fixup", input_size=(3, 16, 16))
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    for index in range(5):
        assert not model.blocks[index].second.weight.any()
    first = model.blocks[2].first.weight.detach()
    assert float(first.std()) == pytest.approx((2 / 144) ** 0.5 * 5**-0.5, rel=0.05)
    assert float(model.stem.weight.detach().std()) == pytest.approx((2 / 27) ** 0.5, rel=0.15)
    assert float(model.blocks[4].shortcut.weight.detach().std()) == pytest.approx((2 / 16) ** 0.5, rel=0.15)


def test_fixup_keeps_the_signal_of_a_deep_network() -> None:
    model = Residual(30)
    timm_ghn.init_model(model, "fixup", input_size=(3, 16, 16))
    with torch.no_grad():
        stem = F.relu(model.stem(torch.randn(4, 3, 16, 16)))
        torch.testing.assert_close(model.blocks[:29](stem), stem)


def test_fixup_where_it_does_not_apply() -> None:
    with pytest.raises(InitError, match="without normalization, and ResNet has BatchNorm2d layers"):
        timm.create_model("test_resnet", init="fixup")
    with pytest.raises(InitError, match="Sequential has no residual branches"):
        timm_ghn.init_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "fixup", input_size=(3, 8, 8))


# --- covariance -----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sampled_from([3, 5, 7, 9]), st.floats(0.3, 4.0))
def test_covariances_are_covariances(side: int, sigma: float) -> None:
    covariance = kernel_covariance(side, sigma)
    torch.testing.assert_close(covariance, covariance.T)
    assert float(torch.linalg.eigvalsh(covariance).min()) > -1e-12
    assert float(covariance.trace()) == pytest.approx(1)
    variance = covariance.diagonal().view(side, side)
    for turned in (variance.T, variance.flip(0), variance.flip(1)):
        torch.testing.assert_close(variance, turned)
    assert int(variance.argmax()) == side * side // 2
    line = variance[side // 2, side // 2 :]
    assert bool((line[1:] <= line[:-1] + 1e-12).all())


def test_neighbours_are_alike() -> None:
    covariance = kernel_covariance(7, 2.0)
    deviation = covariance.diagonal().sqrt()
    correlation = (covariance / torch.outer(deviation, deviation)).view(7, 7, 7, 7)
    near, far = correlation[3, 2, 3, 3], correlation[3, 0, 3, 6]
    assert float(near) > 0.6
    assert float(near) > float(far)


def test_samples_have_the_covariance() -> None:
    covariance = kernel_covariance(5, 1.2)
    kernels = sample_kernels(40_000, covariance, torch.Generator().manual_seed(0))
    found = kernels.T @ kernels / len(kernels)
    assert float((found - covariance).norm() / covariance.norm()) < 0.03


def test_covariance_changes_depthwise_kernels_alone_and_keeps_their_scale() -> None:
    model = timm.create_model("test_convnext")
    depthwise = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    before = {name: float(model.get_parameter(name).detach().square().sum()) for name in depthwise}
    assert changed_parameters(model, "covariance") == depthwise
    for name in depthwise:
        assert float(model.get_parameter(name).detach().square().sum()) == pytest.approx(before[name], rel=0.5)


# --- mimetic --------------------------------------------------------------------------------------------------------


def test_factors_multiply_to_noise_and_identity() -> None:
    first, second = factors(128, 128, 0.7, 0.7, torch.Generator().manual_seed(0))
    product = first @ second
    assert float(product.diagonal().mean()) == pytest.approx(0.7, abs=0.05)
    rest = product - torch.diag(product.diagonal())
    assert float(rest.std()) == pytest.approx(0.7 / 128**0.5, rel=0.05)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224"])
def test_attention_of_timm(name: str) -> None:
    model = timm.create_model(name)
    changed = changed_parameters(model, "mimetic")
    expected = {f"{n}.{part}.weight" for n, m in model.named_modules() if hasattr(m, "qkv") for part in ("qkv", "proj")}
    assert changed == expected
    for attention in find_attention(model):
        width, heads = attention.projection.shape[0], attention.heads
        query, key, value = attention.stacked.detach().double().view(3, heads, width // heads, width)
        for head in range(heads):
            product = query[head].T @ key[head]  # W_q W_k^T in the paper's notation
            assert float(product.diagonal().mean()) > 3 * float((product - torch.diag(product.diagonal())).mean().abs())
            assert float(product.diagonal().mean()) > 0
        whole = (attention.projection.detach().double() @ value.reshape(width, width)).T
        assert float(whole.diagonal().mean()) == pytest.approx(-0.4, abs=0.1)
        others = whole - torch.diag(whole.diagonal())
        assert float(whole.diagonal().mean().abs()) > 4 * float(others.abs().mean())


def test_attention_of_torch() -> None:
    model = nn.TransformerEncoderLayer(32, 4)
    changed = changed_parameters(model, "mimetic")
    assert changed == {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}


# --- as `init=` -----------------------------------------------------------------------------------------------------

CASES = [("lsuv", "test_resnet"), ("covariance", "test_convnext"), ("mimetic", "test_vit")]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_create_model_with_a_baseline(method: str, name: str) -> None:
    torch.manual_seed(0)
    first = timm.create_model(name, num_classes=7, init=timm_ghn.Init(method, seed=3))
    torch.manual_seed(1)
    second = timm.create_model(name, num_classes=7, init=timm_ghn.Init(method, seed=3))
    other = timm.create_model(name, num_classes=7, init=timm_ghn.Init(method, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    report = timm_ghn.report_of(first)
    assert report is not None
    computed = {row.name for row in report.parameters if row.status is Status.COMPUTED}
    assert computed
    assert all(
        not torch.equal(value, other.get_parameter(row))
        for row, value in first.named_parameters()
        if row in computed and row.endswith("weight")
    )
    found = timm_ghn.provenance(first)
    assert found is not None
    assert found["method"] == method


def test_what_does_not_apply_says_why() -> None:
    for method, why in (("mimetic", "no self-attention"), ("covariance", "no depthwise convolutions")):
        with pytest.raises(InitError, match=rf"{method} has nothing to initialize in ResNet: it has {why}"):
            timm.create_model("test_resnet", init=method)


def test_every_baseline_is_a_method() -> None:
    assert BASELINES.keys() == {m.name for m in timm_ghn.METHODS.values() if m.source.value == "baseline"}
