"""The main path: model -> graph -> prediction -> post-processing -> parameters, and a report of what each got."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn._version import __version__
from timm_ghn.cache import WeightCache, cache_key
from timm_ghn.deferred import DeferredRandom, derived_seed
from timm_ghn.errors import InitError
from timm_ghn.ghn import GHN, content_hash, default_ghn, load_ghn
from timm_ghn.ghn.layout import token_rows
from timm_ghn.graph import Graph, Layout, Role, Target, to_graph
from timm_ghn.methods import Init, Source
from timm_ghn.postprocess import (
    PostProcess,
    WeightLayer,
    postprocess_many,
    resolve_start_layer,
    single_threaded,
    weight_layers,
)
from timm_ghn.report import ParameterReport, Report, Status

_logger = logging.getLogger(__name__)

_PREFIX = "timm-ghn: "
"""Start of the note in `model.pretrained_cfg` that holds the provenance."""


def init_model(
    model: nn.Module,
    method: str | Mapping[str, Any] | Init = "ghn-orth",
    *,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
    **settings: Any,
) -> Report:
    """Initialize a model that is in memory, in place.

    Args:
        model: Any module, from timm or not. Parameters that are not predicted keep their values; training mode,
            `requires_grad` and buffers stay as they are.
        method: "ghn-orth", "ghn", "orth" or "rand", or `Init` with all settings.
        input_size: (channels, height, width) of one image, where the model does not say it itself.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors.
        **settings: Fields of `Init`: `ghn`, `noise`, `start_layer`, `seed`, ...

    Returns:
        What every parameter got.

    Raises:
        InitError: If a setting is wrong or the model is on the meta device. The model is then unchanged.
        CaptureError: If the forward pass cannot be recorded.
        GraphError: If the model has no layer that can be predicted.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
    """
    settings.setdefault("cache", method.cache if isinstance(method, Init) else False)
    init = Init.of(method, **settings)
    return initialize_(model, init, input_size=input_size, example_input=example_input)


def provenance(model: nn.Module) -> dict[str, Any] | None:
    """What a model was initialized with, from its `pretrained_cfg`; None if it was not initialized by timm-ghn."""
    for note in (getattr(model, "pretrained_cfg", None) or {}).get("notes") or ():
        if isinstance(note, str) and note.startswith(_PREFIX):
            found: dict[str, Any] = json.loads(note[len(_PREFIX) :])
            return found
    return None


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before a weight is written.

    Attributes:
        init: Settings.
        ghn: The hypernetwork; None for methods without one.
        graph: The model's graph; None likewise.
        parameters: Parameters by name; tied ones once.
        layers: All conv and fully-connected layers, in order.
        start_layer: L; None without post-processing.
        targets: What the GHN predicts, by name.
        reasons: Why a parameter is not predicted, by name.
        processed: Layers that are post-processed, by the name of their weight.
    """

    init: Init
    ghn: GHN | None
    graph: Graph | None
    parameters: Mapping[str, nn.Parameter]
    layers: tuple[WeightLayer, ...]
    start_layer: int | None
    targets: Mapping[str, Target]
    reasons: Mapping[str, str]
    processed: Mapping[str, WeightLayer]

    @property
    def postprocess(self) -> PostProcess:
        """Settings of the post-processing; weights that were not predicted get no noise."""
        noise = self.init.noise if self.init.spec.source is Source.GHN else 0.0
        return PostProcess(noise=noise, seed=self.init.seed, correlation=self.init.correlation)

    @property
    def generated(self) -> tuple[str, ...]:
        """Parameters whose values depend on the plan alone, not on what they were before."""
        drawn = self.processed if self.init.spec.source is Source.GAUSSIAN else {}
        return tuple(name for name in self.parameters if name in self.targets or name in drawn)


