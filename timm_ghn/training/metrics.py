"""What a run counts between two lines of its metrics: what the networks reach, and where the time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from timm_ghn.training.objective import Score


@dataclass
class Meter:
    """Running sums over the networks of one task since the last line of the metrics file."""

    loss: float = 0.0
    classes: int = 0
    groups: int = 0
    images: int = 0
    networks: int = 0
    ridge_loss: float = 0.0
    ridge_accuracy: float = 0.0

    def add(self, score: Score) -> None:
        """Count a network's batch."""
        self.loss += float(score.loss.detach())
        self.classes += score.classes
        self.groups += score.groups
        self.images += score.count
        self.networks += 1

    def summary(self) -> dict[str, float]:
        """Means; empty if nothing was counted."""
        if not self.networks:
            return {}
        return {
            "loss": self.loss / self.networks,
            "accuracy": self.classes / self.images,
            "group_accuracy": self.groups / self.images,
            "ridge_loss": self.ridge_loss / self.networks,
            "ridge_accuracy": self.ridge_accuracy / self.networks,
        }


PARTS = ("images", "networks_forward", "networks_backward", "ghn_forward", "ghn_backward", "update")
"""Parts of a step, as `Clock` times them: those of the networks, and those of the GHN and its optimizer."""


@dataclass
class Clock:
    """Where the time of this process went, and sums over its steps, since the last line of the metrics file.

    On CUDA, a part's seconds are those until its kernels are launched; they wait wherever a value is read.
    """

    steps: int = 0
    networks: int = 0
    images: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    norm_penalty: float = 0.0
    correlation_penalty: float = 0.0
    gradient: float = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time that is spent here for one of the `PARTS`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - start

    def summary(self) -> dict[str, float]:
        """Means, rates and shares of the time; empty if nothing was counted."""
        if not self.steps:
            return {}
        total = max(self.seconds, 1e-9)
        ghn = sum(self.parts[name] for name in ("ghn_forward", "ghn_backward", "update"))
        return {
            "norm_penalty": self.norm_penalty / self.steps,
            "correlation_penalty": self.correlation_penalty / self.steps,
            "gradient": self.gradient / self.steps,
            "steps_per_second": self.steps / total,
            "architectures_per_second": self.networks / total,
            "images_per_second": self.images / total,
            "ghn_share": ghn / total,
            **{f"{name}_share": seconds / total for name, seconds in self.parts.items()},
        }
