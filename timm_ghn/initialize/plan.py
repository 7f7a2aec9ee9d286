"""What an initialization is going to do, decided and checked before a weight is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.ghn import GHN
from timm_ghn.graph import Graph, Role, Target
from timm_ghn.initialize.hypernetwork import Hypernetwork, find_hypernetwork, noise_of
from timm_ghn.initialize.outline import Outline, read_outline
from timm_ghn.initialize.provenance import describe_origin
from timm_ghn.initialize.report import ParameterReport, Report, Status
from timm_ghn.orthogonalization import (
    PostProcess,
    WeightLayer,
    kept_parameters,
    resolve_start_layer,
    selected_layers,
    weight_layers,
)
from timm_ghn.scale.rule import find_structure, gaining_norms
from timm_ghn.settings import Init, Source
from timm_ghn.threads import single_threaded
from timm_ghn.trace.distributed import whole

if TYPE_CHECKING:
    from timm_ghn.baselines import Computation

_logger = logging.getLogger(__name__)

FROZEN = "frozen: requires_grad is False"
SILENCING = "negative ones are 0, as they could silence channels that another batch norm reads"


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
        clamped: Whether negative numbers of the prediction become 0.
        reason: Why its values are those of timm, are drawn where a GHN was to predict, or are clamped.
    """

    source: Source
    target: Target | None = None
    layer: WeightLayer | None = None
    factor: float = 1.0
    gains: bool = False
    clamped: bool = False
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


def postprocess_settings(init: Init, hypernetwork: Hypernetwork | None) -> PostProcess:
    """Settings of the post-processing."""
    return PostProcess(noise=noise_of(init, hypernetwork), seed=init.seed or 0, correlation=init.correlation)


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
    parameters = dict(model.named_parameters())
    kept = _kept(model, init)
    _check_model(model, init, kept)
    free = frozenset(parameters.keys() - kept.keys())
    inputs: dict[str, Any] = {"input_size": input_size, "example_input": example_input}
    if hypernetwork is not None and outline is None:
        outline = read_outline(model, init.reading, **inputs)
    layers = weight_layers(model, **inputs) if outline is None else outline.layers
    start_layer = _start_layer(init, layers, hypernetwork)

    chosen: Mapping[str, Assignment] = {}
    computation = None
    if hypernetwork is not None and outline is not None:
        chosen = _choose_for_ghn(init, hypernetwork.model, outline, start_layer, parameters, free, deferred)
    elif init.spec.source is Source.BASELINE:
        from timm_ghn.baselines import BASELINES, Setting

        computation = BASELINES[init.method](Setting(model, init.method, init.seed or 0, free, **inputs))
        chosen = dict.fromkeys(computation.names, Assignment(Source.BASELINE))
    elif init.spec.source is Source.GAUSSIAN and start_layer is not None:
        late = (layer for layer in selected_layers(layers, start_layer) if layer.parameter in free)
        chosen = {layer.parameter: Assignment(Source.GAUSSIAN, layer=layer) for layer in late}

    default = f"not changed by {init.method}"
    assignments = {n: chosen.get(n) or Assignment(Source.TIMM, reason=kept.get(n, default)) for n in parameters}
    _check_values(model, init, assignments, deferred)
    origin = describe_origin(init, hypernetwork, layers, start_layer)
    graph = None if outline is None else outline.graph
    return Plan(init, origin, parameters, assignments, hypernetwork, graph, computation)


