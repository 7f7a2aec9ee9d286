"""The main path: model -> graph -> prediction -> post-processing -> parameters, and a report of what each got."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_ghn._version import __version__
from timm_ghn.cache import WeightCache, cache_key
from timm_ghn.deferred import DeferredRandom, derived_seed
from timm_ghn.errors import InitError
from timm_ghn.ghn import GHN, Prediction, content_hash, default_ghn, load_ghn
from timm_ghn.graph import Graph, Layout, Role, Target, to_graph
from timm_ghn.methods import Init, Source
from timm_ghn.postprocess import (
    PostProcess,
    WeightLayer,
    postprocess_many,
    resolve_start_layer,
    selected_layers,
    single_threaded,
    weight_layers,
)
from timm_ghn.report import ParameterReport, Report, Status

_Item = TypeVar("_Item")

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
        """Settings of the post-processing."""
        return _postprocess_settings(self.init)

    @property
    def generated(self) -> tuple[str, ...]:
        """Parameters whose values depend on the plan alone, not on what they were before."""
        drawn = self.processed if self.init.spec.source is Source.GAUSSIAN else {}
        return tuple(name for name in self.parameters if name in self.targets or name in drawn)

    @property
    def overwritten(self) -> tuple[str, ...]:
        """Generated parameters of which nothing is kept, not even the prefix rows of a table of tokens."""
        return tuple(
            name
            for name in self.generated
            if name not in self.targets or self.targets[name].layout is not Layout.TOKENS
        )


def _postprocess_settings(init: Init) -> PostProcess:
    """Settings of the post-processing; random weights get no noise."""
    noise = init.noise if init.spec.source is Source.GHN else 0.0
    return PostProcess(noise=noise, seed=init.seed, correlation=init.correlation)


def initialize_(
    model: nn.Module,
    init: Init,
    *,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
    deferred: DeferredRandom | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Report:
    """Initialize a model in place; see `init_model` for the arguments and errors.

    Args:
        deferred: What was put off while the model was built. Parameters that are not predicted get it here.
        recipe: What determines the model's code and graph, JSON-compatible, if that is known.
    """
    start = time.perf_counter()
    parameters = dict(model.named_parameters())
    _check_memory(parameters)
    ghn = None
    if init.spec.source is Source.GHN:
        ghn = load_ghn(init.ghn) if init.ghn is not None else default_ghn()
    cache = WeightCache.default() if init.cache and init.spec.source is not Source.TIMM else None
    known = cache_key(_recipe_inputs(recipe, init, ghn, parameters)) if cache and recipe is not None else None
    facts = _restore(cache, cache.find(known), parameters, deferred) if cache and known else None
    from_cache = facts is not None
    if facts is None:
        plan = _make_plan(model, init, ghn, parameters, input_size, example_input)
        facts, from_cache = _fill(plan, cache, deferred, known)
    _postprocess_rest(model, init, facts)
    if ghn is not None and ghn.info is not None:
        facts["provenance"]["ghn"] = ghn.info.name
    _record(model, facts["provenance"])
    return _report(model, facts, from_cache, time.perf_counter() - start)


# --- planning -------------------------------------------------------------------------------------------------------


def _check_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises InitError for a parameter without memory."""
    on_meta = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if on_meta is not None:
        raise InitError(f"{on_meta} is on the meta device and has no memory; call model.to_empty(device=...) first")


def _make_plan(
    model: nn.Module,
    init: Init,
    ghn: GHN | None,
    parameters: Mapping[str, nn.Parameter],
    input_size: Sequence[int] | None,
    example_input: Any,
) -> _Plan:
    """Decide what every parameter gets. Nothing is changed here."""
    layers = weight_layers(model)
    method = init.spec
    start_layer = None
    processed: dict[str, WeightLayer] = {}
    if method.orthogonal:
        start_layer = resolve_start_layer(layers, init.start_layer, method.start_layer)
        processed = {layer.parameter: layer for layer in selected_layers(layers, start_layer)}
    graph = None
    targets: dict[str, Target] = {}
    reasons: dict[str, str] = {}
    if ghn is not None:
        graph = to_graph(model, input_size=input_size, example_input=example_input, reading=init.reading)
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


def _restore(
    cache: WeightCache, key: str | None, parameters: Mapping[str, nn.Parameter], deferred: DeferredRandom | None
) -> dict[str, Any] | None:
    """Write the weights of a cache entry.

    Returns:
        What is stored beside them; None if there is no such entry or it is damaged.
    """
    entry = cache.open(key) if key else None
    if entry is None or not entry.names <= parameters.keys():
        return None
    _replay(deferred, parameters, entry.names - _partial(entry.tiles))
    return dict(entry.facts) if entry.copy_to({name: parameters[name].data for name in entry.names}) else None


