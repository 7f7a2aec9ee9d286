"""The orthogonal factor of a weight matrix (arXiv 2207.10049, Eq. 2), at the speed of matrix products.

Shapes: `M x N` is the tall orientation of a matrix (`M >= N`). Its factorization is `W = Q R` with a positive diagonal
of `R`. Four facts carry the module:

1. `Q` is unique for full rank, and `W T = Q (R T)` has the same `Q` for every upper triangular `T` with a positive
   diagonal. So columns may be rescaled, and multiples of earlier columns may be subtracted from later ones, without
   changing the answer. Every step below is such a `T`, so it may stop anywhere and leave the rest to another method.
2. A GHN predicts one block of kernels and repeats it, every 64 columns for a GHN-2. Such a `W` is of rank 64 but for a
   little noise, and the noise alone decides about all further columns of `Q`. The differences to the first
   block of columns are that noise, nearly exact in floating point because almost equal numbers are subtracted. They
   are nearly independent, and the result is closer to the exact `Q` than Householder reflections applied to `W`.
3. Block Gram-Schmidt: the right half of the columns loses its projection on the orthonormal left half, by two matrix
   products, and each half is treated in the same way, down to panels of 64 columns. That costs `2 M N^2` operations,
   as many as Cholesky QR, and unlike Cholesky QR of the whole matrix it never squares the condition number of more than
   a panel. In a panel, the Cholesky factor of the Gram matrix is `R`.
4. The rounding errors of a projection grow as what remains of a column shrinks. A panel of which little remained is
   therefore projected and factorized once more, after which it is orthogonal to the accuracy of the arithmetic ("twice
   is enough": Giraud, Langou, Rozloznik, The loss of orthogonality in the Gram-Schmidt orthogonalization process,
   2005). In a square matrix of noise those are the last few panels.

Every result is tested for orthogonality, and orthogonalized once more if it fails. A matrix that fails again, or has a
column that depends on others exactly, goes to Householder QR (LAPACK), which is orthogonal whatever the input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from timm_ghn.errors import InitError

_PANEL = 64
"""Columns that are orthogonalized at once by a Cholesky factor."""

_REMAINS = 0.003
"""Share of a column's norm that has to remain without the columns before it in its panel, for a Cholesky factor."""

_AMPLIFIED = 16.0
"""How much larger the squares of rounding errors may be, in relation to those of orthogonal columns, after a pass."""

_PASSES = 3
"""How often a panel is orthogonalized before that is left to Householder reflections; two are enough for noise, and for
a whole matrix."""

_ROWS = 128
"""Rows whose squares are computed at once, to save memory."""

_PROBES = 4
"""Number of random sign vectors that test a result for orthogonality."""


