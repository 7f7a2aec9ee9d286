"""Trying many models: all graphs first, then the weights of those that fit in memory, small models first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from zoo_survey.examine import Settings, examine_graph, examine_init, memory_needed, reason_to_skip
from zoo_survey.pool import Limits, Task, run
from zoo_survey.records import Entry, GraphFacts, Stage

GRAPH_MEMORY = 2**29
"""Bytes that a graph takes, at most: for the 6.7e9 parameters of vit_7b_patch16_dinov3 it is a tenth."""


@dataclass(frozen=True)
class Plan:
    """What is tried.

    Attributes:
        settings: How models are examined.
        limits: Processes, memory and time.
        graph_only: Whether weights are left out.
        max_parameters: Parameters from which on weights are left out, of peers as well; None for no such limit.
        peers: Work of other packages, by stage.
    """

    settings: Settings = field(default_factory=Settings)
    limits: Limits = field(default_factory=Limits)
    graph_only: bool = False
    max_parameters: int | None = None
    peers: Mapping[Stage, Callable[[str], Entry]] = field(default_factory=dict)

    def reason_to_skip(self, entry: Entry) -> str:
        """Why the weights of a model with this graph are left out; empty if they are not."""
        facts = entry.facts
        if self.graph_only:
            return "only graphs were asked for"
        limit = self.max_parameters
        if isinstance(facts, GraphFacts) and limit is not None and facts.parameters > limit:
            return f"has {facts.parameters:,} parameters, more than the {limit:,} asked for"
        return reason_to_skip(facts, self.limits.memory)


def survey(names: Sequence[str], plan: Plan, known: Iterable[Entry] = ()) -> Iterator[Entry]:
    """Try models, and leave out what is known.

    Args:
        names: Names of timm models.
        plan: What is tried.
        known: Entries of an earlier run.

    Yields:
        An entry for each stage of a model, as they are finished.
    """
    wanted = set(names)
    done = {(entry.stage, entry.name): entry for entry in known if entry.name in wanted}
    for entry in run(_graph_tasks(names, plan, done), plan.limits):
        done[entry.stage, entry.name] = entry
        yield entry
    yield from run(_weight_tasks(names, plan, done), plan.limits)


def skipped(entries: Iterable[Entry], plan: Plan) -> dict[str, str]:
    """Why models were not initialized, by name."""
    graphs = (entry for entry in entries if entry.stage is Stage.GRAPH)
    reasons = {entry.name: plan.reason_to_skip(entry) for entry in graphs}
    return {name: reason for name, reason in reasons.items() if reason}


def _graph_tasks(names: Sequence[str], plan: Plan, done: Mapping[tuple[Stage, str], Entry]) -> list[Task]:
    work = functools.partial(examine_graph, settings=plan.settings)
    return [Task(Stage.GRAPH, name, work, GRAPH_MEMORY) for name in names if (Stage.GRAPH, name) not in done]


def _weight_tasks(names: Sequence[str], plan: Plan, done: Mapping[tuple[Stage, str], Entry]) -> list[Task]:
    """Everything that needs weights in memory, by size."""
    graphs = [done[Stage.GRAPH, name] for name in names if (Stage.GRAPH, name) in done]
    tasks = list[Task]()
    for entry in sorted(graphs, key=_parameters):
        size, memory = _parameters(entry), memory_needed(_parameters(entry))
        if not plan.reason_to_skip(entry):
            facts = entry.facts
            probe = facts.probe_size if isinstance(facts, GraphFacts) else None
            work = functools.partial(examine_init, settings=plan.settings, probe_size=probe)
            tasks.append(Task(Stage.INIT, entry.name, work, memory))
        if memory <= plan.limits.memory and (plan.max_parameters is None or size <= plan.max_parameters):
            # Others hold gradients or copies beside the weights.
            tasks += [Task(stage, entry.name, work, 2 * memory) for stage, work in plan.peers.items()]
    return [task for task in tasks if (task.stage, task.name) not in done]


def _parameters(entry: Entry) -> int:
    return entry.facts.parameters if isinstance(entry.facts, GraphFacts) else 0
