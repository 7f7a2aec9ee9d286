"""The benchmark of the bundled GHN, from shards to table, with a tiny network."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from shards import noisy_images, write_shard

from timm_ghn.finetune import FineTuneConfig, ResultStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
bundled_ghn = importlib.import_module("bundled_ghn")
sys.path.pop(0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """CIFAR-10 and Tiny-ImageNet (of 55 classes) in name."""
    for part, count in (("train", 1400), ("test", 40)):
        write_shard(tmp_path / f"cifar10-{part}.safetensors", noisy_images(count, 0, 32, 10))
    for part, count in (("train-0", 2200), ("val", 110)):
        write_shard(tmp_path / f"tinyimagenet32-{part}.safetensors", noisy_images(count, 1, 32, 55))
    return tmp_path


def test_every_line_of_the_table(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FineTuneConfig("test_resnet", stem="original", batch_size=100)
    monkeypatch.setattr(bundled_ghn, "MODELS", {"tiny": config})
    command = ["--data", data, "--out", data / "out", "--models", "tiny", "--epochs", "1", "--seeds", "1"]
    command += ["--oracle-epochs", "1", "--lrs", "1e-3", "3e-3"]
    assert bundled_ghn.main([*map(str, command), "--tasks", "cifar10"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == list(bundled_ghn.INITS)
    assert lines[0].endswith("| - |")
    assert all("(p = " in line for line in lines[1:])
    runs = ResultStore(data / "out").all()
    # two trials and a seed a line, and the oracle itself
    assert len(runs) == 3 * len(bundled_ghn.INITS) + 1
    assert sum(run.config.split == "validation" for run in runs) == 2 * len(bundled_ghn.INITS)
    oracle = next(run for run in runs if run.data["name"] == "tinyimagenet32, trained classes")
    assert oracle.data["classes"] == 5
    started = [run for run in runs if run.config.init_file]
    assert {run.config.init_file for run in started} == {str(ResultStore(data / "out").weights(oracle.key))}
    assert {run.network["weights"]["ghn"] for run in runs if run.config.ghn == "bundled"} == {"bundled"}


def test_classes_that_the_ghn_never_saw(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled_ghn, "MODELS", {"tiny": FineTuneConfig("test_resnet", stem="original")})
    command = ["--data", data, "--out", data / "out", "--tasks", "held-out", "--models", "tiny", "--epochs", "1"]
    command += ["--inits", "ghn-orth", "--lrs", "1e-3", "--seeds", "1"]
    assert bundled_ghn.main([*map(str, command)]) == 0
    (run,) = ResultStore(data / "out").all()
    assert run.data["classes"] == 50
    assert run.data["train"] == 1000
    assert "| held-out | tiny | ghn-orth |" in capsys.readouterr().out


def test_missing_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundled_ghn.main(["--data", str(tmp_path), "--out", str(tmp_path), "--inits", "rand"]) == 2
    assert "--download gets it" in capsys.readouterr().err