def orthogonal_factor(matrix: Tensor, name: str = "matrix") -> Tensor:
    """Replaces a matrix by the orthogonal factor of its QR decomposition (Eq. 2).

    The matrix is transposed if it is wide, factorized as `Q R`, and `Q sign(diag R)` is transposed back, with
    `sign(0) = 1`. The scale of the matrix does not matter. A column that depends on the columns before it is replaced
    by a unit vector that is orthogonal to all others; for a matrix of zeros or exact copies, that is the one of
    Householder reflections. The input is not changed.

    Args:
        matrix: `(K, D)` of a floating dtype, on the CPU. The arithmetic is float64 for float64 and else float32.
        name: What error messages call the matrix.

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
    orthogonal_factor_(factor, name)
    return factor.to(matrix.dtype)


def orthogonal_factor_(matrix: Tensor, name: str) -> None:
    """Does what `orthogonal_factor` does, in place; less than half of the size of the matrix is allocated.

    The matrix is float32 or float64, on the CPU, contiguous, without gradients. It is not changed if it raises.
    """
    if matrix.numel() == 0:
        return
    for scale in checked_scales(matrix, name):
        matrix.mul_(scale)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    rank = tall.shape[1]
    if rank > _PANEL:
        period = _period(tall)
        for start in range(period, rank, period) if period else ():
            block = tall[:, start : start + period]
            block.sub_(tall[:, : block.shape[1]])
        norms = torch.stack([rows.square().sum(dim=0) for rows in torch.split(tall, _ROWS)]).sum(dim=0)
        if period and not norms[period:].any():
            rank = period  # exact copies: reflections of the first block complete it
        else:
            for _ in range(_PASSES - 1):
                if not _gram_schmidt_(tall, norms, 0, rank):
                    break
                if _is_orthonormal(tall):
                    return
                norms = torch.ones_like(norms)
    _householder_(tall, rank)


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
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InitError(f"{name} holds NaN or infinity, so it was not changed; repair the weights first")
    exponent = math.frexp(max(-low, high))[1]
    half = exponent // 2
    return () if abs(exponent) <= 16 else (2.0**-half, 2.0 ** (half - exponent))


def _period(matrix: Tensor) -> int:
    """Returns the width of the block of columns that a matrix repeats up to a small difference; 0 if there is none."""
    head = matrix[:_PANEL]
    lengths = head.square().sum(dim=0)
    alike = ((head - head[:, :1]).square_().sum(dim=0) <= 0.01 * lengths[0]).nonzero()[1:, 0]
    if len(alike) == 0:
        return 0
    period = int(alike[0])
    distances = (head[:, period:] - head[:, :-period]).square_().sum(dim=0)
    return period if bool((distances <= 0.01 * lengths[:-period]).all()) else 0


def _gram_schmidt_(matrix: Tensor, norms: Tensor, start: int, stop: int) -> bool:
    """Orthogonalizes columns that have lost their projections on the orthonormal columns before them.

    Args:
        matrix: The whole matrix, `M x N`.
        norms: The squared norms that its columns had at first.
        start: The first of the columns, a multiple of the width of a panel.
        stop: The column behind the last.

    Returns:
        Whether that was possible. If not, the whole matrix still has its `Q`.
    """
    if stop - start <= _PANEL:
        return _orthogonalize_panel_(matrix[:, :start], matrix[:, start:stop], norms[start:stop])
    middle = start + -(-(stop - start) // (2 * _PANEL)) * _PANEL
    if not _gram_schmidt_(matrix, norms, start, middle):
        return False
    _project_(matrix[:, start:middle], matrix[:, middle:stop])
    return _gram_schmidt_(matrix, norms, middle, stop)


def _project_(basis: Tensor, columns: Tensor) -> None:
    """Subtracts from columns their projections on orthonormal columns."""
    columns.addmm_(basis, basis.mT @ columns, alpha=-1)


def _orthogonalize_panel_(before: Tensor, panel: Tensor, norms: Tensor) -> bool:
    """Orthogonalizes a panel, and makes sure that it is orthogonal to the columns before it; see `_gram_schmidt_`.

    A column of the result is a sum of columns of the panel, with the entries of `R^-1` as weights. Each of those has a
    rounding error in proportion to the norm that it had at first, which gives the error of the sum.
    """
    for _ in range(_PASSES):
        gram = panel.mT @ panel
        triangle, info = torch.linalg.cholesky_ex(gram, upper=True)
        if int(info) == 0 and bool((triangle.diagonal() > _REMAINS * gram.diagonal().sqrt()).all()):
            identity = torch.eye(len(gram), dtype=gram.dtype, device="cpu")
            inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
            panel.copy_(torch.mm(panel, inverse, out=torch.empty_like(panel)))
            if float((norms @ inverse.square()).max()) <= _AMPLIFIED:
                return True
        else:
            _householder_(panel, panel.shape[1])
        _project_(before, panel)
        norms = torch.ones_like(norms)
    return False


def _householder_(matrix: Tensor, rank: int) -> None:
    """Replaces a matrix by its `Q sign(diag R)`, by Householder reflections of its first `rank` columns.

    The reflections of further columns, which depend on those, are left out. These are the steps of `linalg.qr`.
    """
    columns = matrix[:, :rank]
    scales = matrix.new_empty(rank)
    torch.geqrf(columns, out=(columns, scales))
    signs = torch.where(columns.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    torch.linalg.householder_product(matrix, scales, out=matrix)
    columns.mul_(signs)


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
