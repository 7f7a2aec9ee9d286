"""Trying one model: its graph on the meta device, then its weights in memory."""

from __future__ import annotations

import functools
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from timm_ghn.ghn import GHN, default_ghn, load_ghn
from timm_ghn.graph import Graph, capture, condense
from timm_ghn.hook import install
from timm_ghn.initialize.provenance import report_of
from timm_ghn.initialize.report import Report, Status
from timm_ghn.orthogonalization import resolve_start_layer, selected_layers, weight_layers
from timm_ghn.seeding import seeded
from timm_ghn.settings import Init
from timm_ghn.trace.inputs import input_sizes
from timm_ghn.trace.records import Trace
from timm_ghn.trace.skeleton import build_on_meta
from zoo_survey.activations import Activations as Measured
from zoo_survey.activations import BlockRatio, activation_ratio, keeps_statistics, measure_activations
from zoo_survey.clock import Clock, ClockedGHN
from zoo_survey.flops import multiplications
from zoo_survey.names import module_of
from zoo_survey.records import (
    Activations,
    Coverage,
    Entry,
    Extreme,
    Facts,
    Failure,
    GraphFacts,
    GraphSeconds,
    InitFacts,
    InitSeconds,
    Share,
    Stage,
)

MEMORY = 8 * 2**30
"""Bytes that may be used for the weights of models at the same time."""
PROBE_OPERATIONS = 5 * 10**9
"""Multiplications of a forward pass of one image from which on activations are compared on smaller images."""
_SMALLEST_PROBE = 64
_WORKSPACE = 1.4  # weights and what is needed beside them: buffers, post-processing, activations
_PROGRAM = 2**29


@dataclass(frozen=True)
class Settings:
    """How models are examined.

    Attributes:
        ghn: Name or path of the GHN; None for the default one.
        seed: Seed of timm's own weights, of the initialization and of the noise images.
        probe_operations: See `PROBE_OPERATIONS`.
    """

    ghn: str | None = "bundled"
    seed: int = 0
    probe_operations: int = PROBE_OPERATIONS


def memory_needed(parameters: int) -> int:
    """Bytes that initializing a model of that many float32 parameters takes, about."""
    return int(4 * parameters * _WORKSPACE) + _PROGRAM


def examine(name: str, settings: Settings = Settings(), *, graph_only: bool = False, memory: int = MEMORY) -> Coverage:
    """Everything that can be found out about one model, in this process.

    Args:
        name: Name of a timm model.
        settings: How it is examined.
        graph_only: Whether the weights are left out.
        memory: Bytes from which on they are left out as well.

    Returns:
        What worked, and what failed; a model that fails raises nothing.
    """
    entries = {Stage.GRAPH: examine_graph(name, settings)}
    facts = entries[Stage.GRAPH].facts
    skipped = "" if graph_only else reason_to_skip(facts, memory)
    if not graph_only and isinstance(facts, GraphFacts) and not skipped:
        entries[Stage.INIT] = examine_init(name, settings, facts.probe_size)
    return Coverage.of(name, module_of(name), entries, skipped)


def reason_to_skip(facts: Facts | None, memory: int) -> str:
    """Why a model is not initialized; empty if it can be."""
    if not isinstance(facts, GraphFacts):
        return "no graph"
    needed = memory_needed(facts.parameters)
    if needed > memory:
        return f"needs {needed / 2**30:.1f} GiB of memory, more than the {memory / 2**30:.1f} GiB allowed"
    return ""


def examine_graph(name: str, settings: Settings = Settings()) -> Entry:
    """The graph of a model, without its weights."""
    clock = Clock()
    return _recorded(Stage.GRAPH, name, clock, lambda: _graph_facts(name, settings, clock))


def examine_init(name: str, settings: Settings = Settings(), probe_size: tuple[int, ...] | None = None) -> Entry:
    """The initialization of a model in memory, by GHN-orth and without a cache, and its activations.

    Args:
        name: Name of a timm model.
        settings: How it is examined.
        probe_size: Size of the noise images; the model's own by default.
    """
    clock = Clock()
    return _recorded(Stage.INIT, name, clock, lambda: _init_facts(name, settings, probe_size, clock))


def _recorded(stage: Stage, name: str, clock: Clock, work: Callable[[], Facts]) -> Entry:
    """An entry of what the work returns, or of how it failed."""
    start, cpu, before = time.perf_counter(), time.process_time(), _reset_peak()
    facts, failure = None, None
    try:
        facts = work()
    except Exception as error:  # noqa: BLE001 - any model code may run here; what it raises is the result
        failure = Failure.of(clock.last, error)
    peak = _status_bytes("VmHWM")
    memory = None if peak is None or before is None else max(peak - before, 0)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Entry(stage, name, module_of(name), facts, failure, seconds, cpu, memory)


# --- the graph ------------------------------------------------------------------------------------------------------


def _graph_facts(name: str, settings: Settings, clock: Clock) -> GraphFacts:
    with clock.step("build"):
        model = build_on_meta(lambda: timm.create_model(name))
    with clock.step("capture"):
        trace = capture(model)
    with clock.step("condense"):
        graph = condense(trace)
    with clock.step("distances"):
        virtual_edges = int((graph.distance_matrix > 0).sum())
    with clock.step("gnn"), torch.no_grad():
        _ghn(settings.ghn).embed_nodes(graph)
    with clock.step("layers"):
        layers = weight_layers(model)
        start_layer = resolve_start_layer(layers)
        processed = selected_layers(layers, start_layer)
    with clock.step("input size"):
        operations = multiplications(trace)
        probe_size = _probe_size(model, trace, settings.probe_operations)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    predictable = {target.name for target in graph.targets}
    return GraphFacts(
        parameters=sum(sizes.values()),
        nodes=len(graph),
        edges=len(graph.edges),
        virtual_edges=virtual_edges,
        layers=len(layers),
        start_layer=start_layer,
        predictable=sum(size for parameter, size in sizes.items() if parameter in predictable),
        orthogonalized=sum(sizes[layer.parameter] for layer in processed),
        kept=_kept(graph, sizes),
        operations=operations,
        probe_size=probe_size,
        seconds=GraphSeconds(**{step: clock[step] for step in GraphSeconds.__dataclass_fields__}),
    )


