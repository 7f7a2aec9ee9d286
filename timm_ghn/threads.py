"""Threads that share the work of one call: each computes with one of torch's threads, and the results come in order.

Sums depend on how torch splits them among its threads, so that numbers are computed by one thread each.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from timm_ghn.errors import InitError

_T = TypeVar("_T")

_QUEUED = 4
"""Tasks for each thread that are worked on or wait, unless a call says otherwise."""


class Workers:
    """Threads for a `with` block; at its end they are gone, and tasks that wait are forgotten.

    The number of torch's threads in the calling thread is not touched; that of threads started meanwhile elsewhere is
    1.

    Args:
        count: Number of threads, `torch.get_num_threads()` by default.

    Raises:
        InitError: If it is not positive.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = torch.get_num_threads() if count is None else count
        if self.count < 1:
            raise InitError(f"workers={count}: expected at least one thread")

    def __enter__(self) -> Workers:
        self._num_threads = torch.get_num_threads()
        self._threads: list[int] = []
        self._pool = ThreadPoolExecutor(self.count, "timm-ghn", initializer=self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        _await_end(self._threads)
        torch.set_num_threads(self._num_threads)

    def _begin(self) -> None:
        torch.set_num_threads(1)
        self._threads.append(threading.get_native_id())

    def in_order(self, tasks: Iterable[Callable[[], _T]], queued: int | None = None) -> Iterator[_T]:
        """Carry out tasks, without gradients and in the caller's mode of inference.

        Tasks are asked for in the calling thread while others are carried out.

        Args:
            tasks: The tasks; all are carried out if the iterator is exhausted.
            queued: How many are worked on or wait at once, 4 for each thread by default. One more is held while it is
                waited for them.

        Yields:
            What the tasks return, in their order.
        """
        queued = _QUEUED * self.count if queued is None else queued
        is_inference = torch.is_inference_mode_enabled()  # which is a matter of each thread

        def carry_out(task: Callable[[], _T]) -> _T:
            with torch.inference_mode(is_inference), torch.no_grad():
                return task()

        pending: deque[Future[_T]] = deque()
        for task in tasks:
            pending.append(self._pool.submit(carry_out, task))
            while pending and (pending[0].done() or len(pending) > queued):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _await_end(threads: Sequence[int]) -> None:
    """Wait until threads that were joined are gone from the operating system, on Linux; Python does not wait for that.

    MKL gives back the memory of a thread as the thread goes. A process that is forked in that moment spins for ever in
    its first matrix product.
    """
    latest = time.monotonic() + 1
    while any(os.path.exists(f"/proc/self/task/{thread}") for thread in threads) and time.monotonic() < latest:
        time.sleep(1e-4)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch use one thread in the calling thread.

    Sums depend on how they are split among threads. And a child that is forked from a process with torch's threads
    hangs in its first parallel loop.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
