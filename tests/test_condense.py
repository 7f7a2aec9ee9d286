"""Small modules, one spelling each: what they become in the graph's vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import Tensor, nn

from timm_ghn.graph import Graph, Layout, Op, Role, to_graph
from timm_ghn.orthogonalization import orthogonalize_, weight_layers


def graph_of(model: nn.Module, *size: int) -> Graph:
    return to_graph(model, example_input=torch.zeros(1, *(size or (3, 16, 16))))


def operators(graph: Graph) -> dict[str, int]:
    return dict(graph.operators)


class Gate(nn.Module):
    """A channel gate around a convolution, with a choice of pooling and activation."""

    def __init__(self, pool: str, activation: str) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.pool, self.activation = pool, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        squeezed = {
            "mean": lambda: x.mean((2, 3), keepdim=True),
            "flat mean": lambda: x.flatten(2).mean(-1)[:, :, None, None],
            "adaptive": lambda: F.adaptive_avg_pool2d(x, 1),
            "max": lambda: x.amax((2, 3), keepdim=True),
        }[self.pool]()
        gate = self.up(F.relu(self.down(squeezed)))
        gate = {"sigmoid": torch.sigmoid, "hard": F.hardsigmoid, "tanh": torch.tanh}[self.activation](gate)
        return (x * gate).mean((2, 3))


@pytest.mark.parametrize("activation", ["sigmoid", "hard", "tanh"])
@pytest.mark.parametrize("pool", ["mean", "flat mean", "adaptive", "max"])
def test_a_squeezed_gate_is_cse_and_its_squeeze_no_node(pool: str, activation: str) -> None:
    graph = graph_of(Gate(pool, activation))
    assert operators(graph) == {"input": 1, "conv": 3, "bias": 3, "cse": 1, "glob_avg": 1}
    gate = next(i for i, node in enumerate(graph.nodes) if node.op is Op.CSE)
    assert [source for source, target in graph.edges if target == gate] == [2, 6]  # the activation and the gate


class Attention(nn.Module):
    """Self-attention in several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.mix = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(2, 2)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(1, -1, 3, 2, 6).permute(2, 0, 3, 1, 4)
        if self.spelling == "fused":
            out = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "softmax":
            out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.spelling == "einsum":
            out = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        elif self.spelling == "talking heads":
            weights = self.mix((q @ k.mT).permute(0, 2, 3, 1)).softmax(-2)
            out = weights.permute(0, 3, 1, 2) @ v
        elif self.spelling == "elementwise":
            out = ((q.softmax(-2) * k).sum(-2, keepdim=True)).expand_as(v) * v
        elif self.spelling == "linear":
            out = q.softmax(-1) @ (k.softmax(-2).mT @ v)
        else:
            out = ((q.mT @ k).softmax(-1) @ v.mT).mT  # cross-covariance
        return self.proj(out.transpose(1, 2).reshape(1, -1, 12))


@pytest.mark.parametrize(
    "spelling", ["fused", "softmax", "einsum", "talking heads", "linear", "elementwise", "cross-covariance"]
)
def test_attention_is_one_msa(spelling: str) -> None:
    graph = graph_of(Attention(spelling), 9, 12)
    assert graph.operators["msa"] == 1
    assert graph.operators["conv"] == 2 + (spelling == "talking heads")


class SpelledNorm(nn.Module):
    """A norm without a function of torch that normalizes, as EvoNorm, filter response norm and old RMS norms."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.spelling == "response":
            x = x * (x.square().mean((2, 3), keepdim=True) + 1e-6).rsqrt()
        elif self.spelling == "deviation":
            x = x * torch.sigmoid(x) / x.var((2, 3), keepdim=True).add(1e-6).sqrt().expand(x.shape)
        else:
            x = x * (x.pow(2).mean(1, keepdim=True) + 1e-6) ** -0.5
        return (x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).mean((2, 3))


@pytest.mark.parametrize(("spelling", "op"), [("response", "bn"), ("deviation", "bn"), ("channels", "ln")])
def test_a_norm_that_is_spelled_out_is_one_node(spelling: str, op: str) -> None:
    graph = graph_of(SpelledNorm(spelling))
    assert operators(graph) == {"input": 1, "conv": 1, "bias": 1, op: 1, "glob_avg": 1}
    assert [(t.name, t.role) for t in graph.nodes[3].targets] == [
        ("weight", Role.NORM_WEIGHT), ("bias", Role.NORM_BIAS),
    ]  # fmt: skip


def test_multi_head_attention_of_torch() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    graph = graph_of(Block(), 9, 12)
    assert [node.op.value for node in graph.nodes] == ["input", "conv", "bias", "msa", "conv", "bias"]
    assert [t.name for t in graph.targets] == [
        "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias",
    ]  # fmt: skip


def test_recurrent_layers_are_chains() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model = Recurrent()
    graph = graph_of(model, 7, 6)
    assert {t.name for t in graph.targets} == {name for name, _ in model.named_parameters()}
    assert operators(graph) == {"input": 1, "conv": 8, "bias": 8}


class Standardized(nn.Conv2d):
    """A weight-standardized convolution: what is convolved with is derived from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_a_derived_weight_leads_to_its_parameter() -> None:
    graph = graph_of(nn.Sequential(Standardized(3, 8, 3), nn.Flatten(), nn.Linear(8 * 196, 5)))
    assert [(t.name, t.role) for t in graph.targets[:2]] == [("0.weight", Role.WEIGHT), ("0.bias", Role.BIAS)]
    assert operators(graph) == {"input": 1, "conv": 2, "bias": 2}


