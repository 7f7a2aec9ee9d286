"""What is known of the values of a trace before a node is made: the analyses, each computed when first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property

from timm_ghn.graph.attention import Match, find_attention, find_matches
from timm_ghn.graph.extents import Extent, find_extents, find_unbiased
from timm_ghn.graph.mixtures import Mixtures, find_mixtures
from timm_ghn.graph.norms import SpelledNorm, find_norms
from timm_ghn.graph.origins import Origins, find_origins
from timm_ghn.graph.squeezes import Gates, Squeezes, find_gates, find_hard_gates, find_squeezes
from timm_ghn.trace.records import Trace


@dataclass(frozen=True)
class Analyses:
    """The analyses of a trace, by number of the value; see the modules of the types.

    Attributes:
        trace: The forward pass.
    """

    trace: Trace

    @cached_property
    def origins(self) -> Origins:
        """What depends on the input, and what all else is made from."""
        return find_origins(self.trace)

    @cached_property
    def extents(self) -> Mapping[int, Extent]:
        """Channels and feature maps."""
        return find_extents(self.origins)

    @cached_property
    def norms(self) -> Mapping[int, SpelledNorm]:
        """Parts of spelled-out norms."""
        return find_norms(self.origins, self.extents)

    @cached_property
    def mixtures(self) -> Mixtures:
        """Kernels that the input mixes."""
        return find_mixtures(self.origins)

    @cached_property
    def squeezes(self) -> Squeezes:
        """Values of one number a channel."""
        return find_squeezes(self.origins, self.extents)

    @cached_property
    def gates(self) -> Gates:
        """Products of values and squeezed ones."""
        return find_gates(self.origins, self.squeezes, self.norms, self.mixtures)

    @cached_property
    def hard_gates(self) -> Set[int]:
        """What ppuda takes for these products."""
        return find_hard_gates(self.origins)

    @cached_property
    def matches(self) -> Mapping[int, Match]:
        """Similarities, and what is weighted by them."""
        return find_matches(self.origins, self.squeezes)

    @cached_property
    def attention(self) -> Set[int]:
        """Where attention ends."""
        return find_attention(self.origins, self.matches)

    @cached_property
    def unbiased(self) -> Set[int]:
        """Products with weights that have no bias yet."""
        return find_unbiased(self.origins)
