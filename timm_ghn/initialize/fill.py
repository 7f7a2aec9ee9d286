"""Carrying out a plan, one parameter after another: predictions, draws, post-processing, and what was put off.

Every parameter is reported as soon as it is final, so that a caller may write it to disk and give its memory back
before the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.ghn import Prediction
from timm_ghn.initialize.plan import Plan
from timm_ghn.initialize.provenance import Facts
from timm_ghn.initialize.report import Status
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_many, single_threaded, weight_layers
from timm_ghn.scale.rule import bounded, gaining_norms
from timm_ghn.seeding import derived_seed

Finished = Callable[[str, Prediction | None], None]
"""Called once for each parameter when it is final: its name, and what it was tiled from if nothing followed that."""


@torch.no_grad()
def fill_generated(plan: Plan, deferred: DeferredRandom, finished: Finished, *, queued: int | None = None) -> None:
    """Predict or draw the generated parameters, and post-process those from layer L on.

    Args:
        plan: The plan.
        deferred: What was put off while the model was built; forgotten for what is overwritten.
        finished: Called for each of `plan.generated`.
        queued: How many weights are post-processed or wait for that; None for a few per thread.

    Raises:
        InitError: If the GHN predicts values that are not finite.
    """
    source = _drawn(plan, deferred) if plan.hypernetwork is None else _predicted(plan, deferred, finished)
    workers = torch.get_num_threads()
    # The thousands of small products of a GNN are slower on several threads, and sums depend on their number.
    with single_threaded(), torch.autocast("cpu", enabled=False):
        for layer, weight in postprocess_many(source, plan.postprocess, workers, in_place=True, queued=queued):
            parameter = plan.parameters[layer.parameter].data
            if weight.data_ptr() != parameter.data_ptr():
                parameter.copy_(weight)
            finished(layer.parameter, None)


@torch.no_grad()
def fill_others(
    model: nn.Module,
    facts: Facts,
    settings: PostProcess,
    deferred: DeferredRandom,
    finished: Finished,
    *,
    queued: int | None = None,
) -> None:
    """Give parameters that are not generated what was put off, and post-process them where the paper does.

    Args:
        model: The model.
        facts: What every parameter gets.
        settings: Settings of the post-processing.
        deferred: What was put off while the model was built.
        finished: Called for each parameter that is not generated.
        queued: How many weights are post-processed or wait for that; None for a few per thread.
    """
    others = [row for row in facts.parameters if row.name not in facts.generated]
    transformed = {row.name for row in others if row.status is Status.ORTHOGONALIZED}
    for row in others:
        if row.name not in transformed:
            deferred.replay(model.get_parameter(row.name), row.name)
            finished(row.name, None)
    if not transformed:
        return

    def source() -> Iterator[tuple[WeightLayer, Tensor]]:
        for layer in weight_layers(model):
            if layer.parameter in transformed:
                weight = model.get_parameter(layer.parameter)
                deferred.replay(weight, layer.parameter)
                yield layer, weight

    for layer, _ in postprocess_many(source(), settings, in_place=True, queued=queued):
        finished(layer.parameter, None)


def _claim(plan: Plan, deferred: DeferredRandom, name: str) -> Tensor:
    """The memory of a generated parameter; of what was put off for it, only what will not be overwritten is done."""
    parameter = plan.parameters[name]
    if plan.is_overwritten(name):
        deferred.drop([parameter])
    else:
        deferred.replay(parameter, name)
    return parameter.data


def _predicted(plan: Plan, deferred: DeferredRandom, finished: Finished) -> Iterator[tuple[WeightLayer, Tensor]]:
    """Write what needs no post-processing, and hand out the rest in float32 (the noise is lost in 16 bits)."""
    if plan.hypernetwork is None or plan.graph is None:
        return
    gaining = gaining_norms(plan.graph)
    for prediction in plan.hypernetwork.model.predict(plan.graph):
        name = prediction.target.name
        if name not in plan.targets:
            continue
        if not bool(torch.isfinite(prediction.block).all()):
            raise InitError(f"the GHN predicts values for {name} that are not finite; it was not trained well enough")
        if plan.init.rescale == "auto":
            prediction = bounded(prediction, name in gaining)
        prediction = _scaled(prediction, plan.factors.get(name, 1.0))
        parameter = _claim(plan, deferred, name)
        layer = plan.processed.get(name)
        if layer is None:
            prediction.write_(parameter)
            finished(name, prediction)
        else:
            if not _is_workspace(parameter):
                parameter = torch.empty(parameter.shape, dtype=torch.promote_types(torch.float32, parameter.dtype))
            prediction.write_(parameter)
            yield layer, parameter


def _scaled(prediction: Prediction, factor: float) -> Prediction:
    return prediction if factor == 1 else replace(prediction, block=prediction.block * factor)


def _drawn(plan: Plan, deferred: DeferredRandom) -> Iterator[tuple[WeightLayer, Tensor]]:
    """Standard normal weights that depend on seed, layer and shape alone."""
    for name, layer in plan.processed.items():
        parameter = _claim(plan, deferred, name)
        in_place = _is_workspace(parameter) and parameter.is_contiguous()  # else the order of the draw differs
        weight = parameter if in_place else torch.empty(parameter.shape)
        seed = derived_seed("orth", plan.init.seed, layer.number, tuple(weight.shape))
        yield layer, weight.normal_(generator=torch.Generator().manual_seed(seed))


def _is_workspace(parameter: Tensor) -> bool:
    """Whether a weight can be post-processed in its own memory: on the CPU, and not in 16 bits."""
    return parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64)
