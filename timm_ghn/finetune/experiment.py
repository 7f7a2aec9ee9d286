"""Many runs: which are left, and which settings are best on held-out images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.batches import DeviceImages
from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.finetune.data import Benchmark, Task, classes_in_turn, make_task
from timm_ghn.finetune.results import ResultStore, RunResult, Summary, environment, summarize
from timm_ghn.finetune.run import Execution, Run
from timm_ghn.initialize.provenance import report_of

_logger = logging.getLogger(__name__)

_INITIAL_IMAGES = 64
"""Training images that initializations which look at data are given."""


@dataclass(frozen=True)
class Job:
    """A run to make: settings and a seed."""

    config: FineTuneConfig
    seed: int


def run_jobs(jobs: Sequence[Job], data: Benchmark, store: ResultStore, execution: Execution) -> tuple[RunResult, ...]:
    """Make the runs that are not in the store, and return the results of all that are by then.

    A run that another process works on is left to it. A run that was interrupted begins anew.

    Args:
        jobs: The runs.
        data: The images.
        store: Where results are.
        execution: How to compute.

    Raises:
        FineTuneError: If a run cannot be made, or memory does not suffice (the message says what to change).
    """
    named = _named(jobs, data)
    todo = {key: (job, task) for key, job, task in named if store.read(key) is None}
    total = sum(_steps(job.config, task) for job, task in todo.values())
    with tqdm(total=total, unit="step", delay=2, smoothing=0.01, disable=None) as bar:
        for key, (job, task) in todo.items():
            end = bar.n + _steps(job.config, task)
            # Another process may have finished it since the store was read.
            with store.claimed(key) as is_ours, explained_memory(job.config):
                if is_ours and store.read(key) is None:
                    bar.set_postfix_str(f"{job.config.starts_from}, seed {job.seed}")
                    run = _trained(job, task, execution, bar.update)
                    weights = run.module.state_dict() if execution.keep_weights else None
                    store.write(_result(key, run, task, data), weights)
                else:
                    _logger.info("%s is left to the process that works on it", key)
            bar.update(end - bar.n)
    found = (store.read(key) for key in dict.fromkeys(key for key, _, _ in named))
    return tuple(result for result in found if result is not None)


def _named(jobs: Sequence[Job], data: Benchmark) -> list[tuple[str, Job, Task]]:
    """The runs with their names and images; what several have in common is made once."""
    tasks: dict[tuple[str, int | None], Task] = {}
    weights: dict[tuple[str, str | None], str] = {}
    named = []
    for job in jobs:
        config = job.config
        images, source = (config.split, config.labels_per_class), (config.starts_from, config.ghn)
        if images not in tasks:
            tasks[images] = make_task(data, config)
        if source not in weights:
            weights[source] = config.weights_digest()
        named.append((config.key(job.seed, tasks[images].digest, weights[source]), job, tasks[images]))
    return named


def _steps(config: FineTuneConfig, task: Task) -> int:
    """Steps of all epochs of a run."""
    return config.epochs * -(-len(task.train) // config.batch_size)


def _trained(job: Job, task: Task, execution: Execution, after_step: Callable[[], object]) -> Run:
    """Train a network to the end."""
    first = task.train.subset(classes_in_turn(task.train.labels, _INITIAL_IMAGES))
    images = DeviceImages.of(first, task, job.config, torch.device("cpu")).plain(0, len(first))[0].contiguous()
    network = job.config.build(len(task.train.classes), job.seed, images)
    run = Run(job.config, job.seed, task, network, execution)
    while not run.is_done:
        run.train_epoch(after_step)
    return run


def _result(key: str, run: Run, task: Task, data: Benchmark) -> RunResult:
    """The record of a finished run."""
    if run.diverged:
        _logger.warning("%s diverged in epoch %d: its loss is not finite, and it does not count; a learning rate below "
            "%g may help", key, len(run.curve), run.config.lr)  # fmt: skip
    loss, accuracy = run.measured
    sizes = {"train": len(task.train), run.config.split: len(task.test), "classes": data.num_classes}
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    report = report_of(run.module)
    weights = {"method": run.config.starts_from} if report is None else dict(report.provenance)
    return RunResult(
        key=key,
        config=run.config,
        seed=run.seed,
        accuracy=accuracy,
        loss=loss,
        diverged=run.diverged,
        seconds=run.seconds,
        images_per_second=len(run.curve) * len(task.train) / max(run.seconds, 1e-9),
        curve=tuple(run.curve),
        data={"name": data.name, "copy": data.copy, "digest": task.digest, **sizes},
        network={"parameters": parameters, "weights": weights},
        environment=environment(run.device),
    )


@contextmanager
def explained_memory(config: FineTuneConfig) -> Iterator[None]:
    """Say what to change where memory does not suffice.

    Raises:
        FineTuneError: In place of torch's error.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise FineTuneError(
            f"{config.model} does not fit in the memory of the GPU with images of {config.image_size} pixels: try a "
            f"smaller --batch-size than {config.batch_size}, a smaller --image-size, or fewer runs at a time. Finished "
            "runs are kept; the same command goes on"
        ) from error


def tune(
    candidates: Sequence[FineTuneConfig],
    seeds: Sequence[int],
    data: Benchmark,
    store: ResultStore,
    execution: Execution,
) -> FineTuneConfig:
    """The settings that are best on held-out training images; a single candidate is not tried.

    Args:
        candidates: Settings to choose from, which differ in learning rate or weight decay.
        seeds: Seeds of the trials of each candidate.
        data: The images.
        store: Where results are.
        execution: How to compute.

    Raises:
        FineTuneError: As `run_jobs`, or if other processes still work on some of the trials.
    """
    if len(candidates) == 1:
        return candidates[0]
    jobs = [Job(replace(config, split="validation"), seed) for config in candidates for seed in seeds]
    results = run_jobs(jobs, data, store, execution)
    if len(results) < len(jobs):
        raise FineTuneError(
            f"{len(jobs) - len(results)} of {len(jobs)} trials are left to other processes: run this again later"
        )
    best = best_of(summarize(results))
    _logger.info("%s, %s: lr %g, weight decay %g", best.model, best.starts_from, best.lr, best.weight_decay)
    return replace(best, split=candidates[0].split)


def best_of(summaries: Sequence[Summary]) -> FineTuneConfig:
    """The configuration of the highest mean accuracy; of equal ones the smallest learning rate.

    One with a run that diverged comes last.
    """
    return max(summaries, key=lambda row: (not row.diverged, row.mean if row.accuracies else 0, -row.config.lr)).config
