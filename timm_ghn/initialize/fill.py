"""Carrying out a plan, one parameter after another: predictions, draws, post-processing, and what was put off.

Every parameter is reported as soon as it is final, so that a caller may write it to disk and give its memory back
before the next one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.ghn import Prediction
from timm_ghn.graph import Layout
from timm_ghn.initialize.plan import Plan, postprocess_settings
from timm_ghn.initialize.report import Report, Status, why_scaled
from timm_ghn.orthogonalization import PostProcess, WeightLayer, postprocess_many
from timm_ghn.scale.rule import bounding_factor
from timm_ghn.seeding import derived_seed
from timm_ghn.settings import Source
from timm_ghn.threads import Workers, single_threaded

Finished = Callable[[str, Prediction | None], None]
"""Called once for each parameter when it is final, with its name. The second argument is the prediction that its values
were tiled from, if nothing was done to them afterwards."""


@torch.no_grad()
def fill_generated(
    plan: Plan, deferred: DeferredRandom, finished: Finished, *, queued: int | None = None
) -> dict[str, tuple[float, str]]:
    """Predict or draw the generated parameters, and post-process those from layer L on.

    Where the model holds values, because nothing was put off, all predictions are made and checked before the first one
    is written.

    Args:
        plan: The plan.
        deferred: What was put off while the model was built; forgotten for what is overwritten.
        finished: Called for each of `plan.generated`.
        queued: How many weights are post-processed or wait for that; None for a few per thread.

    Returns:
        What predictions were multiplied with and why, by name, where that was not 1.

    Raises:
        InitError: If the GHN predicts values that are not finite.
    """
    scaled: dict[str, tuple[float, str]] = {}
    # The thousands of small products of a GNN are slower on several threads, and sums depend on their number.
    with Workers() as workers, single_threaded(), torch.autocast("cpu", enabled=False):
        predictions: Iterable[Prediction] = _predictions(plan, scaled, workers)
        if not any(deferred.is_pending(parameter) for parameter in plan.parameters.values()):
            predictions = list(predictions)
        settings = postprocess_settings(plan.init, plan.hypernetwork)
        sources = (
            (_predicted(plan, predictions, deferred, finished), settings),
            (_drawn(plan, deferred), replace(settings, noise=0.0)),
        )
        for source, applied in sources:
            for layer, weight in postprocess_many(source, applied, workers, in_place=True, queued=queued):
                parameter = plan.parameters[layer.parameter].data
                if weight.data_ptr() != parameter.data_ptr():
                    parameter.copy_(weight)
                finished(layer.parameter, None)
    return scaled


@torch.no_grad()
def fill_others(
    model: nn.Module,
    report: Report,
    layers: Callable[[], Iterable[WeightLayer]],
    settings: PostProcess,
    deferred: DeferredRandom,
    finished: Finished,
    *,
    queued: int | None = None,
) -> None:
    """Give parameters that are not generated what was put off, and post-process them where the paper does.

    Args:
        model: The model.
        report: What every parameter gets.
        layers: Gives the layers of the model, at least those that are post-processed.
        settings: Settings of the post-processing.
        deferred: What was put off while the model was built.
        finished: Called for each parameter that is not generated.
        queued: How many weights are post-processed or wait for that; None for a few per thread.
    """
    generated = report.generated
    others = [row for row in report.parameters if row.name not in generated]
    transformed = {row.name for row in others if row.status is Status.ORTHOGONALIZED}
    parameters = dict(model.named_parameters())
    with single_threaded():
        for row in others:
            if row.name not in transformed:
                deferred.replay(parameters[row.name], row.name)
                finished(row.name, None)
    if not transformed:
        return

    def source() -> Iterator[tuple[WeightLayer, Tensor]]:
        for layer in layers():
            if layer.parameter in transformed:
                weight = parameters[layer.parameter]
                deferred.replay(weight, layer.parameter)
                yield layer, weight

    with Workers() as workers:
        for layer, _ in postprocess_many(source(), settings, workers, in_place=True, queued=queued):
            finished(layer.parameter, None)


@torch.no_grad()
def fill_computed(plan: Plan) -> None:
    """Give parameters what a baseline computes, once all others are as they are going to be."""
    if plan.computation is None:
        return
    with single_threaded(), torch.autocast("cpu", enabled=False):  # as above
        for name, value in plan.computation.values():
            if plan.assignments[name].source is Source.BASELINE:
                plan.parameters[name].copy_(value)


def _predictions(plan: Plan, scaled: dict[str, tuple[float, str]], workers: Workers) -> Iterator[Prediction]:
    """The predictions of a plan, scaled; notes by what and why.

    Raises:
        InitError: If one is not finite.
    """
    if plan.hypernetwork is None or plan.graph is None:
        return
    for prediction in plan.hypernetwork.predict(plan.graph, workers):
        name = prediction.target.name
        assigned = plan.assignments[name]
        if assigned.source is not Source.GHN:
            continue
        bounding = bounding_factor(prediction, assigned.gains)
        if math.isnan(bounding):
            raise InitError(f"the GHN predicts values for {name} that are not finite; it was not trained well enough")
        bounding = bounding if plan.init.rescale == "auto" else 1.0
        for factor in (bounding, assigned.factor):
            if factor != 1:
                prediction = replace(prediction, block=prediction.block * factor)
        if assigned.clamped:
            prediction = replace(prediction, block=prediction.block.clamp(min=0))
        if bounding * assigned.factor != 1:
            reasons = assigned.reason, why_scaled(assigned.factor, bounding)
            scaled[name] = bounding * assigned.factor, "; ".join(filter(None, reasons))
        yield prediction


def _predicted(
    plan: Plan, predictions: Iterable[Prediction], deferred: DeferredRandom, finished: Finished
) -> Iterator[tuple[WeightLayer, Callable[[], Tensor]]]:
    """Write what needs no post-processing, and hand out what writes the rest."""
    for prediction in predictions:
        name = prediction.target.name
        parameter = _claim(plan, deferred, name)
        layer = plan.assignments[name].layer
        if layer is None:
            prediction.write_(parameter)
            finished(name, prediction)
        else:
            yield layer, partial(_written, prediction, parameter)


def _written(prediction: Prediction, parameter: Tensor) -> Tensor:
    """A prediction in the memory of its parameter, or in float32 elsewhere: in 16 bits the noise would be lost."""
    if not _is_workspace(parameter):
        parameter = torch.empty(
            parameter.shape, dtype=torch.promote_types(torch.float32, parameter.dtype), device="cpu"
        )
    prediction.write_(parameter)
    return parameter


def _drawn(plan: Plan, deferred: DeferredRandom) -> Iterator[tuple[WeightLayer, Callable[[], Tensor]]]:
    """What draws standard normal weights that depend on seed, layer and shape alone."""
    for name, assigned in plan.assignments.items():
        if assigned.source is Source.GAUSSIAN and assigned.layer is not None:
            yield assigned.layer, partial(_normal, _claim(plan, deferred, name), assigned.layer, plan.init.seed)


def _normal(parameter: Tensor, layer: WeightLayer, seed: int | None) -> Tensor:
    """Standard normal numbers in the memory of a parameter, or elsewhere."""
    in_place = _is_workspace(parameter) and parameter.is_contiguous()  # else the order of the draw differs
    weight = parameter if in_place else torch.empty(parameter.shape, device="cpu")
    derived = derived_seed("orth", seed, layer.number, tuple(weight.shape))
    return weight.normal_(generator=torch.Generator().manual_seed(derived))


def _claim(plan: Plan, deferred: DeferredRandom, name: str) -> Tensor:
    """The memory of a generated parameter; what was put off is done if a part of it stays, and else forgotten."""
    parameter, target = plan.parameters[name], plan.assignments[name].target
    if target is not None and target.layout is Layout.TOKENS:  # the prefix rows of a table of tokens stay
        deferred.replay(parameter, name)
    else:
        deferred.drop([parameter])
    return parameter.data


def _is_workspace(parameter: Tensor) -> bool:
    """Whether a weight can be post-processed in its own memory: on the CPU, and not in 16 bits."""
    return parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64)
