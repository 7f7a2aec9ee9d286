"""Noise and orthogonal factor (arXiv 2207.10049, Eq. 1 and 2) of a kernel that a GHN put together from one block.

Shapes: `M x N` is the tall orientation of a kernel (`M >= N`). Its rows repeat after `p < N` of them, so its rank is at
most `p`, and the noise alone decides about all columns of `Q` behind the first `p`. To find these costs less where the
block is taken out. Let the reflection `H` turn the `c` copies of a row, `(1, ..., 1) / sqrt(c)`, into `(1, 0, ..., 0)`,
and let `P R` be the factorization of the first `p` rows and columns, each row times `sqrt(c)`. Then

    H (kernel + noise) = | P  0 | ( | R  * | + noise )
                         | 0  I |   | 0  0 |

since noise that is rotated is noise. What `*` stands for depends on the columns under `R` and is left out. The first
columns of `R` are so much longer than the noise that their directions are known: `r` of them, nearly `p` for blocks
that are nearly orthogonal. What remains, `M - r` rows and `N - r` columns, is factorized. This takes
`2 (M - r) (N - r)^2` operations, less than half of the `2 M N^2` of the whole kernel where `r` is a third of `N`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from timm_ghn.orthogonalization.noise import row_period
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor, orthogonal_factor_

_FIRM = 100.0
"""How much longer than its noise a column of `R` has to be at its diagonal, for the noise to be left out."""

_UNSURE = 0.25
"""Largest share of the columns of `R` that are shorter."""

_ROWS = 128
"""How many rows are moved at once within the memory of a matrix."""


def orthogonalize_tiled_(matrix: Tensor, deviation: float, add_normal_: Callable[[Tensor], None], name: str) -> bool:
    """Replaces a matrix by the orthogonal factor of its sum with noise, in place, if its rows repeat as said above.

    What remains is factorized in the memory of the matrix.

    Args:
        matrix: `(K, D)`, float32 or float64, on the CPU, finite.
        deviation: Standard deviation of the noise, more than 0.
        add_normal_: Adds standard normal numbers to a contiguous tensor.
        name: What error messages call the matrix.

    Returns:
        Whether that was done. If not, the matrix was not changed: it does not repeat, or the noise decides about much
        of its block.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    rows, columns = tall.shape
    period = row_period(tall)
    if period >= columns:
        return False
    copies = torch.full((period, 1), rows // period, dtype=matrix.dtype, device="cpu")
    copies[: rows % period] += 1
    block = tall[:period, :period] * copies.sqrt()
    rotation = orthogonal_factor(block, name)
    triangle = rotation.mT @ block
    unsure = (triangle.diagonal() < _FIRM * deviation * math.sqrt(rows)).nonzero()
    known = int(unsure[0]) if len(unsure) else period
    if known < (1 - _UNSURE) * period:
        return False
    height, width = (size - known for size in matrix.shape)
    rest = matrix.view(-1)[: height * width].view(height, width).zero_()
    tall_rest = rest if tall is matrix else rest.mT
    tall_rest[: period - known, : period - known] = triangle[known:, known:] / deviation
    add_normal_(rest)
    orthogonal_factor_(rest, name)
    turned = rotation[:, known:] @ tall_rest[: period - known]
    for start in reversed(range(0, height, _ROWS)):  # each row moves behind all that have not moved yet
        matrix[known + start : known + start + _ROWS, known:] = rest[start : start + _ROWS].clone()
    tall[:period, :known] = rotation[:, :known]
    tall[period:, :known] = 0
    tall[:period, known:] = turned
    _spread_(tall, period)
    return True


def _spread_(matrix: Tensor, period: int) -> None:
    """Applies `H`, which makes one row out of the copies of a row, and back."""
    full, rest = divmod(len(matrix), period)
    for start, stop, copies in ((0, rest, full + 1), (rest, period, full)):
        if copies == 1:
            continue
        share = 1 / math.sqrt(copies)
        parts = [matrix[first + start : first + stop] for first in range(0, copies * period, period)]
        along = parts[0] * (1 - share)
        for part in parts[1:]:
            along.sub_(part, alpha=share)
        parts[0].sub_(along)
        for part in parts[1:]:
            part.add_(along, alpha=share / (1 - share))
