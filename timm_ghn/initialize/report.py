"""What every parameter of a model got, and why: told to the user, kept in the cache, and published on the Hub."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from timm_ghn.text import table

GHN3_NOTE = "L, the noise and the scale rule are those of GHN-2: nothing is published for GHN-3."
"""Last line of the table of an initialization with a GHN-3 that was not trained for orthogonalized kernels."""


class Status(str, Enum):
    """What a parameter got."""

    PREDICTED = "predicted"
    PREDICTED_ORTHOGONALIZED = "predicted and orthogonalized"
    ORTHOGONALIZED = "orthogonalized"
    DRAWN = "orthogonal instead of predicted"
    COMPUTED = "computed"
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """One parameter.

    Attributes:
        name: Qualified name.
        shape: Shape.
        status: What it got.
        reason: Why it was kept or not predicted, or why its prediction was scaled.
        factor: What the prediction was multiplied with, before anything followed; 1 where it was left as it was.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    reason: str = ""
    factor: float = 1.0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Report:
    """What an initialization did to a model.

    Attributes:
        model: Name of the model.
        provenance: Everything that determines the weights: method, GHN and its hash, beta, L, seed, versions
            (see `timm_ghn.initialize.provenance.describe_origin`).
        parameters: Every parameter of the model, in order; tied ones once.
        from_cache: Whether the weights came from the cache.
        seconds: Time that it took, without the construction of the model.
        source: Repository of the Hub that ready-made weights were taken from; None if they were not.
    """

    model: str
    provenance: dict[str, Any]
    parameters: tuple[ParameterReport, ...]
    from_cache: bool = False
    seconds: float = 0.0
    source: str | None = None

    @property
    def num_layers(self) -> int:
        """Number of conv and fully-connected layers."""
        return int(self.provenance["num_layers"])

    @property
    def start_layer(self) -> int | None:
        """L, 1-based; None if no layer was post-processed."""
        found: int | None = self.provenance["start_layer"]
        return found

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def generated(self) -> frozenset[str]:
        """Parameters whose values the provenance determines: predicted ones, or without a GHN those that are drawn."""
        drawn = Status.ORTHOGONALIZED if self.provenance["ghn_hash"] is None else None
        statuses = (Status.PREDICTED, Status.PREDICTED_ORTHOGONALIZED, Status.DRAWN, drawn)
        return frozenset(row.name for row in self.parameters if row.status in statuses)

    def share(self, *statuses: Status) -> float:
        """Share of all elements whose parameters got one of these."""
        count = sum(parameter.numel for parameter in self.parameters if parameter.status in statuses)
        return count / max(self.num_parameters, 1)

    @property
    def predicted_share(self) -> float:
        """Share of all elements that a GHN predicted."""
        return self.share(Status.PREDICTED, Status.PREDICTED_ORTHOGONALIZED)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back."""
        names = [field.name for field in fields(ParameterReport)]
        rows = [{name: getattr(row, name) for name in names} for row in self.parameters]
        for row in rows:
            row.update(shape=list(row["shape"]), status=row["status"].value)
        return {
            "model": self.model,
            "provenance": self.provenance,
            "num_layers": self.num_layers,
            "start_layer": self.start_layer,
            "from_cache": self.from_cache,
            "seconds": self.seconds,
            "source": self.source,
            "parameters": rows,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        rows = tuple(
            ParameterReport(
                str(row["name"]), tuple(row["shape"]), Status(row["status"]), str(row["reason"]), float(row["factor"])
            )
            for row in data["parameters"]
        )
        how = bool(data["from_cache"]), float(data["seconds"]), data["source"]
        report = cls(str(data["model"]), dict(data["provenance"]), rows, *how)
        _ = report.num_layers, report.start_layer, report.generated, report.provenance["method"]
        return report

    def __str__(self) -> str:
        source = self.source or ("cache" if self.from_cache else "computed")
        layers = f"{self.num_layers} layers"
        return (
            f"{self.model}: {self.provenance['method']}, {self.num_parameters:,} parameters, "
            f"{self.predicted_share:.1%} predicted, "
            f"{layers if self.start_layer is None else f'L = {self.start_layer} of {layers}'} "
            f"({source}, {self.seconds:.2f} s)"
        )

    def table(self, *, parameters: bool = False) -> str:
        """The report as text: a line for each status and reason, or for each parameter.

        Args:
            parameters: Whether to list every parameter.
        """
        lines = [str(self), "", *(self._parameter_lines() if parameters else table(*self.summary()))]
        is_untuned = self.provenance.get("ghn_kind") == "GHN-3"
        return "\n".join([*lines, "", GHN3_NOTE] if is_untuned else lines)

    def summary(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Header and rows of a table with a line for each status and reason."""
        groups: dict[tuple[str, str], list[ParameterReport]] = defaultdict(list)
        for row in self.parameters:
            groups[row.status.value, row.reason].append(row)
        rows: list[tuple[object, ...]] = []
        for (status, reason), group in groups.items():
            count = sum(row.numel for row in group)
            share = f"{count / max(self.num_parameters, 1):.2%}"
            rows.append((status, len(group), f"{count:,}", share, _factors(group), reason))
        return ("what", "tensors", "parameters", "share", "times", "why"), rows

    def _parameter_lines(self) -> list[str]:
        rows = [
            (p.name, "x".join(map(str, p.shape)) or "scalar", p.status.value, _factors([p]), p.reason)
            for p in self.parameters
        ]
        return table(("parameter", "shape", "what", "times", "why"), rows)


def _factors(rows: Sequence[ParameterReport]) -> str:
    """The factors of some parameters; empty if there are none but 1."""
    low, high = min(row.factor for row in rows), max(row.factor for row in rows)
    if low == high:
        return "" if low == 1 else f"{low:.3g}"
    return f"{low:.3g} to {high:.3g}"


def why_scaled(structural: float, bounding: float) -> str:
    """Why a prediction was multiplied with a factor; empty if it is as the GHN gave it.

    Args:
        structural: Factor that the structure of the network asks for (`timm_ghn.scale`).
        bounding: Factor that brings a tensor back to the scale that is usual for its kind.
    """
    reasons = []
    if structural != 1:
        reasons.append("smaller, as similar layers would add up to large values and no norm layer follows")
    if bounding != 1:
        reasons.append(f"scaled, as the prediction was far too {'large' if bounding < 1 else 'small'}")
    return "; ".join(reasons)
