"""What the scale rule needs to know of a network's structure, put together from the analyses of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from timm_ghn.graph.analyses import Analyses
from timm_ghn.scale.batch_norms import Depth, find_depths, find_last_batch_norms, find_overflowing
from timm_ghn.scale.branches import Scale, Start, find_scales
from timm_ghn.scale.chains import Chain, find_chains
from timm_ghn.scale.products import Factors, find_products, find_weights
from timm_ghn.scale.rule import MAX_CHAIN, Structure
from timm_ghn.scale.steps import Steps
from timm_ghn.scale.streams import Streams, find_streams
from timm_ghn.trace.records import Trace

_T = TypeVar("_T")


def _unknown(_: str) -> float | None:
    return None


def find_structure(trace: Trace, start: Start = _unknown, *, analyses: Analyses | None = None) -> Structure:
    """Read residual streams, products of activations and chains without norms from a recorded forward pass.

    Args:
        trace: The forward pass.
        start: Starting values of the parameters that are kept. Learned scales of unknown size count as small.
        analyses: Those of the trace, where they exist already.
    """
    steps = Steps(analyses or Analyses(trace))
    streams = find_streams(steps)
    scales, chains, depths = find_scales(steps, streams, start), find_chains(steps), find_depths(steps, streams)
    factors = Factors(chains, depths, scales, find_weights(steps, streams))
    return Structure(
        branches=_by_name(trace, _branches(steps, streams, scales, depths)),
        products=_by_name(trace, _products(steps, streams, factors)),
        chains=_by_name(trace, _lengths(steps, chains)),
        chained=_names(trace, _chained(steps, chains)),
        standardized=_names(trace, steps.standardized),
    )


def _by_name(trace: Trace, found: Mapping[int, _T]) -> dict[str, _T]:
    return {name: number for index, number in found.items() for name in trace.parameters[index]}


def _names(trace: Trace, parameters: Iterable[int]) -> frozenset[str]:
    return frozenset(name for index in parameters for name in trace.parameters[index])


def _branches(
    steps: Steps, streams: Streams, scales: Mapping[int, Scale], depths: Mapping[int, Depth]
) -> dict[int, float]:
    """The number of sums that what ends a branch passes, times its gain."""
    overflowing = find_overflowing(steps, streams, depths)
    norms = find_last_batch_norms(steps, streams, scales, depths) if overflowing else {}
    of_norm = {output.index: steps.learned(op.inputs) for op, _, (output, *_) in steps.flow.steps} if norms else {}
    found: dict[int, float] = {}
    for _, sources, (output, *_) in steps.flow.steps:
        total = streams.sums.get(output.index)
        if total is None:
            continue
        scale, norm = scales[total.branch], norms.get(total.branch)
        ends = scale.layers or frozenset()
        trunk = streams.places[sources[total.trunk]]
        if norm is not None and total.stream in overflowing and not trunk.ancestors >> norm & 1:
            ends |= of_norm[norm]
        for index in ends:
            found[index] = max(found.get(index, 0), streams.lengths[total.stream] * scale.gain)
    return found


def _products(steps: Steps, streams: Streams, factors: Factors) -> dict[int, float]:
    """The largest number of products that are added up behind a layer."""
    products = find_products(steps, streams, factors)
    found: dict[int, float] = {}
    for total in streams.sums.values():
        for product in products.get(total.branch, ()):
            for index in product.layers:
                found[index] = max(found.get(index, 1.0), product.divisor)
    return found


def _lengths(steps: Steps, chains: Mapping[int, Chain]) -> dict[int, int]:
    """The number of layers on the longest chain that ends in a layer."""
    found: dict[int, int] = {}
    for operation, _, (output, *_) in steps.flow.steps:
        for index in steps.layer(operation):
            found[index] = max(found.get(index, 0), chains[output.index].length)
    return found


def _chained(steps: Steps, chains: Mapping[int, Chain]) -> frozenset[int]:
    """The parameters of layers on chains of more than `MAX_CHAIN`."""
    layers = (chains[output.index] for operation, _, (output, *_) in steps.flow.steps if steps.layer(operation))
    return frozenset(index for chain in layers if chain.length > MAX_CHAIN for index in chain.layers)
