"""What an initialization is going to do, decided and checked before a weight is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.baselines import BASELINES, Computation, Setting
from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.ghn import GHN
from timm_ghn.graph import Graph, Layout, Role, Target
from timm_ghn.initialize.hypernetwork import Hypernetwork, find_hypernetwork
from timm_ghn.initialize.outline import Outline, read_outline
from timm_ghn.initialize.provenance import describe_origin
from timm_ghn.initialize.report import ParameterReport, Report, Status
from timm_ghn.orthogonalization import (
    PostProcess,
    WeightLayer,
    kept_parameters,
    resolve_start_layer,
    selected_layers,
    single_threaded,
    weight_layers,
)
from timm_ghn.scale.rule import Structure, gaining_norms
from timm_ghn.scale.structure import find_structure
from timm_ghn.settings import Init, Source
from timm_ghn.trace.distributed import whole

FROZEN = "frozen: requires_grad is False"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one parameter is going to get.

    Attributes:
        source: Where its values come from: a GHN, a draw of normal numbers, a baseline, or timm (what it holds already,
            or what was put off while the model was built).
        target: How the GHN predicts it; None for other sources.
        layer: As which layer it is post-processed; None if it is not.
        factor: What the prediction is multiplied with because of the structure of the network.
        gains: Whether it is the weight of a layer norm whose output is multiplied by what follows.
        reason: Why its values are those of timm, or are drawn where a GHN was to predict.
    """

    source: Source
    target: Target | None = None
    layer: WeightLayer | None = None
    factor: float = 1.0
    gains: bool = False
    reason: str = ""

    @property
    def status(self) -> Status:
        """What the report says of it."""
        if self.source is Source.GHN:
            return Status.PREDICTED if self.layer is None else Status.PREDICTED_ORTHOGONALIZED
        if self.source is Source.BASELINE:
            return Status.COMPUTED
        if self.source is Source.GAUSSIAN and self.reason:
            return Status.DRAWN
        return Status.KEPT if self.layer is None else Status.ORTHOGONALIZED

    @property
    def is_whole(self) -> bool:
        """Whether nothing is kept of the parameter, not even the prefix rows of a table of tokens."""
        return self.target is None or self.target.layout is not Layout.TOKENS


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the parameters of a model get.

    Attributes:
        init: Settings.
        origin: The provenance that results (see `describe_origin`).
        parameters: Parameters by name; tied ones once.
        assignments: What each of them gets, in the same order.
        hypernetwork: What predicts; None for methods without a GHN.
        graph: The model's graph; None for methods without a GHN.
        computation: What a baseline is going to compute; None for other methods.
    """

    init: Init
    origin: dict[str, Any]
    parameters: Mapping[str, nn.Parameter]
    assignments: Mapping[str, Assignment]
    hypernetwork: Hypernetwork | None = None
    graph: Graph | None = None
    computation: Computation | None = None

    @property
    def generated(self) -> tuple[str, ...]:
        """Parameters whose values depend on the plan alone, not on what they were before."""
        return tuple(n for n, assigned in self.assignments.items() if assigned.source in (Source.GHN, Source.GAUSSIAN))

    def processed(self) -> tuple[WeightLayer, ...]:
        """The layers that are post-processed, in order."""
        return tuple(assigned.layer for assigned in self.assignments.values() if assigned.layer is not None)

    def report(self, model: str, scaled: Mapping[str, tuple[float, str]] | None = None) -> Report:
        """The report of a plan that was carried out.

        Args:
            model: Name of the model.
            scaled: What predictions were multiplied with and why, by the name of the parameter.
        """
        rows = []
        for name, assigned in self.assignments.items():
            factor, reason = (scaled or {}).get(name, (1.0, assigned.reason))
            rows.append(ParameterReport(name, tuple(self.parameters[name].shape), assigned.status, reason, factor))
        return Report(model, self.origin, tuple(rows))


def postprocess_settings(init: Init) -> PostProcess:
    """Settings of the post-processing; random weights get no noise."""
    noise = init.noise if init.spec.source is Source.GHN else 0.0
    return PostProcess(noise=noise, seed=init.seed or 0, correlation=init.correlation)


def expected_origin(model: nn.Module, init: Init) -> dict[str, Any]:
    """The provenance that an initialization of a model would have, without reading its graph.

    Raises:
        InitError: If L lies outside of the model.
        CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
    """
    layers = weight_layers(model)
    hypernetwork = find_hypernetwork(init)
    return describe_origin(init, hypernetwork, layers, _start_layer(init, layers, hypernetwork))


@single_threaded()  # so that forked children can make a plan, too
def make_plan(
    model: nn.Module,
    init: Init,
    hypernetwork: Hypernetwork | None,
    *,
    input_size: int | Sequence[int] | None = None,
    example_input: Any = None,
    deferred: DeferredRandom | None = None,
    outline: Outline | None = None,
) -> Plan:
    """Decide what every parameter gets. Nothing is written; the values of kept parameters are read.

    Args:
        model: The model.
        init: Settings.
        hypernetwork: What predicts; None for methods without a GHN.
        input_size: As of `init_model`.
        example_input: As of `init_model`.
        deferred: What was put off while the model was built: values that it is still going to get.
        outline: That of the model, if it was read already.

    Raises:
        InitError: If L lies outside of the model, all parameters are frozen, or the method does not apply.
        CaptureError: If the forward pass cannot be recorded.
        GraphError: If the model has no layer that can be predicted.
    """
    deferred = DeferredRandom(0) if deferred is None else deferred
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    kept = _kept(model, init)
    free = frozenset(parameters.keys() - kept.keys())
    _check_model(init, parameters, buffers, kept)
    inputs: dict[str, Any] = {"input_size": input_size, "example_input": example_input}
    if hypernetwork is not None and outline is None:
        outline = read_outline(model, init.reading, **inputs)
    layers = weight_layers(model, **inputs) if outline is None else outline.layers
    start_layer = _start_layer(init, layers, hypernetwork)
    targets: Mapping[str, Target] = {}
    reasons: Mapping[str, str] = {}
    unseen: Mapping[str, str] = {}
    structure, computation = None, None
    if hypernetwork is not None and outline is not None:
        targets, reasons = _choose_targets(outline.graph, hypernetwork.model, free)
        if init.fallback == "auto":
            unseen = _unseen(targets, outline.graph, hypernetwork.model)
            targets, reasons = {n: target for n, target in targets.items() if n not in unseen}, {**reasons, **unseen}
        if init.rescale == "auto":
            others = {name: parameter for name, parameter in parameters.items() if name not in targets}
            structure = find_structure(
                outline.analyses.trace, partial(_start, others, deferred), analyses=outline.analyses
            )
    processed = _processed(layers, free, start_layer, structure)
    if hypernetwork is not None and outline is not None:
        chosen = _predictions(targets, outline.graph, structure, hypernetwork.model, processed)
        drawn = (layer for layer in layers if layer.parameter in unseen and not layer.is_classifier)
        chosen |= {x.parameter: Assignment(Source.GAUSSIAN, layer=x, reason=unseen[x.parameter]) for x in drawn}
    elif init.spec.source is Source.BASELINE:
        computation = BASELINES[init.method](Setting(model, init.method, init.seed or 0, free, **inputs))
        chosen = dict.fromkeys(computation.names, Assignment(Source.BASELINE))
    elif init.spec.source is Source.GAUSSIAN:
        chosen = {name: Assignment(Source.GAUSSIAN, layer=layer) for name, layer in processed.items()}
    else:
        chosen = {}
    reasons = {**reasons, **kept}
    assignments = {n: chosen.get(n) or _as_before(n, init, processed.get(n), reasons) for n in parameters}
    _check_values(init, parameters, buffers, assignments, deferred)
    origin = describe_origin(init, hypernetwork, layers, start_layer)
    graph = None if outline is None else outline.graph
    return Plan(init, origin, parameters, assignments, hypernetwork, graph, computation)


def _kept(model: nn.Module, init: Init) -> dict[str, str]:
    """Parameters that no method changes, and why, by name."""
    frozen = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return (dict.fromkeys(frozen, FROZEN) if init.frozen == "keep" else {}) | kept_parameters(model)


def _processed(
    layers: Sequence[WeightLayer], free: frozenset[str], start_layer: int | None, structure: Structure | None
) -> dict[str, WeightLayer]:
    """The layers to post-process, by name of the parameter: from L on, and where the structure asks for it."""
    if start_layer is None:
        return {}
    found = list(selected_layers(layers, start_layer))
    if structure is not None:
        found += [x for x in layers if not x.is_classifier and structure.needs_orthogonal(x.parameter)]
    return {layer.parameter: layer for layer in found if layer.parameter in free}


def _as_before(name: str, init: Init, layer: WeightLayer | None, reasons: Mapping[str, str]) -> Assignment:
    """What a parameter gets that has its values from timm."""
    reason = reasons.get(name, "" if layer else f"not changed by {init.method}")
    return Assignment(Source.TIMM, layer=layer, reason=reason)


def _check_model(
    init: Init, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], kept: Mapping[str, str]
) -> None:
    """Raises InitError for models that no method can initialize."""
    if init.spec.source is Source.TIMM:
        return
    on_meta = next((name for name, tensor in {**parameters, **buffers}.items() if tensor.is_meta), None)
    if on_meta is not None:
        raise InitError(
            f"{on_meta} is on the meta device, where parameters and buffers that are kept have no values. Build the "
            "model outside of torch.device('meta'): timm.create_model(..., init='ghn-orth') draws no random numbers in "
            "vain either. Memory from model.to_empty() alone holds no values: give init_model build= then, a function "
            "that builds the model"
        )
    inference = next((name for name, parameter in parameters.items() if parameter.is_inference()), None)
    if inference is not None and not torch.is_inference_mode_enabled():
        raise InitError(
            f"{inference} was made within torch.inference_mode() and cannot be changed outside of it: initialize the "
            "model there, too, or build it outside"
        )
    if parameters and not parameters.keys() - kept.keys():
        if set(kept.values()) == {FROZEN}:
            raise InitError(
                "all parameters are frozen (requires_grad=False): Init(frozen='init') initializes them as well"
            )
        reasons = ", ".join(f"{name} ({kept[name]})" for name in list(parameters)[:3])
        raise InitError(f"methods but 'rand' keep all parameters of the model: {reasons}")


def _check_values(
    init: Init,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    assignments: Mapping[str, Assignment],
    deferred: DeferredRandom,
) -> None:
    """Raises InitError if parameters or buffers that keep their values hold none, or none to orthogonalize."""
    if init.spec.source is Source.TIMM:
        return
    kept = {name: assigned for name, assigned in assignments.items() if assigned.source is Source.TIMM}
    for name, tensor in [*((name, parameters[name]) for name in kept), *buffers.items()]:
        if deferred.is_pending(tensor):
            continue
        tensor = whole(tensor)
        if name in kept and kept[name].layer is not None and not bool(tensor.isfinite().all()):
            raise InitError(f"{name} holds NaN or infinity, so nothing was changed; repair the weights first")
        if bool(tensor.isnan().any()):
            raise InitError(
                f"{name} holds NaN and would be kept, so nothing was changed. Memory from model.to_empty() alone holds "
                "no values: build the model on a real device, load weights first, or give build=, a function that "
                "builds the model"
            )


def _start_layer(init: Init, layers: Sequence[WeightLayer], hypernetwork: Hypernetwork | None) -> int | None:
    """L, by default that of the method or of the GHN's training; None for methods that do not orthogonalize."""
    if not init.spec.orthogonal:
        return None
    default = init.spec.start_layer if hypernetwork is None else hypernetwork.model.config.start_layer
    return resolve_start_layer(layers, init.start_layer, default)


