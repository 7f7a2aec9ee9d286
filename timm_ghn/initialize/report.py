"""What every parameter of a model got, and why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from timm_ghn.text import table


class Status(str, Enum):
    """What a parameter got."""

    PREDICTED = "predicted"
    PREDICTED_ORTHOGONALIZED = "predicted and orthogonalized"
    ORTHOGONALIZED = "orthogonalized"
    COMPUTED = "computed"
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """One parameter.

    Attributes:
        name: Qualified name.
        shape: Shape.
        status: What it got.
        reason: Why, where it was kept.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    reason: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Report:
    """What an initialization did to a model.

    Attributes:
        model: Name of the model.
        provenance: Everything that determines the weights: method, GHN and its hash, beta, L, seed, version.
        parameters: Every parameter of the model, in order; tied ones once.
        num_layers: Number of conv and fully-connected layers.
        start_layer: L, 1-based; None if no layer was post-processed.
        from_cache: Whether the weights came from the cache.
        seconds: Time that it took, without the construction of the model.
        source: Repository of the Hub that ready-made weights were taken from; None if they were not.
    """

    model: str
    provenance: dict[str, Any]
    parameters: tuple[ParameterReport, ...]
    num_layers: int
    start_layer: int | None
    from_cache: bool
    seconds: float
    source: str | None = None

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    def share(self, *statuses: Status) -> float:
        """Share of all elements whose parameters got one of these."""
        count = sum(parameter.numel for parameter in self.parameters if parameter.status in statuses)
        return count / max(self.num_parameters, 1)

    @property
    def predicted_share(self) -> float:
        """Share of all elements that a GHN predicted."""
        return self.share(Status.PREDICTED, Status.PREDICTED_ORTHOGONALIZED)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return {
            "model": self.model,
            "provenance": self.provenance,
            "num_layers": self.num_layers,
            "start_layer": self.start_layer,
            "from_cache": self.from_cache,
            "seconds": self.seconds,
            "source": self.source,
            "parameters": [
                {"name": p.name, "shape": list(p.shape), "status": p.status.value, "reason": p.reason}
                for p in self.parameters
            ],
        }

    def with_computed(self, names: Collection[str]) -> Report:
        """The report with parameters that a baseline has computed."""
        rows = tuple(
            replace(row, status=Status.COMPUTED, reason="") if row.name in names else row for row in self.parameters
        )
        return replace(self, parameters=rows)

    def __str__(self) -> str:
        source = self.source or ("cache" if self.from_cache else "computed")
        return (
            f"{self.model}: {self.provenance['method']}, {self.num_parameters:,} parameters, "
            f"{self.predicted_share:.1%} predicted, L = {self.start_layer} of {self.num_layers} layers "
            f"({source}, {self.seconds:.2f} s)"
        )

    def table(self, *, parameters: bool = False) -> str:
        """The report as text: a line for each status and reason, or for each parameter.

        Args:
            parameters: Whether to list every parameter.
        """
        return "\n".join([str(self), "", *(self._parameter_lines() if parameters else self._summary_lines())])

    def _summary_lines(self) -> list[str]:
        groups: dict[tuple[str, str], list[ParameterReport]] = defaultdict(list)
        for parameter in self.parameters:
            groups[parameter.status.value, parameter.reason].append(parameter)
        total = max(self.num_parameters, 1)
        rows = []
        for (status, reason), group in groups.items():
            count = sum(parameter.numel for parameter in group)
            rows.append((status, str(len(group)), f"{count:,}", f"{count / total:.2%}", reason))
        return table(("what", "tensors", "parameters", "share", "why"), rows)

    def _parameter_lines(self) -> list[str]:
        rows = [(p.name, "x".join(map(str, p.shape)) or "scalar", p.status.value, p.reason) for p in self.parameters]
        return table(("parameter", "shape", "what", "why"), rows)
