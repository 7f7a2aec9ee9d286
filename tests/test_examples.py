"""The examples run, each in a process of its own, on small models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*command: str, ghn: Path) -> str:
    environment = {**os.environ, "TIMM_GHN": str(ghn), "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
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


def test_postprocess_pretrained(seeded_checkpoint: Path) -> None:
    out = run("postprocess_pretrained.py", ghn=seeded_checkpoint)
    assert "layer4.1.conv2.weight: max |Q^T Q - I|" in out


def test_draw_graphs(seeded_checkpoint: Path, tmp_path: Path) -> None:
    out = run("draw_graphs.py", "test_resnet", "test_vit", "--out", str(tmp_path / "a.svg"), ghn=seeded_checkpoint)
    assert "test_vit: Graph of" in out
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_what_it_shows(path: Path) -> None:
    compile(source := path.read_text(encoding="utf-8"), str(path), "exec")
    assert source.startswith('"""')
    assert f"test_{path.stem}" in globals()