def initialize_(
    model: nn.Module,
    init: Init,
    *,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
    deferred: DeferredRandom | None = None,
) -> Report:
    """Initialize a model in place; see `init_model` for the arguments and errors.

    Args:
        deferred: What was put off while the model was built. Parameters that are not predicted get it here.
    """
    start = time.perf_counter()
    plan = _make_plan(model, init, input_size, example_input)
    slots = _slots(plan)
    facts = _provenance(plan)
    if deferred is not None:
        deferred.drop(plan.parameters[name] for name in plan.generated if slots[name] is plan.parameters[name].data)
        for name, parameter in plan.parameters.items():
            deferred.replay(parameter, name)
    from_cache = _fill(plan, slots, facts)
    _postprocess_kept(plan)
    _record(model, facts)
    return Report(
        model=_model_name(model),
        provenance=facts,
        parameters=_parameter_reports(plan),
        num_layers=len(plan.layers),
        start_layer=plan.start_layer,
        from_cache=from_cache,
        seconds=time.perf_counter() - start,
    )


# --- planning -------------------------------------------------------------------------------------------------------


def _make_plan(model: nn.Module, init: Init, input_size: Sequence[int] | None, example_input: Any) -> _Plan:
    """Decide what every parameter gets. Nothing is changed here."""
    parameters = dict(model.named_parameters())
    on_meta = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if on_meta is not None:
        raise InitError(f"{on_meta} is on the meta device and has no memory; call model.to_empty(device=...) first")
    layers = weight_layers(model)
    method = init.spec
    start_layer = None
    processed: dict[str, WeightLayer] = {}
    if method.orthogonal:
        wanted = init.start_layer if init.start_layer is not None else method.start_layer
        start_layer = resolve_start_layer(layers, wanted)
        processed = {
            layer.parameter: layer for layer in layers if layer.number >= start_layer and not layer.is_classifier
        }
    graph = ghn = None
    targets: dict[str, Target] = {}
    reasons: dict[str, str] = {}
    if method.source is Source.GHN:
        graph = to_graph(model, input_size=input_size, example_input=example_input, reading=init.reading)
        ghn = load_ghn(init.ghn) if init.ghn is not None else default_ghn()
        targets, reasons = _choose_targets(graph, ghn)
    return _Plan(init, ghn, graph, parameters, layers, start_layer, targets, reasons, processed)


def _choose_targets(graph: Graph, ghn: GHN) -> tuple[dict[str, Target], dict[str, str]]:
    """Parameters to predict, and why the others are not."""
    reasons = dict(graph.unused)
    chosen: dict[str, Target] = {}
    for target in graph.targets:
        classes = target.shape[0]
        if target.role in (Role.CLASS_WEIGHT, Role.CLASS_BIAS) and classes != ghn.config.num_classes:
            reasons[target.name] = f"classifier of {classes} classes, the GHN's has {ghn.config.num_classes}"
        else:
            chosen[target.name] = target
    return chosen, reasons


def _slots(plan: _Plan) -> dict[str, Tensor]:
    """The memory that is written for each generated parameter: all of it, or all but the prefix of a token table."""
    slots = {name: plan.parameters[name].data for name in plan.generated}
    for node in plan.graph.nodes if plan.graph else ():
        for target in node.targets:
            if target.layout is Layout.TOKENS and target.name in slots and node.shape is not None:
                rows = token_rows(slots[target.name], node.shape)
                slots[target.name] = rows if rows.shape != slots[target.name].shape else slots[target.name]
    return slots


def _provenance(plan: _Plan) -> dict[str, Any]:
    """Everything that determines the generated weights, JSON-compatible."""
    ghn = plan.ghn
    return {
        "method": plan.init.method,
        "version": __version__,
        "ghn": None if ghn is None else (ghn.info.name if ghn.info else "in memory"),
        "ghn_hash": None if ghn is None else content_hash(ghn),
        "noise": plan.postprocess.noise if plan.processed else 0.0,
        "start_layer": plan.start_layer,
        "num_layers": len(plan.layers),
        "seed": plan.init.seed,
        "correlation": plan.init.correlation,
        "reading": plan.init.reading,
    }


# --- weights --------------------------------------------------------------------------------------------------------


def _fill(plan: _Plan, slots: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
    """Write all generated weights, from the cache or computed.

    Returns:
        Whether they came from the cache.
    """
    if not slots:
        return False
    if not plan.init.cache:
        _compute(plan, slots)
        return False
    cache = WeightCache.default()
    key = cache_key(_cache_inputs(plan, slots, facts))
    if cache.load(key, slots):
        return True
    with cache.locked(key):
        if cache.load(key, slots):
            return True
        _compute(plan, slots)
        cache.write(key, slots, facts)
    return False


def _cache_inputs(plan: _Plan, slots: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: value for name, value in facts.items() if name != "ghn"},
        "graph": plan.graph.digest if plan.graph else None,
        "slots": {name: [list(slot.shape), str(slot.dtype)] for name, slot in slots.items()},
        "processed": {name: layer.number for name, layer in plan.processed.items() if name in slots},
    }


