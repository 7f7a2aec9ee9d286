"""What a GHN was trained in, and what becomes of layers in other surroundings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from ghn_reference import seeded_ghn
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_ghn_model import CASES, chain, graphs, weight
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from timm_ghn import Init, Report, init_model, init_to_folder, provenance, report_of
from timm_ghn.errors import CheckpointError, InitError
from timm_ghn.ghn import GHN, GHNConfig, content_hash, load_ghn, read, write_safetensors
from timm_ghn.ghn.seen import Seen
from timm_ghn.graph import Graph, Node, Op, Role, Target, to_graph
from timm_ghn.initialize.report import Status
from timm_ghn.trace.skeleton import build_on_meta
from timm_ghn.training.architectures import seen_in_training, training_architecture
from timm_ghn.training.config import PRESETS


@pytest.fixture(scope="module")
def ghn() -> GHN:
    """A GHN that knows residual networks of basic blocks."""
    ghn = seeded_ghn(GHNConfig(max_shape=(8, 8, 7, 7), num_classes=10, hid=8))
    ghn.seen = Seen.of([to_graph(timm.create_model("resnet18", num_classes=10))])
    return ghn


class Gated(nn.Module):
    """A ResNet's stem and blocks, and a depthwise convolution with a gate and no norm layer, which it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2)
        self.blocks = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.depthwise = nn.Conv2d(64, 64, 7, padding=3, groups=64)
        self.gate = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.norm(self.stem(x)).relu()))
        x = self.depthwise(x) * self.gate(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def fell_back(report: Report) -> set[str]:
    return {row.name for row in report.parameters if row.reason.startswith("not seen: ")}


# The table


@CASES
@given(graph=graphs())
def test_nothing_of_what_was_seen_is_unseen(graph: Graph) -> None:
    assert Seen.of([graph]).unseen(graph) == {}
    assert Seen.of([chain(weight((8, 8, 3, 3))), graph]).unseen(graph) == {}


@CASES
@given(graph=graphs())
def test_widths_do_not_count(graph: Graph) -> None:
    wider = tuple(
        Node(node.op, None if node.shape is None else (3 * node.shape[0], *node.shape[1:]), node.targets)
        for node in graph.nodes
    )
    assert Seen.of([graph]).unseen(Graph(wider, graph.edges)) == {}


def test_surroundings_are_two_edges_on_each_side() -> None:
    def network(*ops: Op, side: int = 3) -> Graph:
        kernel = Node(Op.CONV, (8, 8, side, side), (Target("kernel", (8, 8, side, side), Role.WEIGHT),))
        return chain(Node(Op.CONCAT), Node(Op.SUM), kernel, *map(Node, ops))

    seen = Seen.of([network(Op.BIAS, Op.BN, Op.CONV), network(Op.BN, Op.CONV)])
    assert seen.networks == 2
    assert seen.unseen(network(Op.BIAS, Op.BN, Op.CSE)) == {}
    assert seen.unseen(network(Op.BN, Op.CONV, Op.LN)) == {}
    reason = "conv 3x3 between sum, concat and bias, ln: 0 of 2 training networks"
    assert seen.unseen(network(Op.BIAS, Op.LN)) == {"kernel": reason}
    reason = "conv 5x5 between sum, concat and bias, bn: 0 of 2 training networks"
    assert seen.unseen(network(Op.BIAS, Op.BN, side=5)) == {"kernel": reason}


def test_kernels_that_read_the_images_are_predicted_in_any_surroundings() -> None:
    def network(*sides: int) -> Graph:
        return chain(*(weight((8, 8, side, side), f"kernel{side}") for side in sides))

    seen = Seen.of([network(3, 3, 1, 3)])
    assert seen.unseen(network(7, 3, 1, 3)) == {}
    assert set(seen.unseen(network(3, 3, 1, 7))) == {"kernel7"}


def test_the_table_is_kept_with_the_ghn(ghn: GHN, tmp_path: Path) -> None:
    write_safetensors(ghn, tmp_path / "ghn.safetensors", {"epoch": "3"})
    again = read(tmp_path / "ghn.safetensors")
    assert again.seen is not None
    assert ghn.seen is not None
    assert np.array_equal(again.seen.codes, ghn.seen.codes)
    assert again.seen.networks == 1
    assert again.info is not None
    assert again.info.metadata == {"format": "pt", "epoch": "3"}
    assert again.info.hash == content_hash(ghn) != content_hash(seeded_ghn(ghn.config))


@pytest.mark.parametrize(
    ("codes", "networks"), [(torch.zeros(3), "1"), (torch.zeros(3, 1, dtype=torch.int64), "1"), (None, "one")]
)
def test_damaged_tables_are_refused(ghn: GHN, tmp_path: Path, codes: Tensor | None, networks: str) -> None:
    path = tmp_path / "ghn.safetensors"
    write_safetensors(ghn, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, "seen": tensors["seen"] if codes is None else codes}, path, {**metadata, "seen": networks})
    with pytest.raises(CheckpointError, match="seen is not a table of surroundings"):
        read(path)


def test_a_run_lists_what_its_networks_have() -> None:
    config = PRESETS["smoke"]
    seen = seen_in_training(config, 0)
    assert seen.networks == 4
    drawn = training_architecture(config, 3)
    assert seen.unseen(to_graph(drawn.build(10), input_size=drawn.size)) == {}


