"""Where values are weighted by similarities, however attention is spelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from timm_ghn.graph.extents import is_product_of_data
from timm_ghn.graph.nodes import Shape
from timm_ghn.graph.origins import Origins
from timm_ghn.graph.squeezes import Squeezes
from timm_ghn.trace.operations import LAYERS, Kind, kind_of
from timm_ghn.trace.records import Operation, Value


@dataclass(frozen=True, slots=True)
class Match:
    """What a value has to do with similarities.

    Attributes:
        similarity: Sizes of the two dimensions of a matrix of similarities; None for other values.
        is_weighted: Whether it is an elementwise product with weights from a softmax, so that its sum is attention.
        product: The last product of two activations (by number of its value) that led to it, if no layer with weights
            came after.
    """

    similarity: tuple[int, int] | None = None
    is_weighted: bool = False
    product: int | None = None


def find_matches(origins: Origins, squeezes: Squeezes) -> Mapping[int, Match]:
    """What values have to do with similarities, by number."""

    def step(operation: Operation, output: Value, known: Sequence[Match | None]) -> Match | None:
        kind, found = kind_of(operation), [match for match in known if match is not None]
        if kind is Kind.PRODUCT and is_product_of_data(operation, origins):
            is_attention = any(match.product is not None or match.similarity for match in found)
            return Match(None if is_attention else _last_sizes(output.shape), product=output.index)
        if kind is Kind.SOFTMAX:
            similarity = next((match.similarity for match in found if match.similarity), _last_sizes(output.shape))
            return _surviving(Match(similarity, product=_last_product(found)), output.shape)
        if not found or kind in (Kind.ATTENTION, Kind.MULTI_HEAD_ATTENTION):
            return None
        if kind in (Kind.TOTAL, Kind.MEAN) and found[0].is_weighted:
            return Match(product=output.index)
        if len(known) == 1 and kind is Kind.VIEW:
            return _surviving(found[0], output.shape)
        similarity = next((match.similarity for match in found if match.similarity), None)
        product = None if kind in LAYERS or kind is Kind.PRODUCT else _last_product(found)
        return _surviving(Match(similarity, _is_weighted(operation, known), product), output.shape)

    def _is_weighted(operation: Operation, known: Sequence[Match | None]) -> bool:
        """Whether one of two factors is a weight from a softmax, and none is a gate."""
        if kind_of(operation) is not Kind.MULTIPLICATION or len(known) != 2:
            return False
        weights = [match is not None and match.similarity is not None for match in known]
        return weights[0] != weights[1] and not any(value.index in squeezes for value in operation.inputs)

    return origins.flow.follow(step)


def find_attention(origins: Origins, matches: Mapping[int, Match]) -> Set[int]:
    """Numbers of the values that attention gives.

    Of consecutive products of activations only the last counts, whatever the order of the factors.
    """
    attention = set[int]()
    for operation, sources, (output, *_) in origins.flow.steps:
        found = [matches[index] for index in sources if index in matches]
        kind = kind_of(operation)
        if kind is Kind.PRODUCT and is_product_of_data(operation, origins):
            earlier = {match.product for match in found if match.product is not None}
            if earlier or any(match.similarity for match in found):
                attention -= earlier
                attention.add(output.index)
        elif kind in (Kind.TOTAL, Kind.MEAN) and found and found[0].is_weighted:
            attention.add(output.index)
    return attention


def _last_sizes(shape: Shape) -> tuple[int, int] | None:
    return (shape[-2], shape[-1]) if len(shape) >= 2 else None


def _last_product(found: Sequence[Match]) -> int | None:
    return max((match.product for match in found if match.product is not None), default=None)


def _surviving(match: Match, shape: Shape) -> Match:
    """A match whose similarity is forgotten unless a tensor of that shape still has both of its sizes."""
    sizes = list(shape)
    for size in match.similarity or ():
        if size not in sizes:
            return replace(match, similarity=None)
        sizes.remove(size)
    return match
