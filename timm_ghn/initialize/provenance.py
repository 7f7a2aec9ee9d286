"""What is told of an initialization: in its report, beside cached weights, and in timm's description of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from timm_ghn import numerics
from timm_ghn._version import __version__
from timm_ghn.initialize.plan import Plan
from timm_ghn.initialize.report import ParameterReport, Report, Status
from timm_ghn.scale.rule import describe_factor

_PREFIX = "timm-ghn: "
"""Start of the note in `model.pretrained_cfg` that holds the provenance."""
_PAPER = "arXiv:2207.10049"
_FOREIGN_FIELDS = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "origin_url", "license",
)  # fmt: skip
"""Fields of `model.pretrained_cfg` that say where pretrained weights come from."""


@dataclass(frozen=True)
class Provenance:
    """Everything that determines the generated weights of a model.

    Attributes:
        method: Name of the method.
        version: Version of this package.
        ghn: What the GHN is called; None without one.
        ghn_hash: SHA-256 of its configuration and weights; None likewise.
        noise: beta; 0 if nothing is post-processed.
        start_layer: L; None without post-processing.
        num_layers: Number of conv and fully-connected layers.
        seed: Seed of the noise and of what is random.
        correlation: Whose correlations scale the noise.
        reading: How the graph is read.
        rescale: Whether the scale of predictions is kept sane, "auto" or "off".
        numerics: Version of the rules that turn all this into numbers (`timm_ghn.numerics`).
    """

    method: str
    version: str
    ghn: str | None
    ghn_hash: str | None
    noise: float
    start_layer: int | None
    num_layers: int
    seed: int
    correlation: str
    reading: str
    rescale: str
    numerics: int

    @classmethod
    def of(cls, plan: Plan) -> Provenance:
        """The provenance of what a plan generates."""
        init, hypernetwork = plan.init, plan.hypernetwork
        return cls(
            method=init.method,
            version=__version__,
            ghn=None if hypernetwork is None else hypernetwork.name,
            ghn_hash=None if hypernetwork is None else hypernetwork.hash,
            noise=plan.postprocess.noise if plan.processed else 0.0,
            start_layer=plan.start_layer,
            num_layers=len(plan.layers),
            seed=init.seed,
            correlation=init.correlation,
            reading=init.reading,
            rescale=init.rescale,
            numerics=numerics.VERSION,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return asdict(self)

    def describe(self) -> str:
        """The provenance in a line."""
        parts = [f"Initialization {self.method}, not trained"]
        if self.ghn is not None and self.ghn_hash is not None:
            parts.append(f"GHN {self.ghn} ({self.ghn_hash[:12]})")
        if self.start_layer is not None:
            parts.append(f"L = {self.start_layer} of {self.num_layers}, beta = {self.noise:g}")
        return "; ".join([*parts, f"seed {self.seed}; timm-ghn {self.version}"])


@dataclass(frozen=True)
class Facts:
    """What is known of an initialization beside the weights.

    Attributes:
        provenance: What determines the weights.
        parameters: What every parameter gets, in order.
    """

    provenance: Provenance
    parameters: tuple[ParameterReport, ...]

    @classmethod
    def of(cls, plan: Plan) -> Facts:
        """The facts of what a plan does."""
        rows = (ParameterReport(name, tuple(p.shape), *_outcome(plan, name)) for name, p in plan.parameters.items())
        return cls(Provenance.of(plan), tuple(rows))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Facts:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        rows = (
            ParameterReport(name, tuple(shape), Status(status), reason)
            for name, shape, status, reason in data["parameters"]
        )
        return cls(Provenance(**data["provenance"]), tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back."""
        rows = [[row.name, list(row.shape), row.status.value, row.reason] for row in self.parameters]
        return {"provenance": self.provenance.to_dict(), "parameters": rows}

    def with_ghn(self, name: str) -> Facts:
        """The same weights, from a GHN that is now called otherwise."""
        return replace(self, provenance=replace(self.provenance, ghn=name))

    @property
    def generated(self) -> frozenset[str]:
        """Parameters whose values the provenance determines: predicted ones, or without a GHN those that are drawn."""
        drawn = Status.ORTHOGONALIZED if self.provenance.ghn_hash is None else None
        statuses = (Status.PREDICTED, Status.PREDICTED_ORTHOGONALIZED, drawn)
        return frozenset(row.name for row in self.parameters if row.status in statuses)

    def report(self, model: nn.Module, *, from_cache: bool, seconds: float) -> Report:
        """The report of an initialization of a model."""
        return Report(
            model=model_name(model),
            provenance=self.provenance.to_dict(),
            parameters=self.parameters,
            num_layers=self.provenance.num_layers,
            start_layer=self.provenance.start_layer,
            from_cache=from_cache,
            seconds=seconds,
        )


def provenance(model: nn.Module) -> dict[str, Any] | None:
    """What a model was initialized with, from its `pretrained_cfg`; None if it was not initialized by timm-ghn."""
    for note in (getattr(model, "pretrained_cfg", None) or {}).get("notes") or ():
        if isinstance(note, str) and note.startswith(_PREFIX):
            try:
                found = json.loads(note[len(_PREFIX) :])
            except (ValueError, RecursionError):  # the configuration may be anybody's
                continue
            return found if isinstance(found, dict) else None
    return None


def record_(model: nn.Module, origin: Provenance) -> None:
    """Note in timm's own description of a model where its weights come from, in fields that plain timm knows."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return
    for name in _FOREIGN_FIELDS:
        config.pop(name, None)
    config["custom_load"] = False
    config["tag"] = origin.method.replace("-", "_")
    config["description"] = origin.describe()
    config["paper_ids"] = _PAPER
    config["notes"] = (_PREFIX + json.dumps(origin.to_dict()),)


def _outcome(plan: Plan, name: str) -> tuple[Status, str]:
    """What a parameter gets, and why if that is not the prediction."""
    processed = name in plan.processed
    if name in plan.targets:
        return (Status.PREDICTED_ORTHOGONALIZED if processed else Status.PREDICTED), describe_factor(plan.factors, name)
    status = Status.ORTHOGONALIZED if processed else Status.KEPT
    return status, plan.reasons.get(name, "" if processed else f"not changed by {plan.init.method}")


def model_name(model: nn.Module) -> str:
    """What a model is called in reports: its architecture in timm, else its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)
