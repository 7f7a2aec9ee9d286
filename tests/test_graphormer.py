"""GHN-3 against its authors' own code, and its encoder against a plain re-statement.

`tests/data/reference/ghn3.json` holds what ghn3 at b3289ac predicts with the weights of `seeded_ghn3`: for every
parameter its norm, its mean, and up to 8 values; and the parameters that it does not predict. `ghn3_more.json` holds a
dozen parameters of other families. Attention was spelled as a softmax, as torch 1.x did, so that ghn3 sees it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from ghn_reference import REFERENCE, ghn3_config, seeded_ghn3
from hypothesis import given
from reference_data import samples
from test_ghn_model import CASES, chain, graphs, weight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import MODULES, on_meta, smallest_model

from timm_ghn.errors import CheckpointError
from timm_ghn.ghn import GHN, graphormer
from timm_ghn.ghn.layout import Tiles
from timm_ghn.graph import Graph, Layout, Node, Op, Role, Target, to_graph
from timm_ghn.trace.skeleton import build_on_meta

MORE: dict[str, dict[str, Any]] = json.loads((REFERENCE / "ghn3_more.json").read_text())
EXPECTED: dict[str, dict[str, Any]] = json.loads((REFERENCE / "ghn3.json").read_text())
TINY = ghn3_config(16, 2, 4, num_classes=10)


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn3()


@pytest.fixture(scope="module")
def tiny() -> GHN:
    return seeded_ghn3(TINY)


def test_the_published_sizes() -> None:
    """Numbers of parameters of the four released files (arXiv 2303.04143, table 1)."""
    sizes = {(64, 3, 8): 6.91e6, (128, 5, 16): 35.81e6, (256, 12, 16): 214.7e6, (384, 24, 16): 654.37e6}
    with torch.device("meta"):
        found = {size: sum(p.numel() for p in GHN(ghn3_config(*size)).parameters()) for size in sizes}
    assert found == pytest.approx(sizes, rel=1e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_predictions_equal_ghn3(ghn: GHN, name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    graph = to_graph(model)
    with torch.no_grad():
        embedding = ghn.embed_nodes(graph).mean(0)
    torch.testing.assert_close(embedding, torch.tensor(EXPECTED[name]["graph_embedding"]), rtol=1e-4, atol=1e-5)

    expected = dict(EXPECTED[name]["predicted"])
    for prediction in ghn.predict(graph):
        norm, mean, *sample = expected.pop(prediction.target.name)
        if prediction.target.role is Role.POS_ENC:  # the row of the class token is random in ghn3
            norm, mean, sample = *two(prediction.materialize()), sample[1:]
        values = prediction.materialize().flatten().double()
        size = values.abs().mean().item()
        index = np.linspace(0, len(values) - 1, min(len(values), 8)).astype(int)[-len(sample) :]
        assert two(values) == pytest.approx((norm, mean), rel=1e-4, abs=1e-4 * size), prediction.target
        assert values[index].tolist() == pytest.approx(sample, rel=1e-4, abs=1e-4 * size), prediction.target
    assert not expected
    predicted = {target.name for target in graph.targets}
    assert [key for key, _ in model.named_parameters() if key not in predicted] == EXPECTED[name]["kept"]


@pytest.mark.parametrize("name", MORE)
def test_other_families_equal_ghn3(ghn: GHN, name: str) -> None:
    """Networks with squeeze-excitation, windows, groups and shuffles; a dozen parameters of each."""
    model = build_on_meta(lambda: torchvision.models.get_model(name))
    graph = to_graph(model)
    expected = dict(MORE[name]["predicted"])
    for prediction in ghn.predict(graph):
        if prediction.target.name in expected:
            norm, mean, *sample = expected.pop(prediction.target.name)
            tensor = prediction.materialize()
            size = tensor.abs().mean().item()
            assert two(tensor) == pytest.approx((norm, mean), rel=1e-4, abs=1e-4 * size), prediction.target
            assert samples(tensor).tolist() == pytest.approx(sample, rel=1e-4, abs=1e-4 * size), prediction.target
    assert not expected
    predicted = {target.name for target in graph.targets}
    assert len(predicted) == MORE[name]["num_predicted"]
    assert [key for key, _ in model.named_parameters() if key not in predicted] == MORE[name]["kept"]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_smallest_model_of_every_module(ghn: GHN, module: str) -> None:
    model = on_meta(smallest_model(module))
    graph = to_graph(model)
    predictions = {item.target.name: item for item in ghn.predict(graph)}
    assert predictions.keys() == {target.name for target in graph.targets}
    assert all(bool(item.block.isfinite().all()) for item in predictions.values())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes[name] for name in predictions) > 0.9 * sum(sizes.values())


def two(values: Tensor) -> tuple[float, float]:
    return values.double().norm().item(), values.double().mean().item()


# The encoder


def naive_encoder(ghn: GHN, x: Tensor, graph: Graph) -> Tensor:
    """Equations of arXiv 2303.04143, section 3, with the whole matrix of distances in both directions."""
    state = {name.removeprefix("gnn."): value for name, value in ghn.state_dict().items() if name.startswith("gnn.")}
    heads, width = ghn.config.heads, ghn.config.hid // ghn.config.heads
    distance = torch.from_numpy(graph.distance_matrix.astype(np.int64))
    x = x + state["0.centrality_embed_in.weight"][(distance == 1).sum(0).clamp(max=100)]
    x = x + state["0.centrality_embed_out.weight"][(distance == 1).sum(1).clamp(max=100)]
    x = x + state["0.input_dist_embed.weight"][distance[0]]
    table = state["0.attn.edge_embed.embed.weight"]
    pairs = torch.cat([table[distance + 2], table[distance.t() + 2]], dim=2)
    hidden = torch.relu(pairs @ state["0.attn.proj_e.0.weight"].t() + state["0.attn.proj_e.0.bias"])
    bias = hidden @ state["0.attn.proj_e.2.weight"].t() + state["0.attn.proj_e.2.bias"]
    for layer in range(ghn.config.layers):
        own = {name.removeprefix(f"{layer}."): value for name, value in state.items() if name.startswith(f"{layer}.")}
        inner = torch.nn.functional.layer_norm(x, x.shape[1:], own["ln1.weight"], own["ln1.bias"])
        query, key, value = (inner @ own["attn.to_qkv.weight"].t()).chunk(3, dim=1)
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = query[:, part] @ key[:, part].t() / width**0.5 + bias[:, :, head]
            mixed.append(logits.softmax(1) @ value[:, part])
        x = x + torch.cat(mixed, 1) @ own["attn.to_out.0.weight"].t() + own["attn.to_out.0.bias"]
        inner = torch.nn.functional.layer_norm(x, x.shape[1:], own["ln2.weight"], own["ln2.bias"])
        hidden = torch.nn.functional.gelu(inner @ own["ff.net.0.weight"].t() + own["ff.net.0.bias"])
        x = x + hidden @ own["ff.net.3.weight"].t() + own["ff.net.3.bias"]
    return x


@CASES
@given(graph=graphs())
def test_the_encoder_equals_its_equations(graph: Graph) -> None:
    ghn = seeded_ghn3(TINY)
    x = torch.randn(len(graph), 16, generator=torch.Generator().manual_seed(len(graph.edges)))
    with torch.no_grad():
        found = ghn.gnn(x, [graph])
    torch.testing.assert_close(found, naive_encoder(ghn, x, graph), rtol=1e-4, atol=1e-5)


def test_a_batch_of_graphs_equals_each_alone(tiny: GHN) -> None:
    nodes = Node(Op.CONV, (8, 8))
    batch = [Graph((nodes,) * 7, ((0, 1), (1, 4), (2, 5), (4, 6))), Graph((nodes,), ()), chain(weight((9, 9, 3, 3)))]
    with torch.no_grad():
        together = tiny.embed_nodes(batch)
        alone = torch.cat([tiny.embed_nodes(graph) for graph in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def deep_graph(count: int) -> Graph:
    """A chain with a bypass around every five nodes."""
    edges = {(i, i + 1) for i in range(count - 1)} | {(i, i + 5) for i in range(0, count - 5, 5)}
    return Graph((Node(Op.CONV, (64, 64, 3, 3)),) * count, tuple(sorted(edges)))


def test_biases_in_parts_equal_all_at_once(tiny: GHN, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = deep_graph(70)
    with torch.no_grad():
        whole = tiny.embed_nodes(graph)
        monkeypatch.setattr(graphormer, "BIAS_BYTES", 4 * 4 * 70 * 16)  # 16 attending nodes at a time
        torch.testing.assert_close(tiny.embed_nodes(graph), whole, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return made


def test_memory_for_large_graphs_is_bounded(tiny: GHN) -> None:
    """All biases of 3,000 nodes and 4 heads are 144 MB, and grow with the square of the nodes."""
    sizes = {}
    for count in (750, 1500, 3000):
        with torch.no_grad(), Largest() as largest:
            assert bool(tiny.embed_nodes(deep_graph(count)).isfinite().all())
        sizes[count] = largest.size
    assert sizes[750] == 4 * 4 * 750**2
    assert sizes[1500] < sizes[3000] <= graphormer.BIAS_BYTES < 4 * 4 * 3000**2


def test_gradients_reach_every_parameter_of_the_encoder() -> None:
    ghn = GHN(TINY)
    outputs = ghn([chain(weight((20, 20, 3, 3)), Node(Op.SUM), weight((8, 8), "v"))])
    sum(value.square().sum() for value in outputs[0].values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ghn.gnn.parameters())


# The decoder


@pytest.mark.parametrize("shape", [(20, 1, 3, 3), (3, 20, 1, 1), (5, 3, 16, 14), (6, 12), (8, 7, 1, 4), (8, 7, 2, 7)])
def test_a_kernel_is_the_centre_of_a_block(shape: tuple[int, ...]) -> None:
    ghn = seeded_ghn3(replace(TINY, weight_norm=False))
    out_channels, in_channels, height, width = (*shape, 1, 1)[:4]
    top, left = 8 - height // 2, 8 - width // 2
    with torch.no_grad():
        (prediction,) = ghn.predict(chain(weight(shape)))
        features = ghn.embed_nodes(chain(weight(shape)))[1:]
        whole = ghn.decoder(features, Tiles(range(1), range(1), (16, 16, 16, 16)))[0, 0, 0]
    centre = whole[:, :, top : top + height, left : left + width]
    expected = centre.repeat(2, 2, 1, 1)[:out_channels, :in_channels].reshape(shape)
    torch.testing.assert_close(prediction.materialize(), expected, rtol=1e-4, atol=1e-5)


def test_larger_kernels_are_interpolated() -> None:
    ghn = seeded_ghn3(replace(TINY, weight_norm=False))
    node = weight((4, 4, 31, 20))
    with torch.no_grad():
        (prediction,) = ghn.predict(chain(node))
        whole = ghn.decoder(ghn.embed_nodes(chain(node))[1:], Tiles(range(1), range(1), (4, 4, 16, 16)))[0, 0, 0]
    expected = torch.nn.functional.interpolate(whole, (31, 20), mode="bilinear")
    torch.testing.assert_close(prediction.materialize(), expected, rtol=1e-4, atol=1e-5)


def test_a_table_of_tokens_is_not_scaled(tiny: GHN) -> None:
    def table(kind: Layout, stored: tuple[int, ...]) -> Tensor:
        node = Node(Op.POS_ENC, (1, 16, 7, 7), (Target("t", stored, Role.POS_ENC, kind),))
        (prediction,) = tiny.predict(chain(node))
        return prediction.block

    scaled, tokens = table(Layout.PLAIN, (1, 16, 7, 7)), table(Layout.TOKENS, (1, 50, 16))
    torch.testing.assert_close(scaled, tokens * (2 / (16 * 49)) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "hid is 16, not a multiple of 5 heads"),
        ({"layers": 0}, "layers is 0, not between 1 and 256"),
        ({"hypernet": "gatedgnn"}, "layers and heads need hypernet 'graphormer'"),
        ({"cut": "middle"}, "cut is 'middle', not one of corner, centre"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(TINY, **changes)
