"""Training in several processes: `torchrun` against the same steps, gradients averaged by hand, in this process."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shards import noisy_images, write_shard

from timm_ghn.errors import TrainingError
from timm_ghn.training import processes
from timm_ghn.training.cli import add_train_arguments, make_config
from timm_ghn.training.loop import Trainer
from timm_ghn.training.processes import join_processes
from timm_ghn.training.run import prepare

pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2
Weights = dict[str, torch.Tensor]


@dataclass
class OneOfTwo:
    """Stands for a process of a group of two whose gradients are averaged elsewhere."""

    process_index: int
    num_processes: int = 2

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        yield

    def prepare(self, module: Any) -> Any:
        return module


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[[str], list[str]]:
    write_shard(tmp_path / "train.safetensors", noisy_images(120, 0, 32, classes=6))
    line = ["--images", str(tmp_path / "train.safetensors"), "--device", "cpu", "--preset", "smoke"]
    line += ["--steps", str(STEPS), "--meta-batch", "2"]
    line += ["--batch-size", "16", "--held-out-classes", "1"]
    return lambda out: [*line, "--out", str(tmp_path / out)]


def by_hand(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Weights, Weights, bool]:
    """Weights before the first and after the last step, and whether the processes ever had different gradients."""
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    args = parser.parse_args(arguments)
    config = make_config(args)
    trainers = [prepare(args.images, config, args.out, OneOfTwo(rank)) for rank in range(2)]  # type: ignore[arg-type]
    first = {name: tensor.clone() for name, tensor in trainers[0].ghn.state_dict().items()}
    differed = False
    for _ in range(STEPS):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", lambda self: True)
            for trainer in trainers:
                trainer.train_step()
                trainer.step += 1
        for one, other in zip(*(trainer.ghn.parameters() for trainer in trainers), strict=True):
            if one.grad is not None and other.grad is not None:
                differed |= not torch.equal(one.grad, other.grad)
            parts = [torch.zeros_like(one) if p.grad is None else p.grad for p in (one, other)]
            one.grad, other.grad = sum(parts) / 2, sum(parts) / 2
        for trainer in trainers:
            trainer._update()
    return first, trainers[0].ghn.state_dict(), differed


def test_two_processes_take_the_steps_of_averaged_gradients(
    arguments: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Loopback by number: a machine's own name need not resolve.
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    launch += [str(Path(__file__).with_name("train_worker.py")), "train"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for how in (["--steps", "1"], ["--resume"]):  # the second run goes on from the first one's checkpoint
        command = [sys.executable, *launch, *arguments("run"), *how]
        joined = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert joined.returncode == 0, joined.stderr[-3000:]
    found = load_file(tmp_path / "run" / f"ghn-{STEPS:07d}.safetensors")
    first, expected, differed = by_hand(arguments("alone"), monkeypatch)
    assert differed
    assert found.keys() == expected.keys()
    # AdamW's first steps are as large for the smallest gradient, whose sign rounding may turn: compare all together.
    moved = torch.cat([(tensor - first[name]).flatten() for name, tensor in expected.items()]).norm()
    apart = torch.cat([(tensor - found[name]).flatten() for name, tensor in expected.items()]).norm()
    assert float(apart) < 0.02 * float(moved)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "evaluation" in row] == [1, STEPS]


def test_processes_must_share_the_architectures_evenly(arguments: Callable[[str], list[str]], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    args = parser.parse_args([*arguments("run"), "--meta-batch", "3"])
    with pytest.raises(TrainingError, match="3 networks an update cannot be shared by 2 processes"):
        prepare(args.images, make_config(args), args.out, OneOfTwo(0))  # type: ignore[arg-type]


def test_devices_that_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="not on 'meta'"):
        join_processes("meta")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TrainingError, match="3 processes need as many GPUs, there are 2"):
        join_processes("cuda")
