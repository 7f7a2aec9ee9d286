"""Graphs of whole models: equality with ppuda, timm's twins, and what capturing leaves alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import pytest
import timm
import torch
import torchvision
from ghn_reference import MODELS, reference, seeded_ghn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_ghn.errors import CaptureError, GraphError
from timm_ghn.graph import Graph, Node, Op, Role, to_graph

TWINS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenet_v2": "mobilenetv2_100",
    "convnext_base": "convnext_base",
}


def on_meta(create: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = create(*args, **kwargs)
    return model


def as_networkx(nodes: list[tuple[Any, ...]], edges: Any) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from((index, {"label": label}) for index, label in enumerate(nodes))
    graph.add_edges_from(tuple(edge) for edge in edges)
    return graph


def same_graph(first: nx.DiGraph, second: nx.DiGraph) -> bool:
    return nx.is_isomorphic(first, second, node_match=lambda a, b: a["label"] == b["label"])


@pytest.mark.parametrize("reading", ["default", "ppuda"])
@pytest.mark.parametrize("name", MODELS)
def test_graph_equals_ppuda(name: str, reading: str) -> None:
    data = reference(name)
    graph = to_graph(on_meta(getattr(torchvision.models, name)), reading=reading)
    assert (len(graph), len(graph.edges)) == (data["n_nodes"], data["n_edges"])
    assert (len(graph.distances), graph.distances[:, 2].sum()) == (data["n_edges_ve50"], data["ve_sum"])
    ours = [(n.op.value, n.targets[0].name if n.targets else "", n.shape) for n in graph.nodes]
    theirs = [(n["op"], n["name"], tuple(n["shape"]) if n["shape"] else None) for n in data["nodes"]]
    assert same_graph(as_networkx(ours, graph.edges), as_networkx(theirs, data["edges"]))
    assert {t.name for t in graph.targets} == set(data["predicted"])
    assert {kept for kept, _ in graph.unused} == set(data["kept"])


@pytest.mark.parametrize("name", MODELS)
def test_timm_twin_has_the_same_graph_and_the_same_predictions(name: str) -> None:
    ghn = seeded_ghn()
    found = []
    for create, model in ((getattr(torchvision.models, name), ()), (timm.create_model, (TWINS[name],))):
        graph = to_graph(on_meta(create, *model))
        blocks = {p.target.name: p.block for p in ghn.predict(graph)}
        found.append((graph, [blocks[t.name] for node in graph.nodes for t in node.targets], graph))
    (first, tensors, _), (second, others, _) = found
    labels = [[(node.op, node.shape, tuple(t.role for t in node.targets)) for node in g.nodes] for g in (first, second)]
    assert same_graph(as_networkx(labels[0], first.edges), as_networkx(labels[1], second.edges))
    # Nodes of parallel branches may come in another order, so tensors are compared as sets.
    assert sorted(t.double().norm().item() for t in tensors) == pytest.approx(
        sorted(t.double().norm().item() for t in others), rel=1e-5
    )


def test_squeeze_excite_by_both_readings() -> None:
    model = on_meta(torchvision.models.mobilenet_v3_small)
    default, exact = to_graph(model), to_graph(model, reading="ppuda")
    assert (default.operators["cse"], default.operators["glob_avg"]) == (9, 1)
    assert (exact.operators["cse"], exact.operators["glob_avg"]) == (0, 10)
    assert len(default.targets) == len(exact.targets)


def test_a_mean_without_kept_dimensions_by_both_readings() -> None:
    model = on_meta(torchvision.models.mnasnet0_5)
    assert to_graph(model).operators["glob_avg"] == 1
    assert to_graph(model, reading="ppuda").operators["glob_avg"] == 0


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
        "ids": [id(p) for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_nfnet"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = timm.create_model(name).train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = snapshot(model)
    to_graph(model)
    after = snapshot(model)
    for name_, tensor in before.pop("state").items():
        torch.testing.assert_close(after["state"][name_], tensor, rtol=0, atol=0, equal_nan=True)
    after.pop("state")
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    assert before == after


def test_a_user_model_runs_on_no_data() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)
            self.seen: list[str] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x.device.type)
            return self.layer(x).mean((2, 3))

    model = Recorder()
    to_graph(model)
    assert model.seen == []


def test_text_and_json_forms() -> None:
    graph = to_graph(on_meta(timm.create_model, "test_vit"))
    assert json.loads(graph.to_json()) == graph.to_dict()
    assert graph.to_dict()["nodes"][1] == {
        "op": "conv",
        "shape": [64, 3, 16, 16],
        "targets": [{"name": "patch_embed.proj.weight", "shape": [64, 3, 16, 16], "role": "weight", "layout": "plain"}],
    }
    assert graph.to_dict()["edges"][:2] == [[0, 1], [1, 2]]
    assert "pos_enc" in graph.to_text()
    assert str(graph).startswith(f"Graph of {len(graph)} nodes")
    assert len(graph.to_text().splitlines()) == len(graph) + 1


def test_a_graph_is_immutable_and_checked() -> None:
    nodes = (Node(Op.INPUT), Node(Op.SUM))
    with pytest.raises(GraphError, match="topological"):
        Graph(nodes, ((1, 0),))
    with pytest.raises(GraphError, match="sorted and distinct"):
        Graph(nodes, ((0, 1), (0, 1)))
    with pytest.raises(GraphError, match="at least one"):
        Graph((), ())
    with pytest.raises(AttributeError):
        Graph(nodes, ((0, 1),)).edges = ()  # type: ignore[misc]


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 70))
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    chain = [(i, i + 1) for i in range(count - 1)] if draw(st.booleans()) else []
    edges = {(min(pair), max(pair)) for pair in draw(st.lists(pairs, max_size=80)) if pair[0] != pair[1]}
    distance = draw(st.sampled_from([1, 2, 5, 50]))
    return Graph(tuple(Node(Op.SUM) for _ in range(count)), tuple(sorted(edges | set(chain))), distance)


@given(random_graphs())
@settings(max_examples=60)
def test_distances_are_shortest_paths(graph: Graph) -> None:
    ours = {(int(a), int(b)): int(d) for a, b, d in graph.distances}
    network = as_networkx([()] * len(graph), graph.edges)
    lengths = nx.all_pairs_shortest_path_length(network, cutoff=graph.max_distance)
    assert ours == {(a, b): d for a, found in lengths for b, d in found.items() if d}


@given(random_graphs())
@settings(max_examples=60)
def test_nodes_of_a_level_do_not_see_each_other(graph: Graph) -> None:
    reach = graph.distance_matrix > 0
    assert len(graph.levels) == len(graph)
    for level in range(max(graph.levels) + 1):
        nodes = np.flatnonzero(graph.levels == level)
        assert len(nodes) > 0
        assert not reach[np.ix_(nodes, nodes)].any()


def test_input_sizes_that_users_choose() -> None:
    for kwargs in ({"in_chans": 1}, {"img_size": 96}, {"num_classes": 0}, {"num_classes": 3, "global_pool": ""}):
        graph = to_graph(on_meta(timm.create_model, "vit_tiny_patch16_224", **kwargs))
        assert graph.nodes[1].shape == (192, kwargs.get("in_chans", 3), 16, 16)


MEMORY_OF_A_GRAPH = """
import resource, sys, timm, torch
from timm_ghn.graph import to_graph

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak()
with torch.device("meta"):
    model = timm.create_model(sys.argv[1])
