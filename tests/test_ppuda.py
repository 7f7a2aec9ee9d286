"""Against ppuda itself, where it is installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from ppuda_graphs import to_ppuda

from timm_ghn.graph import Reading, to_graph


@pytest.fixture
def ppuda_graphs() -> Any:
    pytest.importorskip("einops")
    return pytest.importorskip("ppuda.deepnets1m.graph")


@pytest.fixture
def ppuda_ghn(ppuda_graphs: Any, seeded_checkpoint: Path) -> Any:
    from ppuda.ghn.nn import GHN

    return GHN.load(str(seeded_checkpoint), debug_level=0, device="cpu").eval()


@pytest.mark.ppuda
def test_the_graph_is_what_ppuda_builds(ppuda_graphs: Any) -> None:
    model = torchvision.models.resnet18()
    theirs = ppuda_graphs.Graph(copy.deepcopy(model), ve_cutoff=50)
    graph = to_graph(model, reading=Reading.PPUDA)
    ours = to_ppuda(graph)
    assert ours.n_nodes == theirs.n_nodes == len(ours.node_feat)
    assert sorted(ours.node_feat.flatten().tolist()) == sorted(theirs.node_feat.flatten().tolist())
    assert len(ours.edges) == len(theirs.edges)
    assert ours.edges[:, 2].sum() == theirs.edges[:, 2].sum()
    expected = {(*row[1:3], _shape(row[3]), *row[4:]) for row in theirs.node_info[0]}
    assert {row[1:] for row in ours.node_info[0]} == expected
    assert ours._Adj.max() <= graph.max_distance
    batch = ppuda_graphs.GraphBatch([ours])
    batch.to_device("cpu")
    assert batch.node_feat.shape == (len(graph), 2)


def _shape(shape: Any) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


@pytest.mark.ppuda
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_its_ghn_predicts_the_same_from_both_graphs(name: str, ppuda_graphs: Any, ppuda_ghn: Any) -> None:
    model = torchvision.models.get_model(name)
    graph = to_ppuda(to_graph(model, reading=Reading.PPUDA))
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    ppuda_ghn(theirs)
    ppuda_ghn(ours, graphs=ppuda_graphs.GraphBatch([graph]).to_device("cpu"))
    expected = dict(theirs.named_parameters())
    for key, found in ours.named_parameters():
        torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=1e-6, msg=lambda text, at=key: f"{at}: {text}")


@pytest.mark.ppuda
def test_its_ghn_reads_graphs_of_timm_models(ppuda_graphs: Any, ppuda_ghn: Any) -> None:
    """The twins have the same tensors in the same order, under other names."""
    twins = [timm.create_model("resnet18"), torchvision.models.resnet18()]
    with torch.no_grad():
        for model in twins:
            graph = to_ppuda(to_graph(model, input_size=(3, 224, 224), reading=Reading.PPUDA))
            ppuda_ghn(model, graphs=ppuda_graphs.GraphBatch([graph]).to_device("cpu"))
    for (name, ours), (_, theirs) in zip(twins[0].named_parameters(), twins[1].named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