@torch.no_grad()
def _compute(plan: _Plan, slots: Mapping[str, Tensor]) -> None:
    """Predict or draw the generated weights and post-process those from layer L on."""
    source = _predicted(plan, slots) if plan.ghn is not None else _drawn(plan, slots)
    workers = torch.get_num_threads()
    # The thousands of small products of a GNN are slower on several threads, and sums depend on their number.
    with single_threaded(), torch.autocast("cpu", enabled=False):
        for layer, weight in postprocess_many(source, plan.postprocess, workers):
            slots[layer.parameter].copy_(weight)


def _predicted(plan: _Plan, slots: Mapping[str, Tensor]) -> Iterator[tuple[WeightLayer, Tensor]]:
    """Write what needs no post-processing, and hand out the rest in float32 (the noise is lost in 16 bits)."""
    if plan.ghn is None or plan.graph is None:
        return
    for prediction in plan.ghn.predict(plan.graph):
        name = prediction.target.name
        if name not in plan.targets:
            continue
        if not bool(torch.isfinite(prediction.block).all()):
            raise InitError(f"the GHN predicts values for {name} that are not finite; it was not trained well enough")
        layer = plan.processed.get(name)
        if layer is None:
            prediction.write_(plan.parameters[name].data)
        else:
            yield layer, prediction.materialize(torch.promote_types(torch.float32, slots[name].dtype))


def _drawn(plan: _Plan, slots: Mapping[str, Tensor]) -> Iterator[tuple[WeightLayer, Tensor]]:
    """Standard normal weights that depend on seed, layer and shape alone."""
    for name, layer in plan.processed.items():
        slot = slots[name]
        seed = derived_seed("orth", plan.init.seed, layer.number, tuple(slot.shape))
        yield layer, torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _postprocess_kept(plan: _Plan) -> None:
    """Post-process layers that were not predicted, as the paper does with every layer from L on."""
    rest = [(layer, plan.parameters[name].data) for name, layer in plan.processed.items() if name not in plan.generated]
    for layer, weight in postprocess_many(iter(rest), plan.postprocess):
        plan.parameters[layer.parameter].data.copy_(weight)


# --- reporting ------------------------------------------------------------------------------------------------------


def _parameter_reports(plan: _Plan) -> tuple[ParameterReport, ...]:
    def report(name: str, parameter: Tensor) -> ParameterReport:
        shape = tuple(parameter.shape)
        if name in plan.targets:
            status = Status.PREDICTED_ORTHOGONALIZED if name in plan.processed else Status.PREDICTED
            return ParameterReport(name, shape, status)
        if name in plan.processed:
            return ParameterReport(name, shape, Status.ORTHOGONALIZED, plan.reasons.get(name, ""))
        return ParameterReport(name, shape, Status.KEPT, plan.reasons.get(name, _kept_reason(plan)))

    return tuple(report(name, parameter) for name, parameter in plan.parameters.items())


def _kept_reason(plan: _Plan) -> str:
    return f"not changed by {plan.init.method}"


def _model_name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _record(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Note in timm's own description of a model where its weights come from, in fields that plain timm knows."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return
    for field in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "origin_url", "license"):
        config.pop(field, None)
    config["custom_load"] = False
    config["tag"] = str(facts["method"]).replace("-", "_")
    config["description"] = _describe(facts)
    config["paper_ids"] = "arXiv:2207.10049"
    config["notes"] = (_PREFIX + json.dumps(dict(facts)),)


def _describe(facts: Mapping[str, Any]) -> str:
    parts = [f"Initialization {facts['method']}, not trained"]
    if facts["ghn"]:
        parts.append(f"GHN {facts['ghn']} ({facts['ghn_hash'][:12]})")
    if facts["start_layer"] is not None:
        parts.append(f"L = {facts['start_layer']} of {facts['num_layers']}, beta = {facts['noise']:g}")
    return "; ".join([*parts, f"seed {facts['seed']}; timm-ghn {facts['version']}"])
