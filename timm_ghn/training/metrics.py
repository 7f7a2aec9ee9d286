"""What a run counts between two lines of its metrics: what the networks reach, and where the time goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean


class Meter:
    """Means of named values, and seconds of named parts of an update, since the last line of the metrics.

    On CUDA, a part's seconds are those until its kernels are launched; they wait wherever a value is read.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()
        self.steps = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Count some values once."""
        for name, value in values.items():
            self._values[name].append(value)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time that is spent here for a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def summary(self) -> dict[str, float]:
        """Means, updates a second, and shares of the time."""
        total = max(time.perf_counter() - self._started, 1e-9)
        means = {name: fmean(values) for name, values in self._values.items()}
        shares = {f"{name}_share": seconds / total for name, seconds in self._seconds.items()}
        return {**means, "steps_per_second": self.steps / total, **shares}
