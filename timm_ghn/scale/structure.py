"""What the scale rule needs to know of a network's structure, put together from the analyses of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from timm_ghn.graph.analyses import Analyses
from timm_ghn.scale.batch_norms import Growth, find_growth, find_last_batch_norms, find_overflowing
from timm_ghn.scale.branches import Scale, Start, find_scales
from timm_ghn.scale.chains import find_chains
from timm_ghn.scale.products import find_products
from timm_ghn.scale.rule import MAX_CHAIN, Structure
from timm_ghn.scale.steps import Steps
from timm_ghn.scale.streams import Streams, find_streams
from timm_ghn.trace.records import Trace


def find_structure(trace: Trace, start: Start = lambda _: None, *, analyses: Analyses | None = None) -> Structure:
    """Read residual streams, products of activations and chains without norms from a recorded forward pass.

    Args:
        trace: The forward pass.
        start: Starting values of the parameters that are kept. Learned scales of unknown size count as small.
        analyses: Those of the trace, where they exist already.
    """
    steps = Steps(analyses or Analyses(trace))
    streams = find_streams(steps)
    scales, chains, growths = find_scales(steps, streams, start), find_chains(steps), find_growth(steps, streams)
    products = find_products(steps, streams, scales, chains, growths)
    counted = (product for total in streams.sums.values() for product in products.get(total.branch, ()))
    layers = [
        (index, chains[output.index])
        for operation, _, (output, *_) in steps.flow.steps
        for index in steps.layer(operation)
    ]
    long = (chain for _, chain in layers if chain.length > MAX_CHAIN)
    return Structure(
        branches=_largest(trace, _branches(steps, streams, scales, growths)),
        products=_largest(trace, ((index, product.divisor) for product in counted for index in product.layers)),
        chains=_largest(trace, ((index, chain.length) for index, chain in layers)),
        chained=_names(trace, (index for chain in long for index in chain.layers)),
        standardized=_names(trace, steps.standardized),
    )


def _largest(trace: Trace, found: Iterable[tuple[int, float]]) -> dict[str, float]:
    """The largest number that was found for each parameter, by name."""
    largest: dict[str, float] = {}
    for index, number in found:
        for name in trace.parameters[index]:
            largest[name] = max(largest.get(name, 0), number)
    return largest


def _names(trace: Trace, parameters: Iterable[int]) -> frozenset[str]:
    return frozenset(name for index in parameters for name in trace.parameters[index])


def _branches(
    steps: Steps, streams: Streams, scales: Mapping[int, Scale], growths: Mapping[int, Growth]
) -> Iterator[tuple[int, float]]:
    """What ends each branch, by number of the parameter, with the number of sums of the stream times the gain."""
    overflowing = find_overflowing(steps, streams, growths)
    norms = find_last_batch_norms(steps, streams, scales, growths) if overflowing else {}
    of_norm = {output.index: steps.learned(op.inputs) for op, _, (output, *_) in steps.flow.steps} if norms else {}
    for _, sources, (output, *_) in steps.flow.steps:
        total = streams.sums.get(output.index)
        if total is None:
            continue
        scale, norm = scales[total.branch], norms.get(total.branch)
        ends = scale.layers or frozenset()
        is_before_branch = norm is not None and streams.places[sources[total.trunk]].ancestors >> norm & 1
        if norm is not None and total.stream in overflowing and not is_before_branch:
            ends |= of_norm[norm]
        yield from ((index, streams.lengths[total.stream] * scale.gain) for index in ends)
