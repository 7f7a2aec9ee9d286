"""The examples run on small models: two in processes of their own, the others in this one, which has torch by now."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed.fsdp
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Run = Callable[..., str]


def run_apart(*command: str, ghn: Path) -> str:
    environment = {**os.environ, "TIMM_GHN": str(ghn), "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(seeded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as `python NAME ARGUMENTS` does, and gives what it prints."""
    monkeypatch.setenv("TIMM_GHN", str(seeded_checkpoint))
    monkeypatch.chdir(EXAMPLES)

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_quickstart(seeded_checkpoint: Path) -> None:
    out = run_apart("quickstart.py", "test_convnext", ghn=seeded_checkpoint)
    assert "predicted and orthogonalized" in out
    assert "logits: (1, 1000) finite" in out


def test_own_model(run: Run) -> None:
    out = run("own_model.py")
    assert "1.gain" in out
    assert "multiplied elementwise" in out
    assert "classifier of 10 classes" in out


def test_unrecognized_operation(run: Run) -> None:
    before, after = run("unrecognized_operation.py").split("Recognized: ")
    assert "3.weight (32, 32): multiplied elementwise" in before
    assert "3.weight" not in after
    assert "2.filter (32, 8, 5): multiplied elementwise" in before
    assert "2.filter (32, 8, 5): multiplied elementwise" in after
    assert "both spellings compute the same" in after


def test_postprocess_pretrained(run: Run, tmp_path: Path) -> None:
    out = run("postprocess_pretrained.py", "--out", str(tmp_path / "a.safetensors"))
    assert "layer4.1.conv2.weight: max |Q^T Q - I|" in out
    timm.create_model("resnet18").load_state_dict(load_file(tmp_path / "a.safetensors"))


def test_draw_graphs(run: Run, tmp_path: Path) -> None:
    out = run("draw_graphs.py", "--out", str(tmp_path / "a.svg"), "test_resnet", "test_vit")
    assert "test_vit: Graph of" in out
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        path = folder / f"class {index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)


def test_finetune_folder(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    out = run(
        "finetune_folder.py",
        str(tmp_path / "images"),
        *("--model", "test_resnet", "--epochs", "2"),
    )
    assert "epoch 2: loss" in out
    assert "24 training images" in out
    with pytest.raises(SystemExit, match=r"finetune_folder\.py: error: there is no folder"):
        run("finetune_folder.py", str(tmp_path / "no"))


def test_finetune_folder_without_a_folder(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("finetune_folder.py")
    assert "arguments are required: FOLDER" in capsys.readouterr().err


def test_timm_train(run: Run, tmp_path: Path) -> None:
    out = run("timm_train.py", "test_resnet", str(tmp_path))
    assert "plain timm loads the same weights: True" in out
    assert f"--initial-checkpoint {tmp_path}" in out


def test_one_layer(run: Run) -> None:
    out = run("one_layer.py", "test_resnet")
    assert "1. predicted by the GHN" in out
    assert "the same as init='ghn-orth' gives, up to 0e+00" in out


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is part of torch from 2.6 on")
def test_init_sharded(seeded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run_apart(*torchrun, "init_sharded.py", "test_vit", ghn=seeded_checkpoint)
    assert "test_vit: ghn-orth, 306,890 parameters" in out
    assert "rank 0 of 2 holds 156,709 of 306,890 parameters" in out
    assert "loss of the first step: " in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_what_it_shows(path: Path) -> None:
    compile(source := path.read_text(encoding="utf-8"), str(path), "exec")
    assert source.startswith('"""')
    assert f"test_{path.stem}" in globals()
