"""Tests of timm_ghn.orthogonalization."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from ghn_reference import MODELS, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import samples, starting_model, starting_weight
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

import timm_ghn
from timm_ghn.errors import InitError
from timm_ghn.initialize.report import Status
from timm_ghn.orthogonalization import (
    PostProcess,
    WeightLayer,
    orthogonalize_,
    postprocess_many,
    postprocess_tensor,
    resolve_start_layer,
    weight_layers,
)
from timm_ghn.orthogonalization.layers import default_start_layer, is_pointwise
from timm_ghn.orthogonalization.noise import correlation_std, standard_normal
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor
from timm_ghn.threads import Workers
from timm_ghn.trace.capture import capture

LAYER = WeightLayer(3, "stem.weight", "stem")
DEFAULTS = PostProcess()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiled(rows: int, columns: int, noise: float = 0.0, seed: int = 0, side: int = 64) -> Tensor:
    """(rows, columns): a random square block, tiled as a GHN does, plus noise."""
    block = torch.randn(side, side, generator=generator(seed)).mul_(0.02)
    weight = block.repeat(-(-rows // side), -(-columns // side))[:rows, :columns].contiguous()
    return weight + noise * torch.randn(rows, columns, generator=generator(seed + 1)) if noise else weight


def orthogonality_error(weight: Tensor) -> float:
    """max |Q^T Q - I| in float64."""
    matrix = weight.detach().reshape(weight.shape[0], -1).double()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return float((tall.mT @ tall - torch.eye(tall.shape[1], dtype=torch.float64)).abs().max())


def householder_factor(matrix: Tensor) -> Tensor:
    """Q sign(diag R) of Householder reflections."""
    factor, triangle = torch.linalg.qr(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT)
    factor = factor * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(factor.dtype)
    return factor if matrix.shape[0] >= matrix.shape[1] else factor.mT


def exact_factor(matrix: Tensor) -> Tensor:
    return householder_factor(matrix.double())


def assert_triangular(matrix: Tensor, factor: Tensor, tolerance: float = 1e-6) -> None:
    """Q^T W is upper triangular with a diagonal that is not negative."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall, orthogonal = (matrix.mT, factor.mT) if wide else (matrix, factor)
    triangle = orthogonal.double().mT @ tall.double()
    bound = tolerance * float(tall.double().norm())
    assert float(triangle.tril(-1).abs().max()) <= bound
    assert float(triangle.diagonal().min()) >= -bound


