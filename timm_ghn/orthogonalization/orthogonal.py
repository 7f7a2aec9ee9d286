"""The orthogonal factor of a weight matrix (arXiv 2207.10049, Eq. 2), faster and more exact than by LAPACK alone.

Shapes: `M x N` is the tall orientation of a matrix (`M >= N`); `W` is the matrix itself, `Z = W T` with a unit upper
triangular `T`, `G = Z^T Z` its Gram matrix. Three facts carry the module:

1. `W = Q R` with a positive diagonal of `R` is unique for full rank, and `W T = Q (R T)` has the same `Q` for every
   upper triangular `T` with a positive diagonal. So columns may be rescaled, and multiples of earlier columns may be
   subtracted from later ones, without changing the answer.
2. A GHN predicts one 64 x 64 block and tiles it. `W` is then `rank 64 + a little noise`, so badly conditioned that
   only Householder reflections can factorize it. The contrasts of its column blocks (block `k` minus the mean of the
   blocks before it) leave the first block and, as all others, nearly independent noise: `Z` is well conditioned. The
   contrasts are differences of almost equal numbers, hence nearly exact in floating point, and the result is closer
   to the exact `Q` of `W` than that of Householder reflections applied to `W`.
3. For a well-conditioned `Z` the Cholesky factor of `G` is `R`, and its diagonal is positive, which is the sign
   convention of Eq. 2. That costs half the operations of Householder QR, all of them matrix products.

All of it happens in the memory of the matrix, by the `out=` variants of torch's functions; the Gram matrix and a few
block columns are all that is allocated.

Every fast result is tested for orthogonality. What fails is refined by a second pass, and what still fails, or is
rank-deficient, goes to Householder QR (`torch.linalg.qr`), which is orthogonal whatever the input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timm_ghn.errors import InitError

BLOCK = 64
"""Channels after which kernels of a GHN-2 repeat: the side of its block."""

_FEW = 64
"""Columns up to which Householder QR is cheap."""

_GRAM_BLOCK = 128
"""Width of the column blocks in which a Gram matrix is computed, to skip what symmetry gives."""

_MIN_ASPECT = 1.5
"""Below this M / N even random matrices are too badly conditioned for Cholesky, and Householder QR is cheap."""

_PROBES = 16
"""Number of random sign vectors that test a result for orthogonality."""


def orthogonal_factor(matrix: Tensor, name: str = "matrix", block: int = BLOCK) -> Tensor:
    """Replaces a matrix by the orthogonal factor of its QR decomposition (Eq. 2).

    The matrix is transposed if it is wide, factorized as `Q R`, and `Q sign(diag R)` is transposed back, with
    `sign(0) = 1`. The scale of the matrix does not matter; a rank-deficient matrix (a zero matrix, exact copies) gets
    the completion that Householder reflections give. The input is not changed.

    Args:
        matrix: `(K, D)` of a floating dtype, on the CPU. The arithmetic is float64 for float64 and else float32.
        name: What error messages call the matrix.
        block: Channels after which the matrix may repeat, up to a small difference.

    Returns:
        `(K, D)` of the dtype of the input, with orthonormal columns (rows if `K < D`): `max |Q^T Q - I| <= 1e-5`
        before rounding to a 16-bit dtype. Contiguous.

    Raises:
        InitError: The matrix is not a floating matrix of two dimensions, or holds NaN or infinity.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        got = f"{matrix.dtype} {tuple(matrix.shape)}"
        raise InitError(f"{name}: expected a floating matrix of two dimensions, got {got}")
    factor = torch.empty(matrix.shape, dtype=wide_dtype(matrix.dtype), device="cpu").copy_(matrix.detach())
    orthogonal_factor_(factor, name, block)
    return factor.to(matrix.dtype)


def orthogonal_factor_(matrix: Tensor, name: str, block: int = BLOCK) -> None:
    """Does what `orthogonal_factor` does, in place and with less memory than the matrix takes twice.

    A wide matrix, whose transpose has contiguous columns, is factorized where it is. A tall one is copied into that
    order and back, which costs less than what matrix products lose in the other one.

    Args:
        matrix: `(K, D)`, float32 or float64, on the CPU, contiguous, without gradients.
        name: What error messages call the matrix.
        block: As of `orthogonal_factor`.

    Raises:
        InitError: The matrix holds NaN or infinity; it is then not changed.
    """
    if matrix.numel() == 0:
        return
    for scale in checked_scales(matrix, name):
        matrix.mul_(scale)
    rows, columns = matrix.shape
    if rows < columns:
        _tall_factor_(matrix.mT, block)
        return
    tall = torch.empty(columns, rows, dtype=matrix.dtype, device="cpu").mT
    tall.mT.copy_(matrix.mT)
    _tall_factor_(tall, block)
    matrix.copy_(tall)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 for float64 and else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_scales(matrix: Tensor, name: str) -> tuple[float, ...]:
    """Returns powers of two that bring the entries of a matrix near 1, and none unless they are huge or tiny.

    There are two, because their product may lie outside of the range of float32.

    Raises:
        InitError: The matrix holds NaN or infinity.
    """
    low, high = (float(bound) for bound in torch.aminmax(matrix))
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise InitError(f"{name}: the weight holds NaN or infinity, so it cannot be orthogonalized")
    exponent = math.frexp(largest)[1]
    half = exponent // 2
    return () if abs(exponent) <= 16 else (2.0**-half, 2.0 ** (half - exponent))


