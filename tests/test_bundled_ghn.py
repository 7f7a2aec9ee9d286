"""The benchmark of the bundled GHN, from shards to table, with a tiny network."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from protocol import PaperConfig
from safetensors.torch import load_file
from shards import noisy_images, write_shard

from timm_ghn.finetune import ResultStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
bundled_ghn = importlib.import_module("bundled_ghn")
sys.path.pop(0)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 and Tiny-ImageNet (of 55 classes) in name, with fewer images and labels than those have."""
    monkeypatch.setattr(bundled_ghn, "LABELS", {"cifar10": 10, "held-out": 3, "fashion-mnist": 10})
    for part, count in (("train", 240), ("test", 40)):
        write_shard(tmp_path / f"cifar10-{part}.safetensors", noisy_images(count, 0, 32, 10))
    for part, count in (("train-0", 660), ("val", 110)):
        write_shard(tmp_path / f"tinyimagenet32-{part}.safetensors", noisy_images(count, 1, 32, 55))
    return tmp_path


def test_every_line_of_the_table(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PaperConfig("test_resnet", stem="original", batch_size=50)
    monkeypatch.setattr(bundled_ghn, "MODELS", {"tiny": config})
    command = ["--data", data, "--out", data / "out", "--models", "tiny", "--epochs", "1", "--seeds", "1"]
    command += ["--oracle-epochs", "1", "--lrs", "1e-3", "3e-3"]
    assert bundled_ghn.main([*map(str, command), "--tasks", "cifar10"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == list(bundled_ghn.INITS)
    assert lines[0].endswith("| - | - |")
    assert all("(p = " in line for line in lines[1:])
    runs = ResultStore(data / "out", PaperConfig).all()
    # two trials and a seed a line, and the oracle itself
    assert len(runs) == 3 * len(bundled_ghn.INITS) + 1
    assert sum(run.config.split == "validation" for run in runs) == 2 * len(bundled_ghn.INITS)
    oracle = next(run for run in runs if run.data["name"] == "tinyimagenet32, trained classes")
    assert oracle.data["classes"] == 5
    started = [run for run in runs if run.config.init_file]
    assert {run.config.init_file for run in started} == {str(ResultStore(data / "out").path(oracle.key, "weights"))}
    assert {run.network["weights"]["ghn"] for run in runs if run.config.ghn == "bundled"} == {"bundled"}


def test_classes_that_the_ghn_never_saw(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled_ghn, "MODELS", {"tiny": PaperConfig("test_resnet", stem="original")})
    command = ["--data", data, "--out", data / "out", "--tasks", "held-out", "--models", "tiny", "--epochs", "1"]
    command += ["--inits", "ghn-orth", "--lrs", "1e-3", "--seeds", "1"]
    assert bundled_ghn.main([*map(str, command)]) == 0
    (run,) = ResultStore(data / "out", PaperConfig).all()
    assert run.data["classes"] == 50
    assert run.data["train"] == 50 * 3
    assert "| held-out | tiny | ghn-orth |" in capsys.readouterr().out


def test_variants_and_the_table_of_what_is_there(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled_ghn, "MODELS", {"tiny": PaperConfig("test_resnet", stem="original", batch_size=50)})
    out = data / "out"
    command = ["--data", data, "--out", out, "--models", "tiny", "--epochs", "1", "--seeds", "2", "--lrs", "1e-3"]
    inits = ["orth", "ghn-orth@noise=0@start_layer=1", "ghn-orth@start_layer=0.5", "noise-only", "oracle-orth"]
    assert bundled_ghn.main([*map(str, command), "--oracle-epochs", "1", "--inits", *inits]) == 0
    printed = capsys.readouterr().out.splitlines()[2:]
    runs = [run for run in ResultStore(out, PaperConfig).all() if run.data["name"] == "cifar10"]
    assert len(runs) == 2 * len(inits)
    settings = {(run.config.noise, run.config.start_layer) for run in runs if run.config.init == "ghn-orth"}
    assert settings == {(0, 1), (None, 0.5)}

    # Noise alone leaves the singular values of the predicted weights; the oracle's became orthogonal.
    noisy, oracle = load_file(next(out.glob("noise-only-*"))), load_file(next(out.glob("oracle-orth-*")))
    last = next(name for name in reversed(noisy) if noisy[name].ndim == 4 and noisy[name].shape[2] > 1)
    for weights, expected in ((noisy, False), (oracle, True)):
        matrix = weights[last].flatten(1)
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4) == expected

    # A line that is there keeps the commit at which it was finished.
    monkeypatch.setattr(bundled_ghn, "commit", lambda: "a later one")
    assert bundled_ghn.main([*map(str, command), "--inits", "orth"]) == 0
    capsys.readouterr()
    assert bundled_ghn.main([*map(str, command), "--table", "--jsonl", str(data / "runs.jsonl")]) == 0
    again, ends = capsys.readouterr().out.split("\ncifar10\n\n")
    assert sorted(again.splitlines()[2:]) == sorted(printed)
    head, _, *rows = ends.splitlines()
    assert head == "| init | GHN | tiny |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["orth", *sorted(set(inits) - {"orth"})]
    orth = 50 * sum(run.accuracy for run in runs if run.config.init == "orth")
    cells = [row.split(" | ")[2] for row in rows]
    assert cells[0].startswith(f"{orth:.1f} ± ")
    for cell in cells[1:]:
        mean, gain = re.fullmatch(r"(.+) ± .+ \((.+)\) \|", cell).groups()
        assert float(mean) - orth == pytest.approx(float(gain), abs=0.1)
    rows = [json.loads(line) for line in (data / "runs.jsonl").read_text().splitlines()]
    assert [(row["init"], row["seed"]) for row in rows[:2]] == [("orth", 0), ("orth", 1)]
    assert len(rows) == 2 * len(inits)
    assert all(row["commit"] and row["torch"] for row in rows)
    assert all(row["commit"] != "a later one" for row in rows)
    assert {row["accuracy"]["1"] for row in rows} == {run.accuracy for run in runs}

    # A line of which a run is gone is left out.
    ResultStore(out).path(runs[0].key).unlink()
    assert bundled_ghn.main([*map(str, command), "--table"]) == 0
    again, _ = capsys.readouterr().out.split("\ncifar10\n\n")
    assert len(again.splitlines()) == 2 + len(inits) - 1


@pytest.mark.parametrize(
    ("init", "message"),
    [("ghn-orth@noise", "'noise' is not of the form KEY=VALUE"), ("ghn-orth@nois=0", "there is no setting nois")],
)
def test_settings_that_cannot_be_read(init: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bundled_ghn.main(["--inits", init])
    assert message in capsys.readouterr().err


def test_a_table_without_runs_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "runs.jsonl"
    kept.write_text("a line")
    assert bundled_ghn.main(["--out", str(tmp_path), "--table", "--jsonl", str(kept)]) == 2
    assert "has no finished lines of 20 epochs" in capsys.readouterr().err
    assert kept.read_text() == "a line"


def test_missing_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundled_ghn.main(["--data", str(tmp_path), "--out", str(tmp_path), "--inits", "rand"]) == 2
    assert "--download gets it" in capsys.readouterr().err