class Reflections(TorchFunctionMode):
    """Records the shapes that LAPACK factorizes by Householder reflections."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.geqrf:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


class RoughProducts(TorchFunctionMode):
    """Rounds small products to 8 bits, as hardware might that multiplies in reduced precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        small = func in (Tensor.matmul, Tensor.__matmul__) and max(result.shape) <= 64
        return result.bfloat16().to(result.dtype) if small else result


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- against the reference implementation


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_those_of_the_reference(name: str) -> None:
    with torch.device("meta"):
        layers = weight_layers(torchvision.models.get_model(name))
    data = reference(name)
    assert [layer.module for layer in layers] == data["layers_2d"]
    assert [layer.number for layer in layers] == list(range(1, data["n_layers_2d"] + 1))
    assert [layer.number for layer in layers if layer.is_classifier] == [len(layers)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_orthogonalized_weights_are_those_of_the_reference(name: str) -> None:
    data = reference(name)
    model = starting_model(name)
    before = snapshot(model)
    changed = orthogonalize_(model, start_layer=data["orth_layer"], noise=0)
    assert list(changed) == list(data["orthogonalized"])
    for parameter, weight in model.state_dict().items():
        if parameter not in changed:
            assert torch.equal(weight, before[parameter]), parameter
            continue
        expected = data["orthogonalized"][parameter]
        assert float(weight.double().norm()) == pytest.approx(expected["norm"], rel=1e-5)
        assert float(weight.double().mean()) == pytest.approx(expected["mean"], rel=1e-4, abs=1e-7)
        torch.testing.assert_close(samples(weight), torch.tensor(expected["sample"]), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["resnet50", "convnext_base"])
def test_orthogonalized_large_layers_are_those_of_the_reference(name: str) -> None:
    data = reference(name)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in torchvision.models.get_model(name).named_parameters()}
    largest = sorted(data["orthogonalized"], key=lambda key: -torch.Size(shapes[key]).numel())
    for parameter in {largest[0], largest[len(largest) // 2], largest[-1]}:
        weight = starting_weight(parameter, shapes[parameter])
        result = postprocess_tensor(weight, WeightLayer(1, parameter, ""), PostProcess(noise=0))
        expected = data["orthogonalized"][parameter]
        assert float(result.double().norm()) == pytest.approx(expected["norm"], rel=1e-5)
        torch.testing.assert_close(samples(result), torch.tensor(expected["sample"]), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("correlation", "key"), [("ppuda", "corr_std_rows"), ("paper", "corr_std_channels")])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_correlation_std_is_that_of_the_reference(name: str, correlation: str, key: str) -> None:
    parameters = dict(starting_model(name).named_parameters())
    for module, expected in reference(name)[key].items():
        matrix = parameters[f"{module}.weight"].flatten(1)
        assert correlation_std(matrix, correlation) == pytest.approx(expected, rel=1e-4), module  # type: ignore[arg-type]


# --- correlations


def naive_std(matrix: Tensor, correlation: str = "paper") -> float:
    transposed = correlation == "ppuda" and matrix.shape[0] < matrix.shape[1]
    return float(torch.corrcoef((matrix.mT if transposed else matrix).double()).flatten().std())


@settings(max_examples=40)
@given(
    rows=st.integers(2, 150),
    columns=st.integers(3, 150),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["paper", "ppuda"]),
)
def test_correlation_std_of_random_matrices(rows: int, columns: int, seed: int, kind: str) -> None:
    matrix = torch.randn(rows, columns, generator=generator(seed))
    assert correlation_std(matrix, kind) == pytest.approx(naive_std(matrix, kind), rel=1e-5, abs=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("correlation", ["paper", "ppuda"])
@pytest.mark.parametrize("shape", [(128, 64), (200, 100), (100, 300), (300, 100), (65, 700)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_correlation_std_of_tiled_matrices(shape: tuple[int, int], correlation: str, scale: float) -> None:
    matrix = tiled(*shape)
    expected = pytest.approx(naive_std(matrix, correlation), rel=1e-5)
    assert correlation_std(matrix * scale, correlation) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("correlation", ["paper", "ppuda"])
def test_correlation_std_without_variance_is_a_number(correlation: str) -> None:
    for matrix in (
        torch.zeros(8, 5),
        torch.full((8, 5), 0.1),
        torch.full((70, 5), 0.1),
        torch.ones(1, 9),
        torch.ones(9, 1),
    ):
        assert correlation_std(matrix, correlation) == 0.0  # type: ignore[arg-type]
    assert correlation_std(torch.randn(1, 9, generator=generator()), "paper") == 0.0
    assert correlation_std(torch.empty(0, 4)) == 0.0


def test_a_channel_without_variance_has_no_correlations() -> None:
    matrix = torch.randn(6, 40, generator=generator()).double()
    entries = torch.zeros(7, 7, dtype=torch.float64)
    entries[:6, :6] = torch.corrcoef(matrix)
    with_constant = torch.cat([matrix, torch.full((1, 40), 0.3, dtype=torch.float64)])
    assert correlation_std(with_constant) == pytest.approx(float(entries.flatten().std()))


# --- the orthogonal factor


@settings(max_examples=60)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    rank=st.none() | st.integers(0, 80),
    exponent=st.sampled_from([0, -44, -30, 30, 36]),
    seed=st.integers(0, 99),
)
def test_orthogonal_whatever_the_matrix(rows: int, columns: int, rank: int | None, exponent: int, seed: int) -> None:
    draws = generator(seed)
    if rank is None:
        matrix = torch.randn(rows, columns, generator=draws)
    else:
        matrix = torch.randn(rows, rank, generator=draws) @ torch.randn(rank, columns, generator=draws)
    matrix = (matrix.double() * 10.0**exponent).float()
    original = matrix.clone()
    factor = orthogonal_factor(matrix)
    assert torch.equal(matrix, original)
    assert factor.shape == matrix.shape
    assert factor.dtype == matrix.dtype
    assert factor.is_contiguous()
    assert orthogonality_error(factor) <= 1e-5
    assert_triangular(matrix, factor, 1e-5)


TILED_SHAPES = [(512, 2048), (768, 768), (700, 1500), (1000, 672), (288, 1024), (64, 4096), (512, 49)]


@pytest.mark.parametrize(
    ("shape", "noise"),
    [((4096, 1024), 1e-6), *((shape, noise) for shape in TILED_SHAPES for noise in (0.0, 1e-9, 1e-6))],
)
def test_tiled_weights(shape: tuple[int, int], noise: float) -> None:
    matrix = tiled(*shape, noise)
    factor = orthogonal_factor(matrix)
    assert orthogonality_error(factor) <= 1e-5
    assert_triangular(matrix, factor)


@pytest.mark.parametrize("side", [24, 96])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_blocks_of_any_side(side: int, noise: float) -> None:
    matrix = tiled(600, 200, noise, side=side)
    with Reflections() as reflections:
        factor = orthogonal_factor(matrix)
    assert (600, 200) not in reflections.shapes
    assert orthogonality_error(factor) <= 1e-5
    assert_triangular(matrix, factor)
    if noise:
        assert float((factor - exact_factor(matrix)).abs().max()) <= 2e-3
    else:
        assert correlation_std(matrix) == pytest.approx(naive_std(matrix), rel=1e-5)


@pytest.mark.parametrize("shape", [(2048, 512), (400, 900), (320, 320)])
def test_tiled_weights_are_factorized_more_exactly_than_by_householder_alone(shape: tuple[int, int]) -> None:
    matrix = tiled(*shape, noise=1e-7)
    exact = exact_factor(matrix)
    error = float((orthogonal_factor(matrix) - exact).abs().max())
    assert error <= 2e-3
    assert error <= float((householder_factor(matrix) - exact).abs().max()) / 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(768, 768), (400, 390), (65, 65), (257, 256)])
def test_square_matrices_of_noise(shape: tuple[int, int], seed: int) -> None:
    for matrix in (torch.randn(shape, generator=generator(seed)), tiled(*shape, noise=3e-6, seed=seed)):
        factor = orthogonal_factor(matrix)
        assert orthogonality_error(factor) <= 2e-6
        assert_triangular(matrix, factor)


@pytest.mark.parametrize("shape", [(1024, 256), (256, 1024), (400, 200), (300, 70), (90, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_well_conditioned_weights_equal_lapack_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=generator(5), dtype=dtype)
    matrix *= torch.logspace(-3, 3, shape[0], dtype=dtype).unsqueeze(1)[
        torch.randperm(shape[0], generator=generator())
    ] ** (1 if shape[0] < shape[1] else 0)
    error = (orthogonal_factor(matrix) - exact_factor(matrix)).abs().max()
    assert float(error) <= (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("shape", [(600, 256), (256, 600), (512, 512)])
def test_only_exact_copies_need_reflections(shape: tuple[int, int]) -> None:
    with Reflections() as reflections:
        orthogonal_factor(torch.randn(shape, generator=generator()))
    assert (max(shape), min(shape)) not in reflections.shapes
    with Reflections() as reflections:
        orthogonal_factor(tiled(*shape, noise=1e-6))
    assert (max(shape), min(shape)) not in reflections.shapes
    with Reflections() as reflections:
        orthogonal_factor(tiled(*shape))
    assert reflections.shapes == [(max(shape), 64)]  # the first block of columns alone


def ill_conditioned(condition: float) -> Tensor:
    """(600, 256) float32 with singular values spread evenly in logarithm."""
    left = torch.linalg.qr(torch.randn(600, 256, generator=generator(1), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(256, 256, generator=generator(2), dtype=torch.float64))[0]
    return (left * torch.logspace(0, -torch.log10(torch.tensor(condition)), 256) @ right).float()


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e6])
def test_ill_conditioned_weights(condition: float) -> None:
    matrix = ill_conditioned(condition)
    factor = orthogonal_factor(matrix)
    assert orthogonality_error(factor) <= 1e-5
    assert_triangular(matrix, factor)
    assert float((factor - exact_factor(matrix)).abs().max()) <= 1e-6 * condition


def test_rough_products_are_noticed() -> None:
    with Reflections() as reflections, RoughProducts():
        factor = orthogonal_factor(torch.randn(600, 256, generator=generator()))
    assert reflections.shapes[-1] == (600, 256)
    assert orthogonality_error(factor) <= 1e-5


def test_two_almost_equal_columns_are_noticed() -> None:
    matrix = torch.randn(600, 256, generator=generator())
    for gap in (1e-1, 1e-2, 1e-3, 1e-5, 0.0):
        matrix[:, 200] = matrix[:, 17] + gap * matrix[:, 40]
        factor = orthogonal_factor(matrix)
        assert orthogonality_error(factor) <= 1e-5
        assert_triangular(matrix, factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    matrix = tiled(256, 128, noise=1e-3).to(dtype)
    factor = orthogonal_factor(matrix)
    assert factor.dtype == dtype
    assert torch.equal(factor, orthogonal_factor(matrix.float()).to(dtype))


def test_zero_matrix_becomes_the_identity() -> None:
    assert torch.equal(orthogonal_factor(torch.zeros(5, 3)), torch.eye(5, 3))
    assert orthogonality_error(orthogonal_factor(torch.zeros(500, 300))) <= 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    matrix = torch.ones(4, 4)
    matrix[2, 1] = value
    with pytest.raises(InitError, match=r"head\.weight.*NaN or infinity"):
        orthogonal_factor(matrix, "head.weight")


def test_other_tensors_are_refused() -> None:
    with pytest.raises(InitError, match="two dimensions"):
        orthogonal_factor(torch.ones(3))
    with pytest.raises(InitError, match="int64"):
        orthogonal_factor(torch.ones(3, 3, dtype=torch.long))


# --- one tensor, many tensors


@pytest.mark.parametrize(
    "shape", [(8, 4, 3, 3), (4, 8), (6, 2, 3), (64, 1, 7, 7), (3, 2, 2, 2, 2), (1, 5), (5, 1), (0, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=generator()).to(dtype)
    before = weight.clone()
    result = postprocess_tensor(weight, LAYER, PostProcess())
    assert torch.equal(weight, before)
    assert result.shape == weight.shape
    assert result.dtype == dtype
    if weight.numel() and dtype in (torch.float32, torch.float64):
        assert orthogonality_error(result) <= 1e-5


def test_noise_alone_has_the_scale_of_equation_1() -> None:
    weight = tiled(300, 200)
    result = postprocess_tensor(weight, LAYER, PostProcess(noise=1e-2, orthogonal=False))
    expected = 1e-2 * correlation_std(weight)
    assert float((result - weight).std()) == pytest.approx(expected, rel=0.02)
    assert torch.equal(postprocess_tensor(weight, LAYER, PostProcess(noise=0, orthogonal=False)), weight)


def noise_of(count: int, seed: int = 0, layer: int = 1, shape: tuple[int, ...] = (4, 4), expert: int = 0) -> Tensor:
    return torch.cat([part.clone() for part in standard_normal(count, seed, layer, shape, expert)])


def test_noise_depends_on_seed_layer_and_shape_alone() -> None:
    base = noise_of(16)
    torch.manual_seed(123)
    torch.randn(7)
    assert torch.equal(noise_of(16), base)
    others = [noise_of(16, seed=1), noise_of(16, layer=2), noise_of(16, shape=(2, 8)), noise_of(16, seed=-1)]
    assert all(not torch.equal(other, base) for other in [*others, noise_of(16, expert=1)])


def test_noise_is_the_same_everywhere() -> None:
    expected = [0.1574463, 1.217608, 0.008242568, 0.4311823, 0.1405065, -0.5963846, 1.577415, -1.778993]
    torch.testing.assert_close(noise_of(8), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 3, 15, 32767, 32768, 32769, 100_000])
def test_shorter_noise_is_the_beginning_of_longer_noise(count: int) -> None:
    assert torch.equal(noise_of(count), noise_of(100_001)[:count])


def test_noise_is_normal() -> None:
    draws = noise_of(1_000_000, shape=(1000, 1000)).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = torch.arange(1, len(draws) + 1, dtype=torch.float64) / len(draws)
    assert float((normal.cdf(draws.sort().values) - expected).abs().max()) <= 1.63e-3  # Kolmogorov's test, 1 %
    assert float(draws.var()) == pytest.approx(1, abs=5e-3)
    assert float((draws**4).mean()) == pytest.approx(3, abs=0.03)
    assert 4 < float(draws.abs().max()) < 4.5
    for lag in (1, 2, 3, 4, 1000):
        assert abs(float((draws[lag:] * draws[:-lag]).mean())) <= 4e-3


def small_stream() -> list[tuple[WeightLayer, Tensor]]:
    shapes = [(512, 128), (300, 1, 7, 7), (128, 64, 3, 3), (96, 400), (640, 192)]
    weights = [
        tiled(shape[0], torch.Size(shape[1:]).numel(), seed=10 * i).reshape(shape) for i, shape in enumerate(shapes)
    ]
    return [(WeightLayer(i, f"layer{i}.weight", f"layer{i}"), weight) for i, weight in enumerate(weights, start=1)]


def postprocessed(
    items: list[tuple[WeightLayer, Tensor]],
    settings: PostProcess = DEFAULTS,
    count: int | None = None,
    in_place: bool = False,
) -> list[tuple[WeightLayer, Tensor]]:
    """All results of `postprocess_many`."""
    with Workers(count) as workers:
        return list(postprocess_many(items, settings, workers, in_place=in_place))


@pytest.mark.usefixtures("two_threads")
def test_results_do_not_depend_on_threads_or_order() -> None:
    stream = small_stream()
    expected = {layer: postprocess_tensor(weight, layer, PostProcess()) for layer, weight in stream}
    runs = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        runs.append(dict(postprocessed(stream)))
        runs.append(dict(postprocessed(stream[::-1], count=3)))
        runs.append({layer: postprocess_tensor(weight, layer, PostProcess()) for layer, weight in stream})
        assert torch.get_num_threads() == num_threads
    for run in runs:
        assert run.keys() == expected.keys()
        assert all(torch.equal(run[layer], expected[layer]) for layer in expected)


def test_the_stream_is_read_lazily_and_answered_in_order() -> None:
    read: list[int] = []

    def items() -> Iterator[tuple[WeightLayer, Tensor]]:
        for number in range(1, 30):
            read.append(number)
            yield WeightLayer(number, f"w{number}", ""), torch.randn(40, 40, generator=generator(number))

    with Workers(1) as workers:
        results = postprocess_many(items(), PostProcess(), workers)
        assert read == []
        first, _ = next(results)
        assert first.number == 1
        assert len(read) <= 6
        assert [layer.number for layer, _ in results] == list(range(2, 30))


@pytest.mark.usefixtures("two_threads")
def test_threads_are_restored_after_an_error_and_an_early_stop() -> None:
    bad = [(LAYER, torch.full((4, 4), float("nan")))]
    with pytest.raises(InitError, match=r"stem\.weight"):
        postprocessed(bad)
    assert torch.get_num_threads() == 2
    with Workers() as workers:
        next(postprocess_many(small_stream(), PostProcess(), workers))
    assert torch.get_num_threads() == 2
    with pytest.raises(InitError, match="workers=0"):
        postprocessed([], count=0)


def test_gradient_and_inference_modes_do_not_matter() -> None:
    layer, weight = small_stream()[0]
    expected = postprocess_tensor(weight, layer, PostProcess())
    assert not expected.requires_grad
    assert torch.equal(postprocess_tensor(nn.Parameter(weight), layer, PostProcess()), expected)
    with torch.inference_mode():
        inferred = weight * 1
    assert torch.equal(postprocessed([(layer, inferred)])[0][1], expected)
    with torch.device("meta"):
        assert torch.equal(postprocess_tensor(weight, layer, PostProcess()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_equals_cpu() -> None:
    for layer, weight in small_stream():
        expected = postprocess_tensor(weight, layer, PostProcess())
        on_gpu = weight.cuda()
        result = postprocess_tensor(on_gpu, layer, PostProcess())
        assert result.is_cuda
        assert torch.equal(result.cpu(), expected)
        assert postprocess_tensor(on_gpu, layer, PostProcess(), in_place=True) is on_gpu
        assert torch.equal(on_gpu.cpu(), expected)


# --- in place


def in_place_variants(weight: Tensor) -> Iterator[Tensor]:
    """The same values in tensors of other kinds, each with its own memory."""
    yield weight.clone()
    yield nn.Parameter(weight.clone())
    yield weight.double()
    yield weight.bfloat16()
    for offset in (3, 16, 48):  # the first is not aligned
        yield weight.new_empty(weight.numel() + offset)[offset:].view(weight.shape).copy_(weight)
    yield weight.new_empty(*weight.shape, 2)[..., 1].copy_(weight)
    yield weight.transpose(0, 1).contiguous().transpose(0, 1)
    if weight.dim() == 4:
        yield weight.clone().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        yield weight.clone()


@pytest.mark.parametrize("noise", [0.0, 3e-5])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_in_place_gives_the_same(noise: float, orthogonal: bool) -> None:
    chosen = PostProcess(noise=noise, orthogonal=orthogonal)
    for layer, weight in [*small_stream(), (LAYER, torch.randn(300, 70)), (LAYER, torch.randn(5, 1))]:
        for variant in in_place_variants(weight):
            expected = postprocess_tensor(variant, layer, chosen)
            assert expected.data_ptr() != variant.data_ptr()
            pointer, strides = variant.data_ptr(), variant.stride()
            assert postprocess_tensor(variant, layer, chosen, in_place=True) is variant
            assert (variant.data_ptr(), variant.stride()) == (pointer, strides)
            assert torch.equal(variant, expected)


@pytest.mark.usefixtures("two_threads")
def test_in_place_results_do_not_depend_on_threads_or_order() -> None:
    expected = dict(postprocessed(small_stream()))
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for stream, count in ((small_stream(), None), (small_stream()[::-1], 3), (small_stream(), 1)):
            given = dict(stream)
            results = postprocessed(stream, count=count, in_place=True)
            assert [layer for layer, _ in results] == [layer for layer, _ in stream]
            assert all(weight is given[layer] and torch.equal(weight, expected[layer]) for layer, weight in results)


@pytest.mark.parametrize("noise", [0.0, 3e-5])
def test_in_place_leaves_weights_that_are_not_finite(noise: float) -> None:
    for shape in ((300, 100), (100, 300)):
        weight = tiled(*shape)
        weight[70, 3] = float("nan")
        before = weight.clone()
        with pytest.raises(InitError, match=r"stem\.weight.*NaN"):
            postprocessed([(LAYER, weight)], PostProcess(noise=noise), in_place=True)
        torch.testing.assert_close(weight, before, rtol=0, atol=0, equal_nan=True)


MEASURE = """
import json, os, sys, torch
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_many
from timm_ghn.threads import Workers

def mebibytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

def run(rows, columns, tiled, count):
    layer = WeightLayer(1, "w", "")
    weights = [
        torch.randn(64, 64).repeat(rows // 64, columns // 64) if tiled else torch.randn(rows, columns)
        for _ in range(count)
    ]
    before = mebibytes("VmRSS")
    with Workers(1) as workers:
        for _ in postprocess_many([(layer, weight) for weight in weights], PostProcess(), workers, in_place=True):
            pass
    return mebibytes("VmHWM") - before

for case in json.loads(sys.argv[1]):
    process = os.fork()
    if process == 0:
        run(256, 128, True, 2)
        print(run(*case, 2), flush=True)
        os._exit(0)
    os.waitpid(process, 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_is_left_that_a_fork_could_meet() -> None:
    """A thread that ends during a fork leaves the child with MKL's memory locked."""
    weights = [(WeightLayer(number, "w", ""), torch.randn(64, 64)) for number in range(1, 9)]
    before = set(os.listdir("/proc/self/task"))
    for _ in range(100):
        postprocessed(weights, count=4)
        assert set(os.listdir("/proc/self/task")) <= before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_in_place_memory() -> None:
    """What is allocated beside the weights stays below the bound that copies of the weights would break.

    The allocator and the libraries keep up to 16 MiB on their own, by machine. The bounds leave room for this. The same
    work on copies takes 37, 46, 63 and 39 MiB.
    """
    bounds = {  # as multiples of the weight, which has 16 MiB
        (4096, 1024, True): 2.0,
        (1024, 4096, True): 2.0,
        (512, 8192, False): 3.25,
        (2048, 2048, True): 2.0,
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(list(bounds))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = dict(zip(bounds, map(float, output.split()), strict=True))
    for (rows, columns, tile), factor in bounds.items():
        assert peaks[rows, columns, tile] <= factor * rows * columns * 4 / 2**20, (rows, columns, peaks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": -1.0}, "noise=-1.0"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"noise": "much"}, "noise='much'"),
        ({"noise": True}, "noise=True"),
        ({"orthogonal": 1}, "orthogonal=1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"correlation": "rows"}, "correlation='rows'.*paper.*ppuda"),
    ],
)
def test_settings_are_validated(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InitError, match=message):
        PostProcess(**arguments)  # type: ignore[arg-type]


# --- layers


class Oddities(nn.Module):
    """Shared modules and parameters, lookup tables, norms of images, attention and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.bags = nn.EmbeddingBag(10, 4)
        self.conv = nn.Conv1d(4, 6, 3)
        self.again = self.conv
        self.norm = nn.LayerNorm((6, 5))
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.tied_to_table = nn.Linear(4, 10)
        self.tied_to_table.weight = self.table.weight
        self.fc = nn.Linear(4, 4)
        self.tied_to_fc = nn.Linear(4, 4)
        self.tied_to_fc.weight = self.fc.weight
        self.head = nn.Linear(4, 3)


def test_layers_of_an_odd_model() -> None:
    assert [layer.parameter for layer in weight_layers(Oddities())] == [
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "fc.weight",
        "head.weight",
    ]


class ChannelNorm(nn.Module):
    """Normalizes over channels, and multiplies with a weight of any shape."""

    def __init__(self, shape: tuple[int, ...], groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], self.groups, -1, *x.shape[2:])
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True) + 1e-5).sqrt()
        weight, bias = (p.view(-1, 1, 1) if self.groups > 1 else p for p in (self.weight, self.bias))
        return y.view(x.shape) * weight + bias


class Filter(nn.Module):
    """A convolution that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std(), padding=1)


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.weight)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.embedding(x.argmax(1).clamp(0, 4), self.weight).permute(0, 3, 1, 2)


def test_the_operation_decides_what_is_a_layer() -> None:
    others = (
        ChannelNorm((1, 8, 1, 1)),
        ChannelNorm((8, 1, 1)),
        ChannelNorm((2, 4), groups=2),
        Scale(8, 16, 16),
        Table(),
    )
    body = [module for other in others for module in (nn.Conv2d(8, 8, 3, padding=1), other)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Filter(), *body, nn.Flatten(), nn.Linear(2048, 5))
    names = ["0.weight", "1.weight", "2.weight", "4.weight", "6.weight", "8.weight", "10.weight", "13.weight"]
    layers = weight_layers(model, input_size=(3, 16, 16))
    assert [layer.parameter for layer in layers] == names
    assert [layer.parameter for layer in layers if layer.is_classifier] == ["13.weight"]
    assert weight_layers(model, trace=capture(model, input_size=(3, 16, 16))) == layers
    before = snapshot(model)
    assert orthogonalize_(model, start_layer=1, input_size=(3, 16, 16)) == tuple(names[:-1])
    report = timm_ghn.init_model(
        model, "ghn-orth", ghn="bundled", fallback="off", start_layer=1, input_size=(3, 16, 16)
    )
    status = {row.name: row.status for row in report.parameters}
    orthogonal = {name for name, found in status.items() if found is Status.PREDICTED_ORTHOGONALIZED}
    assert orthogonal == set(names[:-1])
    kept = {name for name, found in status.items() if found is Status.KEPT}
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in kept)


class Elementwise(nn.Module):
    """Calls a function of its input and of a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lerp": lambda x, w: torch.lerp(x, torch.zeros_like(x), w.sum(1)[:, None, None].expand_as(x)),
    "einsum": lambda x, w: torch.einsum("bhcij,hc->bhcij", x.unflatten(1, (2, 4)), w).flatten(1, 2),
    "maximum": lambda x, w: torch.maximum(x, w.view(8, 1, 1)),
    "where": lambda x, w: torch.where(x > 0, x, w.view(8, 1, 1)),
    "divide": lambda x, w: torch.divide(x, w.view(8, 1, 1)),
    "prelu": lambda x, w: F.prelu(x, w.flatten()),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_weights_of_elementwise_functions_are_no_layers(name: str) -> None:
    scale = Elementwise(ELEMENTWISE[name], *((8, 4) if name == "lerp" else (2, 4)))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), scale, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 5))
    for method in ("ghn-orth", "ghn", "orth"):
        options: dict[str, Any] = {} if method == "orth" else {"ghn": "bundled", "fallback": "off"}
        report = timm_ghn.init_model(model, method, input_size=(3, 4, 4), **options)
        assert report.num_layers == 3
        assert torch.equal(scale.weight, torch.ones_like(scale.weight))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (torch.diag(w.flatten()) @ x.flatten(2)).view_as(x),
        lambda x, w: F.conv2d(x, torch.diag_embed(w.view(8))[..., None, None]),
        lambda x, w: torch.einsum("oc,bchw->bohw", torch.eye(8, device=x.device) * w.view(8, 1), x),
    ],
)
def test_diagonals_are_no_layers(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    scale = Elementwise(function, 2, 4)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), scale, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 5))
    assert orthogonalize_(model, start_layer=1, input_size=(3, 4, 4)) == ("0.weight", "2.weight")
    for method in ("orth", "ghn", "ghn-orth"):
        options: dict[str, Any] = {} if method == "orth" else {"ghn": "bundled", "fallback": "off"}
        assert timm_ghn.init_model(model, method, input_size=(3, 4, 4), **options).num_layers == 3
        assert torch.equal(scale.weight, torch.ones_like(scale.weight))


def test_layers_that_only_their_shapes_tell_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Scale(8, 16, 16), nn.Flatten(), nn.Linear(2048, 5))
    assert len(weight_layers(model)) == 3  # a scale of this size does not fit to images of 224 x 224
    assert "['1.weight'] count as layers, as no forward pass says how they are used" in caplog.text
    assert "input_size=" in caplog.text


def test_shapes_decide_where_no_forward_pass_can_be_recorded() -> None:
    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    model = nn.Sequential(Reader(), nn.Conv2d(3, 8, 1), ChannelNorm((1, 8, 1, 1)), Filter(), nn.Linear(8, 5))
    assert [layer.parameter for layer in weight_layers(model)] == ["1.weight", "3.weight", "4.weight"]


def weight_norm_of_before(layer: nn.Linear) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


PARAMETRIZED: dict[str, tuple[Callable[[nn.Linear], nn.Module], str, str]] = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1", "WeightNorm"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original", "SpectralNorm"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original", "Orthogonal"),
    "old weight_norm": (weight_norm_of_before, "weight_v", "WeightNorm"),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig", "SpectralNorm"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig", "pruning"),
}


@pytest.mark.parametrize("method", ["ghn-orth", "orth"])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_layers_with_a_computed_weight_are_counted_and_kept(name: str, method: str) -> None:
    change, parameter, reason = PARAMETRIZED[name]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Flatten(2), change(nn.Linear(64, 20)), nn.Linear(20, 6), nn.Linear(6, 5)
    )
    model.eval()
    layers = weight_layers(model)
    assert [layer.parameter for layer in layers] == ["0.weight", f"2.{parameter}", "3.weight", "4.weight"]
    assert [layer.is_classifier for layer in layers] == [False, False, False, True]
    images, before = torch.randn(2, 8, 64), snapshot(model)
    expected = model[2](images)
    weights = {key for key in before if key.startswith("2.") and key != "2.bias"}
    report = timm_ghn.init_model(model, method, ghn="bundled", fallback="off", start_layer=1, input_size=(3, 8, 8))
    with torch.no_grad():
        model[2].bias.copy_(before["2.bias"])  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model[2](images), expected)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in weights)
    row = next(row for row in report.parameters if row.name == f"2.{parameter}")
    assert (row.status, row.reason) == (Status.KEPT, f"weight is computed from it by {reason}")
    assert orthogonalize_(model, start_layer=1) == ("0.weight", "3.weight")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_types_are_kept(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype))  # type: ignore[union-attr]
    kind = str(dtype).removeprefix("torch.")
    before = model[1].weight.detach().clone()  # type: ignore[operator, union-attr]
    assert [layer.kept for layer in weight_layers(model)] == ["", f"of type {kind}", ""]
    assert orthogonalize_(model, start_layer=1) == ("0.weight",)
    assert f"1.weight (of type {kind})" in caplog.text
    report = timm_ghn.init_model(model, "orth", start_layer=1)
    assert report.parameters[2].reason == f"of type {kind}"
    assert torch.equal(model[1].weight.detach().view(torch.uint8), before.view(torch.uint8))  # type: ignore[operator, union-attr]
    with pytest.raises(InitError, match=rf"nothing can be orthogonalized: 0\.weight \(of type {kind}\)"):
        orthogonalize_(nn.Sequential(model[1], model[2]))


@pytest.mark.parametrize("form", [str, dict, tuple, nn.Parameter, "argument", "error", None])
def test_get_classifier_of_every_form(form: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.last = nn.Linear(4, 3), nn.Linear(4, 8)

        def get_classifier(self) -> Any:
            forms = {str: "head", dict: {"a": self.head}, tuple: (self.head,), nn.Parameter: self.head.weight}
            return forms.get(form)

    class WithArgument(Model):
        def get_classifier(self, which: str) -> nn.Module:  # type: ignore[override]
            return self.head

    class Fails(Model):
        def get_classifier(self) -> nn.Module:
            raise NotImplementedError

    model = {"argument": WithArgument, "error": Fails}.get(form, Model)()
    expected = {None: [], "argument": ["last.weight"], "error": ["last.weight"]}.get(form, ["head.weight"])
    assert [layer.parameter for layer in weight_layers(model) if layer.is_classifier] == expected


def test_lazy_and_layerless_models() -> None:
    with pytest.raises(InitError, match="one forward pass"):
        weight_layers(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(InitError, match="no convolutional"):
        orthogonalize_(nn.Sequential(nn.BatchNorm2d(3), nn.Embedding(4, 4)))
    assert weight_layers(nn.Linear(3, 4)) == (WeightLayer(1, "weight", "", is_classifier=True),)


@pytest.mark.parametrize(
    ("name", "arguments", "classifiers"),
    [
        ("resnet50", {}, ["fc.weight"]),
        ("convnext_base", {}, ["head.fc.weight"]),
        ("resnet18", {"num_classes": 0}, []),
        ("resnet18", {"features_only": True}, []),
        ("vit_tiny_patch16_224", {"features_only": True}, []),
        ("deit_tiny_distilled_patch16_224", {}, ["head.weight", "head_dist.weight"]),
        ("crossvit_tiny_240", {}, ["head.0.weight", "head.1.weight"]),
        ("samvit_base_patch16", {"num_classes": 0}, []),
    ],
)
def test_classifiers_of_timm_models(name: str, arguments: dict[str, object], classifiers: list[str]) -> None:
    with torch.device("meta"):
        layers = weight_layers(timm.create_model(name, **arguments))
    assert [layer.parameter for layer in layers if layer.is_classifier] == classifiers


def layers_of(name: str) -> tuple[WeightLayer, ...]:
    with torch.device("meta"):
        return weight_layers(timm.create_model(name))


@pytest.mark.parametrize(("name", "count", "start"), [("resnet50", 54, 37), ("convnext_base", 113, 94)])
def test_default_start_layer_is_that_of_the_paper(name: str, count: int, start: int) -> None:
    layers = layers_of(name)
    assert len(layers) == count
    assert resolve_start_layer(layers) == start
    assert resolve_start_layer(layers, 0.69 if name == "resnet50" else 0.83) == start


@pytest.mark.parametrize(
    ("name", "pointwise"),
    [
        ("vit_base_patch16_224", True),
        ("swin_tiny_patch4_window7_224", True),
        ("mixer_b16_224", True),
        ("convnext_base", False),
        ("resnet50", False),
        ("efficientnet_b0", False),
        ("coatnet_0_rw_224", False),
        ("poolformer_s12", False),
    ],
)
def test_networks_of_matrices_are_processed_from_the_first_layer(name: str, pointwise: bool) -> None:
    layers = layers_of(name)
    assert is_pointwise(layers) == pointwise
    assert (resolve_start_layer(layers) == 1) == pointwise
    assert resolve_start_layer(layers, 0.5) in (len(layers) // 2, len(layers) // 2 + 1)


@given(st.integers(1, 2000))
def test_default_start_layer_in_general(count: int) -> None:
    start = default_start_layer(count)
    assert 1 <= start <= count
    assert start <= default_start_layer(count + 1) <= start + 1
    assert count < 2 or start < count


def test_start_layer_by_number_share_and_name() -> None:
    layers = layers_of("resnet50")
    assert resolve_start_layer(layers, 54) == 54
    assert resolve_start_layer(layers, 1.0) == 54
    assert resolve_start_layer(layers, 1e-6) == 1
    assert resolve_start_layer(layers, "layer3.3.conv3") == 37
    assert resolve_start_layer(layers, "layer3.3.conv3.weight") == 37
    assert resolve_start_layer(layers, "layer1") == 2
    assert resolve_start_layer(layers, default=1) == 1
    assert resolve_start_layer(layers, 5, default=1) == 5


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (0, "from 1 to 54"),
        (55, "from 1 to 54"),
        (True, "from 1 to 54"),
        (0.0, "share"),
        (1.5, "share"),
        (float("nan"), "share"),
        ("layer3.33.conv3", "did you mean 'layer3.3.conv3'"),
        ("bn1", "no module of this name"),
        ("zzzz", "the first layer is in 'conv1'"),
    ],
)
def test_wrong_start_layers(start: object, message: str) -> None:
    with pytest.raises(InitError, match=message):
        resolve_start_layer(layers_of("resnet50"), start)  # type: ignore[arg-type]


# --- whole models


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_orthogonalize_changes_the_later_layers_alone() -> None:
    model = starting_model("resnet18")
    model.layer4[1].conv1.weight.requires_grad_(False)  # type: ignore[index, union-attr]
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before = snapshot(model)
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    steps: list[tuple[int, int, str]] = []
    changed = orthogonalize_(model, progress=lambda *step: steps.append(step))
    layers = weight_layers(model)
    assert list(changed) == [layer.parameter for layer in layers[default_start_layer(21) - 1 : -1]]
    assert steps == [(i, len(changed), name) for i, name in enumerate(changed, start=1)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == num_threads
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == pointers[name]
        assert parameter.requires_grad == (name != "layer4.1.conv1.weight")
        assert parameter.grad_fn is None
        if name in changed:
            assert orthogonality_error(parameter) <= 1e-5
        else:
            assert torch.equal(parameter, before[name])


def test_seeds_and_repetition() -> None:
    def result(seed: int, earlier_draws: int) -> dict[str, Tensor]:
        model = Oddities()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(starting_weight(name, tuple(parameter.shape)))
        torch.randn(earlier_draws)
        orthogonalize_(model, start_layer=1, noise=0.1, seed=seed)
        return snapshot(model)

    first, again, other = result(0, 3), result(0, 50), result(1, 3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    assert torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(first["tied_to_fc.weight"], first["fc.weight"])
    assert torch.equal(first["table.weight"], starting_weight("table.weight", (10, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model = starting_model("mobilenet_v2").to(dtype)
    changed = orthogonalize_(model, start_layer="features.16")
    for name in changed:
        weight = model.get_parameter(name)
        assert weight.dtype == dtype
        assert orthogonality_error(weight) <= (1e-5 if dtype == torch.float64 else 2e-2)


def test_nothing_changes_when_something_is_wrong() -> None:
    model = starting_model("resnet18")
    with torch.no_grad():
        model.layer4[1].conv2.weight[3, 1] = float("nan")  # type: ignore[index, union-attr]
    before = snapshot(model)
    with pytest.raises(InitError, match=r"layer4\.1\.conv2\.weight holds NaN or infinity"):
        orthogonalize_(model)
    with pytest.raises(InitError, match="no module of this name"):
        orthogonalize_(model, start_layer="layer9")
    with pytest.raises(InitError, match="noise"):
        orthogonalize_(model, noise=-1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_meta_models_are_refused() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    with pytest.raises(InitError, match=r"meta device.*outside of"):
        orthogonalize_(model)


@pytest.mark.slow
def test_vgg16_from_the_first_layer() -> None:
    """Its first fully-connected layer has 25088 x 4096 weights: 0.4 GB, as has each temporary copy."""
    model = starting_model("vgg16")
    changed = orthogonalize_(model, start_layer=1)
    assert len(changed) == 15
    for name in changed:
        matrix = model.get_parameter(name).detach().flatten(1)
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
        gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
        for part in tall.split(4096):
            gram += part.double().mT @ part.double()
        assert float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) <= 1e-5, name
