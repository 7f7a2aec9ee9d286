"""A sweep on Ray Tune, with real workers on this machine."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from protocol import PaperConfig

from timm_ghn.finetune import ResultStore

pytest.importorskip("ray.tune")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sweep = importlib.import_module("sweep")
sys.path.pop(0)

CONFIG = PaperConfig(
    "test_resnet",
    "rand",
    image_size=16,
    stem="original",
    epochs=2,
    batch_size=10,
    labels_per_class=4,
    padding=2,
    lr=0.02,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("test", 6)):
        for index in range(count):
            path = tmp_path / "images" / part / f"class {index % 3}" / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 255, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "images"


def parse(*arguments: str) -> list[PaperConfig]:
    return list(sweep.configurations(sweep.make_parser().parse_args(arguments)))


def test_the_grid() -> None:
    required = ("--models", "test_resnet", "test_vit", "--inits", "rand", "ghn-orth")
    assert len(parse(*required, "--lrs", "0.1", "0.2", "--optimizers", "sgd", "adamw")) == 16
    found = parse(*required, "--noises", "0", "1e-5", "--start-layers", "3", "5")
    assert len(found) == 2 * (1 + 4)  # beta and L mean nothing to random weights
    assert {config.split for config in found} == {"validation"}


def test_missing_data_are_told_before_workers_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--models", "test_resnet", "--inits", "rand", "--data", str(tmp_path)]) == 2
    assert "sweep.py: error: cifar10 is not in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_trial_leaves_the_others_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    trials: list[Mapping[str, Any]] = [{"config": CONFIG.to_dict(), "seed": seed} for seed in range(3)]
    trials.append({"config": replace(CONFIG, labels_per_class=500).to_dict(), "seed": 0})
    work = sweep.Workload("folder", str(folder), 16, str(tmp_path / "out"), "cpu", 1, 1)

    def die_once(trial: Mapping[str, Any], work: Any) -> None:
        marker = Path(work.out) / "died"
        if trial["seed"] == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        sweep.train_trial(trial, work)

    try:
        rows = sweep.sweep(trials, work, run_trial=die_once)
        status = {(row["seed"], row["labels_per_class"]): row["status"] for row in rows}
        assert status == {(0, 4): "finished", (1, 4): "failed", (2, 4): "finished", (0, 500): "failed"}
        assert any("500 labels a class were asked for" in (row["error"] or "") for row in rows)
        assert len(ResultStore(tmp_path / "out", PaperConfig).all()) == 2
        again = sweep.sweep(trials, work, run_trial=die_once)
        assert sorted(row["status"] for row in again) == ["failed", "finished", "finished", "finished"]
        sweep.write_table(again, tmp_path / "trials.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
        assert {line["model"] for line in lines} == {"test_resnet"}
        assert all(0 <= line["accuracy"] <= 1 for line in lines if line["status"] == "finished")
    finally:
        sweep.ray.shutdown()
