"""Training runs of GHNs beside each other, from their folders: cost of an update, and what networks come to.

    timm-ghn train --images S0 S1 --teacher efficientnet_lite0 --hypernet gatedgnn --steps 1000 --cooldown 200 --out a
    timm-ghn train --images S0 S1 --teacher efficientnet_lite0 --hypernet graphormer --steps 1000 --cooldown 200 --out b
    python benchmarks/training_runs.py a b

Networks, images and teacher are the same in both, update by update. `held out` is the mean over one network of each
family that is never trained on; `in training` the mean since the evaluation before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from timm_ghn.text import markdown_table

HEADER = ("run", "update", "s an update", "GHN, share of the time", "in training", "held out", "linear, 20 new classes")
_GHN = ("ghn_forward_share", "ghn_backward_share", "update_share")


def rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """A row for each evaluation of a run."""
    lines: list[dict[str, float]] = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "evaluation" not in line:
            lines.append(line)
        elif lines:  # none after a crash: the evaluation is made again
            yield folder.name, *_row(line, lines)
            lines = []


def _row(evaluation: dict[str, Any], lines: Sequence[dict[str, float]]) -> tuple[str, ...]:
    values, measure = evaluation["evaluation"]["values"], "cosine" if "cosine" in lines[-1] else "accuracy"
    # The median: an update during which the machine did something else does not count.
    seconds = 1 / statistics.median(line["steps_per_second"] for line in lines)
    share = statistics.median(sum(line[name] for name in _GHN) for line in lines)
    trained = statistics.fmean(line[measure] for line in lines)
    numbers = (f"{seconds:.2f}", f"{share:.2f}", f"{trained:.3f}", f"{values[measure]:.3f}")
    return str(evaluation["step"]), *numbers, f"{100 * values['few_shot']:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders given to --out")
    args = parser.parse_args(argv)
    print("\n".join(markdown_table(HEADER, (row for run in args.runs for row in rows(run)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
