"""Orthogonal factor (arXiv 2207.10049, Eq. 2) of a kernel that a GHN put together from one block and signs.

Such a kernel is a Kronecker product `S x B` of signs and the block. The orthogonal factor of a Kronecker product is the
product of its factors' own, `Q_S x Q_B`: of a 768 x 768 kernel, only a block of 256 x 256 has to be factorized.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
        InitError: The matrix holds infinity.
    """
    found = _signs_and_block(matrix)
    if found is None:
        return False
    is_wide = matrix.shape[0] < matrix.shape[1]
    parts = [part.mT if is_wide else part for part in found]
    if any(part.shape[0] < part.shape[1] for part in parts):
        return False
    factors = [orthogonal_factor(part, name) for part in parts]
    signs, block = (float((part * factor).sum(dim=0).min()) for part, factor in zip(parts, factors, strict=True))
    if signs < _INDEPENDENT or signs * block <= _FIRM * deviation * math.sqrt(max(matrix.shape)):
        return False
    outer, inner = (factor.mT if is_wide else factor for factor in factors)
    blocks = matrix.view(outer.shape[0], inner.shape[0], outer.shape[1], inner.shape[1])
    torch.mul(outer[:, None, :, None], inner[None, :, None], out=blocks)
    return True


def _signs_and_block(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors of a Kronecker product of signs, of which the first row and column are 1, and a block."""
    if 0 in matrix.shape:
        return None
    height, width = _repeats_after(matrix), _repeats_after(matrix.mT)
    if (height, width) == tuple(matrix.shape):
        return None
    blocks = matrix.view(matrix.shape[0] // height, height, matrix.shape[1] // width, width)
    block = blocks[0, :, 0]
    signs = blocks[:, 0, :, 0] / block[0, 0]
    is_product = bool((signs.abs() == 1).all()) and all(
        torch.equal(row, sign[None, :, None] * block[:, None]) for row, sign in zip(blocks, signs, strict=True)
    )
    return (signs, block.contiguous()) if is_product else None


def _repeats_after(matrix: Tensor) -> int:
    """After how many rows a product may repeat its block, of at least 8 columns; all if it is none."""
    beginning = matrix[:, :8]
    again = (beginning == beginning[0]).all(dim=1).nonzero()[1:, 0].tolist()
    return next((int(row) for row in again if len(matrix) % row == 0), len(matrix))
