"""The GHN against what ppuda computes, and against plain re-statements of its parts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from ghn_reference import MODELS, SMALL, reference, reference_graph, seeded_ghn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from timm_ghn.errors import GraphError
from timm_ghn.ghn import GHN, GHNConfig, Prediction, layout
from timm_ghn.ghn import model as model_module
from timm_ghn.ghn.features import channel_sizes, kernel_sizes, shape_4d
from timm_ghn.ghn.gnn import GatedGNN
from timm_ghn.ghn.layout import Tiles
from timm_ghn.graph import Graph, Layout, Node, Op, Role, Target
from timm_ghn.threads import Workers

CASES = settings(max_examples=60, derandomize=True)


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn()


@pytest.fixture(scope="module")
def small() -> GHN:
    return seeded_ghn(SMALL)


def chain(*nodes: Node) -> Graph:
    """A graph of an input and the nodes, each reading the one before."""
    return Graph((Node(Op.INPUT), *nodes), tuple((i, i + 1) for i in range(len(nodes))))


def weight(
    shape: tuple[int, ...],
    name: str = "w",
    *,
    stored: tuple[int, ...] | None = None,
    role: Role = Role.WEIGHT,
    kind: Layout = Layout.PLAIN,
) -> Node:
    """A node that predicts one parameter, stored with the shape that the node reads unless another is given."""
    return Node(Op.CONV, shape, (Target(name, stored or shape, role, kind),))


def predict_one(ghn: GHN, node: Node) -> Prediction:
    (prediction,) = ghn.predict(chain(node))
    return prediction


# Equality with ppuda


def test_state_dict_has_the_names_and_shapes_of_ghn2() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in GHN(GHNConfig()).state_dict().items()}
    assert shapes["shape_enc.embed_channel.weight"] == (392, 8)
    assert shapes["shape_enc.embed_spatial.weight"] == (9, 8)
    assert shapes["decoder.conv.2.weight"] == (4096, 256, 1, 1)
    assert shapes["decoder.class_layer_predictor.1.weight"] == (1000, 64, 1, 1)
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_749_464


@pytest.mark.parametrize("name", MODELS)
def test_embedding_and_predictions_equal_ppuda(ghn: GHN, name: str) -> None:
    data = reference(name)
    graph = reference_graph(data)
    with torch.no_grad():
        embedding = ghn.embed_nodes(graph).mean(0)
    torch.testing.assert_close(embedding, torch.tensor(data["graph_embedding"]), rtol=1e-4, atol=1e-5)

    predictions = list(ghn.predict(graph))
    assert sorted(p.target.name for p in predictions) == sorted(data["predicted"])
    for prediction in predictions:
        expected = data["predicted"][prediction.target.name]
        values = prediction.materialize().flatten().double()
        size = values.abs().mean().item()
        index = np.linspace(0, len(values) - 1, min(len(values), 8)).astype(int)
        assert values.norm().item() == pytest.approx(expected["norm"], rel=1e-4), prediction.target
        assert values.mean().item() == pytest.approx(expected["mean"], rel=1e-4, abs=1e-4 * size)
        assert values[index].tolist() == pytest.approx(expected["sample"], rel=1e-4, abs=1e-4 * size)


def naive_gnn(gnn: GatedGNN, x: Tensor, graph: Graph) -> Tensor:
    """Equations 3 and 4 of arXiv 2110.13100, one node after the other."""
    distance = torch.from_numpy(graph.distance_matrix.astype(np.float32))
    hidden = list(x.unbind())
    order = list(range(len(graph)))
    for nodes, columns in ((order, distance), (order[::-1], distance.t())):
        for node in nodes:
            message = torch.zeros_like(hidden[node])
            for sender in torch.nonzero(columns[:, node]).flatten().tolist():
                length = columns[sender, node]
                if length == 1:
                    message = message + gnn.mlp(hidden[sender])
                if gnn.virtual_edges:
                    message = message + gnn.mlp_ve(hidden[sender]) / length
            hidden[node] = gnn.gru(message[None], hidden[node][None])[0]
    return torch.stack(hidden)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Directed acyclic graphs, also disconnected ones, without targets."""
    count = draw(st.integers(1, 14))
    pairs = [(i, j) for j in range(count) for i in range(j)]
    edges = draw(st.sets(st.sampled_from(pairs), max_size=24)) if pairs else set()
    nodes = tuple(Node(draw(st.sampled_from(list(Op))), (8, draw(st.integers(1, 9)))) for _ in range(count))
    return Graph(nodes, tuple(sorted(edges)), max_distance=draw(st.sampled_from([1, 2, 50])))


