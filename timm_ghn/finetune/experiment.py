"""Many runs: which are left, several at a time, tuned learning rates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.batches import DeviceImages
from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.finetune.data import Benchmark, Task, classes_in_turn, make_task
from timm_ghn.finetune.network import build_network, weights_digest
from timm_ghn.finetune.results import ResultStore, RunResult, Summary, environment, summarize
from timm_ghn.finetune.run import Execution, Point, Run

_logger = logging.getLogger(__name__)

Reporter = Callable[[Point], None]
"""Called after an epoch; what it raises ends the run, which goes on from its checkpoint another time."""

_INITIAL_IMAGES = 64
"""Training images that initializations which look at data are given."""


@dataclass(frozen=True)
class Job:
    """A run to make: settings and a seed."""

    config: FineTuneConfig
    seed: int


def run_jobs(
    jobs: Sequence[Job],
    data: Benchmark,
    store: ResultStore,
    execution: Execution,
    *,
    together: int = 1,
    report: Reporter | None = None,
) -> tuple[RunResult, ...]:
    """Make the runs that are not in the store, and return the results of all that are by then.

    A run that another process works on is left to it. A run that was interrupted goes on from its checkpoint.

    Args:
        jobs: The runs.
        data: The images.
        store: Where results are.
        execution: How to compute.
        together: Runs that take turns on a device, each on its own CUDA stream.
        report: Called after every epoch of every run.

    Raises:
        FineTuneError: If a run cannot be made, or memory does not suffice (the message says what to change).
    """
    named = _named(jobs, data)
    todo = [item for item in named if store.read(item[0]) is None]
    steps = sum(job.config.epochs * steps_per_epoch(job.config, task) for _, job, task in todo)
    with tqdm(total=steps, unit="step", delay=2, smoothing=0.01, disable=None) as bar:
        for start in range(0, len(todo), together):
            _run_group(todo[start : start + together], data, store, execution, bar, report)
    found = (store.read(key) for key in dict.fromkeys(key for key, _, _ in named))
    return tuple(result for result in found if result is not None)


def steps_per_epoch(config: FineTuneConfig, task: Task) -> int:
    """Steps in which all training images come once."""
    return -(-len(task.train) // config.batch_size)


def _named(jobs: Sequence[Job], data: Benchmark) -> list[tuple[str, Job, Task]]:
    """The runs with their names and images; what several have in common is made once."""
    tasks: dict[tuple[str, int | None], Task] = {}
    weights: dict[tuple[str, str | None, str | None], str] = {}
    named = []
    for job in jobs:
        config = job.config
        images, source = (config.split, config.labels_per_class), (config.init, config.ghn, config.init_file)
        if images not in tasks:
            tasks[images] = make_task(data, config)
        if source not in weights:
            weights[source] = weights_digest(config)
        named.append((config.key(job.seed, tasks[images].digest, weights[source]), job, tasks[images]))
    return named


def _run_group(
    group: Sequence[tuple[str, Job, Task]],
    data: Benchmark,
    store: ResultStore,
    execution: Execution,
    bar: Any,
    report: Reporter | None,
) -> None:
    """Make a few runs in turns; the bar counts their steps."""
    with ExitStack() as stack, explained_memory(group[0][1].config, len(group)):
        active: list[tuple[str, Run, Task]] = []
        for key, job, task in group:
            steps = job.config.epochs * steps_per_epoch(job.config, task)
            # Another process may have finished it since the store was read.
            if stack.enter_context(store.claimed(key)) and store.read(key) is None:
                run = _start(key, job, task, store, execution)
                steps = run.progress.epoch * steps_per_epoch(job.config, task)
                active.append((key, run, task))
            else:
                _logger.info("%s is left to the process that works on it", key)
            bar.update(steps)
        bar.set_postfix_str(", ".join(f"{run.config.starts_from}, seed {run.seed}" for _, run, _ in active))
        _train(active, store, execution, bar, report)
        for key, run, task in active:
            store.write(_result(key, run, task, data), run.module.state_dict() if execution.keep_weights else None)


def _start(key: str, job: Job, task: Task, store: ResultStore, execution: Execution) -> Run:
    """A new run, or one that goes on."""
    images = _initial_images(job.config, task)
    network = build_network(job.config, len(task.train.classes), job.seed, images)
    run = Run(job.config, job.seed, task, network, execution)
    path = store.checkpoint(key)
    if path.exists():
        run.load(path)
        _logger.info("%s goes on after %d epochs", key, run.progress.epoch)
    return run


def _initial_images(config: FineTuneConfig, task: Task) -> Tensor:
    """A few training images of every class, normalized, on the CPU."""
    first = task.train.subset(classes_in_turn(task.train.labels, _INITIAL_IMAGES))
    images = DeviceImages.of(first, task, config, torch.device("cpu"), padding=0, channels_last=False)
    return images.plain(0, len(first))[0]


def _train(
    active: Sequence[tuple[str, Run, Task]], store: ResultStore, execution: Execution, bar: Any, report: Reporter | None
) -> None:
    """Train all to their ends, step by step in turns."""
    saved = monotonic()
    while running := [item for item in active if not item[1].is_done]:
        epochs = [run.epoch() for _, run, _ in running]
        while epochs := [epoch for epoch in epochs if next(epoch, True) is None]:
            bar.update(len(epochs))
        for key, run, task in running:
            if run.progress.diverged:
                left = run.config.epochs - run.progress.epoch
                bar.update(left * steps_per_epoch(run.config, task))
                _logger.warning("%s diverged in epoch %d: its loss is not finite, and it does not count; a learning "
                    "rate below %g may help", key, run.progress.epoch, run.config.lr)  # fmt: skip
            if report is not None:
                report(run.progress.curve[-1])
        if monotonic() - saved >= execution.save_seconds:
            for key, run, _ in active:
                run.save(store.checkpoint(key))
            saved = monotonic()


def _result(key: str, run: Run, task: Task, data: Benchmark) -> RunResult:
    """The record of a finished run."""
    progress = run.progress
    last = progress.curve[-1]
    if last.accuracy is None or last.loss is None:
        raise FineTuneError(f"{key} was not measured after its last epoch")
    return RunResult(
        key=key,
        config=run.config,
        seed=run.seed,
        accuracy=last.accuracy,
        loss=last.loss,
        diverged=progress.diverged,
        seconds=progress.seconds,
        images_per_second=progress.epoch * len(task.train) / max(progress.seconds, 1e-9),
        curve=tuple(progress.curve),
        data={
            "name": data.name,
            "copy": task.copy,
            "digest": task.digest,
            "train": len(task.train),
            run.config.split: len(task.test),
            "classes": len(task.train.classes),
        },
        network={
            "parameters": sum(parameter.numel() for parameter in run.module.parameters()),
            "stem": run.network.stem,
            "weights": dict(run.network.provenance),
        },
        environment=environment(run.device),
    )


@contextmanager
def explained_memory(config: FineTuneConfig, together: int) -> Iterator[None]:
    """Say what to change where memory does not suffice.

    Raises:
        FineTuneError: In place of torch's error.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        ways = [f"a smaller --batch-size than {config.batch_size}", "--precision bfloat16"]
        if together > 1:
            ways.insert(0, f"fewer runs at a time than --together {together}")
        if config.adjusts_stem:
            ways.append("--stem original")
        raise FineTuneError(
            f"{config.model} does not fit in the memory of the GPU with images of {config.image_size} pixels: try "
            f"{', '.join(ways)}. Finished runs are kept; the same command goes on"
        ) from error


