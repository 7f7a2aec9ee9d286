"""Time by step, where steps may run inside of each other and generators hand over in between."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from timm_ghn.ghn import GHN, Prediction
from timm_ghn.graph import Graph


class Clock:
    """Adds up the seconds of named steps. Time inside of an inner step counts for the inner one alone.

    Attributes:
        last: The step that was entered last; after an error, the one that failed.
    """

    def __init__(self) -> None:
        self.last = ""
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def __getitem__(self, step: str) -> float:
        return self._seconds.get(step, 0.0)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by step."""
        return dict(self._seconds)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the time of a `with` block."""
        self._charge()
        self.last = name
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def switch(self, name: str) -> None:
        """End the innermost step and begin another in its place."""
        self._charge()
        self.last = name
        if self._open:
            self._open[-1] = name

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


class ClockedGHN(GHN):
    """A GHN with the weights of another that counts the time of its steps: distances, gnn, decode.

    Args:
        ghn: The other GHN.
        clock: Where the time is counted. When the prediction begins, its innermost step becomes `after`.
        after: Name of what follows.
    """

    def __init__(self, ghn: GHN, clock: Clock, after: str) -> None:
        super().__init__(ghn.config)
        self.load_state_dict(ghn.state_dict())
        self.info, self.seen = ghn.info, ghn.seen
        self.eval()
        self._clock = clock
        self._after = after

    def embed_nodes(self, graphs: Any) -> Tensor:
        """As of any GHN."""
        batch = [graphs] if isinstance(graphs, Graph) else list(graphs)
        with self._clock.step("distances"):
            for graph in batch:
                _ = graph.distance_matrix
        with self._clock.step("gnn"):
            return super().embed_nodes(batch)

    def predict(self, graph: Graph, *args: Any, **kwargs: Any) -> Iterator[Prediction]:
        """As of any GHN."""
        self._clock.switch(self._after)
        predictions = super().predict(graph, *args, **kwargs)
        while True:
            with self._clock.step("decode"):
                prediction = next(predictions, None)
            if prediction is None:
                return
            values = {item.name: getattr(prediction, item.name) for item in fields(prediction)}
            yield _Clocked(**values, clock=self._clock)


@dataclass(frozen=True, slots=True)
class _Clocked(Prediction):
    """A prediction that counts the time of being written, also after `dataclasses.replace`.

    Attributes:
        clock: Where the time is counted.
    """

    clock: Clock = field(default_factory=Clock, compare=False)

    def write_(self, parameter: Tensor) -> None:
        """As of any prediction."""
        with self.clock.step("decode"):
            Prediction.write_(self, parameter)
