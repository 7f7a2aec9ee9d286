"""Running tasks side by side, each in a process of its own, so that memory returns and nothing can end the rest."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from zoo_survey.names import module_of
from zoo_survey.records import Entry, Failure, Stage

PRELOAD = "zoo_survey.warm"
_POLL_SECONDS = 1.0
_HEADROOM = 2 * 2**30


@dataclass(frozen=True)
class Task:
    """One stage of one model.

    Attributes:
        stage: What is tried.
        name: Name of the model.
        work: Function of the name that makes the entry; importable, as it is called in another process.
        memory: Bytes that it needs, about.
    """

    stage: Stage
    name: str
    work: Callable[[str], Entry]
    memory: int = 0


@dataclass(frozen=True)
class Limits:
    """What tasks may use.

    Attributes:
        jobs: Processes at a time.
        memory: Bytes of all of them together. A task that needs more than all of it runs alone.
        seconds: Time of one task.
    """

    jobs: int = 1
    memory: int = 8 * 2**30
    seconds: float = 600.0


@dataclass(frozen=True)
class _Running:
    task: Task
    process: BaseProcess
    connection: Connection
    start: float


def run(tasks: Sequence[Task], limits: Limits = Limits()) -> Iterator[Entry]:
    """Work off tasks in order, each in a new process.

    A process that ends without a result, or that takes too long and is ended, makes an entry with a failure. Closing
    the iterator ends all processes.

    Args:
        tasks: What is to be done.
        limits: Processes, memory and time.

    Yields:
        One entry a task, as they are finished.
    """
    context = _context()
    waiting, running = list(tasks), list[_Running]()
    try:
        while waiting or running:
            while waiting and _fits(waiting[0], running, limits):
                running.append(_start(waiting.pop(0), context, limits))
            ready = set(wait([item.connection for item in running], timeout=_POLL_SECONDS))
            for item in [*running]:
                entry = _outcome(item, item.connection in ready, limits.seconds)
                if entry is not None:
                    running.remove(item)
                    yield entry
    finally:
        for item in running:
            _end(item)


def _context() -> BaseContext:
    """Processes that are forked from a server which has imported everything, where the system can do that."""
    here = str(Path(__file__).parent.parent)  # the server imports what it is told to from there
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([here, *known]))
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOAD])
        return context
    return multiprocessing.get_context("spawn")


def _fits(task: Task, running: Sequence[_Running], limits: Limits) -> bool:
    if not running:
        return True
    used = sum(item.task.memory for item in running)
    return len(running) < limits.jobs and used + task.memory <= limits.memory


def _start(task: Task, context: BaseContext, limits: Limits) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    arguments = (task.work, task.name, sender, max(limits.memory, task.memory) + _HEADROOM)
    process: BaseProcess = context.Process(target=_child, args=arguments, daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    return _Running(task, process, receiver, time.perf_counter())


def _outcome(item: _Running, is_ready: bool, seconds: float) -> Entry | None:
    """The entry of a task that is over; None while it goes on."""
    elapsed = time.perf_counter() - item.start
    if is_ready:
        try:
            entry: Entry = item.connection.recv()
        except (EOFError, OSError):
            item.process.join()
            entry = _failed(item.task, Failure("process", "Killed", _ending(item.process.exitcode)), elapsed)
        _end(item)
        return entry
    if elapsed > seconds:
        _end(item)
        return _failed(item.task, Failure("process", "Timeout", f"not done after {seconds:g} s"), elapsed)
    return None


def _failed(task: Task, failure: Failure, elapsed: float) -> Entry:
    return Entry(task.stage, task.name, module_of(task.name), None, failure, elapsed)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"the process was ended by {signal.Signals(-code).name}{hint}"
    return f"the process ended with status {code} and no result"


def _end(item: _Running) -> None:
    item.process.kill()
    item.process.join()
    item.process.close()
    item.connection.close()


# --- in the other process -------------------------------------------------------------------------------------------


def _child(work: Callable[[str], Entry], name: str, sender: Connection, memory: int) -> None:
    """Do one task and send its entry."""
    importlib.import_module(PRELOAD)

    _silence()
    _limit_memory(memory)
    sender.send(work(name))
    sender.close()


def _silence() -> None:
    """Models and other packages print; the terminal is the progress bar's."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def _limit_memory(size: int) -> None:
    """Let an allocation beyond `size` bytes fail here, before the system ends some other process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))