# What becomes of layers


def test_a_network_of_a_known_kind_is_predicted_as_a_whole(ghn: GHN) -> None:
    report = init_model(timm.create_model("resnet34", num_classes=10), ghn=ghn)
    assert report.predicted_share == 1


def test_layers_in_unknown_surroundings_start_as_orth_starts_them(ghn: GHN) -> None:
    torch.manual_seed(0)
    model, orthogonal = Gated(), Gated()
    orthogonal.load_state_dict(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = init_model(model, ghn=ghn, start_layer=1)
    init_model(orthogonal, "orth")
    unknown = {"depthwise.weight", "depthwise.bias", "gate.weight", "gate.bias"}
    assert unknown <= fell_back(report)
    assert {"stem.weight"}.isdisjoint(fell_back(report))
    rows = {row.name: row for row in report.parameters}
    assert rows["depthwise.weight"].status is Status.DRAWN
    assert rows["depthwise.weight"].reason.startswith("not seen: sep_conv 7x7 between ")
    assert rows["depthwise.weight"].reason.endswith(": 0 of 1 training networks")
    assert rows["depthwise.bias"].status is Status.KEPT
    for name in unknown:
        assert torch.equal(model.get_parameter(name), orthogonal.get_parameter(name))
    assert torch.equal(model.depthwise.bias, before["depthwise.bias"])
    assert not torch.equal(model.stem.weight, orthogonal.stem.weight)


def test_the_papers_method_predicts_everything(ghn: GHN) -> None:
    torch.manual_seed(0)
    model, plain = Gated(), Gated()
    report = init_model(model, ghn=ghn, fallback="off")
    assert fell_back(report) == set()
    without_table = seeded_ghn(ghn.config)
    init_model(plain, ghn=without_table)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with pytest.raises(InitError, match="fallback='on'"):
        Init(fallback="on")  # type: ignore[arg-type]


def test_the_cache_tells_both_apart(ghn: GHN) -> None:
    def made(**settings: str) -> tuple[Tensor, bool]:
        init = Init(ghn=ghn, **settings)  # type: ignore[arg-type]
        model = timm.create_model("mambaout_femto", depths=(1, 1, 1, 1), num_classes=10, init=init)
        report = report_of(model)
        assert report is not None
        assert bool(fell_back(report)) == (not settings)
        found = provenance(model)
        assert found is not None
        assert found["fallback"] == (settings or {"fallback": "auto"})["fallback"]
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), report.from_cache

    first, from_cache = made()
    assert not from_cache
    other, from_cache = made(fallback="off")
    assert not from_cache
    again, from_cache = made()
    assert from_cache
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_gets_the_same_weights(ghn: GHN, tmp_path: Path) -> None:
    init, kwargs = Init(ghn=ghn, cache=False), {"depths": (1, 1, 1, 1), "num_classes": 10}
    report = init_to_folder("mambaout_femto", tmp_path / "out", init, **kwargs)
    model = timm.create_model("mambaout_femto", init=init, **kwargs)
    saved = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert fell_back(report)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).generated == report.generated


def test_a_mostly_unknown_network_is_left_to_orth(ghn: GHN, caplog: pytest.LogCaptureFixture) -> None:
    def made(init: str, **settings: Any) -> tuple[dict[str, Tensor], Report]:
        torch.manual_seed(0)
        model = timm.create_model("seresnet18", num_classes=10, init="rand")
        report = init_model(model, init, **settings)
        return dict(model.named_parameters()), report

    orthogonal, _ = made("orth")
    mixed, report = made("ghn-orth", ghn=ghn)
    assert "trained on other kinds of networks: init='ghn-orth' starts as 'orth' does" in caplog.text
    caplog.clear()
    predicted, other = made("ghn-orth", ghn=ghn, fallback="off")
    assert all(torch.equal(mixed[name], orthogonal[name]) for name in mixed)
    assert fell_back(other) == set()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(torch.equal(predicted[name], orthogonal[name]) for name in fell_back(report))
    reasons = "\n".join(row.reason for row in report.parameters)
    assert "not seen: conv 3x3 between conv, bn and conv, cse, bn: 0 of 1 training networks" in reasons
    assert "66 of 94 tensors of the network are in unknown surroundings" in reasons


# The bundled GHN


def unseen_share(model: str, **kwargs: int) -> float:
    """Share of the tensors of a model of timm that the bundled GHN has not seen the like of."""
    seen = load_ghn("bundled").seen
    assert seen is not None
    graph = to_graph(build_on_meta(lambda: timm.create_model(model, **kwargs)))
    return len(seen.unseen(graph)) / len(graph.targets)


@pytest.mark.parametrize("name", [
    "resnet18", "resnet50", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_b0",
    "mobilenetv3_small_050", "mambaout_femto", "ghostnet_050", "starnet_s050",
])  # fmt: skip
def test_the_bundled_ghn_predicts_the_kinds_that_it_was_trained_on(name: str) -> None:
    assert unseen_share(name) == 0


def test_the_bundled_ghn_has_not_seen_everything() -> None:
    assert 0 < unseen_share("edgenext_small_rw") < unseen_share("cspnext_tiny") < unseen_share("cpubone_nano") < 0.5
