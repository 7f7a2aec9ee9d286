"""Several runs at a time on one device: processes that share a folder of results."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import multiprocessing

from timm_ghn.finetune import Benchmark, Execution, FineTuneConfig, Job, ResultStore, RunResult, run_jobs, tune


def run_together(
    jobs: Sequence[Job], data: Benchmark, store: ResultStore, execution: Execution, together: int
) -> tuple[RunResult, ...]:
    """Make runs as `run_jobs` does, several at a time.

    Args:
        jobs: The runs.
        data: The images.
        store: Where results are.
        execution: How to compute.
        together: Processes, each with a run of its own; 1 to compute in this one.
    """
    if together > 1 and len(jobs) > 1:
        work, threads = partial(run_jobs, data=data, store=store, execution=execution), torch.get_num_threads()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(together, len(jobs)), context, torch.set_num_threads, (threads,)) as pool:
            list(pool.map(work, [[job] for job in jobs]))
    return run_jobs(jobs, data, store, execution)


def tune_together(
    candidates: Sequence[FineTuneConfig],
    seeds: Sequence[int],
    data: Benchmark,
    store: ResultStore,
    execution: Execution,
    together: int,
) -> FineTuneConfig:
    """Choose settings as `tune` does, with several trials at a time."""
    if len(candidates) > 1:
        trials = [Job(replace(config, split="validation"), seed) for config in candidates for seed in seeds]
        run_together(trials, data, store, execution, together)
    return tune(candidates, seeds, data, store, execution)


def grid(config: FineTuneConfig, lrs: Sequence[float], weight_decays: Sequence[float]) -> list[FineTuneConfig]:
    """The configuration with every learning rate and weight decay; with its own where none are given."""
    return [
        replace(config, lr=lr, weight_decay=decay)
        for lr in lrs or (config.lr,)
        for decay in weight_decays or (config.weight_decay,)
    ]
