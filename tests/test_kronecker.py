"""Tests of timm_ghn.orthogonalization.kronecker: kernels that are signs times a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_orthogonalization import exact_factor, generator, orthogonality_error

from timm_ghn.errors import InitError
from timm_ghn.ghn import layout
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_tensor
from timm_ghn.orthogonalization.kronecker import orthogonalize_kronecker_

LAYER = WeightLayer(3, "w", "")
NOISE = 3e-5


def signed(rows: int, columns: int, height: int, width: int, places: int = 1, seed: int = 0) -> torch.Tensor:
    """Blocks of height x (width * places) with signs, as a GHN puts a kernel of so many places together."""
    block = torch.randn(height, width, places, generator=generator(seed))
    block = torch.linalg.qr(block.flatten(1) if height >= width * places else block.flatten(1).T)[0]
    block = (block if height >= width * places else block.T).reshape(height, width, places)
    kernel = block.repeat(rows, columns, 1) * layout.signs((rows * height, columns * width, places), (height, width))
    return kernel.flatten(1).contiguous()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    places=st.sampled_from([1, 1, 9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_it_is_the_exact_factor_where_that_does_not_depend_on_noise(
    rows: int, columns: int, height: int, width: int, places: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = signed(rows, columns, height, width, places, seed).to(dtype)
    factor = matrix.clone()
    is_wide = matrix.shape[0] < matrix.shape[1]
    outer, inner = (columns, rows), (width * places, height)
    has_full_rank = all(pair[0] >= pair[1] if is_wide else pair[0] <= pair[1] for pair in (outer, inner))
    assert orthogonalize_kronecker_(factor, 0.0, "w") == (has_full_rank and rows * columns > 1)
    if not has_full_rank or rows * columns == 1:
        assert torch.equal(factor, matrix)
        return
    assert orthogonality_error(factor) <= 1e-5
    torch.testing.assert_close(factor.double(), exact_factor(matrix.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 64, 64), (4, 1, 64, 48), (1, 4, 48, 64), (2, 4, 64, 64)])
def test_noise_is_left_out_where_it_decides_about_nothing(shape: tuple[int, int, int, int]) -> None:
    weight = signed(*shape)
    found = postprocess_tensor(weight, LAYER, PostProcess(noise=NOISE))
    expected = exact_factor(weight.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    noisy = weight + NOISE * torch.randn(weight.shape, generator=generator(1))
    torch.testing.assert_close(exact_factor(noisy.double()), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "weight",
    [
        signed(3, 3, 8, 8)[:20],  # no whole number of blocks
        signed(4, 1, 8, 8, 9),  # the rows of three blocks are copies
        signed(3, 3, 8, 8) + torch.eye(24),
        torch.randn(24, 24, generator=generator(0)),
        torch.zeros(24, 24),
        torch.ones(24, 24),
        torch.zeros(0, 24),
    ],
)
def test_others_are_left_to_the_general_factorization(weight: torch.Tensor) -> None:
    before = weight.clone()
    assert not orthogonalize_kronecker_(weight, NOISE, "w")
    assert torch.equal(weight, before)


def test_large_noise_is_not_left_out() -> None:
    weight = signed(3, 3, 8, 8)
    assert not orthogonalize_kronecker_(weight.clone(), 0.1, "w")
    seeds = [postprocess_tensor(weight, LAYER, PostProcess(noise=10.0, seed=seed)) for seed in (0, 1)]
    assert (seeds[0] - seeds[1]).abs().max() > 0.1


def test_infinity_is_refused() -> None:
    weight = signed(2, 2, 8, 8)
    weight[3::8, 3::8] *= float("inf")
    before = weight.clone()
    with pytest.raises(InitError, match="NaN or infinity"):
        postprocess_tensor(weight, LAYER, PostProcess())
    assert torch.equal(weight, before)