def _choose_for_ghn(
    init: Init,
    ghn: GHN,
    outline: Outline,
    start_layer: int | None,
    parameters: Mapping[str, Tensor],
    free: frozenset[str],
    deferred: DeferredRandom,
) -> dict[str, Assignment]:
    """Decide which parameters a GHN predicts, which are drawn instead, and which are orthogonalized.

    Args:
        init: Settings.
        ghn: The GHN.
        outline: Layers and graph of the model.
        start_layer: L; None without post-processing.
        parameters: All parameters of the model, by name.
        free: Names of those that may be changed.
        deferred: What was put off while the model was built.

    Returns:
        Assignments by name; none for parameters of which there is nothing to say.
    """
    # What is predicted, and why all else is not.
    graph, layers, classes = outline.graph, outline.layers, ghn.config.num_classes
    targets = {target.name: target for target in graph.targets if target.name in free}
    reasons = dict(graph.unused)
    for name, target in list(targets.items()):
        if target.role in (Role.CLASS_WEIGHT, Role.CLASS_BIAS) and target.shape[0] != classes:
            reasons[name] = f"classifier of {target.shape[0]} classes, the GHN's has {classes}"
            del targets[name]
    unseen: dict[str, str] = {}
    if init.fallback == "auto" and ghn.seen is not None:
        found = ghn.seen.unseen(graph)
        unseen = {name: f"not seen: {found[name]}" for name in found if targets.pop(name, None)}
        reasons |= unseen
        if unseen and not targets:
            _logger.warning(
                "the GHN was trained on other kinds of networks: init=%r starts as 'orth' does", init.method
            )

    # What is orthogonalized: layers from L on, and where the structure of the network asks for it.
    late = [] if start_layer is None else [*selected_layers(layers, start_layer)]
    structure = None
    if init.rescale == "auto":
        start = partial(_start, {name: p for name, p in parameters.items() if name not in targets}, deferred)
        structure = find_structure(outline.analyses, start)
        if start_layer is not None:
            late += [x for x in layers if not x.is_classifier and structure.needs_orthogonal(x.parameter)]
    processed = {layer.parameter: layer for layer in late if layer.parameter in free}

    # What each parameter gets.
    plain = (target for name, target in targets.items() if name not in processed)
    factors = {} if structure is None else structure.factors(plain, ghn.config.largest_kernel[1])
    gaining = gaining_norms(graph)
    chosen = {
        name: Assignment(Source.TIMM, layer=processed.get(name), reason=reasons.get(name, ""))
        for name in free & (reasons.keys() | processed.keys())
    }
    for layer in layers:
        if layer.parameter in unseen and not layer.is_classifier:
            chosen[layer.parameter] = Assignment(Source.GAUSSIAN, layer=layer, reason=unseen[layer.parameter])
    for name, target in targets.items():
        factor, clamped = factors.get(name, 1.0), structure is not None and name in structure.silencing
        reason = SILENCING if clamped else ""
        chosen[name] = Assignment(Source.GHN, target, processed.get(name), factor, name in gaining, clamped, reason)
    return chosen


def _kept(model: nn.Module, init: Init) -> dict[str, str]:
    """Parameters that no method changes, and why, by name."""
    frozen = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return (dict.fromkeys(frozen, FROZEN) if init.frozen == "keep" else {}) | kept_parameters(model)


def _start_layer(init: Init, layers: Sequence[WeightLayer], hypernetwork: Hypernetwork | None) -> int | None:
    """L, by default that of the method or of the GHN's training; None for methods that do not orthogonalize."""
    if not init.spec.orthogonal:
        return None
    default = init.spec.start_layer if hypernetwork is None else hypernetwork.model.config.start_layer
    return resolve_start_layer(layers, init.start_layer, default)


def _start(parameters: Mapping[str, Tensor], deferred: DeferredRandom, name: str) -> float | None:
    """The size of the number that all elements of a parameter are.

    None if the elements differ, or get random values later.
    """
    parameter = parameters.get(name)
    if parameter is None or parameter.numel() == 0 or deferred.is_pending(parameter):
        return None
    parameter = whole(parameter)
    first = parameter.detach().flatten()[0]
    return float(first.abs()) if bool((parameter == first).all()) else None


def _check_model(model: nn.Module, init: Init, kept: Mapping[str, str]) -> None:
    """Raises InitError for models that no method can initialize."""
    if init.spec.source is Source.TIMM:
        return
    parameters = dict(model.named_parameters())
    on_meta = next((name for name, x in [*parameters.items(), *model.named_buffers()] if x.is_meta), None)
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
    model: nn.Module, init: Init, assignments: Mapping[str, Assignment], deferred: DeferredRandom
) -> None:
    """Raises InitError if parameters or buffers that keep their values hold none, or none to orthogonalize."""
    if init.spec.source is Source.TIMM:
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assigned = assignments.get(name)  # None for a buffer
        if deferred.is_pending(tensor) or (assigned is not None and assigned.source is not Source.TIMM):
            continue
        tensor = whole(tensor)
        if assigned is not None and assigned.layer is not None and not bool(tensor.isfinite().all()):
            raise InitError(f"{name} holds NaN or infinity, so nothing was changed; repair the weights first")
        if bool(tensor.isnan().any()):
            raise InitError(
                f"{name} holds NaN and would be kept, so nothing was changed. Memory from model.to_empty() alone holds "
                "no values: build the model on a real device, load weights first, or give build=, a function that "
                "builds the model"
            )
