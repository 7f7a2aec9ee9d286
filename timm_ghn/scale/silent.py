"""Channels that a batch norm silences for another one, which divides by how little they vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm_ghn.scale.steps import Steps
from timm_ghn.trace.operations import Kind, kind_of, row_of, weight_and_bias
from timm_ghn.trace.records import Operation, Value

_NONE = frozenset[int]()


@dataclass(frozen=True, slots=True)
class Path:
    """What stands between batch norms and a value, where no layer mixes the channels.

    Attributes:
        biases: Numbers of the parameters that are the batch norms' biases.
        is_rectified: Whether a function that is flat below some number, as ReLU is, stands between.
    """

    biases: frozenset[int]
    is_rectified: bool = False


def find_silencing(steps: Steps) -> frozenset[int]:
    """Biases, by number of the parameter, of batch norms whose output is rectified and then read by a batch norm.

    Where such a bias is so negative that all training images are rectified to the same number, the second batch norm
    learns a variance of zero. In evaluation it multiplies by 300 (one over the root of its epsilon) what a rare image
    has there. Sums with what no batch norm ends are never silent.
    """

    def step(operation: Operation, _: Value, known: Sequence[Path | None]) -> Path | None:
        if operation.name == "batch_norm":
            bias = weight_and_bias(operation)[1]
            return None if bias is None else Path(steps.learned((bias,)))
        if steps.is_norm(operation) or steps.layer(operation):
            return None
        found = [path for path in known if path is not None]
        if not found or (kind_of(operation) is Kind.SUM and None in known):
            return None
        is_rectified = row_of(operation).is_flat or any(path.is_rectified for path in found)
        return Path(_NONE.union(*(path.biases for path in found)), is_rectified)

    paths = steps.flow.follow(step)
    before = (paths.get(index) for op, sources, _ in steps.flow.steps if op.name == "batch_norm" for index in sources)
    return _NONE.union(*(path.biases for path in before if path is not None and path.is_rectified))
