"""The analyses of a graph, each on a trace of a few operations."""

from __future__ import annotations

import pytest
from traces import TraceBuilder

from timm_ghn.graph.analyses import analyse
from timm_ghn.graph.extents import Extent
from timm_ghn.graph.nodes import Op
from timm_ghn.graph.norms import SpelledNorm, Stage
from timm_ghn.graph.origins import LOOKED_UP, OVER_CONSTANTS, Origin
from timm_ghn.trace.records import Value


@pytest.fixture
def t() -> TraceBuilder:
    return TraceBuilder()


def conv(t: TraceBuilder, x: Value, channels: int, name: str = "w", bias: Value | None = None) -> Value:
    """A convolution that keeps the size of the map."""
    return t.call("conv2d", x, t.parameter(name, channels, x.shape[1], 3, 3), bias, shape=(1, channels, *x.shape[2:]))


# Origins


def test_what_depends_on_the_input_and_what_all_else_is_made_from(t: TraceBuilder) -> None:
    x, w, v, constant = t.input(2, 4), t.parameter("w", 4, 8), t.parameter("v", 8), t.value(3, 4)
    turned, scaled = t.call("t", w, shape=(8, 4)), t.call("mul", w, v)
    picked = t.call("index_select", w, 0, constant)
    features = t.call("linear", constant, turned, shape=(3, 8))
    y = t.call("linear", x, turned, shape=(2, 8))
    origins = analyse(t.trace(y)).origins
    assert origins.data == {x.index, y.index}
    assert origins.of(turned) == Origin((w.index,), is_transposed=True)
    assert origins.of(scaled) == Origin((w.index, v.index))
    assert origins.of(picked).obstacle == LOOKED_UP
    assert origins.of(features).obstacle == OVER_CONSTANTS
    assert origins.of(constant) == origins.of(y) == Origin()


def test_a_layer_over_learned_tokens_makes_data(t: TraceBuilder) -> None:
    queries = t.call("linear", t.parameter("token", 1, 4), t.parameter("w", 4, 4))
    assert analyse(t.trace(queries)).origins.is_data(queries)


# Extents


def test_channels_and_maps_of_the_layer_before(t: TraceBuilder) -> None:
    features = conv(t, t.input(1, 3, 8, 8), 16)
    tokens = t.call("flatten", features, 2, shape=(1, 16, 64))
    pooled = t.call("mean", tokens, -1, shape=(1, 16))
    hidden = t.call("linear", pooled, t.parameter("fc", 5, 16), shape=(1, 5))
    extents = analyse(t.trace(hidden)).extents
    assert extents[tokens.index] == Extent(16, (8, 8))
    assert extents[hidden.index] == Extent(5, (8, 8))


# Norms


@pytest.mark.parametrize(("dims", "op"), [((2, 3), Op.BN), ((1,), Op.LN)])
def test_the_stages_of_a_spelled_norm(t: TraceBuilder, dims: tuple[int, ...], op: Op) -> None:
    x = conv(t, t.input(1, 3, 8, 8), 16)
    shape = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
    square = t.call("mean", t.call("square", x), dims, shape=shape)
    inverse = t.call("rsqrt", t.call("add", square, 1e-6))
    normalized = t.call("mul", x, inverse)
    scaled = t.call("mul", normalized, t.parameter("gain", 16))
    shifted = t.call("add", scaled, t.parameter("shift", 16))
    norms = analyse(t.trace(shifted)).norms
    assert norms[square.index] == SpelledNorm(Stage.STATISTIC, op)
    assert norms[inverse.index] == SpelledNorm(Stage.INVERSE, op)
    assert norms[normalized.index] == SpelledNorm(Stage.NORMALIZED, op)
    assert norms[scaled.index] == SpelledNorm(Stage.SCALED, op, scaled.index)
    assert shifted.index not in norms


def test_a_product_with_a_statistic_is_no_norm(t: TraceBuilder) -> None:
    x = conv(t, t.input(1, 3, 8, 8), 16)
    gated = t.call("mul", x, t.call("mean", x, (2, 3), shape=(1, 16, 1, 1)))
    assert gated.index not in analyse(t.trace(gated)).norms