# --- tuning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Values to try on the held-out training images.

    Attributes:
        lrs: Learning rates; empty for the configuration's.
        weight_decays: Weight decays; likewise.
        seeds: Seeds of every trial.
    """

    lrs: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (1000,)

    def of(self, config: FineTuneConfig) -> tuple[FineTuneConfig, ...]:
        """The configurations to try, which measure on the validation images."""
        return tuple(
            replace(config, lr=lr, weight_decay=decay, split="validation")
            for lr in self.lrs or (config.lr,)
            for decay in self.weight_decays or (config.weight_decay,)
        )


def tune(
    config: FineTuneConfig, grid: Grid, data: Benchmark, store: ResultStore, execution: Execution, *, together: int = 1
) -> FineTuneConfig:
    """The configuration with the learning rate and weight decay that are best on held-out training images.

    Raises:
        FineTuneError: As `run_jobs`, or if other processes still work on some of the trials.
    """
    trials = grid.of(config)
    if len(trials) < 2:
        return replace(config, lr=trials[0].lr, weight_decay=trials[0].weight_decay)
    jobs = [Job(trial, seed) for trial in trials for seed in grid.seeds]
    results = run_jobs(jobs, data, store, execution, together=together)
    if len(results) < len(jobs):
        raise FineTuneError(
            f"{len(jobs) - len(results)} of {len(jobs)} trials are left to other processes: run this again later"
        )
    best = best_of(summarize(results))
    _logger.info("%s, %s: lr %g, weight decay %g", config.model, config.starts_from, best.lr, best.weight_decay)
    return replace(config, lr=best.lr, weight_decay=best.weight_decay)


def best_of(summaries: Sequence[Summary]) -> FineTuneConfig:
    """The configuration of the highest mean accuracy; of equal ones the smallest learning rate.

    One with a run that diverged comes last.
    """
    return max(summaries, key=lambda row: (not row.diverged, row.mean if row.accuracies else 0, -row.config.lr)).config
