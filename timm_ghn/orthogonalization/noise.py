"""Noise in proportion to how alike the channels of a weight are (arXiv 2207.10049, Eq. 1).

Shapes: a weight is a matrix `K x D` of `K` channels; `X` (`n x m`) holds the `n` variables that are correlated over `m`
observations, and `Z` its rows, centred and scaled to norm 1, so that `r = Z Z^T`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_ghn.orthogonalization.orthogonal import checked_scales, wide_dtype
from timm_ghn.seeding import seed_of
from timm_ghn.settings import Correlation

_GRAM_BLOCK = 128
_DRAWN = 1 << 15
"""How many numbers are drawn at once, so that they stay in the cache of a core."""
_SMALL = 1 << 18
"""Up to this many entries float64 costs next to nothing; larger matrices are standardized in parts of that size."""


def standard_normal(count: int, seed: int, layer: int, shape: Sequence[int], expert: int = 0) -> Iterator[Tensor]:
    """Yields the noise of a layer in parts, which depends on these values and nothing else.

    Each number is one of 65,536 values of equal probability, the means of the normal distribution over as many parts
    of equal probability, scaled to variance 1. Their distribution function is nowhere further than 2^-16 from the
    normal one. Sixteen random bits choose a value, almost three times as fast as `torch.randn` computes one, and the
    bits are those that numpy guarantees for its generator SFC64 on every platform.

    Args:
        count: How many numbers.
        seed: The user's seed.
        layer: Number of the layer, from 1.
        shape: Shape of its weight, or of one kernel of a mixture.
        expert: Which kernel of a mixture it is, from 0.

    Yields:
        1-D float32 tensors on the CPU, of `count` numbers in all. Each reuses the memory of the one before.
    """
    key = f"timm-ghn noise seed={seed} layer={layer} shape={tuple(shape)}" + (f" expert={expert}" if expert else "")
    bits = np.random.SFC64(seed_of(key, "big"))
    values = _normal_values()
    drawn = np.empty(min(count, _DRAWN), dtype=np.float32)
    for start in range(0, count, _DRAWN):
        part = drawn[: count - start]
        words = np.asarray(bits.random_raw(-(-len(part) // 4)), dtype="<u8")
        yield torch.from_numpy(values.take(words.view("<u2")[: len(part)], out=part, mode="wrap"))


@functools.cache
def _normal_values() -> NDArray[np.float32]:
    """Returns the means of the standard normal distribution over parts of equal probability, scaled to variance 1."""
    parts = 1 << 16
    bounds = torch.special.ndtri(torch.arange(parts + 1, dtype=torch.float64, device="cpu") / parts)
    means = bounds.square().mul_(-0.5).exp_().diff().neg_()
    result: NDArray[np.float32] = (means / means.square().mean().sqrt()).float().numpy()
    return result


def add_normal_(
    tensor: Tensor, deviation: float, *, layer: int, seed: int, shape: Sequence[int], expert: int = 0
) -> None:
    """Adds the noise of a layer, times its standard deviation, to a contiguous tensor of the CPU.

    Args:
        tensor: float32 or float64, in which small noise survives; of no more entries than the layer.
        deviation: `beta sigma(r)` of Eq. 1.
        layer, seed, shape, expert: As of `standard_normal`.
    """
    entries = tensor.view(-1)
    draws = standard_normal(entries.numel(), seed, layer, shape, expert)
    for part, drawn in zip(torch.split(entries, _DRAWN), draws, strict=True):
        part.add_(drawn, alpha=deviation)


def correlation_std(matrix: Tensor, correlation: Correlation = "paper", name: str = "matrix") -> float:
    """Returns `sigma(r)`, the unbiased standard deviation of all `n^2` entries of the Pearson correlation matrix.

    The matrix `r` is never formed: its entries sum to `|sum_i z_i|^2` and their squares to
    `|Z Z^T|_F^2 = |Z^T Z|_F^2`, of which the smaller is computed. Channels and columns that repeat
    exactly, as predicted ones do, are reduced to one copy with its multiplicity.

    A variable without variance has no correlations; its entries of `r` count as 0, the diagonal one included.

    Args:
        matrix: `(K, D)` of a floating dtype, on the CPU.
        correlation: Whether the variables are the `K` channels ("paper"), or the `max(K, D)` rows after the transpose
            of Eq. 2 ("ppuda").
        name: What error messages call the matrix.

    Returns:
        The standard deviation, 0 for fewer than two entries.

    Raises:
        InitError: The matrix holds NaN or infinity.
    """
    if matrix.numel() == 0:
        return 0.0
    transposed = correlation == "ppuda" and matrix.shape[0] < matrix.shape[1]
    num_variables = matrix.shape[1] if transposed else matrix.shape[0]
    channels, channel_counts = _distinct_rows(matrix.detach())
    columns, column_counts = _distinct_rows(channels.mT)
    scales = checked_scales(channels, name)
    columns = columns.to(torch.float64 if columns.numel() <= _SMALL else wide_dtype(columns.dtype))
    for scale in scales:
        columns = columns * scale
    channel_counts, column_counts = channel_counts.to(columns.dtype), column_counts.to(columns.dtype)
    if transposed:
        standardized, total = _standardized(columns, column_counts, channel_counts)
    else:
        standardized, total = _standardized(columns.mT, channel_counts, column_counts)
    num_entries = num_variables**2
    if num_entries < 2:
        return 0.0
    sum_of_squares = _gram_norm_squared(standardized)
    sum_of_entries = float(total.square().sum())
    return math.sqrt(max(sum_of_squares - sum_of_entries**2 / num_entries, 0.0) / (num_entries - 1))


def row_period(matrix: Tensor) -> int:
    """Returns after how many rows a matrix repeats exactly; the number of its rows if it does not."""
    periods = (period for period in possible_periods(matrix) if torch.equal(matrix[period:], matrix[:-period]))
    return next(periods, len(matrix))


def possible_periods(matrix: Tensor) -> list[int]:
    """Returns which rows behind the first begin as the first one does, by their first 8 columns."""
    beginning = matrix[:, :8]
    found: list[int] = (beginning == beginning[0]).all(dim=1).nonzero()[1:, 0].tolist()
    return found


def _distinct_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows without their exact copies (`k x D`), and how often each occurs (`k`, int64)."""
    period = row_period(matrix)
    numbers = torch.arange(len(matrix), device="cpu") % period
    return matrix[:period], torch.bincount(numbers, minlength=period)


