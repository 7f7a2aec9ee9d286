"""Where a vector that is added is the bias of the layer before."""

from __future__ import annotations

from collections.abc import Sequence, Set

from timm_ghn.graph.extents import is_product_of_data
from timm_ghn.graph.origins import Origins
from timm_ghn.trace.operations import LAYERS, Kind, kind_of, weight_and_bias
from timm_ghn.trace.records import Operation, Value


def find_unbiased(origins: Origins) -> Set[int]:
    """Numbers of the values that come straight from a product with a weight, or are a part of one, without a bias."""

    def step(operation: Operation, _: Value, known: Sequence[bool | None]) -> bool | None:
        kind = kind_of(operation)
        if kind in LAYERS:
            return weight_and_bias(operation)[1] is None or None
        if kind is Kind.PRODUCT:
            return not is_product_of_data(operation, origins) or None
        return known[0] if len(known) == 1 and kind in (Kind.VIEW, Kind.PART) else None

    return origins.flow.follow(step).keys()