graph = to_graph(model)
print(sum(p.numel() for p in model.parameters()), len(graph), peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("name", timm.list_models("vit_7b_patch16_dinov3*"))
def test_billions_of_parameters_need_little_memory(name: str) -> None:
    command = [sys.executable, "-c", MEMORY_OF_A_GRAPH, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    parameters, nodes, extra = (int(word) for word in done.stdout.split())
    assert parameters > 6e9
    assert nodes > 400
    assert extra < 1e9


def test_features_only() -> None:
    graph = to_graph(on_meta(timm.create_model, "resnet18", features_only=True))
    assert graph.operators["conv"] == 20
    assert not any(t.role is Role.CLASS_WEIGHT for t in graph.targets)


def test_a_forward_that_reads_values_is_explained() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"reader": _ReadsValues()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["reader"](self.first(x))

    with pytest.raises(CaptureError, match=r"module 'inner.reader' in item.*example_input="):
        to_graph(Reader(), example_input=torch.zeros(1, 4))


class _ReadsValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()


class _Autocast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.enabled = enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=x.device.type, enabled=self.enabled):
            return self.layer(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_for_the_device_of_a_tensor(enabled: bool) -> None:
    init = torch.autocast.__init__
    graph = to_graph(_Autocast(enabled), example_input=torch.ones(1, 4))
    assert [node.op for node in graph.nodes] == [Op.INPUT, Op.CONV, Op.BIAS]
    assert torch.autocast.__init__ is init
    with pytest.raises(RuntimeError), torch.autocast("meta"):
        pass


def test_a_wrong_input_size_is_explained() -> None:
    with pytest.raises(CaptureError, match=r"input 1x5x32x32.*input_size=\(channels, height, width\)"):
        to_graph(timm.create_model("test_resnet"), input_size=(5, 32, 32))


def test_example_inputs_of_every_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(y)

    x, y = torch.zeros(2, 4), torch.zeros(2, 6)
    assert to_graph(Two(), example_input=(x, y)) == to_graph(Two(), example_input={"x": x, "y": y})
    assert to_graph(Two(), example_input=(x, y)).operators["sum"] == 1


@pytest.mark.parametrize("model", [nn.Identity(), nn.ReLU(), nn.Sequential(nn.MaxPool2d(2))])
def test_models_without_layers_are_refused(model: nn.Module) -> None:
    with pytest.raises(GraphError, match="no layer"):
        to_graph(model)


def test_an_output_without_the_input_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value * 2

    with pytest.raises(GraphError, match="does not depend on its input"):
        to_graph(Constant())


def test_a_model_that_cannot_be_copied_is_explained() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    with pytest.raises(CaptureError, match="cannot be copied"):
        to_graph(Stubborn(2, 2), example_input=torch.zeros(1, 2))


class Mixture(nn.Module):
    """Layers of which each is called twice with arguments alike, and calls that change or give back their input."""

    seen: ClassVar[list[tuple[Any, ...]]] = []  # of all copies

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.norm = nn.ModuleList([nn.BatchNorm2d(8), nn.GroupNorm(2, 8)])
        self.last = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=layout)
            for _ in range(2):
                steps = [norm(conv(y)) for conv, norm in zip(self.body, self.norm, strict=True)]
                steps += [
                    nn.functional.gelu(y),
                    nn.functional.dropout(y, 0.5, self.training),
                    y * 2,
                    y.to(torch.int) * 2,
                ]
                steps += [y.to(torch.int) * 2.0, nn.functional.relu(y, inplace=True), self.last(y.permute(0, 2, 3, 1))]
                steps += [y.mean((2, 3)), nn.functional.scaled_dot_product_attention(y, y, y), y[:, :4].relu_()]
                self.seen.extend((step.shape, step.stride(), step.dtype, step.is_meta) for step in steps)
                y = y + steps[0] + steps[1]
        return y.mean((2, 3))


@pytest.mark.parametrize("size", [(3, 8, 8), (3, 1, 7), (3, 1, 1)])
def test_recorded_tensors_have_the_layouts_of_the_computed_ones(size: tuple[int, ...]) -> None:
    model = Mixture().eval()
    Mixture.seen.clear()
    to_graph(model, input_size=size)
    recorded = Mixture.seen.copy()
    Mixture.seen.clear()
    with torch.device("meta"):
        model.to("meta")(torch.empty(1, *size))
    assert recorded == Mixture.seen


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(7), nn.LayerNorm(7), nn.LayerNorm([3, 8, 7]), nn.GroupNorm(7, 7), nn.Linear(7, 2)]
)
def test_layers_that_do_not_fit_are_still_refused(layer: nn.Module) -> None:
    with pytest.raises(CaptureError, match="at module '1'"):
        to_graph(nn.Sequential(nn.Conv2d(3, 3, 1), layer), input_size=(3, 8, 8))


