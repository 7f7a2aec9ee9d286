"""`timm-ghn compare`: runs, what is said of them, and the picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from shards import noisy_images, write_shard
from torch import Tensor

from timm_ghn.cli import main
from timm_ghn.errors import FineTuneError
from timm_ghn.finetune import FineTuneConfig, Summary, load_benchmark
from timm_ghn.finetune.verdict import ENOUGH_STEPS, comparison_table, verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    data = noisy_images(90, 0, size=32)
    for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        place = root / data.classes[int(label)]
        place.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index:03d}.png")
    return root


def summary(init: str, *accuracies: float, diverged: int = 0) -> Summary:
    config = FineTuneConfig("resnet18", init, epochs=10)
    return Summary(config, dict(enumerate(accuracies)), diverged)


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_start_that_is_ahead_on_every_seed() -> None:
    rows = [summary("rand", 0.5, 0.51, 0.49), summary("orth", 0.60, 0.61, 0.62), summary("ghn-orth", 0.62, 0.63, 0.641)]
    assert verdict(rows, 1000) == "ghn-orth is ahead of orth on 3 of 3 seeds, by 2.0 points."
    header, first, second, third = (re.split(r"  +", line) for line in comparison_table(rows))
    assert header == ["init", "lr", "runs", "accuracy, %", "spread", "less rand", "spread", "better on"]
    assert first == ["rand", "0.01", "3", "50.0", "1.0", "-", "-", "-"]
    assert second == ["orth", "0.01", "3", "61.0", "1.0", "+11.0", "1.7", "3 of 3 seeds"]
    assert third[5:] == ["+13.0", "1.8", "3 of 3 seeds"]


def test_a_difference_within_the_spread() -> None:
    said = verdict([summary("orth", 0.60, 0.70, 0.62), summary("ghn-orth", 0.61, 0.66, 0.70)], 1000)
    assert said.startswith(
        "No clear difference between ghn-orth and orth: 1.7 points ± 6.0, the first is better on 2 of 3"
    )


def test_a_comparison_that_is_too_short() -> None:
    said = verdict([summary("orth", 0.3, 0.4), summary("ghn-orth", 0.8, 0.9)], ENOUGH_STEPS // 3)
    assert said == "Too short to tell ghn-orth and orth apart: 50 steps of training; --epochs 30 or more would do."


def test_one_seed_and_no_seed() -> None:
    said = verdict([summary("orth", 0.3), summary("ghn-orth", 0.4)], 1000)
    assert (
        said == "One seed does not tell ghn-orth and orth apart: the first is 10.0 points ahead; use --seeds 3 or more."
    )
    rows = [summary("orth", 0.3), summary("ghn-orth", diverged=2)]
    assert verdict(rows, 1000).startswith("There is nothing to compare")
    assert "0 (2 diverged)" in comparison_table(rows)[2]


# --- which data -----------------------------------------------------------------------------------------------------


def test_data_are_a_folder_a_prefix_or_a_name(folder: Path, tmp_path: Path) -> None:
    assert load_benchmark(str(folder)).train.size == 64
    for part, seed in (("train", 0), ("test", 1)):
        write_shard(tmp_path / f"cifar10-{part}.safetensors", noisy_images(12, seed))
    shards = load_benchmark(str(tmp_path / "cifar10"), size=16)
    named = load_benchmark(f"cifar10:{tmp_path}", size=16)
    assert torch.equal(shards.train.images, named.train.images)
    with pytest.raises(FineTuneError, match=r"no folder nix, .* no shards nix-train.*, .* known are cifar10"):
        load_benchmark("nix")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_trains_says_and_draws(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "test_vit", "--data", str(folder), "--image-size", "32", "--seeds", "2", "--epochs", "1"]
    command += ["--inits", "rand", "ghn_orth", "--ghn", "bundled", "--device", "cpu", "--out", str(tmp_path / "out")]
    command += ["--model-kwargs", "patch_size=8"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("73 images of 3 classes to train on, 17 to measure on; 9 steps a run, in 1 epoch\n")
    assert re.search(r"^rand +0\.001 +2 ", out, re.MULTILINE)
    assert re.search(r"^ghn-orth +0\.001 +2 ", out, re.MULTILINE)
    assert "Too short to tell" in out
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(runs) == 4
    assert main(command) == 0  # nothing is trained again
    assert capsys.readouterr().out == out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()} == runs


def test_the_default_length_is_enough_to_tell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_ghn.finetune.run.Run.train_on", fails)
    command = ["compare", "test_resnet", "--data", str(folder), "--inits", "rand", "--out", str(tmp_path)]
    assert main([*command, "--device", "cpu"]) == 130
    assert "306 steps a run, in 34 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt18", "--data", "nix"], "unknown model 'resnt18'; did you mean 'resnet18'"),
        (["resnet18", "--data", "nix"], "there is no folder nix"),
        (["resnet18", "--data", "nix", "--inits", "gnh"], "unknown initialization 'gnh'"),
        (["resnet18", "--data", "nix", "--seeds", "0"], "--seeds must be at least 1"),
        (["resnet18", "--data", "nix", "--epochs", "0"], "epochs must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