def _kept(graph: Graph, sizes: dict[str, int]) -> tuple[Share, ...]:
    """What is not predicted, by reason."""
    return _shares((reason, sizes.get(parameter, 0)) for parameter, reason in graph.unused)


def _shares(rows: Iterable[tuple[str, int]]) -> tuple[Share, ...]:
    """Rows of a description and a number of elements, summed by description; the largest first."""
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for what, size in rows:
        tensors[what] += 1
        elements[what] += size
    return tuple(Share(what, tensors[what], count) for what, count in elements.most_common())


def _probe_size(model: nn.Module, trace: Trace, limit: int) -> tuple[int, ...] | None:
    """The largest size, by halves from the model's own, that it takes and that needs no more operations.

    None where the model is run at its own size: it is small enough, or does not take another.
    """
    size, chosen = input_sizes(model)[0], None
    while multiplications(trace) > limit and min(size[1:]) // 2 >= _SMALLEST_PROBE:
        size = (size[0], *(side // 2 for side in size[1:]))
        try:
            trace = capture(model, input_size=size)
        except Exception:  # noqa: BLE001 - the model does not take it, for a reason of its own
            return chosen
        chosen = size
    return chosen


# --- the weights ----------------------------------------------------------------------------------------------------


def _init_facts(name: str, settings: Settings, size: tuple[int, ...] | None, clock: Clock) -> InitFacts:
    with clock.step("timm"), seeded(settings.seed):
        reference = timm.create_model(name)
    with clock.step("activations of timm's weights"):
        expected = _activations(reference, size, settings.seed)
    del reference
    gc.collect()
    model, report, seconds = initialized(name, settings, clock)
    with clock.step("activations"):
        activations = _compare(model, expected, size, settings.seed)
    seconds["activations"] = clock["activations"] + clock["activations of timm's weights"]
    orthogonalized = (Status.PREDICTED_ORTHOGONALIZED, Status.ORTHOGONALIZED, Status.DRAWN)
    return InitFacts(
        predicted=sum(p.numel for p in report.parameters if p.status in _PREDICTED),
        orthogonalized=sum(p.numel for p in report.parameters if p.status in orthogonalized),
        kept=_shares((p.reason or p.status.value, p.numel) for p in report.parameters if p.status not in _PREDICTED),
        ghn=str(report.provenance["ghn"]),
        activations=activations,
        seconds=InitSeconds(**seconds),
    )


_PREDICTED = (Status.PREDICTED, Status.PREDICTED_ORTHOGONALIZED)


def initialized(name: str, settings: Settings, clock: Clock) -> tuple[nn.Module, Report, dict[str, float]]:
    """A model as a user gets it, what it got, and the seconds of each step up to there."""
    install()
    ghn = ClockedGHN(_ghn(settings.ghn), clock, after="postprocess")
    init = Init("ghn-orth", ghn=ghn, seed=settings.seed, cache=False)
    start = time.perf_counter()
    with clock.step("plan"):
        model = timm.create_model(name, init=init)
    total = time.perf_counter() - start
    report = report_of(model)
    if report is None:
        raise RuntimeError(f"{name} was built without an initialization")
    construct = total - report.seconds
    steps = {step: clock[step] for step in ("timm", "distances", "gnn", "decode", "postprocess")}
    return model, report, {**steps, "construct": construct, "plan": max(clock["plan"] - construct, 0.0)}


def _keeps_statistics(model: nn.Module) -> bool:
    return any(keeps_statistics(module) for module in model.modules())


def _activations(model: nn.Module, size: tuple[int, ...] | None, seed: int) -> Measured:
    """Activations as in training: of two images where norm layers look at the batch, else of one."""
    batch = 2 if _keeps_statistics(model) else 1
    return measure_activations(model, input_size=size, batch=batch, seed=seed, batch_statistics=True)


def _compare(model: nn.Module, expected: Measured, size: tuple[int, ...] | None, seed: int) -> Activations:
    """Activations of a model beside those that are expected."""
    found = _activations(model, size, seed)
    ratio = activation_ratio(found, expected)
    finite = ratio.finite
    if _keeps_statistics(model):
        finite = finite and measure_activations(model, input_size=size, batch=1, seed=seed).finite
    blocks = sorted(ratio.blocks, key=lambda block: block.ratio)
    return Activations(
        blocks=len(blocks),
        low=_extreme(blocks[0]) if blocks else None,
        high=_extreme(blocks[-1]) if blocks else None,
        peak=max((block.rms for block in found.blocks), default=0.0),
        peak_timm=max((block.rms for block in expected.blocks), default=0.0),
        features=ratio.features,
        logits=ratio.logits,
        finite=finite,
        finite_timm=expected.finite,
        input_size=size,
    )


def _extreme(block: BlockRatio) -> Extreme:
    return Extreme(block.name, block.candidate, block.reference)


@functools.cache
def _ghn(source: str | None) -> GHN:
    return default_ghn() if source is None else load_ghn(source)


# --- memory ---------------------------------------------------------------------------------------------------------


def _reset_peak() -> int | None:
    """Begin to count the peak of this process's memory anew; bytes in use now, None where that is not known."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    """A size that Linux tells of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else 1024 * int(found)
