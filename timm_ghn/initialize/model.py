"""The main path: model -> plan -> weights, from the cache or computed -> a report of what every parameter got."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_ghn._version import __version__
from timm_ghn.deferred import DeferredRandom
from timm_ghn.ghn import Prediction
from timm_ghn.graph import Layout
from timm_ghn.initialize.fill import fill_computed, fill_generated, fill_others
from timm_ghn.initialize.hypernetwork import Hypernetwork, find_hypernetwork
from timm_ghn.initialize.memo import Memo
from timm_ghn.initialize.outline import Outline, read_outline
from timm_ghn.initialize.plan import Plan, make_plan, postprocess_settings
from timm_ghn.initialize.provenance import model_name, record_
from timm_ghn.initialize.report import Report
from timm_ghn.orthogonalization import weight_layers
from timm_ghn.settings import Init, Source
from timm_ghn.storage.cache import WeightCache, cache_key
from timm_ghn.storage.fingerprint import fingerprint
from timm_ghn.storage.upkeep import UNREADABLE

_logger = logging.getLogger(__name__)


def initialize_(
    model: nn.Module,
    init: Init,
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
    deferred: DeferredRandom | None = None,
    recipe: Mapping[str, Any] | None = None,
    memo: Memo | None = None,
) -> Report:
    """Initialize a model in place; see `init_model` (in_memory.py) for the arguments and errors.

    Args:
        deferred: What was put off while the model was built, if nobody has it yet: after an error it may be incomplete.
            Parameters that are not predicted get it.
        recipe: What determines the model's code and graph, JSON-compatible, if that is known.
        memo: What was read and predicted of models with a recipe.
    """
    start = time.perf_counter()
    parameters = dict(model.named_parameters())
    deferred = DeferredRandom(init.seed or 0) if deferred is None else deferred
    hypernetwork = find_hypernetwork(init, memo)
    cacheable = init.spec.source in (Source.GHN, Source.GAUSSIAN)
    cache = WeightCache.default() if init.cache and cacheable else None
    inputs: dict[str, Any] = {"input_size": input_size, "example_input": example_input}
    key = outline = plan = report = None
    remembers = memo is not None and hypernetwork is not None
    identity = _identity(recipe, model) if recipe is not None and (cache or remembers) else None
    if cache and identity:
        key = cache_key({**identity, **_request_inputs(init, hypernetwork)})
        report = _restore(cache, key, parameters, deferred)
    if report is None:
        if memo and identity and hypernetwork:
            outline = _outline(memo, identity, model, init, inputs)
        plan = make_plan(model, init, hypernetwork, **inputs, deferred=deferred, outline=outline)
        report = _generate(plan, cache, deferred, key, model_name(model))
    layers = plan.processed if plan else partial(weight_layers, model, **inputs)
    fill_others(model, report, layers, postprocess_settings(init, hypernetwork), deferred, lambda *_: None)
    if plan is not None:
        fill_computed(plan)
    # The same GHN may have had another name when an entry of the cache was written.
    origin = report.provenance if hypernetwork is None else {**report.provenance, "ghn": hypernetwork.name}
    report = replace(report, model=model_name(model), provenance=origin, seconds=time.perf_counter() - start)
    record_(model, report)
    return report


def _generate(plan: Plan, cache: WeightCache | None, deferred: DeferredRandom, key: str | None, model: str) -> Report:
    """Write all generated weights, from the cache or computed; without a key the plan determines the entry."""
    if cache is None or not plan.generated:
        return _compute(plan, deferred, {}, model)
    key = key or cache_key(_cache_inputs(plan))
    with cache.locked(key):
        report = _restore(cache, key, plan.parameters, deferred)
        if report is None:
            blocks: dict[str, Prediction] = {}
            report = _compute(plan, deferred, blocks, model)
            tensors = {name: plan.parameters[name].data for name in plan.generated if name not in blocks}
            cache.write(key, tensors, blocks, report.to_dict(), model=model)
    return report


def _compute(plan: Plan, deferred: DeferredRandom, blocks: dict[str, Prediction], model: str) -> Report:
    """Compute all generated weights; a progress bar shows what takes more than two seconds, on a terminal.

    Args:
        blocks: Gets the predictions that were not post-processed, by name.
    """
    bar = tqdm(desc="initializing", total=len(plan.generated), unit="tensor", delay=2, leave=False, disable=None)

    def finished(name: str, prediction: Prediction | None) -> None:
        if prediction is not None:
            blocks[name] = prediction
        bar.update()

    with closing(bar):
        scaled = fill_generated(plan, deferred, finished)
    return plan.report(model, scaled)


def _restore(
    cache: WeightCache, key: str, parameters: Mapping[str, nn.Parameter], deferred: DeferredRandom
) -> Report | None:
    """Write the weights of a cache entry.

    Returns:
        The report that is stored beside them; None if there is no such entry or it is damaged.
    """
    entry = cache.open(key)
    if entry is None or not entry.names <= parameters.keys():
        return None
    try:
        report = replace(Report.from_dict(entry.report), from_cache=True)
        # Of a table of tokens, the prefix rows stay.
        partly = {name for name, tile in entry.tiles.items() if tile["layout"] == Layout.TOKENS.value}
        deferred.drop(parameters[name] for name in entry.names - partly)
        for name in partly:
            deferred.replay(parameters[name], name)
        entry.copy_to({name: parameters[name].data for name in entry.names})
    except UNREADABLE as error:
        cache.report_damage(entry.path, error)
        return None
    return report


def _cache_inputs(plan: Plan) -> dict[str, Any]:
    """What determines the generated weights, and the report that is stored with them."""
    return {
        "provenance": {name: value for name, value in plan.origin.items() if name != "ghn"},
        "graph": plan.graph.digest if plan.graph else None,
        "parameters": _signature(plan.parameters),
        "assignments": {
            name: [assigned.status.value, assigned.layer and assigned.layer.number, assigned.factor, assigned.reason]
            for name, assigned in plan.assignments.items()
        },
    }


def _identity(recipe: Mapping[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """What determines a model, but for its values; None if the model runs code that is not timm's own."""
    code = fingerprint(model)
    if code is None:
        return None
    return {"recipe": recipe, "code": code, "parameters": _signature(dict(model.named_parameters()))}


def _request_inputs(init: Init, hypernetwork: Hypernetwork | None) -> dict[str, Any]:
    """What else determines the weights of such a model."""
    return {
        "init": {name: value for name, value in init.to_dict().items() if name not in ("ghn", "cache")},
        "ghn": None if hypernetwork is None else hypernetwork.hash,
        "versions": [__version__, timm.__version__, torch.__version__],
    }


def _outline(
    memo: Memo, identity: Mapping[str, Any], model: nn.Module, init: Init, inputs: Mapping[str, Any]
) -> Outline:
    """The outline of a model, read now unless that was done before."""
    key = cache_key({**identity, "reading": init.reading})
    found: Outline | None = memo.find(key)
    if found is None:
        found = read_outline(model, init.reading, **inputs)
        memo.keep(key, found)
    return found


def _signature(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    return {name: [list(p.shape), str(p.dtype), p.requires_grad] for name, p in parameters.items()}
