"""What is recorded of a model: frozen, and JSON-compatible both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any, TypeVar


class Stage(str, Enum):
    """What was tried with a model."""

    GRAPH = "graph"
    """Its graph, on the meta device."""
    INIT = "init"
    """Its weights, in memory, compared with timm's own."""
    PPUDA = "ppuda"
    GHN3 = "ghn3"


@dataclass(frozen=True)
class Failure:
    """Something that did not work.

    Attributes:
        step: What was being done.
        error: Class of the exception; "Killed" or "Timeout" for a process that had to end.
        message: Its first line.
    """

    step: str
    error: str
    message: str

    @classmethod
    def of(cls, step: str, error: BaseException) -> Failure:
        """The record of an exception."""
        lines = str(error).strip().splitlines() or [""]
        return cls(step, type(error).__name__, lines[0][:300])


@dataclass(frozen=True)
class Share:
    """Parameters that were treated alike.

    Attributes:
        what: What they got, or why they were kept.
        tensors: Number of parameters.
        elements: Number of their elements.
    """

    what: str
    tensors: int
    elements: int


@dataclass(frozen=True)
class GraphSeconds:
    """Seconds of the steps from a name to node embeddings.

    Attributes:
        build: Building the model on the meta device.
        capture: Recording its forward pass.
        condense: Condensing the record to the graph.
        distances: Shortest paths between nodes.
        gnn: Embedding the nodes with a GHN.
    """

    build: float
    capture: float
    condense: float
    distances: float
    gnn: float

    @property
    def graph(self) -> float:
        """From a model to its graph."""
        return self.capture + self.condense


