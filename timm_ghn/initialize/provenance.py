"""The note of where a model's weights come from, in timm's own description of the model, and the report beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from timm.utils.model import unwrap_model

from timm_ghn import numerics
from timm_ghn._version import __version__
from timm_ghn.initialize.hypernetwork import Hypernetwork, noise_of
from timm_ghn.initialize.report import Report
from timm_ghn.orthogonalization import WeightLayer
from timm_ghn.settings import Init
from timm_ghn.trace.distributed import plain_type
from timm_ghn.trace.inputs import timm_config

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "timm-ghn: "
"""Start of the note in `model.pretrained_cfg` that holds the provenance."""
_REPORT = "_timm_ghn_report"
"""Attribute of a model that holds its report as plain data, which copies and pickles of the model keep."""
_FOREIGN_FIELDS = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "origin_url", "license",
)  # fmt: skip
"""Fields of `model.pretrained_cfg` that say where pretrained weights come from."""


def describe_origin(
    init: Init, hypernetwork: Hypernetwork | None, layers: Sequence[WeightLayer], start_layer: int | None
) -> dict[str, Any]:
    """Everything that determines the generated weights of a model: its provenance.

    Args:
        init: Settings.
        hypernetwork: The GHN that predicts; None for methods without one.
        layers: All conv and fully-connected layers of the model.
        start_layer: L; None without post-processing.

    Returns:
        Plain values: `method`; `version` of this package and `numerics` of its rules; `ghn`, the GHN's name,
        `ghn_hash`, the SHA-256 of its configuration and weights, and `ghn_kind`, such as "GHN-2"; `noise`, beta of the
        paper, 0 if nothing is post-processed; `start_layer`, L; `num_layers`; and the settings `seed`, `correlation`,
        `reading`, `rescale`, `fallback` and `frozen` of `timm_ghn.Init`.
    """
    processes = start_layer is not None and any(x.number >= start_layer and not x.is_classifier for x in layers)
    return {
        "method": init.method,
        "version": __version__,
        "numerics": numerics.VERSION,
        "ghn": None if hypernetwork is None else hypernetwork.name,
        "ghn_hash": None if hypernetwork is None else hypernetwork.hash,
        "ghn_kind": None if hypernetwork is None else hypernetwork.model.config.kind,
        "noise": noise_of(init, hypernetwork) if processes else 0.0,
        "start_layer": start_layer,
        "num_layers": len(layers),
        **{name: getattr(init, name) for name in ("seed", "correlation", "reading", "rescale", "fallback", "frozen")},
    }


def provenance(model: nn.Module) -> dict[str, Any] | None:
    """What a model was initialized with, from its `pretrained_cfg`; None if it was not initialized by timm-ghn."""
    for note in (timm_config(model) or timm_config(unwrap_model(model))).get("notes") or ():  # type: ignore[no-untyped-call]
        if isinstance(note, str) and note.startswith(_PREFIX):
            try:
                found = json.loads(note[len(_PREFIX) :])
            except (ValueError, RecursionError):  # the configuration may be anybody's
                continue
            return found if isinstance(found, dict) else None
    return None


def report_of(model: nn.Module) -> Report | None:
    """What every parameter of a model got, or of the model that it copies or wraps; None for models of other origin."""
    found = getattr(model, _REPORT, None) or getattr(unwrap_model(model), _REPORT, None)  # type: ignore[no-untyped-call]
    try:
        return None if found is None else Report.from_dict(found)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def record_(model: nn.Module, report: Report) -> None:
    """Keep the report with the model, and note its provenance in the fields of timm's description of a model."""
    setattr(model, _REPORT, report.to_dict())
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return
    origin = report.provenance
    for name in _FOREIGN_FIELDS:
        config.pop(name, None)
    tag, notes = origin["method"].replace("-", "_"), (_PREFIX + json.dumps(origin),)
    config.update(custom_load=False, tag=tag, description=_sentence(origin), paper_ids="arXiv:2207.10049", notes=notes)


def _sentence(origin: Mapping[str, Any]) -> str:
    """A provenance in a line."""
    parts = [f"Initialization {origin['method']}, not trained"]
    if origin["ghn"] is not None and origin["ghn_hash"] is not None:
        parts.append(f"GHN {origin['ghn']} ({origin['ghn_hash'][:12]})")
    if origin["start_layer"] is not None:
        parts.append(f"L = {origin['start_layer']} of {origin['num_layers']}, beta = {origin['noise']:g}")
    seed = "" if origin["seed"] is None else f"seed {origin['seed']}; "
    return "; ".join([*parts, f"{seed}timm-ghn {origin['version']}"])


def model_name(model: nn.Module) -> str:
    """What a model is called in reports: its architecture in timm, else its class."""
    return str(timm_config(model).get("architecture") or plain_type(model).__name__)