class Attributes(nn.Module):
    """Attributes of many kinds: shared, nested, with a way of being copied of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.again = self.first
        self.order = [self.first, {"layer": self.first}]
        self.cache: dict[str, torch.Tensor] = {}
        self.first.shared = self.cache  # type: ignore[assignment]
        self.scale = torch.ones(4, 1, 1)
        self.steps = (torch.zeros(4, 1, 1), 3)
        self.custom = Custom()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.again is self.first is self.order[0] is self.order[1]["layer"]  # type: ignore[index]
        assert self.first.shared is self.cache
        self.cache["features"] = self.custom(self.again(x)) * self.scale + self.steps[0]
        return self.cache["features"].mean((2, 3))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Custom:
        copied = Custom()
        memo[id(self)] = copied
        copied.layer = copy.deepcopy(self.layer, memo)
        copied.copies = self.copies + 1
        return copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.copies == 1
        result: torch.Tensor = self.layer(x)
        return result


def test_attributes_are_copied_as_deepcopy_does() -> None:
    model = Attributes()
    handle = model.first.register_forward_hook(lambda *_: None)
    assert to_graph(model).operators["conv"] == 2
    assert model.cache == {}
    assert model.custom.copies == 0
    assert not model.scale.is_meta
    assert list(model.first._forward_hooks) == [handle.id]
