"""Tests of timm_ghn.orthogonalization.tiled: the post-processing of kernels that repeat one block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_orthogonalization import assert_triangular, exact_factor, generator, orthogonality_error
from torch import Tensor

from timm_ghn.errors import InitError
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor
from timm_ghn.orthogonalization.noise import add_normal_
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor
from timm_ghn.orthogonalization.tiled import orthogonalize_tiled_

LAYER = WeightLayer(3, "w", "")


def repeated(rows: int, columns: int, side: int, seed: int = 0) -> Tensor:
    """A random block of singular values from 1/2 to 1, repeated as a GHN does."""
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator(seed + n)))[0] for n in (0, 1))
    block = left * torch.linspace(0.5, 1, side) @ right
    return block.repeat(-(-rows // side), -(-columns // side))[:rows, :columns].contiguous()


def try_tiled_(matrix: Tensor, deviation: float = 3e-6, seed: int = 0) -> bool:
    draw_ = partial(add_normal_, deviation=1.0, layer=3, seed=seed, shape=matrix.shape)
    return orthogonalize_tiled_(matrix, deviation, draw_, "w")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 300),
    columns=st.integers(2, 300),
    side=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_orthogonal_with_the_columns_of_the_noisy_matrix(
    rows: int, columns: int, side: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = repeated(rows, columns, side, seed).to(dtype)
    factor = matrix.clone()
    assert try_tiled_(factor, seed=seed) == (side < min(rows, columns))
    if side >= min(rows, columns):
        assert torch.equal(factor, matrix)
        return
    assert orthogonality_error(factor) <= 1e-5
    assert_triangular(matrix, factor, 1e-5)
    noisy = matrix.double() + 3e-6 * torch.randn(matrix.shape, generator=generator(seed), dtype=torch.float64)
    known = (slice(None), slice(side)) if rows >= columns else (slice(side), slice(None))
    torch.testing.assert_close(factor[known].double(), exact_factor(noisy)[known], rtol=0, atol=5e-4)


@pytest.mark.parametrize("deviation", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(26, 12), (12, 26), (12, 12), (11, 9)])
def test_the_distribution_is_that_of_the_noisy_matrix(shape: tuple[int, int], deviation: float) -> None:
    """Also of noise that decides about the last column of the block alone."""
    count = 1000
    matrix = repeated(*shape, side=8)
    tall = matrix if shape[0] >= shape[1] else matrix.mT
    tall[:, 7::8] *= 5 * deviation  # there the noise is about as large
    ours, theirs = torch.zeros(2, *shape), torch.zeros(2, *shape)
    for seed in range(count):
        one = matrix.clone()
        assert try_tiled_(one, deviation, seed)
        other = orthogonal_factor(matrix + deviation * torch.randn(shape, generator=generator(seed)))
        ours += torch.stack([one, one.square()]) / count
        theirs += torch.stack([other, other.square()]) / count
    bound = 6 * (2 / count) ** 0.5  # six standard deviations of a difference of two means
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=bound * max(shape) ** -0.5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=bound * 1.5 / max(shape))


def test_wide_kernels_are_those_of_tall_ones() -> None:
    tall, wide = repeated(300, 200, 64), repeated(300, 200, 64).mT.contiguous()
    assert try_tiled_(tall)
    assert try_tiled_(wide)
    torch.testing.assert_close(tall[:, :64], wide.mT[:, :64], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 40, 60])
def test_noise_decides_what_a_block_of_lower_rank_leaves_open(rank: int) -> None:
    factors = torch.randn(2, 64, rank, generator=generator())
    matrix = (factors[0] @ factors[1].mT).repeat(5, 3)
    one, other = (postprocess_tensor(matrix, LAYER, PostProcess(seed=seed)) for seed in (0, 1))
    assert orthogonality_error(one) <= 1e-5
    assert_triangular(matrix, one, 1e-5)
    torch.testing.assert_close(one[:, :rank], other[:, :rank], rtol=0, atol=5e-3)
    assert float((one[:, rank] - other[:, rank]).abs().max()) > 1e-2


def test_zeros_and_constants() -> None:
    zeros, ones = torch.zeros(20, 10), torch.ones(20, 10)
    assert not try_tiled_(zeros)
    assert not zeros.any()
    assert try_tiled_(ones)
    torch.testing.assert_close(ones[:, 0], torch.full((20,), 20**-0.5))
    assert orthogonality_error(ones) <= 1e-5


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 70, 199])
def test_what_is_not_finite_is_named_and_kept(value: float, column: int) -> None:
    matrix = repeated(300, 200, 100)
    matrix[17::100, column] = value
    before = matrix.clone()
    with pytest.raises(InitError, match="w holds NaN or infinity"):
        postprocess_tensor(matrix, LAYER, PostProcess(), in_place=True)
    torch.testing.assert_close(matrix, before, rtol=0, atol=0, equal_nan=True)


def test_depends_on_seed_layer_and_shape_alone() -> None:
    def run(number: int, seed: int) -> Tensor:
        return postprocess_tensor(repeated(300, 200, 64), WeightLayer(number, "w", ""), PostProcess(seed=seed))

    assert torch.equal(run(3, 0), run(3, 0))
    assert not torch.allclose(run(3, 0)[:, 64:], run(3, 1)[:, 64:])
    assert not torch.allclose(run(3, 0)[:, 64:], run(4, 0)[:, 64:])
    assert torch.equal(run(3, 0)[:, :64], run(4, 1)[:, :64])


def test_kernels_of_three_by_three() -> None:
    """The rows of a tall matrix repeat where channels and positions are counted together."""
    weight = repeated(96, 40, 16).view(96, 40, 1, 1).expand(96, 40, 3, 3) * torch.rand(3, 3, generator=generator())
    result = postprocess_tensor(weight.contiguous(), LAYER, PostProcess())
    assert orthogonality_error(result) <= 1e-5