# Squeezes and gates


def test_a_gate_uses_its_squeeze_and_a_pooling_does_not(t: TraceBuilder) -> None:
    x = conv(t, t.input(1, 3, 8, 8), 16)
    squeezed = t.call("mean", x, (2, 3), shape=(1, 16, 1, 1))
    gate = t.call("sigmoid", conv(t, squeezed, 16, "up"))
    gated = t.call("mul", x, gate)
    pooled = t.call("mean", gated, (2, 3), shape=(1, 16))
    known = analyse(t.trace(pooled))
    assert known.gates.products == {gated.index}
    assert known.gates.squeezes == {squeezed.index}
    assert known.squeezes[gate.index] == {squeezed.index}
    assert known.squeezes[pooled.index] == {pooled.index}


@pytest.mark.parametrize(("between", "found"), [(0, False), (1, True), (2, False)])
def test_ppuda_finds_gates_one_operation_behind_a_hard_sigmoid(t: TraceBuilder, between: int, found: bool) -> None:
    x = conv(t, t.input(1, 3, 8, 8), 16)
    gate = t.call("hardsigmoid", x)
    for _ in range(between):
        gate = t.call("view", gate)
    gated = t.call("mul", x, gate)
    assert (gated.index in analyse(t.trace(gated)).hard_gates) is found


# Attention


def test_of_consecutive_products_the_last_is_the_attention(t: TraceBuilder) -> None:
    q, k, v = (t.call("linear", t.input(5, 4), t.parameter(name, 4, 4)) for name in "qkv")
    similar = t.call("matmul", q, t.call("mT", k, shape=(4, 5)), shape=(5, 5))
    weights = t.call("softmax", similar, -1)
    values = t.call("matmul", weights, v, shape=(5, 4))
    known = analyse(t.trace(values))
    assert known.attention == {values.index}
    assert known.matches[weights.index].similarity == (5, 5)
    linear = t.call("matmul", q, t.call("matmul", t.call("mT", k, shape=(4, 5)), v, shape=(4, 4)), shape=(5, 4))
    assert analyse(t.trace(linear)).attention == {values.index, linear.index}


def test_a_weighted_sum_is_attention(t: TraceBuilder) -> None:
    x = t.call("linear", t.input(5, 4), t.parameter("w", 4, 4))
    weighted = t.call("mul", t.call("softmax", x, -2), t.call("relu", x))
    total = t.call("sum", weighted, -2, shape=(1, 4))
    known = analyse(t.trace(total))
    assert known.matches[weighted.index].is_weighted
    assert known.attention == {total.index}


# Biases and mixtures


def test_a_vector_behind_a_product_with_a_weight_is_its_bias(t: TraceBuilder) -> None:
    x, w, b = t.input(2, 4), t.parameter("w", 4, 8), t.parameter("b", 8)
    bare = t.call("matmul", x, w, shape=(2, 8))
    part = t.call("chunk", bare, 2, shape=(2, 4))
    full = t.call("linear", x, t.call("t", w, shape=(8, 4)), b, shape=(2, 8))
    bent = t.call("relu", bare)
    unbiased = analyse(t.trace(full)).unbiased
    assert {bare.index, part.index} <= unbiased
    assert not {full.index, bent.index} & unbiased


def test_a_kernel_that_the_input_mixes_comes_from_its_experts(t: TraceBuilder) -> None:
    x, experts = t.input(1, 3, 8, 8), t.parameter("experts", 4, 216)
    squeezed = t.call("mean", conv(t, x, 3, "stem"), (2, 3), shape=(1, 3))
    routing = t.call("sigmoid", t.call("linear", squeezed, t.parameter("fc", 4, 3), shape=(1, 4)))
    mixed = t.call("matmul", routing, experts, shape=(1, 216))
    kernel = t.call("view", mixed, shape=(8, 3, 3, 3))
    y = t.call("conv2d", x, kernel, shape=(1, 8, 6, 6))
    known = analyse(t.trace(y))
    assert known.mixtures.experts == {kernel.index: (experts.index,)}
    assert known.mixtures.mixed == {mixed.index}
    assert squeezed.index in known.gates.squeezes
