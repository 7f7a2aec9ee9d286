"""What the layers before made of a value: its channels, the size of its feature map, and whether they added a bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from timm_ghn.graph.origins import Origins
from timm_ghn.trace.operations import LAYERS, Kind, factors, kind_of, row_of, weight_and_bias
from timm_ghn.trace.records import Operation, Value


@dataclass(frozen=True, slots=True)
class Extent:
    """What the layers before made of a value that depends on the input.

    Attributes:
        channels: Channels that the last layer gave it; None if unknown.
        grid: (h, w) of the last feature map of more than one position; None if there was none.
    """

    channels: int | None = None
    grid: tuple[int, int] | None = None


UNKNOWN = Extent()


def find_extents(origins: Origins) -> Mapping[int, Extent]:
    """Extents by number of the value."""

    def step(operation: Operation, output: Value, known: Sequence[Extent | None]) -> Extent:
        kind, found = kind_of(operation), [extent for extent in known if extent is not None]
        grid = next((extent.grid for extent in found if extent.grid), None)
        if kind in LAYERS:
            shape = output.shape
            if kind is Kind.CONVOLUTION and len(shape) == 4 and max(shape[-2:]) > 1:
                grid = (shape[-2], shape[-1])
            return Extent(_channels(operation, output), grid)
        if kind is Kind.PRODUCT and not is_product_of_data(operation, origins):
            return Extent(output.shape[-1] if output.shape else None, grid)
        if kind is Kind.MULTI_HEAD_ATTENTION:
            return Extent(output.shape[-1], grid)
        channels = {extent.channels for extent in found} - {None}
        return Extent(channels.pop() if len(channels) == 1 else None, grid)

    return origins.flow.follow(step)


def is_product_of_data(operation: Operation, origins: Origins) -> bool:
    """Whether both factors of a matrix product depend on the input, so that it is no layer."""
    return sum(origins.is_data(value) for value in factors(operation)) == 2


def _channels(operation: Operation, output: Value) -> int | None:
    """Channels that a layer gives its output; they stand before the spatial dimensions."""
    rank = row_of(operation).rank
    return output.shape[-rank - 1] if len(output.shape) > rank else None


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
