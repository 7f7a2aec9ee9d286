"""A test of differences that are paired by seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of all choices of signs that give a mean at least as far from 0 (exact, two-sided).

    With 5 seeds it cannot be smaller than 0.0625.

    Args:
        differences: One for each seed; at least one.
    """
    observed = abs(sum(differences)) - 1e-12
    choices = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in choices]
    return sum(value >= observed for value in sums) / len(sums)
