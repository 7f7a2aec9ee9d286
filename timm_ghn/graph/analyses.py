"""What is known of the values of a trace before a node is made."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from timm_ghn.graph.attention import Match, find_attention, find_matches
from timm_ghn.graph.extents import Extent, find_extents, find_unbiased
from timm_ghn.graph.mixtures import Mixtures, find_mixtures
from timm_ghn.graph.norms import SpelledNorm, find_norms
from timm_ghn.graph.origins import Origins, find_origins
from timm_ghn.graph.squeezes import Gates, Squeezes, find_gates, find_hard_gates, find_squeezes
from timm_ghn.trace.records import Trace


@dataclass(frozen=True, slots=True)
class Analyses:
    """The analyses of a trace, by number of the value; see the modules of the types.

    Attributes:
        trace: The forward pass.
        origins: What depends on the input, and what all else is made from.
        extents: Channels and feature maps.
        norms: Parts of spelled-out norms.
        mixtures: Kernels that the input mixes.
        squeezes: Values of one number a channel.
        gates: Products of values and squeezed ones.
        hard_gates: What ppuda takes for these products.
        matches: Similarities, and what is weighted by them.
        attention: Where attention ends.
        unbiased: Products with weights that have no bias yet.
    """

    trace: Trace
    origins: Origins
    extents: Mapping[int, Extent]
    norms: Mapping[int, SpelledNorm]
    mixtures: Mixtures
    squeezes: Squeezes
    gates: Gates
    hard_gates: Set[int]
    matches: Mapping[int, Match]
    attention: Set[int]
    unbiased: Set[int]


def analyse(trace: Trace) -> Analyses:
    """Look at a trace in all ways."""
    origins = find_origins(trace)
    extents, mixtures = find_extents(origins), find_mixtures(origins)
    norms, squeezes = find_norms(origins, extents), find_squeezes(origins, extents)
    gates, matches = find_gates(origins, squeezes, norms, mixtures), find_matches(origins, squeezes)
    hard_gates, attention, unbiased = find_hard_gates(origins), find_attention(origins, matches), find_unbiased(origins)
    return Analyses(trace, origins, extents, norms, mixtures, squeezes, gates, hard_gates, matches, attention, unbiased)
