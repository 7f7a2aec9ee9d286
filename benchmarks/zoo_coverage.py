"""What works for every model of timm, how well, and how long it takes: graph, weights, activations.

    python benchmarks/zoo_coverage.py --table docs/coverage.md          # every model; goes on where it was stopped
    python benchmarks/zoo_coverage.py 'resnet*' 'vit_*' --graph-only    # some of them, without weights
    python benchmarks/zoo_coverage.py --every 12                        # a sample: every 12th model
    python benchmarks/zoo_coverage.py --peer ppuda --max-params 3e7     # also ppuda, where it is importable

All graphs come first, then the weights, small models first. Each model has a process of its own, of one thread: what
dies or hangs is recorded as a failure. Results are appended to `--out`, a JSON line for each stage of a model, and a
later run with the same versions and settings goes on with them. Models whose weights do not fit in `--memory` get a
graph only. Reported times are those of this machine while nothing else ran but the other jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm
from zoo_survey import peers as zoo_peers
from zoo_survey.examine import Settings
from zoo_survey.pool import Limits
from zoo_survey.records import Entry, Stage, collect
from zoo_survey.results import Results, ResultsError, RunInfo, open_results, read_results, without_failures
from zoo_survey.survey import Plan, skipped, survey
from zoo_survey.table import markdown

from timm_ghn.cli.common import select_names
from timm_ghn.errors import TimmGhnError
from timm_ghn.storage.atomic import write_atomically


def number(text: str) -> int:
    """A number such as 3e7."""
    return int(float(text))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names with * and ?; all models by default")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every n-th of them")
    parser.add_argument("--out", type=Path, default=Path("zoo_coverage.jsonl"), help="results, JSON Lines")
    parser.add_argument("--fresh", action="store_true", help="throw away what --out holds")
    parser.add_argument("--mixed", action="store_true", help="go on with results of other versions, timm's excepted")
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier run")
    parser.add_argument("--table", type=Path, help="write the Markdown page here")
    parser.add_argument("--table-only", action="store_true", help="try nothing, write --table from what --out holds")
    parser.add_argument("--graph-only", action="store_true", help="leave the weights out")
    parser.add_argument("--max-params", type=number, help="leave the weights of larger models out")
    parser.add_argument("--peer", action="append", choices=tuple(zoo_peers.PEERS), default=[], help="also try this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="models at a time (default: one a core)")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB for all of them together (default: 8)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a stage of a model (default: 600)")
    parser.add_argument("--ghn", default="bundled", help="name or path of the GHN (default: bundled)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.table_only and args.table is None:
        parser.error("--table-only needs --table")
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """What is tried.

    Raises:
        MissingDependencyError: If a peer cannot be imported.
    """
    peers: dict[Stage, Callable[[str], Entry]] = {}
    for peer in args.peer:
        zoo_peers.check(peer)
        peers[Stage(peer)] = functools.partial(zoo_peers.examine_peer, peer=peer)
    limits = Limits(args.jobs, int(args.memory * 2**30), args.timeout)
    return Plan(Settings(args.ghn, args.seed), limits, args.graph_only, args.max_params, peers)


def work_off(args: argparse.Namespace, plan: Plan, info: RunInfo) -> None:
    """Try everything that is not in the file of results, and append it there."""
    names = select_names(args.patterns)[:: args.every]
    with open_results(args.out, info, fresh=args.fresh, mixed=args.mixed) as writer:
        known = without_failures(writer.known) if args.retry else writer.known
        stages = 1 + (not plan.graph_only) + len(plan.peers)
        wanted = set(names)
        done = sum(entry.name in wanted for entry in known.entries)
        failures = 0
        interval = 0.1 if sys.stderr.isatty() else 60  # a log has no use for ten lines a second
        with tqdm(total=stages * len(names), initial=done, unit="step", mininterval=interval) as bar:
            for entry in survey(names, plan, known.entries):
                writer.add(entry)
                failures += entry.failure is not None
                bar.set_postfix_str(f"{entry.name[:32]}, {failures} failures", refresh=False)
                bar.update()
            bar.total = bar.n  # models of which only the graph was wanted have one step


def write_table(args: argparse.Namespace, plan: Plan, results: Results) -> None:
    """Write the page from all results of the chosen models."""
    names = set(select_names(args.patterns)[:: args.every])
    entries = [entry for entry in results.entries if entry.name in names]
    if not entries:
        raise ResultsError(f"{args.out} has no results of these models: {args.table} stays as it is")
    latest = {(entry.stage, entry.name): entry for entry in entries}
    peers = [entry for (stage, _), entry in latest.items() if stage in (Stage.PPUDA, Stage.GHN3)]
    page = markdown(collect(entries, skipped(entries, plan)), results.runs, peers)
    write_atomically(args.table, page.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        Exit status: 0, 2 after an error, 130 after an interruption.
    """
    args = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    settings = Settings(args.ghn, args.seed)
    info = RunInfo.now(shlex.join(("python", "benchmarks/zoo_coverage.py", *given)), settings)
    try:
        plan = make_plan(args)
        if not args.table_only:
            work_off(args, plan, info)
        if args.table is not None:
            write_table(args, plan, read_results(args.out))
    except (TimmGhnError, OSError) as error:
        print(f"zoo_coverage: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            print(f"interrupted; the same command goes on with what {args.out} holds", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
