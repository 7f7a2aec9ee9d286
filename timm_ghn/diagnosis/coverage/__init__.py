"""What works for a model of timm, how well, and how long it takes: one model, or all of them in parallel."""

from __future__ import annotations

from timm_ghn.diagnosis.coverage.examine import Settings, examine, examine_graph, examine_init
from timm_ghn.diagnosis.coverage.records import (
    Activations,
    Coverage,
    Entry,
    Failure,
    GraphFacts,
    InitFacts,
    PeerFacts,
    Share,
    Stage,
    collect,
)
from timm_ghn.diagnosis.coverage.select import UnknownPatternError, module_of, select_names

__all__ = [
    "Activations",
    "Coverage",
    "Entry",
    "Failure",
    "GraphFacts",
    "InitFacts",
    "PeerFacts",
    "Settings",
    "Share",
    "Stage",
    "UnknownPatternError",
    "collect",
    "examine",
    "examine_graph",
    "examine_init",
    "module_of",
    "select_names",
]
