"""Tests of the threads that share the work of one call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from timm_ghn.threads import Workers


def test_results_come_in_order_from_threads_that_compute_with_one_thread_each() -> None:
    started = threading.Barrier(3)

    def task(number: int) -> tuple[int, int, str, bool]:
        if number < 3:
            started.wait(timeout=60)  # three at a time
        return number, torch.get_num_threads(), threading.current_thread().name, torch.is_grad_enabled()

    with Workers(3) as workers:
        results = list(workers.in_order(partial(task, number) for number in range(20)))
    numbers, torch_threads, names, gradients = zip(*results, strict=True)
    assert numbers == tuple(range(20))
    assert set(torch_threads) == {1}
    assert threading.current_thread().name not in names
    assert not any(gradients)


def test_tasks_are_asked_for_as_there_is_room() -> None:
    asked: list[int] = []
    go_on = threading.Event()

    def tasks() -> Iterator[partial[object]]:
        for number in range(10):
            asked.append(number)
            yield partial(go_on.wait if number else int)

    with Workers(1) as workers:
        results = workers.in_order(tasks(), queued=2)
        next(results)
        assert len(asked) <= 3
        go_on.set()
        assert len(list(results)) == 9
    assert asked == list(range(10))


def test_an_error_reaches_the_caller_and_ends_the_threads() -> None:
    before, num_threads = threading.active_count(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), Workers(2) as workers:
        list(workers.in_order(partial(divmod, 1, number) for number in (2, 1, 0, 1)))
    assert threading.active_count() == before
    assert torch.get_num_threads() == num_threads


def test_tasks_have_the_callers_mode_of_inference() -> None:
    with Workers(1) as workers:
        for mode in (True, False):
            with torch.inference_mode(mode):
                assert list(workers.in_order([torch.is_inference_mode_enabled])) == [mode]