def _partial(tiles: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Weights of which a part may stay: the prefix rows of a table of tokens."""
    return {name for name, tile in tiles.items() if tile["layout"] == Layout.TOKENS.value}


def _replay(deferred: DeferredRandom | None, parameters: Mapping[str, nn.Parameter], written: Collection[str]) -> None:
    """Give every parameter the initialization that was put off, except those that are written anyway."""
    if deferred is None:
        return
    deferred.drop(parameters[name] for name in written)
    for name, parameter in parameters.items():
        deferred.replay(parameter, name)


def _fill(
    plan: _Plan, cache: WeightCache | None, deferred: DeferredRandom | None, recipe: str | None
) -> tuple[dict[str, Any], bool]:
    """Write all generated weights, from the cache or computed.

    Returns:
        What is stored beside them, and whether they came from the cache.
    """
    facts = _facts(plan)
    if cache is None or not plan.generated:
        _replay(deferred, plan.parameters, plan.overwritten)
        _compute(plan)
        return facts, False
    key = cache_key(_cache_inputs(plan, facts))
    with cache.locked(key):
        found = _restore(cache, key, plan.parameters, deferred)
        if found is None:
            _replay(deferred, plan.parameters, plan.overwritten)
            blocks = _compute(plan)
            tensors = {name: plan.parameters[name].data for name in plan.generated if name not in blocks}
            cache.write(key, tensors, blocks, facts)
        if recipe is not None:
            cache.remember(recipe, key)
    return (facts, False) if found is None else (found, True)


def _cache_inputs(plan: _Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the generated weights, and the facts that are stored with them."""
    return {
        "provenance": {name: value for name, value in facts["provenance"].items() if name != "ghn"},
        "graph": plan.graph.digest if plan.graph else None,
        "parameters": _signature(plan.parameters),
        "processed": {name: layer.number for name, layer in plan.processed.items()},
    }


def _recipe_inputs(
    recipe: Mapping[str, Any] | None, init: Init, ghn: GHN | None, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    settings = {name: value for name, value in init.to_dict().items() if name not in ("ghn", "cache")}
    return {
        "recipe": recipe,
        "init": settings,
        "ghn": None if ghn is None else content_hash(ghn),
        "parameters": _signature(parameters),
        "versions": [__version__, timm.__version__, torch.__version__],
    }


def _signature(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    return {name: [list(parameter.shape), str(parameter.dtype)] for name, parameter in parameters.items()}


@torch.no_grad()
def _compute(plan: _Plan) -> dict[str, Prediction]:
    """Predict or draw the generated weights and post-process those from layer L on.

    Returns:
        The blocks of those that were predicted and not post-processed.
    """
    blocks: dict[str, Prediction] = {}
    source = _predicted(plan, blocks) if plan.ghn is not None else _drawn(plan)
    workers = torch.get_num_threads()
    # The thousands of small products of a GNN are slower on several threads, and sums depend on their number.
    with single_threaded(), torch.autocast("cpu", enabled=False):
        results = postprocess_many(source, plan.postprocess, workers, in_place=True)
        for layer, weight in _with_progress(results, len(plan.processed)):
            parameter = plan.parameters[layer.parameter].data
            if weight.data_ptr() != parameter.data_ptr():
                parameter.copy_(weight)
    return blocks


def _with_progress(results: Iterator[_Item], total: int) -> Iterator[_Item]:
    """A progress bar for what takes more than two seconds, on a terminal."""
    bar: Iterator[_Item] = tqdm(results, "orthogonalizing", total, unit="layer", delay=2, leave=False, disable=None)
    return bar


def _predicted(plan: _Plan, blocks: dict[str, Prediction]) -> Iterator[tuple[WeightLayer, Tensor]]:
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
            blocks[name] = prediction
            prediction.write_(plan.parameters[name].data)
        else:
            parameter = plan.parameters[name].data
            if not _is_workspace(parameter):
                parameter = torch.empty(parameter.shape, dtype=torch.promote_types(torch.float32, parameter.dtype))
            prediction.write_(parameter)
            yield layer, parameter


def _is_workspace(parameter: Tensor) -> bool:
    """Whether a weight can be post-processed in its own memory: on the CPU, and not in 16 bits."""
    return parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64)


def _drawn(plan: _Plan) -> Iterator[tuple[WeightLayer, Tensor]]:
    """Standard normal weights that depend on seed, layer and shape alone."""
    for name, layer in plan.processed.items():
        parameter = plan.parameters[name].data
        in_place = _is_workspace(parameter) and parameter.is_contiguous()  # else the order of the draw differs
        weight = parameter if in_place else torch.empty(parameter.shape)
        seed = derived_seed("orth", plan.init.seed, layer.number, tuple(weight.shape))
        yield layer, weight.normal_(generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _postprocess_rest(model: nn.Module, init: Init, facts: Mapping[str, Any]) -> None:
    """Post-process layers that were not predicted, as the paper does with every layer from L on."""
    names = {name for name, _, status, _ in facts["parameters"] if status == Status.ORTHOGONALIZED.value}
    if not names or init.spec.source is not Source.GHN:
        return
    rest = [(layer, model.get_parameter(layer.parameter)) for layer in weight_layers(model) if layer.parameter in names]
    for _ in postprocess_many(rest, _postprocess_settings(init), in_place=True):
        pass


# --- reporting ------------------------------------------------------------------------------------------------------


def _facts(plan: _Plan) -> dict[str, Any]:
    """What is told of an initialization, JSON-compatible: its provenance, and a row for every parameter."""
    return {
        "provenance": _provenance(plan),
        "parameters": [[name, list(p.shape), *_status(plan, name)] for name, p in plan.parameters.items()],
    }


def _status(plan: _Plan, name: str) -> tuple[str, str]:
    """What a parameter gets, and why if that is not the prediction."""
    processed = name in plan.processed
    if name in plan.targets:
        return (Status.PREDICTED_ORTHOGONALIZED if processed else Status.PREDICTED).value, ""
    status = Status.ORTHOGONALIZED if processed else Status.KEPT
    return status.value, plan.reasons.get(name, "" if processed else _kept_reason(plan))


def _report(model: nn.Module, facts: Mapping[str, Any], from_cache: bool, seconds: float) -> Report:
    rows = tuple(
        ParameterReport(name, tuple(shape), Status(status), reason)
        for name, shape, status, reason in facts["parameters"]
    )
    provenance = facts["provenance"]
    return Report(
        model=_model_name(model),
        provenance=provenance,
        parameters=rows,
        num_layers=provenance["num_layers"],
        start_layer=provenance["start_layer"],
        from_cache=from_cache,
        seconds=seconds,
    )


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
