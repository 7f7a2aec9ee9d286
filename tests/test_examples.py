"""The examples run, each in a process of its own, on small models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed.fsdp
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def start(*command: str, ghn: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TIMM_GHN": str(ghn), "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )


def run(*command: str, ghn: Path) -> str:
    done = start(*command, ghn=ghn)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(seeded_checkpoint: Path) -> None:
    out = run("quickstart.py", "test_convnext", ghn=seeded_checkpoint)
    assert "predicted and orthogonalized" in out
    assert "logits: (1, 1000) finite" in out


def test_own_model(seeded_checkpoint: Path) -> None:
    out = run("own_model.py", ghn=seeded_checkpoint)
    assert "1.gain" in out
    assert "multiplied elementwise" in out
    assert "classifier of 10 classes" in out


def test_unrecognized_operation(seeded_checkpoint: Path) -> None:
    before, after = run("unrecognized_operation.py", ghn=seeded_checkpoint).split("Recognized: ")
    assert "3.weight (32, 32): multiplied elementwise" in before
    assert "3.weight" not in after
    assert "2.filter (32, 8, 5): multiplied elementwise" in before
    assert "2.filter (32, 8, 5): multiplied elementwise" in after
    assert "both spellings compute the same" in after


def test_postprocess_pretrained(seeded_checkpoint: Path, tmp_path: Path) -> None:
    out = run("postprocess_pretrained.py", "--out", str(tmp_path / "a.safetensors"), ghn=seeded_checkpoint)
    assert "layer4.1.conv2.weight: max |Q^T Q - I|" in out
    timm.create_model("resnet18").load_state_dict(load_file(tmp_path / "a.safetensors"))


def test_draw_graphs(seeded_checkpoint: Path, tmp_path: Path) -> None:
    out = run("draw_graphs.py", "--out", str(tmp_path / "a.svg"), "test_resnet", "test_vit", ghn=seeded_checkpoint)
    assert "test_vit: Graph of" in out
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        path = folder / f"class {index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)


def test_finetune_folder(seeded_checkpoint: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    out = run(
        "finetune_folder.py",
        str(tmp_path / "images"),
        *("--model", "test_resnet", "--epochs", "2"),
        ghn=seeded_checkpoint,
    )
    assert "epoch 2: loss" in out
    assert "24 training images" in out
    for arguments, message in (((), "arguments are required: FOLDER"), ((str(tmp_path / "no"),), "there is no folder")):
        failed = start("finetune_folder.py", *arguments, ghn=seeded_checkpoint)
        assert failed.returncode != 0
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr


def test_timm_train(seeded_checkpoint: Path, tmp_path: Path) -> None:
    out = run("timm_train.py", "test_resnet", str(tmp_path), ghn=seeded_checkpoint)
    assert "plain timm loads the same weights: True" in out
    assert f"--initial-checkpoint {tmp_path}" in out


def test_one_layer(seeded_checkpoint: Path) -> None:
    out = run("one_layer.py", "test_resnet", ghn=seeded_checkpoint)
    assert "1. predicted by the GHN" in out
    assert "the same as init='ghn-orth' gives, up to 0e+00" in out


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is part of torch from 2.6 on")
def test_init_sharded(seeded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run(*torchrun, "init_sharded.py", "test_vit", ghn=seeded_checkpoint)
    assert "test_vit: ghn-orth, 306,890 parameters" in out
    assert "rank 0 of 2 holds 156,709 of 306,890 parameters" in out
    assert "loss of the first step: " in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_what_it_shows(path: Path) -> None:
    compile(source := path.read_text(encoding="utf-8"), str(path), "exec")
    assert source.startswith('"""')
    assert f"test_{path.stem}" in globals()
