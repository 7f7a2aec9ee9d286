"""How much of a training step's time is the network's own: images a second of the loop against a resident batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_ghn.finetune.batches import epoch_picks
from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.finetune.data import Task
from timm_ghn.finetune.run import Execution, Run, Step


@dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
        loop: Images a second of the training loop: chosen, cropped, mirrored, normalized, trained on.
        resident: Images a second of steps on one batch that stays where it is.
        batch_size: Images a step.
        seconds_per_run: Time that a run of the configuration's epochs would take, without measurements.
    """

    loop: float
    resident: float
    batch_size: int
    seconds_per_run: float

    @property
    def ratio(self) -> float:
        """Share of the resident speed that the loop reaches."""
        return self.loop / self.resident


def measure_throughput(
    config: FineTuneConfig, task: Task, execution: Execution, *, rounds: int = 5, steps: int = 4
) -> Throughput:
    """Time both kinds of steps in turns, and take medians.

    Args:
        config: Settings.
        task: Images.
        execution: How to compute.
        rounds: Turns that count; one more warms up.
        steps: Steps a turn.
    """
    run = Run(config, 0, task, config.build(len(task.train.classes), 0), execution)
    size = min(config.batch_size, len(run.images))
    picks = epoch_picks(config, len(run.images), 0, 0)[:, :size].to(run.device)
    resident = _resident_step(run, picks)
    run.module.train()
    kinds: dict[str, Callable[[int], None]] = {
        "loop": lambda index: run.train_on(picks, 0, index),
        "resident": lambda _: resident(picks),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, step in kinds.items():
            elapsed = _seconds(run, step, steps) / steps
            if number:
                times[kind].append(elapsed)
    loop, alone = (statistics.median(times[kind]) for kind in kinds)
    return Throughput(size / loop, size / alone, size, loop / size * len(run.images) * config.epochs)


def _resident_step(run: Run, picks: Tensor) -> Step:
    """A step that trains on the same batch whatever it is asked for."""
    batch, capture = run.images.augmented(picks), run.execution.capture

    def step(_: Tensor) -> None:
        run.update(*batch)

    return step if capture is None or run.device.type != "cuda" else capture(run, step)


def _seconds(run: Run, step: Callable[[int], None], steps: int) -> float:
    """Time of some steps."""
    _synchronize(run)
    started = time.perf_counter()
    for index in range(steps):
        step(index)
    _synchronize(run)
    return time.perf_counter() - started


def _synchronize(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
