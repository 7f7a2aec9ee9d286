"""Figures and tables from results."""

from __future__ import annotations

import importlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import PaperConfig

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune import ResultStore, RunResult
from timm_ghn.finetune.run import Point
from timm_ghn.orthogonalization.noise import correlation_std

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
figures = importlib.import_module("figures")
sys.path.pop(0)


def write_result(store: ResultStore, model: str, init: str, seed: int, accuracy: float, **settings: object) -> None:
    config = replace(PaperConfig(model, init, epochs=4), **settings)
    curve = tuple(
        Point(e, 0.01, 2.0 / e, 0.2 * e, *((1.0, accuracy * e / 4) if e % 2 == 0 else (None, None)))
        for e in range(1, 5)
    )
    data = {"name": "cifar10", "copy": "x", "digest": "0", "train": 1000, "test": 10000, "classes": 10}
    key = config.key(seed, "0")
    store.write(RunResult(key, config, seed, accuracy, 1.0, False, 10.0, 100.0, curve, data, {}, {}))


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    store = ResultStore(tmp_path / "results", PaperConfig)
    for seed in range(5):
        for model in ("resnet18", "convnext_atto"):
            write_result(store, model, "rand", seed, 0.5 + 0.01 * seed)
            write_result(store, model, "ghn-orth", seed, 0.53 + 0.012 * seed)
    write_result(store, "resnet18", "rand", 0, 0.9, split="validation")
    return store


def test_tables(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["tables", "--results", str(store.folder)]) == 0
    text = capsys.readouterr().out
    assert "| init | convnext_atto | resnet18 |" in text
    assert "| rand | 52.0 ± 1.6 (n = 5) | 52.0 ± 1.6 (n = 5) |" in text
    assert "55.4 ± 1.9 (n = 5), +3.4 to rand (p = 0.0625)" in text
    assert "| resnet50 | ghn-orth | sgd | 300 | 96 | 0.01 | 0.01 | 32 | 3e-05 | 37 | the paper, GHN-orth |" in text


def test_tables_do_not_mix_experiments(store: ResultStore) -> None:
    write_result(store, "resnet18", "rand", 0, 0.5, lr=0.5)
    with pytest.raises(FineTuneError, match="resnet18 from rand has results with different settings"):
        figures.table_1(figures.tested(store))


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["curves", "--results", str(tmp_path)]) == 2
    assert "has no finished runs on test images: run benchmarks/finetune.py first" in capsys.readouterr().err


def test_curves(store: ResultStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["curves", "--results", str(store.folder), "--out", str(tmp_path / "c")]) == 0
    numbers = json.loads((tmp_path / "c.json").read_text())
    line = numbers["resnet18"]["rand"]
    assert line["epoch"] == [1, 2, 3, 4]
    assert line["test_epoch"] == [2, 4]
    assert line["accuracy"][-1] == pytest.approx(0.52)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    written = f"{tmp_path / 'c.png'}: {(tmp_path / 'c.png').stat().st_size:,} bytes"
    assert written in capsys.readouterr().out


@settings(max_examples=15)
@given(st.integers(2, 40), st.integers(3, 60), st.integers(0, 1000))
def test_sampled_correlations_are_entries_of_the_matrix(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    every = torch.corrcoef(matrix)
    off = every[~torch.eye(rows, dtype=torch.bool)]
    found = figures.sampled_correlations(matrix, 50, seed)
    assert float((found[:, None] - off).abs().min(1).values.max()) < 1e-5


def test_correlations_of_a_model() -> None:
    model = timm.create_model("test_resnet")
    layers = figures.channel_correlations(model)
    by_name = {layer.parameter: layer for layer in layers}
    weight = model.layer1[0].conv1.weight.detach().flatten(1)
    assert by_name["layer1.0.conv1.weight"].std == pytest.approx(correlation_std(weight))
    assert by_name["layer1.0.conv1.weight"].std == pytest.approx(float(torch.corrcoef(weight).std()), rel=1e-4)
    assert all(list(layer.quantiles) == sorted(layer.quantiles) for layer in layers)
    assert "fc.weight" not in by_name
    with torch.no_grad():
        weight = model.layer1[0].conv1.weight
        weight.copy_(weight[:1].expand_as(weight))
    by_name = {layer.parameter: layer for layer in figures.channel_correlations(model)}
    assert by_name["layer1.0.conv1.weight"].quantiles == pytest.approx((1,) * 5, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((8, 1, 7, 7), "depthwise"), ((8, 4), "widening 1 x 1"), ((4, 8, 1, 1), "1 x 1"), ((8, 4, 3, 3), "spatial")],
)
def test_kinds_of_layers(shape: tuple[int, ...], kind: str) -> None:
    assert figures.kind_of(shape) == kind


def test_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([9.0, 3.0, 0.1, 0.1])
    points = torch.randn(200, 4, generator=generator) * scale + 5
    places, shares = figures.principal_components(points)
    assert places.shape == (200, 2)
    torch.testing.assert_close(places.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(shares[0]) > 0.8
    assert float(shares.sum()) == pytest.approx(1, abs=0.01)
    assert float(torch.corrcoef(torch.stack([places[:, 0], points[:, 0].double()]))[0, 1].abs()) > 0.99


def test_embeddings(seeded_checkpoint: Path, tmp_path: Path) -> None:
    random.seed(3)
    arguments = [
        "--count",
        "4",
        "--models",
        "test_resnet",
        "--ghn",
        str(seeded_checkpoint),
        "--out",
        str(tmp_path / "e"),
    ]
    assert figures.main(["embeddings", *arguments]) == 0
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert [row["name"] for row in numbers["points"]] == [None] * 4 + ["test_resnet"]
    assert (tmp_path / "e.png").exists()


def test_curves_of_different_settings_are_not_mixed(store: ResultStore) -> None:
    write_result(store, "resnet18", "ghn-orth", 7, 0.6, lr=0.5)
    with pytest.raises(FineTuneError, match="keep one experiment a folder"):
        figures.curves(store.all())
