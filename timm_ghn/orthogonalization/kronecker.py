"""Orthogonal factor (arXiv 2207.10049, Eq. 2) of a kernel that a GHN put together from one block and signs.

Such a kernel is a Kronecker product `S x B` of signs and the block. The orthogonal factor of a Kronecker product is the
product of its factors' own, `Q_S x Q_B`: of a 768 x 768 kernel, only a block of 256 x 256 has to be factorized.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timm_ghn.orthogonalization.noise import possible_periods
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor

_FIRM = 10.0
"""How much longer than the largest noise a column has to be without the columns before it, for noise to be left out.

That is `beta`, were all channels equal. In kernels of full rank `sigma(r)` is about 0.1, and so is their noise."""

_INDEPENDENT = 0.1
"""Smallest length of what a column of signs has beyond the columns before it."""


def orthogonalize_kronecker_(matrix: Tensor, deviation: float, name: str) -> bool:
    """Replaces a matrix by the orthogonal factor of its sum with noise, in place, if it is signs times a block.

    Args:
        matrix: `(K, D)`, float32 or float64, on the CPU, contiguous.
        deviation: Largest standard deviation of the noise, `beta` of Eq. 1.
        name: What error messages call the matrix.

    Returns:
        Whether that was done. If not, the matrix was not changed: it is no such product, or the noise decides about
        directions.

    Raises:
        InitError: The block holds NaN or infinity.
    """
    if 0 in matrix.shape:
        return False
    height, width = _repeats_after(matrix), _repeats_after(matrix.mT)
    if (height, width) == tuple(matrix.shape):
        return False
    blocks = matrix.view(matrix.shape[0] // height, height, matrix.shape[1] // width, width)
    block = blocks[0, :, 0].contiguous()
    signs = blocks[:, 0, :, 0] / block[0, 0]
    is_wide = matrix.shape[0] < matrix.shape[1]
    parts = [part.mT if is_wide else part for part in (signs, block)]
    if any(part.shape[0] < part.shape[1] for part in parts) or not bool((signs.abs() == 1).all()):
        return False
    factors: list[Tensor] = []
    shortest = 1.0
    for part, least in zip(parts, (_INDEPENDENT, _FIRM * deviation * math.sqrt(max(matrix.shape))), strict=True):
        factors.append(orthogonal_factor(part, name))
        shortest *= float((part * factors[-1]).sum(dim=0).min())
        if shortest <= least:
            return False
    if not all(torch.equal(row, sign[None, :, None] * block[:, None]) for row, sign in zip(blocks, signs, strict=True)):
        return False
    outer, inner = (factor.mT if is_wide else factor for factor in factors)
    torch.mul(outer[:, None, :, None], inner[None, :, None], out=blocks)
    return True


def _repeats_after(matrix: Tensor) -> int:
    """After how many rows a product may repeat its block, of at least 8 columns; all if it is none."""
    return next((row for row in possible_periods(matrix) if len(matrix) % row == 0), len(matrix))
