"""Hidden units of a decoder that no node activates begin anew."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from timm_ghn.ghn import GHN, GHNConfig
from timm_ghn.graph import Graph, to_graph
from timm_ghn.training.dormant import revive
from timm_ghn.training.optimizer import Muon, make_optimizer

DORMANT = [0, 3, 7]


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    return [to_graph(timm.create_model(name)) for name in ("test_resnet", "test_vit", "test_convnext")]


def trained(graphs: list[Graph]) -> tuple[GHN, Muon]:
    """A GHN after two updates, with three units that no node activates."""
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(8, 8, 3, 3), num_classes=4, hid=8))
    optimizer = make_optimizer(ghn, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        sum(tensor.square().sum() for predicted in ghn(graphs) for tensor in predicted.values()).backward()
        optimizer.step()
    with torch.no_grad():
        ghn.decoder_1d.linear(0).bias[DORMANT] = -100.0
    return ghn, optimizer


def activity(ghn: GHN, graphs: list[Graph]) -> torch.Tensor:
    """Share of the nodes with parameters that activate each hidden unit."""
    emits = [bool(node.targets) for graph in graphs for node in graph.nodes]
    with torch.no_grad():
        return (ghn.decoder_1d.linear(0)(ghn.embed_nodes(graphs)[torch.tensor(emits)]) > 0).float().mean(0)


def test_dormant_units_become_active_and_change_no_prediction(graphs: list[Graph]) -> None:
    ghn, optimizer = trained(graphs)
    average = copy.deepcopy(ghn)
    with torch.no_grad():
        before = ghn(graphs)
        others = [unit for unit, share in enumerate(activity(ghn, graphs)) if share > 0.02]
        weights = ghn.decoder_1d.linear(0).weight.detach().clone()
    assert not set(DORMANT) & set(others)
    revived = revive(ghn, average, optimizer, graphs, seed=1)
    assert revived == len(weights) - len(others) >= len(DORMANT)
    found = activity(ghn, graphs)
    assert ((found[DORMANT] > 0.3) & (found[DORMANT] < 0.7)).all()
    assert torch.equal(ghn.decoder_1d.linear(0).weight[others], weights[others])
    with torch.no_grad():
        for old, new in zip(before, ghn(graphs), strict=True):
            for name, tensor in old.items():
                torch.testing.assert_close(new[name], tensor, rtol=0, atol=0.05)
    for one, other in zip(ghn.decoder_1d.parameters(), average.decoder_1d.parameters(), strict=True):
        assert torch.equal(one, other)
    assert revive(ghn, average, optimizer, graphs, seed=2) == 0


def test_moments_of_revived_units_are_forgotten_and_they_learn(graphs: list[Graph]) -> None:
    ghn, optimizer = trained(graphs)
    revive(ghn, copy.deepcopy(ghn), optimizer, graphs, seed=1)
    first, last = ghn.decoder_1d.linear(0), ghn.decoder_1d.linear(1)
    assert not optimizer.state[first.weight]["momentum"][DORMANT].any()
    assert not optimizer.state[first.bias]["exp_avg_sq"][DORMANT].any()
    assert not optimizer.state[last.weight]["momentum"][:, DORMANT].any()
    assert optimizer.state[first.weight]["momentum"].any()
    optimizer.zero_grad()
    sum(tensor.square().sum() for predicted in ghn(graphs) for tensor in predicted.values()).backward()
    optimizer.step()
    assert last.weight[:, DORMANT].any(dim=0).all()


def test_the_same_seed_gives_the_same_units(graphs: list[Graph]) -> None:
    found = []
    for seed in (1, 1, 2):
        ghn, optimizer = trained(graphs)
        revive(ghn, copy.deepcopy(ghn), optimizer, graphs, seed)
        found.append(ghn.decoder_1d.linear(0).weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
