"""A program that imports everything once and forks processes which use the cache; run by test_cache_faults.py.

Prints one line of JSON. It is single-threaded and computes nothing itself, so forking is safe.

    python tests/cache_worker.py crowd 16
    python tests/cache_worker.py kill 200 [SEED]
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import timm_ghn
from timm_ghn.storage.cache import WeightCache

MODEL = "test_vit"


def create() -> dict[str, Any]:
    """Make a model; its weights' hash, and whether they came from the cache."""
    model = timm.create_model(MODEL, init="ghn-orth")
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    report = timm_ghn.report_of(model)
    return {"digest": digest.hexdigest(), "from_cache": report is not None and report.from_cache}


def fork(work: Callable[[], dict[str, Any]], result: int) -> int:
    """Run in a child, which writes its result as a line of JSON to a pipe."""
    pid = os.fork()
    if pid == 0:
        try:
            os.write(result, json.dumps(work()).encode() + b"\n")
        finally:
            os._exit(0)
    return pid


def in_child() -> dict[str, Any]:
    """`create` in a process of its own."""
    reader, writer = os.pipe()
    pid = fork(create, writer)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(text)
    return found


def crowd(count: int) -> dict[str, Any]:
    """Many processes ask for the same entry at once."""
    gate, opener = os.pipe()
    reader, writer = os.pipe()

    def work() -> dict[str, Any]:
        os.close(opener)
        os.read(gate, 1)  # returns when the parent closes the other end
        return create()

    children = [fork(work, writer) for _ in range(count)]
    os.close(writer)
    os.close(opener)
    with os.fdopen(reader) as stream:
        results = [json.loads(line) for line in stream]
    for child in children:
        os.waitpid(child, 0)
    return {"results": results}


class Killer:
    """Kills processes that fill an empty cache, and looks at what they leave."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.cache = WeightCache.default()
        self.outcomes = {"before writing": 0, "while writing": 0, "after writing": 0}
        start = time.perf_counter()
        self.reference = in_child()["digest"]
        self.seconds = time.perf_counter() - start
        (self.path,) = self.entries()
        self.content = self.path.read_bytes()
        self.path.unlink()

    def entries(self) -> list[Path]:
        return sorted(self.cache.weights.glob("[!.]*.safetensors"))

    def temporaries(self) -> list[Path]:
        return sorted(self.cache.weights.glob(".*.tmp"))

    def kill_one(self, number: int) -> None:
        """Kill at a random instant: of the whole run, or of the moments around the writing of the file."""
        before = len(self.temporaries())
        pid = fork(create, os.open(os.devnull, os.O_WRONLY))
        if number % 2:
            time.sleep(self.random.uniform(0, 1.2 * self.seconds))
        else:
            deadline = time.monotonic() + 60
            while len(self.temporaries()) == before and not self.entries() and time.monotonic() < deadline:
                time.sleep(0.0002)
            time.sleep(self.random.uniform(0, 0.0015))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.check(before)

    def check(self, before: int) -> None:
        """What is there is whole."""
        entries = self.entries()
        kind = "after writing" if entries else "while writing" if len(self.temporaries()) > before else "before writing"
        self.outcomes[kind] += 1
        for path in entries:
            if path != self.path or path.read_bytes() != self.content:
                raise AssertionError(f"{path} is not what was to be written")
        problems = [info.problem for info in self.cache.verify() if info.problem]
        if problems:
            raise AssertionError(problems[0])

    def finish(self, number: int) -> None:
        """The next process gets the right weights, and is not kept waiting."""
        start = time.perf_counter()
        found = in_child()
        if found["digest"] != self.reference:
            raise AssertionError("other weights after a kill")
        if time.perf_counter() - start > 10 + 10 * self.seconds:
            raise AssertionError("the dead process still holds the lock")
        self.path.unlink()
        if number % 3 == 0:
            shutil.rmtree(self.cache.root)


def kill(count: int, seed: int) -> dict[str, Any]:
    """Kill `count` processes; after every one of those, look at the files, and after every tenth at the weights."""
    killer = Killer(seed)
    for number in range(count):
        killer.kill_one(number)
        if number % 10 == 9 or number == count - 1:
            killer.finish(number)
        elif killer.path.exists():
            killer.path.unlink()
    return {"kills": count, "outcomes": killer.outcomes, "seconds": killer.seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, *numbers = sys.argv[1:]
    print(json.dumps(crowd(int(numbers[0])) if mode == "crowd" else kill(int(numbers[0]), int((*numbers, 0)[1]))))