def _tall_factor_(matrix: Tensor, block: int) -> None:
    """Replaces an `M x N` matrix with `M >= N` by its `Q sign(diag R)`; its columns are contiguous."""
    rows, columns = matrix.shape
    if columns > block and _is_periodic(matrix, block):
        _contrasts_(matrix, block)
    if columns > _FEW and rows >= _MIN_ASPECT * columns and _cholesky_factor_(matrix):
        return
    _householder_(matrix)


def _householder_(matrix: Tensor) -> None:
    """Replaces a matrix by its `Q sign(diag R)`, by Householder reflections. These are the steps of `linalg.qr`."""
    scales = matrix.new_empty(matrix.shape[1])
    torch.geqrf(matrix, out=(matrix, scales))
    signs = torch.where(matrix.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    torch.linalg.householder_product(matrix, scales, out=matrix)
    matrix.mul_(signs)


def _is_periodic(matrix: Tensor, block: int) -> bool:
    """Tells whether the second block of columns is the first one up to a small difference."""
    width = min(block, matrix.shape[1] - block)
    first, second = matrix[:, :width], matrix[:, block : block + width]
    return bool((second - first).norm() < 0.1 * first.norm())


def _contrasts_(matrix: Tensor, block: int) -> None:
    """Forms `Z`, in which each block of so many columns but the first has lost the mean of the blocks before it.

    The first block is replaced by its own orthogonal factor, since the tile itself may be badly conditioned; before
    that, it is subtracted from all others, so that the rounding errors of the means are relative to the differences of
    the blocks, not to the blocks.
    """
    first = matrix[:, :block]
    total, spare = torch.zeros_like(first), torch.empty_like(first)
    for index, start in enumerate(range(block, matrix.shape[1], block), start=1):
        columns = matrix[:, start : start + block]
        width = columns.shape[1]
        difference = torch.sub(columns, first[:, :width], out=spare[:, :width])
        torch.add(difference, total[:, :width], alpha=-1 / index, out=columns)
        total[:, :width] += difference
    _householder_(first)


def _cholesky_factor_(matrix: Tensor) -> bool:
    """Replaces a matrix by its `Q` with a positive diagonal of `R`, by one or two rounds of Cholesky QR.

    One round leaves an error of about `eps cond(Z)^2`, two rounds one of `eps` as long as `eps cond(Z)^2 << 1`
    (Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, 2015).

    Returns:
        Whether that was safe. If not, the matrix is `Z` times an upper triangle with a positive diagonal, so that its
        `Q` is still that of `Z`.
    """
    for _ in range(2):
        triangle = _triangle(_gram(matrix))
        if triangle is None:
            return False
        torch.linalg.solve_triangular(triangle, matrix, upper=True, left=False, out=matrix)
        if _is_orthonormal(matrix):
            return True
    return False


def _gram(matrix: Tensor) -> Tensor:
    """Returns the upper triangle of `Z^T Z` (`N x N`), with contiguous columns; what is below its blocks is zero."""
    columns = matrix.shape[1]
    gram = matrix.new_zeros(columns, columns).mT
    for start in range(0, columns, _GRAM_BLOCK):
        stop = min(start + _GRAM_BLOCK, columns)
        torch.mm(matrix[:, start:stop].mT, matrix[:, start:], out=gram[start:stop, start:])
    return gram


def _triangle(gram: Tensor) -> Tensor | None:
    """Returns the upper Cholesky factor, or None for a matrix that is not safely positive definite.

    It is computed for columns of unit norm, so that the scales of the columns do not count as bad conditioning.

    Args:
        gram: Symmetric matrix with contiguous columns, of which the upper triangle is read; its memory is reused.
    """
    diagonal = gram.diagonal()
    limits = torch.finfo(gram.dtype)
    if not bool((diagonal > limits.tiny / limits.eps).all()):
        return None  # a zero column, or one whose square underflows
    scale = diagonal.rsqrt()
    gram.mul_(scale).mul_(scale.unsqueeze(1))
    info = torch.empty((), dtype=torch.int32, device="cpu")
    torch.linalg.cholesky_ex(gram, upper=True, out=(gram, info))
    independent = float(diagonal.min()) ** 2  # the share of a column that earlier ones do not explain
    if int(info) != 0 or not independent > 64 * limits.eps * math.sqrt(gram.shape[0]):
        return None
    return gram.div_(scale)


def _is_orthonormal(factor: Tensor) -> bool:
    """Estimates the norms of the rows of `Q^T Q - I` from a few random sign vectors.

    A row of the error that is concentrated in one entry shows up with its full size in every probe, and one that is
    spread out with its norm on average, so no entry above the tolerance goes unnoticed.
    """
    columns = factor.shape[1]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_PROBES, columns), generator=generator, device="cpu").to(factor.dtype).mul_(2).sub_(1)
    error = ((signs @ factor.mT) @ factor).sub_(signs)
    largest = float(error.square().mean(dim=0).max().sqrt())
    return largest <= torch.finfo(factor.dtype).eps * max(48.0, 1.5 * math.sqrt(columns))