@CASES
@given(graph=graphs(), virtual_edges=st.booleans())
def test_gnn_equals_one_node_after_the_other(graph: Graph, virtual_edges: bool) -> None:
    gnn = GatedGNN(8, virtual_edges)
    x = torch.randn(len(graph), 8, generator=torch.Generator().manual_seed(len(graph.edges)))
    with torch.no_grad():
        torch.testing.assert_close(gnn(x, [graph]), naive_gnn(gnn, x, graph), rtol=1e-4, atol=1e-5)


def test_gnn_has_the_gradients_of_one_node_after_the_other() -> None:
    graph = Graph((Node(Op.CONV, (8, 8)),) * 7, ((0, 1), (0, 2), (1, 3), (2, 3), (2, 6), (3, 4), (4, 5), (5, 6)))
    gnn = GatedGNN(8, True).double()
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *gnn.parameters()]
    distance = graph.distance_matrix  # naive_gnn divides float32 distances, exact for these
    assert distance.max() <= 4
    found = torch.autograd.grad(gnn(x, [graph]).square().sum(), inputs)
    expected = torch.autograd.grad(naive_gnn(gnn, x, graph).square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@CASES
@given(batch=st.lists(graphs(), min_size=1, max_size=4))
def test_a_batch_of_graphs_equals_each_alone(small: GHN, batch: list[Graph]) -> None:
    with torch.no_grad():
        together = small.embed_nodes(batch)
        alone = torch.cat([small.embed_nodes(graph) for graph in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_predictions_repeat_exactly_and_do_not_touch_the_generator(ghn: GHN) -> None:
    graph = reference_graph(reference("resnet18"))
    state = torch.random.get_rng_state()
    first = [p.block.clone() for p in ghn.predict(graph)]
    assert all(torch.equal(a, p.block) for a, p in zip(first, ghn.predict(graph), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


class Elements(TorchDispatchMode):
    """Counts the operations that torch carries out, and the numbers that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.numbers += result.numel() if isinstance(result, Tensor) and not func.is_view else 0
        return result


def test_embedding_a_graph_costs_in_proportion_to_its_depth(ghn: GHN) -> None:
    def cost(count: int) -> Elements:
        edges = sorted({(i, i + 1) for i in range(count - 1)} | {(i, i + 5) for i in range(0, count - 5, 5)})
        graph = Graph((Node(Op.CONV, (64, 64, 3, 3)),) * count, tuple(edges))
        counted = Elements()
        with torch.no_grad(), counted:
            assert ghn.embed_nodes(graph).shape == (count, 32)
        return counted

    short, long = cost(500), cost(1000)
    assert 500 < short.operations < 500 * 30
    assert long.operations < 2.1 * short.operations
    assert long.numbers < 2.3 * short.numbers  # not the squares of all pairs of nodes


# Node features


def test_known_sizes_and_nearest_ones() -> None:
    channels, kernels = channel_sizes(1000), kernel_sizes(11)
    nearest = {2: 1, 4: 8, 7: 8, 9: 8, 12: 8, 13: 16, 70: 64, 72: 64, 73: 80, 1000: 1000, 1004: 1000, 4112: 4096}
    assert {size: int(channels.known[channels.index(size)]) for size in nearest} == nearest
    assert [int(channels.known[channels.index(size)]) for size in (8192, 8193, 50_000, 0)] == [8192] * 4
    sides = {1: 1, 2: 3, 4: 3, 6: 5, 8: 7, 10: 9, 12: 11, 13: 14, 15: 14, 16: 16, 32: 16}
    assert {size: int(kernels.known[kernels.index(size)]) for size in sides} == sides


def test_a_small_number_of_classes_is_a_known_size_below_eight_only_in_the_table() -> None:
    channels = channel_sizes(5)
    assert 5 in channels.known
    assert int(channels.known[channels.index(5)]) == 8  # as ppuda: 4 to 7 are read as 8


def test_shapes_of_every_rank_are_read_as_kernels() -> None:
    assert shape_4d((7,)) == (7, 1, 1, 1)
    assert shape_4d((7, 3)) == (7, 3, 1, 1)
    assert shape_4d((7, 3, 5)) == (7, 3, 5, 1)
    assert shape_4d((1, 197, 768)) == (1, 768, 14, 14)
    with pytest.raises(GraphError, match="one to four dimensions"):
        shape_4d((1, 2, 3, 4, 5))


# Tiling and layouts


def naive_tile(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    index = [torch.arange(size) % length for size, length in zip(shape, block.shape, strict=True)]
    return block[torch.meshgrid(*index, indexing="ij")]


@CASES
@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 11)), min_size=1, max_size=5), permute=st.booleans())
def test_tiling_equals_taking_indices_modulo_the_block(sizes: list[tuple[int, int]], permute: bool) -> None:
    block = torch.arange(math.prod(s for s, _ in sizes), dtype=torch.float32).view([s for s, _ in sizes])
    shape = tuple(size for _, size in sizes)
    expected = naive_tile(block, shape)
    assert torch.equal(layout.tile(block, shape), expected)
    destination = torch.empty(shape[::-1]).permute(*reversed(range(len(shape)))) if permute else torch.empty(shape)
    layout.tile_(destination, block)
    assert torch.equal(destination, expected)


LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...], Layout]] = [
    ((10, 7), (10, 7), Layout.PLAIN),
    ((10, 7), (10, 7, 1, 1), Layout.PLAIN),
    ((10, 7, 1, 3), (10, 7, 3), Layout.PLAIN),
    ((10, 7, 3, 3), (7, 10, 3, 3), Layout.TRANSPOSED),
    ((10, 7), (7, 10), Layout.TRANSPOSED),
    ((10, 7, 1, 1), (7, 10), Layout.TRANSPOSED),
    ((10, 7), (7, 5, 2), Layout.TRANSPOSED),
    ((10, 7, 1, 1), (7, 5, 2), Layout.TRANSPOSED),
    ((10, 7, 1, 3), (7, 10, 3), Layout.TRANSPOSED),
    ((12, 5, 3, 3), (20, 3, 3, 3), Layout.TRANSPOSED),
    ((10, 7, 3, 2), (10, 7, 4, 3, 2), Layout.DEPTH),
    ((10, 7, 3, 3), (4, 10, 7, 3, 3), Layout.MIXTURE),
    ((10, 7, 3, 3), (4, 630), Layout.MIXTURE),
    ((10,), (4, 10), Layout.MIXTURE),
    ((1, 9, 3, 4), (1, 14, 9), Layout.TOKENS),
    ((1, 9, 3, 4), (12, 9), Layout.TOKENS),
    ((1, 9, 3, 4), (1, 3, 4, 9), Layout.CHANNELS_LAST),
]


def naive_arrange(kernel: Tensor, shape: tuple[int, ...], kind: Layout) -> Tensor:
    """Element by element, from the definitions of the layouts."""
    out = torch.zeros(shape)
    if kind is Layout.DEPTH:
        out[:] = torch.stack([kernel] * shape[2], dim=2)
    elif kind is Layout.MIXTURE:
        out[:] = torch.stack([kernel.reshape(shape[1:])] * shape[0])
    elif kind in (Layout.TOKENS, Layout.CHANNELS_LAST):
        rows = out.view(-1, shape[-1])
        height, width = kernel.shape[2:]
        prefix = len(rows) - height * width
        for row in range(height):
            for column in range(width):
                rows[prefix + row * width + column] = kernel[0, :, row, column]
    elif kind is Layout.TRANSPOSED:
        shape = shape if kernel.shape[2:].numel() > 1 else (shape[0], math.prod(shape[1:]))
        grouped = out.view(*shape[:2], *kernel.shape[2:])
        per_group = shape[1] if kernel.shape[1] != shape[0] else kernel.shape[0]
        for k in range(kernel.shape[0]):
            for c in range(kernel.shape[1]):
                grouped[k // per_group * kernel.shape[1] + c, k % per_group] = kernel[k, c]
    else:
        out = kernel.reshape(shape)
    return out


@pytest.mark.parametrize(("kernel", "shape", "kind"), LAYOUTS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("limit", [4, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_layouts_agree_with_their_definition(
    kernel: tuple[int, ...],
    shape: tuple[int, ...],
    kind: Layout,
    contiguous: bool,
    limit: int,
    signed: bool,
) -> None:
    block = torch.randn([min(size, limit) for size in kernel])
    signed = signed and len(kernel) > 1
    prediction = Prediction(Target("w", shape, Role.WEIGHT, kind), block, kernel, signed)
    full = naive_tile(block, kernel)
    if signed:
        for k, c in itertools.product(range(kernel[0]), range(kernel[1])):
            full[k, c] *= (-1) ** ((k // len(block)) & (c // block.shape[1])).bit_count()
    expected = naive_arrange(full, shape, kind)
    assert layout.is_consistent(kernel, shape, kind)
    full = prediction.materialize()
    assert torch.equal(full, expected)
    assert full.is_contiguous()

    parameter = torch.full(shape, 7.0)
    if not contiguous:
        parameter = torch.full(shape[::-1], 7.0).permute(*reversed(range(len(shape))))
    prediction.write_(parameter)
    written = parameter
    if kind is Layout.TOKENS:  # the prefix stays
        written, expected = layout.token_rows(parameter, kernel), layout.token_rows(expected, kernel)
    assert written.numel() == math.prod(kernel if kind is Layout.TOKENS else shape)
    assert torch.equal(written, expected)
    assert (parameter == 7.0).sum() == parameter.numel() - written.numel()


def test_write_converts_types_and_works_on_leaves_that_require_gradients(small: GHN) -> None:
    prediction = predict_one(small, weight((20, 12, 3, 3)))
    parameter = torch.nn.Parameter(torch.zeros(20, 12, 3, 3, dtype=torch.bfloat16))
    prediction.write_(parameter)
    assert torch.equal(parameter, prediction.materialize().bfloat16())
    assert parameter.grad_fn is None


def test_write_refuses_another_shape(small: GHN) -> None:
    prediction = predict_one(small, weight((20, 12, 3, 3), "stem.weight"))
    with pytest.raises(GraphError, match=r"stem.weight: the graph says shape \(20, 12, 3, 3\).*\(20, 12, 5, 5\)"):
        prediction.write_(torch.zeros(20, 12, 5, 5))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (weight((8, 4, 3, 3), stored=(8, 4, 5, 5)), r"w: shape \(8, 4, 5, 5\) cannot hold"),
        (weight((8,)), r"w: a weight cannot be predicted by a node of shape \(8,\)"),
        (Node(Op.CONV, None, (Target("w", (8, 8), Role.WEIGHT),)), "node of shape None"),
        (weight((1, 8, 3, 3), stored=(1, 8, 8), kind=Layout.TOKENS, role=Role.POS_ENC), "layout tokens"),
        (weight((8, 4, 3, 3), stored=(4, 9, 3, 3), kind=Layout.TRANSPOSED), "layout transposed"),
    ],
)
def test_targets_that_do_not_fit_their_node_are_refused(small: GHN, node: Node, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        list(small.predict(chain(node)))


def test_no_graph_is_refused(small: GHN) -> None:
    with pytest.raises(GraphError, match="no graph"):
        small.embed_nodes([])


# Decoding and scaling


def whole_block(ghn: GHN, node: Node) -> Tensor:
    """The unscaled block of max_shape that the node's features decode to."""
    features = ghn.embed_nodes(chain(node))[1:]
    return ghn.decoder(features, Tiles(range(1), range(1), ghn.config.max_shape))[0, 0, 0]


@pytest.mark.parametrize("shape", [(24, 1, 3, 3), (3, 20, 1, 1), (5, 3, 9, 7), (6, 12), (30, 30, 16, 16), (8, 7, 1, 4)])
def test_a_part_of_a_block_equals_the_part_of_the_whole(shape: tuple[int, ...]) -> None:
    ghn = seeded_ghn(GHNConfig((8, 8, 5, 5), 10, weight_norm=False, hid=8))
    with torch.no_grad():
        node = weight(shape)
        expected = naive_tile(whole_block(ghn, node)[tuple(slice(size) for size in shape_4d(shape))], shape_4d(shape))
        torch.testing.assert_close(predict_one(ghn, node).materialize(), expected.view(shape))


@pytest.mark.parametrize(
    ("shape", "role", "beta"),
    [
        ((8, 4, 3, 3), Role.WEIGHT, 2),
        ((8, 4), Role.WEIGHT, 2),
        ((8, 1), Role.WEIGHT, 2),  # a matrix is never taken for a depthwise kernel
        ((8, 1, 3, 3), Role.WEIGHT, 1),
        ((8, 4, 1, 5), Role.WEIGHT, 1),
        ((8, 4, 5, 1), Role.WEIGHT, 2),
        ((1, 4, 12, 12), Role.POS_ENC, None),
        ((1, 4, 7, 7), Role.POS_ENC, 2),
        ((1, 4, 12, 12), Role.WEIGHT, 2),
        ((10, 8), Role.CLASS_WEIGHT, 2),
    ],
)
def test_kernels_are_scaled_by_their_fan_in(shape: tuple[int, ...], role: Role, beta: int | None) -> None:
    node = weight(shape, role=role)
    scaled, plain = (
        predict_one(seeded_ghn(GHNConfig((8, 8, 5, 5), 10, weight_norm=norm, hid=8)), node).materialize()
        for norm in (True, False)
    )
    factor = 1.0 if beta is None else (beta / math.prod(shape[1:])) ** 0.5
    torch.testing.assert_close(scaled, plain * factor)


def test_vectors_are_squashed(small: GHN) -> None:
    node = Node(Op.BN, (20,), (Target("w", (20,), Role.NORM_WEIGHT), Target("b", (20,), Role.NORM_BIAS)))
    weights, biases = (p.materialize() for p in small.predict(chain(node)))
    with torch.no_grad():
        raw = small.decoder_1d(small.embed_nodes(chain(node))[1])
    torch.testing.assert_close(weights, naive_tile(2 * torch.sigmoid(raw[:8] / 2), (20,)))
    torch.testing.assert_close(biases, naive_tile(torch.tanh(raw[8:] / 5), (20,)))


def test_a_classifier_of_other_classes_is_tiled(small: GHN) -> None:
    nodes = [
        weight((25, 12), "w", role=Role.CLASS_WEIGHT),
        Node(Op.BIAS, (25,), (Target("b", (25,), Role.CLASS_BIAS),)),
    ]
    tensors = {p.target.name: p.materialize() for p in small.predict(chain(*nodes))}
    assert torch.equal(tensors["w"], naive_tile(tensors["w"][:10, :8], (25, 12)))
    assert torch.equal(tensors["b"], naive_tile(tensors["b"][:10], (25,)))


def test_depth_divides_the_kernel(small: GHN) -> None:
    flat = predict_one(small, weight((6, 4, 3, 3))).materialize()
    deep = predict_one(small, weight((6, 4, 3, 3), stored=(6, 4, 5, 3, 3), kind=Layout.DEPTH)).materialize()
    torch.testing.assert_close(deep.sum(2), flat)


def test_blocks_are_decoded_in_bounded_chunks(small: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = chain(*(weight((8, 8, 3, 3), f"w{i}") for i in range(9)), weight((8, 8), "last"))
    whole = {p.target.name: p.block for p in small.predict(graph)}
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 4 * 4 * 8 * 8 * 9)
    monkeypatch.setattr(model_module, "MIN_CHUNKS", 1)
    sizes: list[int] = []
    handle = small.decoder.register_forward_hook(lambda module, args, out: sizes.append(out.shape[0]))
    parts = {p.target.name: p.block for p in small.predict(graph)}
    handle.remove()
    assert sizes == [4, 4, 1, 1]
    torch.testing.assert_close(parts, whole)


@pytest.mark.usefixtures("one_thread")
def test_threads_decode_the_same_bits(small: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = chain(*(weight((8, 8, 3, 3), f"w{i}") for i in range(9)), weight((8, 8), "last"))
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 4 * 2 * 8 * 8 * 9)
    expected = [(p.target.name, p.block) for p in small.predict(graph)]
    for count in (1, 3):
        with Workers(count) as workers:
            found = [(p.target.name, p.block) for p in small.predict(graph, workers)]
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(torch.equal(block, other) for (_, block), (_, other) in zip(found, expected, strict=True))


def test_large_parameters_are_predicted_first(small: GHN) -> None:
    graph = chain(weight((4, 4, 1, 1), "small"), weight((16, 16, 3, 3), "large"), weight((32, 16, 3, 3), "larger"))
    assert [p.target.name for p in small.predict(graph)] == ["larger", "large", "small"]


def test_forward_equals_predict_and_has_gradients(small: GHN) -> None:
    graphs = [
        chain(weight((20, 12, 3, 3), "a"), Node(Op.BIAS, (20,), (Target("b", (20,), Role.BIAS),))),
        chain(
            weight((1, 12, 3, 3), "p", stored=(1, 10, 12), role=Role.POS_ENC, kind=Layout.TOKENS),
            Node(Op.LN, (12,), (Target("n", (12,), Role.NORM_WEIGHT), Target("m", (12,), Role.NORM_BIAS))),
            weight((10, 12), "c", role=Role.CLASS_WEIGHT),
            Node(Op.BIAS, (10,), (Target("d", (10,), Role.CLASS_BIAS),)),
        ),
    ]
    outputs = small(graphs)
    for graph, output in zip(graphs, outputs, strict=True):
        expected = {p.target.name: p.materialize() for p in small.predict(graph)}
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(outputs[1]["p"][0, 0], torch.zeros(12))
    loss = sum(tensor.square().sum() for output in outputs for tensor in output.values())
    gradients = torch.autograd.grad(loss, list(small.parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)