class Mixture(nn.Module):
    """CondConv: a kernel that is mixed from four experts by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = nn.Linear(3, 4)
        self.experts = nn.Parameter(torch.randn(4, 8 * 3 * 3 * 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.sigmoid(self.routing(x.mean((2, 3)))) @ self.experts
        return F.conv2d(x, kernel.view(8, 3, 3, 3)).mean((2, 3))


def test_a_mixture_of_kernels_is_one_convolution() -> None:
    target = next(t for t in graph_of(Mixture()).targets if t.name == "experts")
    assert (target.layout, target.role) == (Layout.MIXTURE, Role.WEIGHT)
    node = next(node for node in graph_of(Mixture()).nodes if target in node.targets)
    assert node.shape == (8, 3, 3, 3)


@pytest.mark.parametrize("groups", [1, 8])
def test_the_experts_of_a_mixture_are_post_processed_one_by_one(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), CondConv2d(8, 16, 3, groups=groups, num_experts=3), nn.Linear(16, 2))
    assert [layer.kernel for layer in weight_layers(model)] == [(), (16, 8 // groups, 3, 3), ()]
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[0].clone().expand(3, -1))  # as predicted: all from one kernel
    assert orthogonalize_(model, start_layer=1) == ("0.weight", "1.weight")
    experts = model[1].weight.detach().view(3, 16, -1)
    for expert in experts:
        tall = expert if expert.shape[0] >= expert.shape[1] else expert.T
        torch.testing.assert_close(tall.T @ tall, torch.eye(tall.shape[1]), atol=1e-5, rtol=0)
    assert not torch.equal(experts[0], experts[1])  # each got noise of its own
    torch.testing.assert_close(experts[0], experts[1], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("layer", "size", "op", "shape", "layout"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), (4, 9, 9), Op.SEP_CONV, (8, 2, 3, 3), Layout.PLAIN),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (4, 9, 9), Op.DIL_CONV, (4, 1, 3, 3), Layout.PLAIN),
        (nn.Conv2d(4, 8, 3, dilation=2), (4, 9, 9), Op.CONV, (8, 4, 3, 3), Layout.PLAIN),
        (nn.Conv1d(4, 8, 5), (4, 9), Op.CONV, (8, 4, 5, 1), Layout.PLAIN),
        (nn.Conv3d(4, 8, (2, 3, 5)), (4, 9, 9, 9), Op.CONV, (8, 4, 3, 5), Layout.DEPTH),
        (nn.ConvTranspose2d(4, 8, 3), (4, 9, 9), Op.CONV, (8, 4, 3, 3), Layout.TRANSPOSED),
        (nn.Linear(4, 8), (9, 4), Op.CONV, (8, 4), Layout.PLAIN),
    ],
)
def test_layers_become_the_closest_kernel(
    layer: nn.Module, size: tuple[int, ...], op: Op, shape: tuple[int, ...], layout: Layout
) -> None:
    graph = graph_of(nn.Sequential(layer, nn.ReLU()), *size)
    assert (graph.nodes[1].op, graph.nodes[1].shape, graph.nodes[1].targets[0].layout) == (op, shape, layout)
    assert graph.nodes[2].op is Op.BIAS


class Product(nn.Module):
    """A matrix product with a parameter, on either side."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10))
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return {
            "right": lambda: x @ self.weight,
            "left": lambda: self.weight @ x.mT,
            "flip": lambda: x @ self.weight.T,
        }[self.side]()


@pytest.mark.parametrize(
    ("side", "size", "shape", "layout"),
    [
        ("right", (4, 6), (10, 6), Layout.TRANSPOSED),
        ("left", (4, 10), (6, 10), Layout.PLAIN),
        ("flip", (4, 10), (6, 10), Layout.PLAIN),
    ],
)
def test_products_with_a_parameter_are_linear_layers(
    side: str, size: tuple[int, ...], shape: tuple[int, ...], layout: Layout
) -> None:
    node = graph_of(Product(side), *size).nodes[1]
    assert (node.op, node.shape, node.targets[0].layout) == (Op.CONV, shape, layout)


