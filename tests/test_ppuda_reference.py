"""More torchvision models in ppuda's own reading: graphs and samples of what ppuda predicts for them.

The file holds outputs of ppuda at 4673a42 with the seeded GHN of `ghn_reference`, for a dozen parameters of each model.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torchvision
from ghn_reference import REFERENCE, seeded_ghn
from reference_data import samples

from timm_ghn.ghn import GHN
from timm_ghn.graph import to_graph

MORE: dict[str, dict[str, Any]] = json.loads((REFERENCE / "more.json").read_text())


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn()


@pytest.mark.parametrize("name", MORE)
def test_exact_reading(ghn: GHN, name: str) -> None:
    data = MORE[name]
    size = 299 if name == "inception_v3" else 224
    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(**arguments)
    graph = to_graph(model, reading="ppuda", input_size=(3, size, size))
    assert dict(graph.operators) == data["operators"]
    assert (len(graph), len(graph.edges)) == (data["n_nodes"], data["n_edges"])
    assert (len(graph.distances), graph.distances[:, 2].sum()) == (data["n_edges_ve50"], data["ve_sum"])
    expected = data.get("predicted", {})
    for prediction in ghn.predict(graph):
        wanted = expected.pop(prediction.target.name, None)
        if wanted is not None:
            tensor = prediction.materialize()
            assert tensor.double().norm().item() == pytest.approx(wanted["norm"], rel=1e-4)
            torch.testing.assert_close(samples(tensor), torch.tensor(wanted["sample"]), rtol=1e-4, atol=1e-5)
    assert not expected