def _standardized(variables: Tensor, occurring: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of `X`, centred and scaled to norm 1, and their sum; a row that is constant becomes 0.

    Both are weighted, so that products of two rows are sums over all observations, and products of two columns are
    sums over all variables. Constant means up to rounding.

    Args:
        variables: `(n, m)`, float32 or float64.
        occurring: `(n,)`, how often each variable counts.
        observed: `(m,)`, how often each observation counts.

    Returns:
        `(n, m)`, entry `i, j` multiplied by the roots of both counts; and `(m,)` in float64, the sum of all variables.
    """
    standardized = torch.empty_like(variables)
    total = torch.zeros(variables.shape[1], dtype=torch.float64, device="cpu")
    length = max(1, _SMALL // max(1, variables.shape[1]))
    for start in range(0, variables.shape[0], length):
        rows = slice(start, start + length)
        part, before = standardized[rows], variables[rows]
        torch.sub(before, (before @ observed).unsqueeze(1) / observed.sum(), out=part).mul_(observed.sqrt())
        before = before * observed.sqrt()
        norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        constant = norm <= 8 * torch.finfo(norm.dtype).eps * torch.linalg.vector_norm(before, dim=1, keepdim=True)
        root = occurring[rows].sqrt().unsqueeze(1)
        part.mul_(torch.where(constant, 0.0, norm.reciprocal())).mul_(root)
        total += (part * root).sum(dim=0, dtype=torch.float64)
    return standardized, total


def _gram_norm_squared(standardized: Tensor) -> float:
    """Returns `|Z Z^T|_F^2 = |Z^T Z|_F^2` from the upper blocks of the smaller of the two."""
    tall = standardized if standardized.shape[0] >= standardized.shape[1] else standardized.mT
    total = 0.0
    for start in range(0, tall.shape[1], _GRAM_BLOCK):
        block = tall[:, start : start + _GRAM_BLOCK].mT @ tall[:, start:]
        diagonal = block[:, : block.shape[0]]
        total += 2 * float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        total -= float(torch.linalg.vector_norm(diagonal, dtype=torch.float64)) ** 2
    return total