class Tokens(nn.Module):
    """A tiny transformer's stem, with a class token and one kind of position table."""

    def __init__(self, table: tuple[int, ...]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.table = nn.Parameter(torch.zeros(table))
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        if self.table.dim() == 4:
            x = x + self.table if self.table.shape[1] == 8 else (x.permute(0, 2, 3, 1) + self.table).permute(0, 3, 1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        if self.table.dim() == 3:
            x = x + self.table
        return self.head((x * self.scale).mean(1))


@pytest.mark.parametrize(
    ("table", "layout"),
    [((1, 17, 8), Layout.TOKENS), ((1, 8, 4, 4), Layout.PLAIN), ((1, 4, 4, 8), Layout.CHANNELS_LAST)],
)
def test_tables_of_positions(table: tuple[int, ...], layout: Layout) -> None:
    graph = graph_of(Tokens(table))
    node = next(node for node in graph.nodes if node.op is Op.POS_ENC)
    assert (node.shape, node.targets[0].name, node.targets[0].layout) == ((1, 8, 4, 4), "table", layout)
    reasons = dict(graph.unused)
    assert set(reasons) == {"token", "scale"}
    assert "token" in reasons["token"]
    assert "multiplied" in reasons["scale"]


def test_a_relative_position_table_is_kept() -> None:
    class Windowed(Attention):
        def __init__(self) -> None:
            super().__init__("softmax")
            self.bias_table = nn.Parameter(torch.zeros(25, 2))
            self.register_buffer("index", torch.zeros(81, dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(1, -1, 3, 2, 6).permute(2, 0, 3, 1, 4)
            bias = self.bias_table[self.index].view(9, 9, 2).permute(2, 0, 1)
            out = (q @ k.mT + bias.unsqueeze(0)).softmax(-1) @ v
            return self.proj(out.transpose(1, 2).reshape(1, -1, 12))

    graph = graph_of(Windowed(), 9, 12)
    assert "relative positions" in dict(graph.unused)["bias_table"]
    assert (graph.operators["msa"], graph.operators["pos_enc"]) == (1, 0)


def test_norms_and_sums() -> None:
    class Residual(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.conv(x))

    for norm, op in (
        (nn.BatchNorm2d(8), Op.BN),
        (nn.GroupNorm(2, 8), Op.BN),
        (nn.InstanceNorm2d(8, affine=True), Op.BN),
    ):
        graph = graph_of(Residual(norm), 8, 9, 9)
        assert [node.op for node in graph.nodes] == [Op.INPUT, Op.CONV, op, Op.SUM]
        assert [t.role for t in graph.nodes[2].targets] == [Role.NORM_WEIGHT, Role.NORM_BIAS]
        assert (0, 3) in graph.edges
    graph = graph_of(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)), 4, 8)
    assert [node.op for node in graph.nodes[3:]] == [Op.LN, Op.LN]


def test_sums_and_concatenations_of_one_node_are_dropped() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return torch.cat([y + y, y * 2 + 1], -1)

    assert operators(graph_of(Loops(), 4)) == {"input": 1, "conv": 1, "bias": 1}


def test_in_place_operations_and_views() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.relu_()
            y += self.b(x)
            z = torch.zeros_like(y)
            z[:, :2] = y[:, :2]
            z[:, 2:].copy_(x[:, 2:])
            return z

    graph = graph_of(InPlace(), 4)
    assert graph.operators["sum"] == 1
    assert {t.name for t in graph.targets} == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_shared_layers_are_predicted_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.again = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.relu(self.layer(x)))

    graph = graph_of(Shared(), 4)
    assert graph.operators["conv"] == 2
    assert sorted(t.name for t in graph.targets) == ["layer.bias", "layer.weight"]
    assert dict(graph.unused)["again.weight"] == "tied to layer.weight"


def test_the_classifier_is_what_makes_the_logits() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.body(x))
            return (self.first(x) + self.second(x)) / 2

    roles = {t.name: t.role for t in graph_of(TwoHeads(), 4).targets}
    assert roles["body.weight"] is Role.WEIGHT
    assert roles["first.weight"] is roles["second.weight"] is Role.CLASS_WEIGHT
    assert roles["second.bias"] is Role.CLASS_BIAS


def test_every_parameter_is_accounted_for() -> None:
    model = Tokens((1, 17, 8))
    graph = graph_of(model)
    names = [t.name for t in graph.targets] + [name for name, _ in graph.unused]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(math.prod(t.shape) == model.get_parameter(t.name).numel() for t in graph.targets)
