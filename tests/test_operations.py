"""The table of operations, and the walk over a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from traces import TraceBuilder

from timm_ghn.trace.operations import (
    TABLE,
    Flow,
    Kind,
    exponent_of,
    kind_of,
    operands,
    reduced_dims,
    row_of,
    swaps_last_dims,
    weight_and_bias,
)
from timm_ghn.trace.records import Operation


def last(t: TraceBuilder) -> Operation:
    return t.trace().operations[-1]


def test_every_name_of_the_table_is_a_function_of_torch() -> None:
    places = (torch, Tensor, F, torch.linalg)
    operators = {"div": "__truediv__", "reciprocal": "reciprocal", "index": "__getitem__", "getitem": "__getitem__"}
    unknown = {name for name in TABLE if not any(hasattr(place, operators.get(name, name)) for place in places)}
    assert unknown == set()


def test_an_operation_without_a_row_computes_with_all_of_its_operands() -> None:
    t = TraceBuilder()
    x, y = t.input(2, 3), t.input(2, 3)
    t.call("a_function_of_2030", x, y)
    assert kind_of(last(t)) is Kind.OTHER
    assert operands(last(t)) == (x, y)
    assert weight_and_bias(last(t)) == (None, None)


@pytest.mark.parametrize(
    ("equation", "kind"),
    [
        ("bnc,dc->bnd", Kind.PRODUCT),
        ("bnc,dc", Kind.PRODUCT),
        ("...c,dc->...d", Kind.PRODUCT),
        ("bnc,c->bnc", Kind.MULTIPLICATION),
        ("...c, c -> ...c", Kind.MULTIPLICATION),
        ("bnc,ck->bnc", Kind.MULTIPLICATION),
    ],
)
def test_equations_that_sum_over_nothing_multiply_elementwise(equation: str, kind: Kind) -> None:
    t = TraceBuilder()
    t.call("einsum", equation, t.input(2, 3, 4), t.parameter("w", 4, 4))
    assert kind_of(last(t)) is kind


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("clamp", (0.0,), {}),
        ("clamp", (None, 6.0), {}),
        ("clamp", (), {"min": 0.0}),
        ("clamp", (), {"max": 6.0}),
        ("clip", (0.0, 6.0), {}),
        ("clip", (), {"min": 0.0, "max": 6.0}),
        ("hardtanh", (), {}),
        ("relu", (), {}),
        ("relu6", (), {}),
        ("hardswish", (), {}),
        ("tanh", (), {}),
    ],
)
def test_an_activation_is_bounded_and_flat_where_its_results_are(
    name: str, args: tuple[float | None, ...], kwargs: dict[str, float]
) -> None:
    t = TraceBuilder()
    t.call(name, t.input(4), *args, **kwargs)
    function = getattr(F, name, None) or getattr(torch, name)
    lowest, at_4, at_3, highest = function(torch.tensor([-1e9, -4.0, -3.0, 1e9]), *args, **kwargs).tolist()
    assert row_of(last(t)).is_flat == (at_4 == at_3)
    assert row_of(last(t)).is_bounded == (max(-lowest, highest) < 10)


@pytest.mark.parametrize(
    ("name", "count"), [("add", 2), ("expand_as", 1), ("to", 1), ("zeros_like", 0), ("new_ones", 0)]
)
def test_what_only_lends_its_shape_is_no_operand(name: str, count: int) -> None:
    t = TraceBuilder()
    t.call(name, t.input(2, 3), t.input(2, 3))
    assert len(operands(last(t))) == count


def test_weights_and_biases_by_position_and_by_keyword() -> None:
    t = TraceBuilder()
    x, w, b = t.input(1, 4, 8, 8), t.parameter("w", 4), t.parameter("b", 4)
    t.call("batch_norm", x, None, None, w, b)
    assert weight_and_bias(last(t)) == (w, b)
    t.call("layer_norm", x, (8,), weight=w, bias=None)
    assert weight_and_bias(last(t)) == (w, None)
    t.call("relu", x, inplace=True)
    assert weight_and_bias(last(t)) == (None, None)


@pytest.mark.parametrize(
    ("name", "arguments", "dims"),
    [
        ("mean", ((2, 3),), (2, 3)),
        ("mean", (-1,), (3,)),
        ("mean", (), ()),
        ("norm", (2, 1), (1,)),
    ],
)
def test_reduced_dimensions_count_from_zero(name: str, arguments: tuple[object, ...], dims: tuple[int, ...]) -> None:
    t = TraceBuilder()
    t.call(name, t.input(1, 4, 8, 8), *arguments)
    assert reduced_dims(last(t)) == dims
    t.call("amax", t.input(1, 4, 8, 8), axis=-2)
    assert reduced_dims(last(t)) == (2,)


@pytest.mark.parametrize(
    ("name", "arguments", "swaps"),
    [
        ("transpose", (-1, -2), True),
        ("transpose", (0, 1), False),
        ("permute", (0, 2, 1), True),
        ("permute", ((0, 1, 2),), False),
        ("mT", (), True),
        ("view", (3, 2, 1), False),
    ],
)
def test_which_views_transpose_a_matrix(name: str, arguments: tuple[object, ...], swaps: bool) -> None:
    t = TraceBuilder()
    t.call(name, t.input(1, 2, 3), *arguments)
    assert swaps_last_dims(last(t)) is swaps


def test_exponents() -> None:
    t = TraceBuilder()
    x = t.input(3)
    t.call("pow", x, 3)
    assert exponent_of(last(t)) == 3
    t.call("rsqrt", x)
    assert exponent_of(last(t)) == -0.5
    t.call("relu", x)
    assert exponent_of(last(t)) == 1


def test_a_flow_carries_what_a_step_finds_and_leaves_out_other_values() -> None:
    t = TraceBuilder()
    x, constant = t.input(3), t.value(3)
    y = t.call("add", x, constant)
    t.call("exp", constant)
    z = t.call("mul", y, x)
    flow = Flow.of(t.trace(z), {x.index, y.index, z.index})
    lengths = flow.follow(lambda _, __, known: 1 + max(item or 0 for item in known), {x.index: 0})
    assert lengths == {x.index: 0, y.index: 1, z.index: 2}
    assert [sources for _, sources, _ in flow.steps] == [(x.index,), (y.index, x.index)]