@dataclass(frozen=True)
class GraphFacts:
    """What the graph of a model says.

    Attributes:
        parameters: Number of elements of all parameters, tied ones once.
        nodes: Nodes of the graph.
        edges: Edges of the graph.
        virtual_edges: Pairs of nodes within the longest distance that counts, edges included.
        layers: Conv and fully-connected layers.
        start_layer: L, the first one that is orthogonalized, 1-based.
        predictable: Elements that a GHN of the model's number of classes predicts.
        orthogonalized: Elements of the layers from L on, without the classifier.
        kept: What is not predicted, by reason.
        operations: Multiplications and additions of a forward pass of one image, about.
        probe_size: Input size (channels, height, width) for comparing activations: the model's own, or a smaller one
            that it also takes where its own would need too many operations.
        seconds: Time of each step.
    """

    parameters: int
    nodes: int
    edges: int
    virtual_edges: int
    layers: int
    start_layer: int
    predictable: int
    orthogonalized: int
    kept: tuple[Share, ...]
    operations: int
    probe_size: tuple[int, ...] | None
    seconds: GraphSeconds

    @property
    def predictable_share(self) -> float:
        """Share of all elements."""
        return self.predictable / max(self.parameters, 1)

    @property
    def orthogonalized_share(self) -> float:
        """Share of all elements."""
        return self.orthogonalized / max(self.parameters, 1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphFacts:
        """Reads what `dataclasses.asdict` gives."""
        size = data["probe_size"]
        return cls(
            **{
                **data,
                "kept": tuple(Share(**share) for share in data["kept"]),
                "probe_size": None if size is None else tuple(size),
                "seconds": GraphSeconds(**data["seconds"]),
            }
        )


@dataclass(frozen=True)
class InitSeconds:
    """Seconds of an initialization without a cache, on one thread.

    Attributes:
        timm: timm's own creation, with its random weights.
        construct: Building the model with random weights put off.
        plan: Graph, layers, and timm's own weights where nothing is predicted.
        distances: Shortest paths.
        gnn: Embedding the nodes.
        decode: Waiting for predicted blocks and writing them.
        postprocess: Noise and orthogonalization, beyond what runs beside the prediction, and all that follows.
        activations: Comparing activations; no part of an initialization.
    """

    timm: float
    construct: float
    plan: float
    distances: float
    gnn: float
    decode: float
    postprocess: float
    activations: float

    @property
    def total(self) -> float:
        """What `timm.create_model(name, init='ghn-orth')` takes."""
        return self.construct + self.plan + self.distances + self.gnn + self.decode + self.postprocess


@dataclass(frozen=True)
class Extreme:
    """The block of a model whose ratio to timm's is the smallest or the largest.

    Attributes:
        block: Name of the module.
        ours: Root mean square of what it returns.
        timm: The same with timm's own weights.
    """

    block: str
    ours: float
    timm: float

    @property
    def ratio(self) -> float:
        """ours / timm."""
        return self.ours / self.timm


@dataclass(frozen=True)
class Activations:
    """Activations after the initialization, relative to those with timm's own weights and the same noise images.

    Ratios are those of `activations`: root mean squares of what blocks return, where norm layers use
    the statistics of the batch as in training.

    Attributes:
        blocks: Number of blocks that were compared.
        low: The block of the smallest ratio; None if there is no block to compare.
        high: The block of the largest ratio; None if there is no block to compare.
        peak: Largest root mean square of all blocks.
        peak_timm: The same with timm's own weights.
        features: Ratio of what the classifier reads; None where timm's are zero.
        logits: Ratio of the output; None where timm's is zero.
        finite: Whether all activations are finite, also with the running statistics as they are.
        finite_timm: Whether those with timm's own weights are.
        input_size: (channels, height, width) of the images; None for the model's own.
    """

    blocks: int
    low: Extreme | None
    high: Extreme | None
    peak: float
    peak_timm: float
    features: float | None
    logits: float | None
    finite: bool
    finite_timm: bool
    input_size: tuple[int, ...] | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Activations:
        """Reads what `dataclasses.asdict` gives."""
        low, high, size = data["low"], data["high"], data["input_size"]
        return cls(
            **{
                **data,
                "low": None if low is None else Extreme(**low),
                "high": None if high is None else Extreme(**high),
                "input_size": None if size is None else tuple(size),
            }
        )


@dataclass(frozen=True)
class InitFacts:
    """What an initialization did.

    Attributes:
        predicted: Elements that the GHN predicted.
        orthogonalized: Elements that were orthogonalized, predicted or not.
        kept: What was not predicted, by reason.
        ghn: Name of the GHN.
        activations: Comparison with timm's own weights.
        seconds: Time of each step.
    """

    predicted: int
    orthogonalized: int
    kept: tuple[Share, ...]
    ghn: str
    activations: Activations | None
    seconds: InitSeconds

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InitFacts:
        """Reads what `dataclasses.asdict` gives."""
        found = data["activations"]
        return cls(
            **{
                **data,
                "kept": tuple(Share(**share) for share in data["kept"]),
                "activations": None if found is None else Activations.from_dict(found),
                "seconds": InitSeconds(**data["seconds"]),
            }
        )


@dataclass(frozen=True)
class PeerFacts:
    """What another package did with a model.

    Attributes:
        seconds: From the model to its weights.
        predicted: Elements of parameters that it changed.
        parameters: Elements of all parameters.
    """

    seconds: float
    predicted: int
    parameters: int


Facts = GraphFacts | InitFacts | PeerFacts


@dataclass(frozen=True)
class Entry:
    """One stage of one model: a line of a results file.

    Attributes:
        stage: What was tried.
        name: Name of the model.
        module: Module of timm that builds it.
        facts: What came out; None after a failure.
        failure: What went wrong; None otherwise.
        seconds: All of it.
        cpu: Seconds of it that the process computed, on all of its threads.
        memory: Bytes that the process needed at most, beyond what it started with; None where that is not known.
    """

    stage: Stage
    name: str
    module: str
    facts: Facts | None
    failure: Failure | None = None
    seconds: float = 0.0
    cpu: float = 0.0
    memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back."""
        return {**asdict(self), "stage": self.stage.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """Reads what `to_dict` gives.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        stage = Stage(data["stage"])
        facts, failure = data["facts"], data["failure"]
        return cls(
            **{
                **_known(cls, data),
                "stage": stage,
                "facts": None if facts is None else _read_facts(stage, facts),
                "failure": None if failure is None else Failure(**failure),
            }
        )


_T = TypeVar("_T")


def _known(cls: type[_T], data: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: data[item.name] for item in fields(cls)}  # type: ignore[arg-type]


def _read_facts(stage: Stage, data: Mapping[str, Any]) -> Facts:
    if stage is Stage.GRAPH:
        return GraphFacts.from_dict(data)
    return InitFacts.from_dict(data) if stage is Stage.INIT else PeerFacts(**data)


@dataclass(frozen=True)
class Coverage:
    """All that is known of one model.

    Attributes:
        name: Name of the model.
        module: Module of timm that builds it.
        graph: What its graph says; None after a failure.
        init: What its initialization did; None after a failure, or if it was not tried.
        failures: What went wrong.
        skipped: Why it was not initialized; empty if it was tried.
        memory: Bytes that the graph needed at most, beyond the program; None where that is not known.
    """

    name: str
    module: str
    graph: GraphFacts | None = None
    init: InitFacts | None = None
    failures: tuple[Failure, ...] = ()
    skipped: str = ""
    memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return asdict(self)

    @classmethod
    def of(cls, name: str, module: str, entries: Mapping[Stage, Entry], skipped: str = "") -> Coverage:
        """What the entries of one model say together."""
        graph, init = entries.get(Stage.GRAPH), entries.get(Stage.INIT)
        facts, weights = graph and graph.facts, init and init.facts
        failures = tuple(entry.failure for entry in (graph, init) if entry is not None and entry.failure is not None)
        return cls(
            name,
            module,
            facts if isinstance(facts, GraphFacts) else None,
            weights if isinstance(weights, InitFacts) else None,
            failures,
            "" if init is not None else skipped,
            graph.memory if graph is not None else None,
        )


def collect(entries: Iterable[Entry], skipped: Mapping[str, str] | None = None) -> tuple[Coverage, ...]:
    """The coverage of each model, in order of names; of several entries of a stage the last one counts.

    Args:
        entries: Entries of any number of models.
        skipped: Why models were not initialized, by name.
    """
    stages: dict[str, dict[Stage, Entry]] = {}
    for entry in entries:
        stages.setdefault(entry.name, {})[entry.stage] = entry
    reasons = skipped or {}
    return tuple(
        Coverage.of(name, next(iter(found.values())).module, found, reasons.get(name, ""))
        for name, found in sorted(stages.items())
        if Stage.GRAPH in found or Stage.INIT in found
    )
