"""The analyses of the scale rule, each on a trace of a few operations."""

from __future__ import annotations

import math

import pytest
from traces import TraceBuilder

from timm_ghn.graph.analyses import analyse
from timm_ghn.scale.batch_norms import Growth, find_growth, find_last_batch_norms, find_overflowing
from timm_ghn.scale.branches import Scale, find_scales
from timm_ghn.scale.products import Product, Weights, find_products, find_weights
from timm_ghn.scale.silent import find_silencing
from timm_ghn.scale.steps import Chain, Steps, find_chains
from timm_ghn.scale.streams import ResidualSum, find_streams
from timm_ghn.trace.records import Value


@pytest.fixture
def t() -> TraceBuilder:
    return TraceBuilder()


def linear(t: TraceBuilder, x: Value, name: str) -> Value:
    return t.call("linear", x, t.parameter(name, 4, 4))


def number(t: TraceBuilder, name: str) -> int:
    return next(index for index, names in t.trace().parameters.items() if names == (name,))


def steps(t: TraceBuilder) -> Steps:
    return Steps(analyse(t.trace()))


# Streams


def test_a_stream_runs_from_sum_to_sum(t: TraceBuilder) -> None:
    x = linear(t, t.input(2, 4), "stem")
    first = linear(t, x, "a")
    y = t.call("add", x, first)
    second = linear(t, t.call("relu", y), "b")
    z = t.call("add", second, t.call("relu", y))
    other = t.call("add", linear(t, z, "c"), linear(t, z, "d"))
    found = find_streams(steps(t))
    assert found.sums == {y.index: ResidualSum(y.index, 0, first.index), z.index: ResidualSum(y.index, 1, second.index)}
    assert found.lengths == {y.index: 2}
    assert found.places[other.index].stream is None


# Branches


@pytest.mark.parametrize("start", [None, 0.5, 2.0])
def test_learned_scales_count_as_large_as_they_start(t: TraceBuilder, start: float | None) -> None:
    x = linear(t, t.input(2, 4), "w")
    scaled = t.call("mul", x, t.call("view", t.parameter("gamma", 4), shape=(1, 4)))
    normed = t.call("layer_norm", scaled, (4,))
    known = steps(t)
    scales = find_scales(known, find_streams(known), lambda _: start)
    layer = frozenset({number(t, "w")})
    assert scales[x.index] == Scale(layer)
    assert scales[scaled.index] == (Scale(None) if start is None else Scale(layer, start))
    assert scales[normed.index] == Scale(None)


# Chains


def test_chains_count_layers_up_to_a_norm(t: TraceBuilder) -> None:
    x = linear(t, linear(t, t.input(2, 4), "a"), "b")
    y = t.call("add", x, t.call("relu", x))
    normed = t.call("batch_norm", y, None, None, t.parameter("gain", 4))
    z = linear(t, normed, "c")
    chains = find_chains(steps(t))
    assert chains[y.index] == Chain(2, frozenset({number(t, "a"), number(t, "b")}))
    assert chains[normed.index] == Chain()
    assert chains[z.index] == Chain(1, frozenset({number(t, "c")}))


# Products


def products(t: TraceBuilder, value: Value) -> frozenset[Product]:
    known = steps(t)
    streams = find_streams(known)
    scales = find_scales(known, streams, lambda _: None)
    found = find_products(known, streams, scales, find_chains(known), find_growth(known, streams))
    return found.get(value.index, frozenset())


def test_products_of_two_layers_and_squares_of_one(t: TraceBuilder) -> None:
    x = t.input(2, 4)
    a, b = linear(t, x, "a"), linear(t, x, "b")
    both = frozenset({number(t, "a"), number(t, "b")})
    assert products(t, t.call("mul", a, b)) == {Product(both)}
    assert products(t, t.call("square", a)) == {Product(frozenset({number(t, "a")}))}
    assert products(t, t.call("mul", a, t.call("sigmoid", b))) == frozenset()
    assert products(t, t.call("layer_norm", t.call("mul", a, b), (4,))) == frozenset()


def test_a_matrix_product_adds_up_as_many_products_as_it_is_long(t: TraceBuilder) -> None:
    x = t.input(4, 4)
    query, key = linear(t, linear(t, x, "a"), "query"), linear(t, x, "key")
    counted = Product(frozenset({number(t, "query")}), 4)
    assert counted in products(t, t.call("matmul", query, key))
    assert products(t, t.call("matmul", t.call("softmax", query, -1), key)) == frozenset()
    shared = Product(frozenset({number(t, "key")}), math.sqrt(4))
    assert shared in products(t, t.call("matmul", key, key))


def test_what_weights_a_mean(t: TraceBuilder) -> None:
    x = linear(t, t.input(4, 4), "w")
    weights = t.call("softmax", x, -1)
    mixed, applied = linear(t, weights, "heads"), t.call("mul", weights, x)
    behind = linear(t, applied, "after")
    known = steps(t)
    found = find_weights(known, find_streams(known))
    assert (found[weights.index], found[mixed.index], found[applied.index]) == (
        Weights.PURE, Weights.PURE, Weights.APPLIED,
    )  # fmt: skip
    assert behind.index not in found


# Batch norms


def test_growth_and_the_last_batch_norm(t: TraceBuilder) -> None:
    x = linear(t, t.input(4, 4), "w")
    norm = t.call("batch_norm", x, None, None, t.parameter("gain", 4))
    cube = t.call("mul", t.call("mul", norm, norm), norm)
    branch = t.call("batch_norm", linear(t, cube, "v"), None, None, t.parameter("last", 4))
    total = t.call("add", norm, branch)
    normed = t.call("layer_norm", total, (4,))
    known = steps(t)
    streams = find_streams(known)
    growths, scales = find_growth(known, streams), find_scales(known, streams, lambda _: None)
    assert growths[x.index] == Growth(1, 1, layers=1)
    assert growths[branch.index] == Growth(3, 3, layers=2)
    assert growths[total.index] == Growth(3, 1, layers=2, streams=frozenset({total.index}))
    assert growths[normed.index] == Growth(0, 0)
    assert find_overflowing(known, streams, growths) == {total.index}
    last = find_last_batch_norms(known, streams, scales, growths)
    assert (last[branch.index], last[total.index]) == (branch.index, norm.index)
    assert cube.index not in last


# Silent channels


def test_what_a_batch_norm_silences_for_another_one(t: TraceBuilder) -> None:
    def normed(x: Value, name: str) -> Value:
        return t.call("batch_norm", x, None, None, t.parameter(f"{name}.w", 4), t.parameter(f"{name}.b", 4))

    x = linear(t, t.input(2, 4), "stem")
    branches = t.call("add", normed(x, "one"), normed(x, "two"))
    joined = t.call("concat", branches, normed(x, "three"))
    rectified = t.call("relu", joined)
    again = normed(rectified, "reads all three")
    smooth = normed(t.call("gelu", again), "reads no rectified one")
    mixed = normed(linear(t, t.call("relu", smooth), "mixes channels"), "reads a layer")
    stream = t.call("relu", t.call("add", mixed, linear(t, x, "varies")))
    normed(stream, "reads a sum that varies")
    assert find_silencing(steps(t)) == {number(t, f"{name}.b") for name in ("one", "two", "three")}