def _predictions(
    targets: Mapping[str, Target],
    graph: Graph,
    structure: Structure | None,
    ghn: GHN,
    processed: Mapping[str, WeightLayer],
) -> dict[str, Assignment]:
    """What the parameters get that are predicted, by name."""
    unprocessed = (target for name, target in targets.items() if name not in processed)
    factors = {} if structure is None else structure.factors(unprocessed, ghn.config.largest_kernel[1])
    gaining = gaining_norms(graph)
    return {
        name: Assignment(Source.GHN, target, processed.get(name), factors.get(name, 1.0), name in gaining)
        for name, target in targets.items()
    }


def _start(kept: Mapping[str, Tensor], deferred: DeferredRandom, name: str) -> float | None:
    """The size of the number that all elements of a kept parameter are.

    None if the elements differ, or get random values later.
    """
    parameter = kept.get(name)
    if parameter is None or parameter.numel() == 0 or deferred.is_pending(parameter):
        return None
    parameter = whole(parameter)
    first = parameter.detach().flatten()[0]
    return float(first.abs()) if bool((parameter == first).all()) else None


def _choose_targets(graph: Graph, ghn: GHN, free: frozenset[str]) -> tuple[dict[str, Target], dict[str, str]]:
    """Parameters to predict, and why the others are not."""
    reasons = dict(graph.unused)
    chosen: dict[str, Target] = {}
    for target in graph.targets:
        classes = target.shape[0]
        if target.role in (Role.CLASS_WEIGHT, Role.CLASS_BIAS) and classes != ghn.config.num_classes:
            reasons[target.name] = f"classifier of {classes} classes, the GHN's has {ghn.config.num_classes}"
        elif target.name in free:
            chosen[target.name] = target
    return chosen, reasons


def _unseen(targets: Mapping[str, Target], graph: Graph, ghn: GHN) -> dict[str, str]:
    """Which predictions would be guesses, and why: parameters in surroundings that the GHN was not trained in."""
    unseen = {} if ghn.seen is None else ghn.seen.unseen(graph)
    return {name: f"not seen: {reason}" for name, reason in unseen.items() if name in targets}
