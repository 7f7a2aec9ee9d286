"""The coverage of many models as a Markdown page: a summary, a row for each module, and the worst ones by name."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from timm_ghn.graph.condense import TIED
from zoo_survey.activations import log_distance
from zoo_survey.records import (
    Activations,
    Coverage,
    Entry,
    Extreme,
    GraphFacts,
    InitFacts,
    PeerFacts,
    Stage,
)
from zoo_survey.results import RunInfo

LISTED = 10
"""Models in a list of the worst ones."""
GOAL = 0.95
"""Share of the parameters of a model below which it is listed with the reasons."""
FAR = 30
"""Ratio of activations from which on models are counted."""
_SIZES = (0, 100, 200, 400, 800, 1600, 3200)
_DASH = "-"

Row = Sequence[str]


def markdown(models: Sequence[Coverage], runs: Sequence[RunInfo] = (), peers: Sequence[Entry] = ()) -> str:
    """The whole page.

    Args:
        models: Coverage of each model.
        runs: The runs that it comes from.
        peers: What other packages did with the same models.
    """
    sections = [
        ["# Every model in timm", "", *_origin(runs)],
        _summary(models),
        _peer_section(peers),
        ["## By module", "", _LEGEND, "", *_markdown_table(_MODULE_COLUMNS, _module_rows(models))],
        _growth(models),
        _worst(models),
        _failure_section(models),
        _skipped_section(models),
        _reason_section(models),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


# --- numbers --------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _share(value: float) -> str:
    """A percentage that says 100 only if it is all."""
    return "100 %" if value == 1 else f"{min(100 * value, 99.99):.2f} %"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _times(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2g}"


def _range(values: Sequence[float], text: Callable[[float], str] = "{:g}".format) -> str:
    if not values:
        return _DASH
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _graphs(models: Iterable[Coverage]) -> list[tuple[Coverage, GraphFacts]]:
    return [(model, model.graph) for model in models if model.graph is not None]


def _inits(models: Iterable[Coverage]) -> list[tuple[Coverage, InitFacts]]:
    return [(model, model.init) for model in models if model.init is not None]


def _activations(models: Iterable[Coverage]) -> list[tuple[Coverage, Activations]]:
    return [(model, init.activations) for model, init in _inits(models) if init.activations is not None]


def distance(found: Activations) -> float:
    """How far the worst ratio of activations is from 1, as a factor; infinity if one vanished or not all is finite."""
    if not found.finite:
        return float("inf")
    ratios = (*_block_ratios(found), *(ratio for ratio in (found.features, found.logits) if ratio is not None))
    return max(map(log_distance, ratios), default=1.0)


def _block_ratios(found: Activations) -> tuple[float, ...]:
    return tuple(block.ratio for block in (found.low, found.high) if block is not None)


# --- text -----------------------------------------------------------------------------------------------------------


def _markdown_table(header: Row, rows: Iterable[Row]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: Row) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _origin(runs: Sequence[RunInfo]) -> list[str]:
    """A sentence for each run."""
    lines: list[str] = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        begun = "Made by" if not lines else "Continued by"
        lines += [
            f"{begun} `{run.command}` on {run.date}: {run.machine}, {run.cores} cores, one thread a model; {versions}."
        ]
    return lines


def _summary(models: Sequence[Coverage]) -> list[str]:
    modules = {model.module for model in models}
    lines = [f"- **{len(models):,} models** in {len(modules)} modules of timm."]
    lines += _graph_summary(models) if _graphs(models) else ["- No graphs."]
    lines += _init_summary(models) if _inits(models) else ["- Weights were not made in this run."]
    failed = sum(bool(model.failures) for model in models)
    lines.append(f"- Failures: {failed or 'none'}.")
    return lines


def _graph_summary(models: Sequence[Coverage]) -> list[str]:
    graphs = [facts for _, facts in _graphs(models)]
    times = [facts.seconds.graph for facts in graphs]
    whole = [facts.seconds.build + facts.seconds.graph for facts in graphs]
    shares = [facts.predictable_share for facts in graphs]
    orthogonalized = [facts.orthogonalized_share for facts in graphs]
    memory = [(model.memory, model.name) for model, _ in _graphs(models) if model.memory is not None]
    below = sum(share < GOAL for share in shares)
    lines = [
        f"- **Graphs: {len(graphs):,} of {len(models):,}.** Time from a model to its graph: {_percentiles(times)}. "
        f"With building the model on the meta device: {_percentiles(whole)}.",
        f"- **Predicted: {_share(statistics.fmean(shares))} of the parameters** on average over the models, for a GHN "
        f"of the model's number of classes; at least {_percent(GOAL)} in {len(graphs) - below:,} models, "
        f"{_share(min(shares))} in the worst. Orthogonalized: {_share(statistics.fmean(orthogonalized))} on average.",
    ]
    if memory:
        size, name = max(memory)
        lines.append(f"- Memory for a graph, beyond the program: {_gib(size)} at most ({name}).")
    return lines


def _grown(found: Activations) -> bool:
    return found.peak > FAR * found.peak_timm


def _percentiles(times: Sequence[float]) -> str:
    return (
        f"median {_seconds(statistics.median(times))}, 95th percentile {_seconds(percentile(times, 0.95))}, "
        f"slowest {_seconds(max(times))}"
    )


def _init_summary(models: Sequence[Coverage]) -> list[str]:
    inits, found = _inits(models), [item for _, item in _activations(models)]
    slower = [init.seconds.total / init.seconds.timm for _, init in inits if init.seconds.timm > 0]
    apart = [init.seconds.total - init.seconds.timm for _, init in inits]
    finite = sum(item.finite for item in found)
    lines = [
        f"- **Initialized: {len(inits):,}**, without a cache and on one thread: in the median "
        f"{statistics.median(slower):.2f} times as long as timm's own random weights, "
        f"{statistics.median(apart):+.2f} s."
    ]
    if found:
        features = [item.features for item in found if item.features is not None]
        within = [sum(distance(item) <= factor for item in found) for factor in (3, 10)]
        median = _times(statistics.median(features) if features else None)
        ends = f"{_times(min(features, default=None))} to {_times(max(features, default=None))}"
        grown = sum(_grown(item) for item in found)
        far = sum(item.high is not None and item.high.ratio > FAR for item in found)
        lines.append(
            f"- **Activations are finite in {finite:,} of {len(found):,}** models. Ratio to timm's own weights of what "
            f"the classifier reads: median {median}, from {ends}. Every block, the features and the logits are within "
            f"a factor of 3 in {within[0]:,} models, of 10 in {within[1]:,}. A block is more than {FAR} times as large "
            f"as timm's in {far:,} models; in {grown:,} the largest block is more than {FAR} times timm's largest."
        )
    return lines


def _peer_section(peers: Sequence[Entry]) -> list[str]:
    if not peers:
        return []
    rows = []
    for stage in (Stage.PPUDA, Stage.GHN3):
        entries = [entry for entry in peers if entry.stage is stage]
        if not entries:
            continue
        facts = [entry.facts for entry in entries if isinstance(entry.facts, PeerFacts)]
        errors = Counter(entry.failure.error for entry in entries if entry.failure is not None)
        full = sum(item.predicted >= GOAL * item.parameters for item in facts)
        time = _seconds(statistics.median(item.seconds for item in facts)) if facts else _DASH
        reasons = ", ".join(f"{error} {count}" for error, count in errors.most_common())
        rows.append([stage.value, f"{len(entries):,}", f"{len(facts):,}", f"{full:,}", time, reasons])
    header = (
        "package",
        "tried",
        "no error",
        f"of these, {_percent(GOAL)} of the parameters set",
        "median time",
        "errors",
    )
    return ["## Other packages on the same models", "", *_markdown_table(header, rows)]


_LEGEND = (
    "Time: from a model to its graph. Predicted: share of the parameters, the least and the mean of a module's models. "
    "Activations: ratios of root mean squares to those with timm's own weights, of all blocks of all models. "
    "Least: the model of which least is predicted, or one that fails."
)
_MODULE_COLUMNS = (
    "module", "models", "graphs", "time: median, max", "nodes", "predicted: least, mean", "orthogonalized",
    "activations", "least",
)  # fmt: skip


def _module_rows(models: Sequence[Coverage]) -> Iterable[Row]:
    groups: dict[str, list[Coverage]] = defaultdict(list)
    for model in models:
        groups[model.module].append(model)
    return [_module_row(module, group) for module, group in sorted(groups.items())]


def _module_row(module: str, models: Sequence[Coverage]) -> Row:
    graphs = [facts for _, facts in _graphs(models)]
    times = [facts.seconds.graph for facts in graphs]
    shares = [facts.predictable_share for facts in graphs]
    found = [item for _, item in _activations(models)]
    ratios = [ratio for item in found for ratio in _block_ratios(item)]
    infinite = sum(not item.finite for item in found)
    activations = _range(ratios, _times) + (f", {infinite} not finite" if infinite else "")
    if not graphs:
        return [module, str(len(models)), "0", *[_DASH] * 5, models[0].name]
    return [
        module,
        str(len(models)),
        str(len(graphs)),
        f"{_seconds(statistics.median(times))}, {_seconds(max(times))}",
        _range([facts.nodes for facts in graphs]),
        f"{_share(min(shares))}, {_share(statistics.fmean(shares))}",
        _share(statistics.fmean(facts.orthogonalized_share for facts in graphs)),
        activations,
        min(models, key=_least).name,
    ]


def _least(model: Coverage) -> float:
    return -1.0 if model.failures else model.graph.predictable_share if model.graph is not None else 0.0


def _growth(models: Sequence[Coverage]) -> list[str]:
    """Time by number of nodes."""
    graphs = [facts for _, facts in _graphs(models)]
    rows = []
    for low, high in itertools.pairwise((*_SIZES, 10**9)):
        group = [facts for facts in graphs if low <= facts.nodes < high]
        if group:
            rows.append(_growth_row(f"{low} to {high - 1}" if high < 10**9 else f"from {low}", group))
    header = ("nodes", "models", "capture", "condense", "distances", "GNN", "ms per node", "distances and GNN of all")
    intro = "Medians on one core. Build is not counted; the last column is the share of distances and GNN in what is."
    return ["## How time grows with the graph", "", intro, "", *_markdown_table(header, rows)] if rows else []


def _growth_row(label: str, group: Sequence[GraphFacts]) -> Row:
    steps = ("capture", "condense", "distances", "gnn")
    medians = [statistics.median(getattr(facts.seconds, step) for facts in group) for step in steps]
    per_node = statistics.median(1e3 * _work(facts) / facts.nodes for facts in group)
    share = statistics.median((facts.seconds.distances + facts.seconds.gnn) / _work(facts) for facts in group)
    return [label, f"{len(group):,}", *(f"{value:.3f} s" for value in medians), f"{per_node:.2f}", _percent(share)]


def _work(facts: GraphFacts) -> float:
    return facts.seconds.graph + facts.seconds.distances + facts.seconds.gnn


def _worst(models: Sequence[Coverage]) -> list[str]:
    lines = ["## The worst ones"]
    graphs = _graphs(models)
    partly = sorted((item for item in graphs if item[1].predictable < item[1].parameters), key=_by_share)
    below = [item for item in partly if item[1].predictable_share < GOAL]
    listed = below if len(below) > LISTED else partly[:LISTED]
    if listed:
        rows = [[model.name, _share(facts.predictable_share), _main_reason(facts)] for model, facts in listed]
        lines += ["", "### Least predicted", "", *_markdown_table(("model", "predicted", "mostly because of"), rows)]
    slow = sorted(graphs, key=lambda item: -item[1].seconds.graph)[:LISTED]
    rows = [[m.name, f"{f.nodes:,}", _seconds(f.seconds.graph), _seconds(f.seconds.build)] for m, f in slow]
    if rows:
        lines += ["", "### Slowest graphs", "", *_markdown_table(("model", "nodes", "graph", "build"), rows)]
    return [*lines, *_worst_activations(models)] if len(lines) > 1 else []


def _by_share(item: tuple[Coverage, GraphFacts]) -> float:
    return item[1].predictable_share


def _main_reason(facts: GraphFacts) -> str:
    largest = max(facts.kept, key=lambda share: share.elements, default=None)
    return _DASH if largest is None else f"{largest.what} ({largest.elements:,})"


def _worst_activations(models: Sequence[Coverage]) -> list[str]:
    far = sorted(_activations(models), key=lambda item: -distance(item[1]))[:LISTED]
    rows = [
        [
            model.name,
            "yes" if found.finite else "no" if found.finite_timm else "no, nor with timm's weights",
            _extreme(found.low),
            _extreme(found.high),
            f"{_times(found.peak)} / {_times(found.peak_timm)}",
            _times(found.features),
            _times(found.logits),
        ]
        for model, found in far
    ]
    header = ("model", "finite", "smallest ratio", "largest ratio", "largest block", "features", "logits")
    lines = ["", "### Activations farthest from timm's", "", _EXTREMES, "", *_markdown_table(header, rows)]
    return lines if rows else []


_EXTREMES = (
    "A ratio is followed by the root mean squares behind it, ours / timm's, and the block. A large one says that "
    "activations have grown, or that timm's own have vanished: the largest root mean squares of any block tell which."
)


def _extreme(found: Extreme | None) -> str:
    return _DASH if found is None else f"{found.ratio:.2g} = {found.ours:.2g} / {found.timm:.2g} ({found.block})"


def _failure_section(models: Sequence[Coverage]) -> list[str]:
    rows = [
        [model.name, failure.step, failure.error, failure.message] for model in models for failure in model.failures
    ]
    header = ("model", "step", "error", "message")
    return ["## Failures", "", *_markdown_table(header, rows)] if rows else []


def _skipped_section(models: Sequence[Coverage]) -> list[str]:
    large = [model for model in models if model.skipped and model.graph is not None]
    if not large or not _inits(models):
        return []
    rows = [[model.name, f"{model.graph.parameters:,}" if model.graph else _DASH, model.skipped] for model in large]
    intro = "Their graphs are known; `timm-ghn init NAME --out DIR` writes their weights tensor by tensor."
    return ["## Graph only", "", intro, "", *_markdown_table(("model", "parameters", "why"), rows)]


def _without_name(reason: str) -> str:
    """A reason without the name of the one parameter that it is about."""
    return f"{TIED}another parameter" if reason.startswith(TIED) else reason


def _reason_section(models: Sequence[Coverage]) -> list[str]:
    """What is not predicted, over all models."""
    tensors: Counter[str] = Counter()
    affected: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    graphs = _graphs(models)
    for _, facts in graphs:
        for kept in facts.kept:
            what = _without_name(kept.what)
            tensors[what] += kept.tensors
            shares[what] += kept.elements / max(facts.parameters, 1)  # type: ignore[assignment]
        affected.update({_without_name(kept.what) for kept in facts.kept})
    rows = [
        [what, f"{affected[what]:,}", f"{tensors[what]:,}", f"{100 * share / len(graphs):.3f} %"]
        for what, share in shares.most_common()
    ]
    header = ("what is kept as timm sets it", "models", "tensors", "of the parameters, mean over all models")
    return ["## What is not predicted", "", *_markdown_table(header, rows)] if rows else []
