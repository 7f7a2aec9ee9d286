"""Noise in proportion to how alike the channels of a weight are (arXiv 2207.10049, Eq. 1).

Shapes: a weight is a matrix `K x D` of `K` channels; `X` (`n x m`) holds the `n` variables that are correlated over `m`
observations, and `Z` its rows, centred and scaled to norm 1, so that `r = Z Z^T`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from timm_ghn.postprocess.orthogonal import TILE, checked_and_scaled

Correlation = Literal["paper", "ppuda"]
"""What Eq. 1 correlates: the `K` channels (the paper), or the `max(K, D)` rows of the tall matrix (ppuda's code)."""

_GRAM_BLOCK = 128
_SMALL = 1 << 18
"""Up to this many entries float64 costs next to nothing."""


def layer_generator(seed: int, layer: int, shape: Sequence[int]) -> torch.Generator:
    """Returns the CPU generator of a layer's noise, which depends on these three values and nothing else.

    Args:
        seed: The user's seed.
        layer: Number of the layer, from 1.
        shape: Shape of its weight.
    """
    key = f"timm-ghn noise seed={seed} layer={layer} shape={tuple(shape)}"
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def add_noise(weight: Tensor, noise: float, layer: int, seed: int, correlation: Correlation, name: str) -> Tensor:
    """Returns `w + N(0, beta sigma(r(w)))` (Eq. 1).

    Args:
        weight: `(K, ...)`, on the CPU.
        noise: `beta`.
        layer: Number of the layer, from 1.
        seed: The user's seed.
        correlation: What is correlated.
        name: What error messages call the weight.

    Returns:
        The shape of the input, in float64 for float64 and else in float32, in which the noise survives.

    Raises:
        InitError: The weight holds NaN or infinity.
    """
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    deviation = noise * correlation_std(weight.reshape(weight.shape[0], -1), correlation, name) if noise > 0 else 0.0
    if deviation == 0:
        return wide
    generator = layer_generator(seed, layer, weight.shape)
    draws = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    return torch.add(wide, draws.to(wide.dtype), alpha=deviation)


def correlation_std(matrix: Tensor, correlation: Correlation = "paper", name: str = "matrix") -> float:
    """Returns `sigma(r)`, the unbiased standard deviation of all `n^2` entries of the Pearson correlation matrix.

    The matrix `r` is never formed: its entries sum to `|sum_i z_i|^2` and their squares to
    `|Z Z^T|_F^2 = |Z^T Z|_F^2`, of which the smaller is computed. Channels that repeat exactly every 64, as predicted
    ones do, are reduced to one copy with its multiplicity.

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
    distinct, counts = _distinct_channels(matrix.detach())
    distinct = checked_and_scaled(distinct, name)
    if distinct.numel() <= _SMALL:
        distinct = distinct.to(torch.float64)
    counts = counts.to(distinct.dtype)
    if transposed:
        standardized = _standardized(distinct.mT, counts)
        total = standardized.sum(dim=0, dtype=torch.float64)
    else:
        standardized = _standardized(distinct, None).mul_(counts.sqrt().unsqueeze(1))
        total = (standardized * counts.sqrt().unsqueeze(1)).sum(dim=0, dtype=torch.float64)
    num_entries = num_variables**2
    if num_entries < 2:
        return 0.0
    sum_of_squares = _gram_norm_squared(standardized)
    sum_of_entries = float(total.square().sum())
    return math.sqrt(max(sum_of_squares - sum_of_entries**2 / num_entries, 0.0) / (num_entries - 1))


def _distinct_channels(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the channels without their exact copies (`k x D`), and how often each occurs (`k`, int64)."""
    channels = matrix.shape[0]
    tiled = channels > TILE and torch.equal(matrix[TILE], matrix[0]) and torch.equal(matrix[TILE:], matrix[:-TILE])
    distinct = min(channels, TILE) if tiled else channels
    return matrix[:distinct], torch.bincount(torch.arange(channels, device="cpu") % distinct, minlength=distinct)


def _standardized(variables: Tensor, counts: Tensor | None) -> Tensor:
    """Returns the rows of `X`, centred and scaled to norm 1; a row that is constant up to rounding becomes 0.

    Args:
        variables: `(n, m)`, float32 or float64.
        counts: `(m,)`, how often each observation counts. Column `j` of the result is then `sqrt(counts[j])` times
            the standardized value, so that products of rows are sums over all observations.
    """
    if counts is None:
        centred = variables - variables.mean(dim=1, keepdim=True)
        before = torch.linalg.vector_norm(variables, dim=1, keepdim=True)
    else:
        root = counts.sqrt()
        centred = (variables - (variables @ counts).unsqueeze(1) / counts.sum()).mul_(root)
        before = torch.linalg.vector_norm(variables * root, dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    constant = norm <= 8 * torch.finfo(norm.dtype).eps * before
    return centred.mul_(torch.where(constant, 0.0, norm.reciprocal()))


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
