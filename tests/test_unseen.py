"""How far networks are from what a GHN was trained on: the measures of benchmarks/unseen.py."""

from __future__ import annotations

import math

import pytest
import timm
from ghn_reference import SMALL, seeded_ghn
from test_ghn_model import chain, weight
from unseen import distance, embeddings, rank_correlation, unseen

from timm_ghn.ghn.seen import Seen
from timm_ghn.graph import Node, Op, to_graph


def test_what_was_trained_on_is_near() -> None:
    ghn = seeded_ghn(SMALL)
    known = [to_graph(timm.create_model("test_resnet")), chain(weight((8, 8, 3, 3)))]
    table, places = Seen.of(known), [embeddings(ghn, graph) for graph in known]
    assert sum(len(rows) for rows in places[0].values()) == len(known[0])
    for graph in known:
        assert unseen(graph, table) == 0
        assert distance(ghn, graph, places) == pytest.approx(0, abs=1e-3)
    assert distance(ghn, to_graph(timm.create_model("test_vit")), places) > 0.1
    assert unseen(to_graph(timm.create_model("test_vit")), table) > 0.5
    assert math.isinf(distance(ghn, chain(Node(Op.MSA), Node(Op.MSA), Node(Op.MSA)), places))


@pytest.mark.parametrize(("x", "y", "expected"), [([1, 2, 3], [5, 6, 9], 1), ([1, 2, 3], [9, 6, 5], -1)])
def test_rank_correlation(x: list[float], y: list[float], expected: float) -> None:
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
