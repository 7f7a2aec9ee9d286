"""The main path: model -> plan -> weights, from the cache or computed -> a report of what every parameter got."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_ghn._version import __version__
from timm_ghn.baselines import apply_baseline
from timm_ghn.deferred import DeferredRandom
from timm_ghn.ghn import Prediction
from timm_ghn.graph import Layout
from timm_ghn.initialize.fill import fill_generated, fill_others
from timm_ghn.initialize.plan import (
    Hypernetwork,
    Plan,
    check_memory,
    find_hypernetwork,
    make_plan,
    postprocess_settings,
)
from timm_ghn.initialize.provenance import Facts, model_name, record_
from timm_ghn.initialize.report import Report
from timm_ghn.settings import Init, Source
from timm_ghn.storage.cache import Entry, WeightCache, cache_key
from timm_ghn.storage.fingerprint import fingerprint
from timm_ghn.storage.upkeep import UNREADABLE

_logger = logging.getLogger(__name__)


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
        method: A name of `METHODS`, such as "ghn-orth", "orth" or "lsuv", or `Init` with all settings.
        input_size: (channels, height, width) of one image, where the model does not say it itself.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors. "lsuv" measures on it.
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


@dataclass(frozen=True)
class _Outcome:
    """What generated weights have been written, and where they came from."""

    facts: Facts
    from_cache: bool


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
    check_memory(parameters)
    deferred = DeferredRandom(init.seed) if deferred is None else deferred
    hypernetwork = find_hypernetwork(init)
    cacheable = init.spec.source in (Source.GHN, Source.GAUSSIAN)
    cache = WeightCache.default() if init.cache and cacheable else None
    key = cache_key(_recipe_inputs(recipe, init, hypernetwork, model)) if cache and recipe is not None else None
    outcome = _restore(cache, key, parameters, deferred) if cache and key else None
    if outcome is None:
        plan = make_plan(
            model, init, hypernetwork, input_size=input_size, example_input=example_input, deferred=deferred
        )
        outcome = _fill(plan, cache, deferred, key, model_name(model))
    facts = outcome.facts if hypernetwork is None else outcome.facts.with_ghn(hypernetwork.name)
    fill_others(model, facts, postprocess_settings(init), deferred, lambda *_: None)
    computed = _baseline(model, init, input_size, example_input)
    record_(model, facts.provenance)
    report = facts.report(model, from_cache=outcome.from_cache, seconds=time.perf_counter() - start)
    return report.with_computed(computed)


def _baseline(model: nn.Module, init: Init, input_size: Sequence[int] | None, example_input: Any) -> frozenset[str]:
    """Names of the parameters that a baseline has changed, on top of what was there."""
    if init.spec.source is not Source.BASELINE:
        return frozenset()
    return frozenset(apply_baseline(init.method, model, init.seed, input_size=input_size, example_input=example_input))


def _fill(plan: Plan, cache: WeightCache | None, deferred: DeferredRandom, key: str | None, model: str) -> _Outcome:
    """Write all generated weights, from the cache or computed; without a key the plan determines the entry."""
    facts = Facts.of(plan)
    if cache is None or not plan.generated:
        _compute(plan, deferred)
        return _Outcome(facts, from_cache=False)
    key = key or cache_key(_cache_inputs(plan, facts))
    with cache.locked(key):
        found = _restore(cache, key, plan.parameters, deferred)
        if found is None:
            blocks = _compute(plan, deferred)
            tensors = {name: plan.parameters[name].data for name in plan.generated if name not in blocks}
            cache.write(key, tensors, blocks, facts.to_dict(), model=model)
    return found or _Outcome(facts, from_cache=False)


def _compute(plan: Plan, deferred: DeferredRandom) -> dict[str, Prediction]:
    """Compute all generated weights; a progress bar shows what takes more than two seconds, on a terminal.

    Returns:
        The blocks of those that were predicted and not post-processed.
    """
    blocks: dict[str, Prediction] = {}
    bar = tqdm(desc="initializing", total=len(plan.generated), unit="tensor", delay=2, leave=False, disable=None)

    def finished(name: str, prediction: Prediction | None) -> None:
        if prediction is not None:
            blocks[name] = prediction
        bar.update()

    with closing(bar):
        fill_generated(plan, deferred, finished)
    return blocks


def _restore(
    cache: WeightCache, key: str, parameters: Mapping[str, nn.Parameter], deferred: DeferredRandom
) -> _Outcome | None:
    """Write the weights of a cache entry; None if there is no such entry or it is damaged."""
    entry = cache.open(key)
    if entry is None or not entry.names <= parameters.keys():
        return None
    try:
        facts = Facts.from_dict(entry.report)
        partial = _partial(entry)
        deferred.drop(parameters[name] for name in entry.names - partial)
        for name in partial:
            deferred.replay(parameters[name], name)
        entry.copy_to({name: parameters[name].data for name in entry.names})
    except UNREADABLE as error:
        cache.report_damage(entry.path, error)
        return None
    return _Outcome(facts, from_cache=True)


def _partial(entry: Entry) -> frozenset[str]:
    """Weights of which a part may stay: the prefix rows of a table of tokens."""
    return frozenset(name for name, tile in entry.tiles.items() if tile["layout"] == Layout.TOKENS.value)


def _cache_inputs(plan: Plan, facts: Facts) -> dict[str, Any]:
    """What determines the generated weights, and the facts that are stored with them."""
    return {
        "provenance": {name: value for name, value in facts.provenance.to_dict().items() if name != "ghn"},
        "graph": plan.graph.digest if plan.graph else None,
        "parameters": _signature(plan.parameters),
        "processed": {name: layer.number for name, layer in plan.processed.items()},
        "factors": dict(plan.factors),
    }


def _recipe_inputs(
    recipe: Mapping[str, Any] | None, init: Init, hypernetwork: Hypernetwork | None, model: nn.Module
) -> dict[str, Any]:
    settings = {name: value for name, value in init.to_dict().items() if name not in ("ghn", "cache")}
    return {
        "recipe": recipe,
        "init": settings,
        "ghn": None if hypernetwork is None else hypernetwork.hash,
        "code": fingerprint(model),
        "parameters": _signature(dict(model.named_parameters())),
        "versions": [__version__, timm.__version__, torch.__version__],
    }


def _signature(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    return {name: [list(parameter.shape), str(parameter.dtype)] for name, parameter in parameters.items()}
