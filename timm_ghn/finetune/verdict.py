"""The outcome of a comparison of initializations: a table, one sentence, and a picture of the curves."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm_ghn.errors import MissingDependencyError
from timm_ghn.finetune.results import RunResult, Summary, differences, spread
from timm_ghn.storage.atomic import save_atomically
from timm_ghn.text import table

ENOUGH_STEPS = 150
"""Steps of training below which accuracies say more about the first steps than about the start."""


def comparison_table(summaries: Sequence[Summary]) -> list[str]:
    """Lines of a table with a row for each initialization; differences are to the first one, paired by seed."""
    first = summaries[0]
    header = ("init", "lr", "runs", "accuracy, %", "spread", f"less {first.config.starts_from}", "spread", "better on")
    return table(header, [_row(summary, first) for summary in summaries])


def _row(summary: Summary, first: Summary) -> tuple[str, ...]:
    note = f" ({summary.diverged} diverged)" if summary.diverged else ""
    name, rate, runs = summary.config.starts_from, f"{summary.config.lr:g}", f"{len(summary.accuracies)}{note}"
    if not summary.accuracies:
        return (name, rate, runs, *["-"] * 5)
    own, gains = (f"{100 * summary.mean:.1f}", f"{100 * summary.std:.1f}"), differences(summary, first)
    if summary is first or not gains:
        return (name, rate, runs, *own, *["-"] * 3)
    paired = f"{100 * statistics.fmean(gains):+.1f}", f"{100 * spread(gains):.1f}"
    return (name, rate, runs, *own, *paired, f"{_wins(gains)} of {len(gains)} seeds")


def _wins(gains: Sequence[float]) -> int:
    return sum(gain > 0 for gain in gains)


def verdict(summaries: Sequence[Summary], steps: int) -> str:
    """One sentence that says what the table means: the best initialization beside the second best.

    Args:
        summaries: One for each initialization.
        steps: Steps of training of every run.
    """
    ranked = sorted((row for row in summaries if row.accuracies), key=lambda row: row.mean, reverse=True)
    pairs = [(row, gains) for row in ranked[1:] if (gains := differences(ranked[0], row))]
    if not pairs:
        return "There is nothing to compare: no two initializations have a run with the same seed that did not diverge."
    best, (second, gains) = ranked[0], pairs[0]
    names = f"{best.config.starts_from} and {second.config.starts_from}"
    if steps < ENOUGH_STEPS:
        epochs = math.ceil(best.config.epochs * ENOUGH_STEPS / steps)
        return f"Too short to tell {names} apart: {steps} steps of training; --epochs {epochs} or more would do."
    mean, wins = statistics.fmean(gains), f"{_wins(gains)} of {len(gains)} seeds"
    lead = f"{100 * mean:.1f} points"
    if len(gains) == 1:
        return f"One seed does not tell {names} apart: the first is {lead} ahead; use --seeds 3 or more."
    if _wins(gains) < len(gains) or mean <= spread(gains):
        return (
            f"No clear difference between {names}: {lead} ± {100 * spread(gains):.1f}, the first is better on "
            f"{wins}; more --seeds or --epochs may tell them apart."
        )
    return f"{best.config.starts_from} is ahead of {second.config.starts_from} on {wins}, by {lead}."


def draw_curves(results: Iterable[RunResult], path: Path) -> None:
    """Write a PNG: test accuracy by epoch, a line for the mean of each initialization, a band from worst to best seed.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingDependencyError("curves need matplotlib: pip install 'timm-ghn[plot]'") from error
    measured: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for point in result.curve:
            if point.accuracy is not None and not result.diverged:
                measured[result.config.starts_from][point.epoch].append(100 * point.accuracy)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for init, curve in measured.items():
        epochs, values = list(curve), list(curve.values())
        (line,) = axis.plot(epochs, [statistics.fmean(value) for value in values], marker=".", label=init)
        axis.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    axis.set(xlabel="epoch", ylabel="test accuracy (%)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measured:
        axis.legend(frameon=False)
    save_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
