"""The survey of all models: what is found out of one, and what becomes of failures and interruptions."""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import zoo_coverage
from hypothesis import given
from hypothesis import strategies as st
from zoo_survey import peers
from zoo_survey.clock import Clock
from zoo_survey.examine import Settings, examine, examine_graph, examine_init, initialized
from zoo_survey.flops import multiplications
from zoo_survey.pool import Limits, Task, run
from zoo_survey.records import Entry, Failure, GraphFacts, InitFacts, PeerFacts, Stage, collect
from zoo_survey.results import ResultsError, RunInfo, open_results, read_results
from zoo_survey.survey import Plan, skipped, survey
from zoo_survey.table import markdown, percentile

from timm_ghn.graph import capture, to_graph
from timm_ghn.orthogonalization import weight_layers

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GIB = 2**30


# --- work for other processes ---------------------------------------------------------------------------------------


def die(name: str) -> Entry:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(name)


def hang(name: str) -> Entry:
    time.sleep(600)
    raise AssertionError(name)


def leave(name: str) -> Entry:
    os._exit(3)


def allocate(name: str, size: int) -> Entry:
    try:
        torch.ones(size, dtype=torch.uint8)
    except RuntimeError as error:
        return Entry(Stage.INIT, name, "", None, Failure.of("allocate", error))
    return Entry(Stage.INIT, name, "", None)


def chatter(name: str) -> Entry:
    os.write(1, b"on stdout")
    os.write(2, b"on stderr")
    return Entry(Stage.INIT, name, "", None)


def when(name: str) -> Entry:
    start = time.time()
    time.sleep(0.5)
    return Entry(Stage.INIT, name, str(start), None, seconds=time.time())


# --- one model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> tuple[Entry, Entry]:
    return examine_graph("test_resnet"), examine_init("test_resnet")


def test_a_graph_agrees_with_the_model(resnet: tuple[Entry, Entry]) -> None:
    facts = resnet[0].facts
    assert isinstance(facts, GraphFacts)
    model = timm.create_model("test_resnet")
    graph = to_graph(model)
    assert (facts.nodes, facts.edges) == (len(graph), len(graph.edges))
    assert facts.virtual_edges == len(graph.distances)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.predictable == facts.parameters
    assert 0 < facts.orthogonalized < facts.parameters
    assert facts.probe_size is None
    assert min(vars(facts.seconds).values()) > 0


def test_an_initialization_agrees_with_its_report(resnet: tuple[Entry, Entry]) -> None:
    graph, facts = resnet[0].facts, resnet[1].facts
    assert isinstance(facts, InitFacts)
    assert isinstance(graph, GraphFacts)
    model = timm.create_model("test_resnet")
    classifier = model.get_classifier()
    kept = sum(parameter.numel() for parameter in classifier.parameters())  # the bundled GHN has 328 outputs
    assert facts.predicted == graph.predictable - kept
    layers = sum(model.get_parameter(layer.parameter).numel() for layer in weight_layers(model))
    assert facts.orthogonalized == layers - classifier.weight.numel()  # the bundled GHN's L is 1
    assert [(share.tensors, share.elements) for share in facts.kept] == [(2, kept)]
    assert "classifier of 1000 classes" in facts.kept[0].what
    assert min(vars(facts.seconds).values()) >= 0
    assert facts.seconds.total > facts.seconds.decode


def test_what_fell_back_is_told() -> None:
    facts = examine_init("test_nfnet").facts
    assert isinstance(facts, InitFacts)
    assert [share.tensors for share in facts.kept if share.what.startswith("not seen: sep_conv 3x3")]


def test_activations_are_those_of_the_two_starts(resnet: tuple[Entry, Entry]) -> None:
    facts = resnet[1].facts
    assert isinstance(facts, InitFacts)
    found = facts.activations
    assert found is not None
    assert found.finite
    assert found.finite_timm
    assert found.low is not None
    assert found.high is not None
    assert 0.05 < found.low.ratio <= found.high.ratio < 20
    assert found.peak >= max(found.low.ours, found.high.ours)
    assert found.peak_timm >= max(found.low.timm, found.high.timm)
    names = {name for name, _ in timm.create_model("test_resnet").named_modules()}
    assert {found.low.block.partition("#")[0], found.high.block.partition("#")[0]} <= names


def test_entries_survive_json(resnet: tuple[Entry, Entry]) -> None:
    peer = Entry(Stage.PPUDA, "test_resnet", "resnet", PeerFacts(1.5, 3, 4))
    failed = Entry(Stage.GHN3, "test_resnet", "resnet", None, Failure("graph.py", "KeyError", "'x'"))
    for entry in (*resnet, peer, failed):
        assert Entry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


def test_the_initialization_is_the_users_own() -> None:
    """Counting the time of the steps changes no weight."""
    counted, _, _ = initialized("test_vit", Settings(seed=3), Clock())
    plain = timm.create_model("test_vit", init={"method": "ghn-orth", "ghn": "bundled", "seed": 3, "cache": False})
    for (name, ours), (_, users) in zip(counted.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, users), name


def test_examine_leaves_out_what_does_not_fit() -> None:
    small = examine("test_vit", memory=GIB // 4)
    assert small.graph is not None
    assert small.init is None
    assert "GiB of memory, more than the 0.2 GiB allowed" in small.skipped
    assert not small.failures
    graph_only = examine("test_vit", graph_only=True)
    assert graph_only.init is None
    assert graph_only.graph is not None
    assert graph_only.graph.kept == small.graph.kept
    json.dumps(graph_only.to_dict())


@pytest.mark.parametrize("stage", [Stage.GRAPH, Stage.INIT])
def test_a_model_that_cannot_be_built_is_a_failure(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("no such block\nsecond line")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_resnet", broken)
    monkeypatch.setattr(broken, "__module__", "timm.models.resnet", raising=False)
    entry = (examine_graph if stage is Stage.GRAPH else examine_init)("test_resnet")
    assert entry.facts is None
    assert entry.failure is not None
    assert entry.failure.error == "KeyError"
    assert entry.failure.step == ("build" if stage is Stage.GRAPH else "timm")
    assert entry.failure.message == "'no such block\\nsecond line'"


def test_large_images_are_made_smaller_only_where_a_model_takes_them() -> None:
    limit = Settings(probe_operations=10**8)
    convolutional, windowed = (
        examine_graph(name, limit).facts for name in ("resnet18", "swin_tiny_patch4_window7_224")
    )
    assert isinstance(convolutional, GraphFacts)
    assert isinstance(windowed, GraphFacts)
    assert convolutional.probe_size == (3, 64, 64) or convolutional.probe_size == (3, 112, 112)
    assert windowed.probe_size is None


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet50", 4.09), ("mobilenetv2_100", 0.30), ("vit_tiny_patch16_224", 1.26)]
)
def test_multiplications_are_the_published_ones(name: str, giga: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert multiplications(capture(model)) == pytest.approx(giga * 1e9, rel=0.06)


# --- time -----------------------------------------------------------------------------------------------------------


def test_inner_steps_count_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 2.0, 6.0, 7.0, 17.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = Clock()
    with clock.step("outer"):
        with clock.step("inner"):
            pass
        clock.switch("after")
    assert clock.seconds == {"outer": 2.0 + 1.0, "inner": 4.0, "after": 10.0}
    assert clock.last == "after"


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_bounds_its_share(values: list[float], share: float) -> None:
    bound = percentile(values, share)
    assert bound in values
    assert sum(value <= bound for value in values) >= share * len(values) - 1e-6
    assert sum(value < bound for value in values) <= share * len(values) + 1e-6


# --- processes ------------------------------------------------------------------------------------------------------


def test_what_dies_is_recorded_and_the_rest_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    works = (die, leave, functools.partial(allocate, size=8 * GIB), chatter)
    tasks = [Task(Stage.INIT, "test_vit", work) for work in works]
    tasks.append(Task(Stage.GRAPH, "test_vit", examine_graph))
    entries = list(run(tasks, Limits(jobs=1, memory=GIB)))
    errors = [entry.failure and entry.failure.error for entry in entries]
    assert errors == ["Killed", "Killed", "RuntimeError", None, None]
    messages = [entry.failure.message for entry in entries if entry.failure is not None]
    assert messages[0] == "the process was ended by SIGKILL; the system may have run out of memory"
    assert messages[1] == "the process ended with status 3 and no result"
    assert "allocate" in messages[2]
    assert isinstance(entries[-1].facts, GraphFacts)
    assert capfd.readouterr() == ("", "")


def test_what_hangs_is_recorded() -> None:
    (entry,) = run([Task(Stage.INIT, "test_vit", hang)], Limits(jobs=1, memory=GIB, seconds=4))
    assert entry.failure is not None
    assert (entry.failure.error, entry.failure.message) == ("Timeout", "not done after 4 s")


@pytest.mark.parametrize(("need", "together"), [(GIB, True), (3 * GIB, False)])
def test_large_tasks_do_not_run_together(need: int, together: bool) -> None:
    """A task of this kind takes half a second, in which the other begins if it may."""
    tasks = [Task(Stage.INIT, "test_vit", when, need) for _ in range(2)]
    first, second = sorted(run(tasks, Limits(jobs=2, memory=4 * GIB)), key=lambda entry: entry.module)
    assert (float(second.module) < first.seconds) == together


def test_a_survey_knows_what_is_done_and_what_is_too_large() -> None:
    plan = Plan(limits=Limits(memory=GIB), max_parameters=10**6)
    names = ["test_vit", "test_resnet", "vit_7b_patch16_dinov3"]
    entries = list(survey(names, plan))
    done = [(entry.stage, entry.name) for entry in entries]
    graphs = [(Stage.GRAPH, name) for name in names]
    assert done == [*graphs, (Stage.INIT, "test_vit"), (Stage.INIT, "test_resnet")]  # weights by size
    assert "more than the 1,000,000 asked for" in skipped(entries, plan)["vit_7b_patch16_dinov3"]
    largest = entries[2]
    assert largest.memory is None or largest.memory < GIB
    assert [entry.name for entry in survey(names, plan, entries[:3])] == ["test_vit", "test_resnet"]
    assert not list(survey(names, plan, entries))
    assert not list(survey(names[:1], replace(plan, graph_only=True), entries))


# --- files ----------------------------------------------------------------------------------------------------------


INFO = RunInfo.now("zoo_coverage.py", Settings())


def test_results_go_on_after_a_torn_line(
    tmp_path: Path, resnet: tuple[Entry, Entry], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    with open_results(path, INFO) as writer:
        writer.add(resnet[0])
        writer.add(resnet[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with open_results(path, INFO) as writer:
        assert writer.known.entries == resnet[:1]
        assert writer.known.damaged == 1
        writer.add(resnet[1])
    assert "1 damaged lines are left out" in caplog.text
    assert read_results(path).entries == resnet
    assert path.read_bytes().startswith(whole[:-100])  # nothing is rewritten


def test_results_of_other_versions_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    other = replace(INFO, versions={**INFO.versions, "timm": "0.0.1"})
    with open_results(path, other):
        pass
    with pytest.raises(ResultsError, match=f"timm 0.0.1 instead of {timm.__version__}"), open_results(path, INFO):
        pass
    with open_results(path, INFO, fresh=True) as writer:
        assert writer.known.runs == ()
    with open_results(path, INFO), pytest.raises(ResultsError, match="another run writes"), open_results(path, INFO):
        pass


def test_versions_of_torch_are_mixed_where_that_is_asked_for(tmp_path: Path, resnet: tuple[Entry, Entry]) -> None:
    path = tmp_path / "results.jsonl"
    other = replace(INFO, versions={**INFO.versions, "torch": "2.2.0"}, date="2026-01-01")
    for _ in range(2):
        with open_results(path, other) as writer:
            writer.add(resnet[0])
    with pytest.raises(ResultsError, match=r"torch 2\.2\.0 instead of .*; begin anew"), open_results(path, INFO):
        pass
    with open_results(path, INFO, mixed=True) as writer:
        assert len(writer.known.entries) == 2
    runs = read_results(path).runs
    assert runs == (other, INFO)
    page = markdown(collect([resnet[0]]), runs)
    assert "Made by `zoo_coverage.py` on 2026-01-01" in page
    assert f"Continued by `zoo_coverage.py` on {INFO.date}" in page
    old = replace(INFO, versions={**INFO.versions, "timm": "0.0.1"})
    with open_results(tmp_path / "old.jsonl", old):
        pass
    with pytest.raises(ResultsError, match=r"timm 0\.0\.1"), open_results(tmp_path / "old.jsonl", INFO, mixed=True):
        pass


def benchmark(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "zoo_coverage.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_benchmark_goes_on(tmp_path: Path) -> None:
    out, table = tmp_path / "out.jsonl", tmp_path / "docs" / "table.md"
    arguments = ("test_vit*", "test_resnet", "--out", out, "--jobs", 1, "--graph-only")
    process = benchmark(*arguments)
    deadline = time.monotonic() + 300
    while not (out.exists() and len(read_results(out).entries) >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = read_results(out).entries
    assert 2 <= len(before) <= 5
    process = benchmark(*arguments, "--table", table)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    entries = read_results(out).entries
    assert entries[: len(before)] == before
    names = [*fnmatch.filter(timm.list_models(), "test_vit*"), "test_resnet"]
    assert sorted(entry.name for entry in entries) == sorted(names)
    page = table.read_text()
    assert f"**{len(names)} models** in 3 modules" in page
    assert "| resnet | 1 | 1 |" in page


def test_a_page_is_not_overwritten_with_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "out.jsonl", tmp_path / "table.md"
    out.touch()
    table.write_text("a page")
    assert zoo_coverage.main(["--out", str(out), "--table", str(table), "--table-only"]) == 2
    assert "has no results of these models" in capsys.readouterr().err
    assert table.read_text() == "a page"


def test_a_peer_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("ghn3") is not None:
        pytest.skip("ghn3 is installed")
    assert zoo_coverage.main(["test_vit", "--peer", "ghn3", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "ghn3 cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.ppuda
def test_ppuda_is_tried_on_the_same_models() -> None:
    pytest.importorskip("ppuda.ghn.nn")
    entry = peers.examine_peer("test_resnet", "ppuda")
    assert entry.stage is Stage.PPUDA
    assert isinstance(entry.facts, PeerFacts) != isinstance(entry.failure, Failure)


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries(resnet: tuple[Entry, Entry]) -> tuple[Entry, ...]:
    vit = examine_graph("test_vit"), examine_init("test_vit")
    broken = Entry(Stage.GRAPH, "test_nfnet", "nfnet", None, Failure("capture", "CaptureError", "a | b"))
    return *resnet, *vit, broken


def test_the_page_counts_and_names_what_is_there(entries: tuple[Entry, ...]) -> None:
    peers = [
        Entry(Stage.PPUDA, "test_resnet", "resnet", PeerFacts(2.0, 99, 100)),
        Entry(Stage.PPUDA, "test_vit", "vision_transformer", None, Failure("graph.py", "KeyError", "")),
    ]
    page = markdown(collect(entries), [INFO], peers)
    assert "**3 models** in 3 modules" in page
    assert "**Graphs: 2 of 3.**" in page
    assert "**Initialized: 2**" in page
    assert "finite in 2 of 2" in page
    assert f"timm {timm.__version__}" in page
    assert "- Failures: 1." in page
    assert "| test_nfnet | capture | CaptureError | a / b |" in page
    assert "| ppuda | 2 | 1 | 1 | 2.00 s | KeyError 1 |" in page
    rows = [
        line for line in page.splitlines() if line.startswith(("| nfnet |", "| resnet |", "| vision_transformer |"))
    ]
    assert len(rows) == 3
    assert "100 %, 100 %" in rows[1]
    assert rows[2].endswith("| test_vit |")
    assert page.count("\n\n\n") == 0


def test_a_page_of_graphs_says_so(entries: tuple[Entry, ...]) -> None:
    graphs = [entry for entry in entries if entry.stage is Stage.GRAPH]
    page = markdown(collect(graphs, {"test_vit": "only graphs were asked for"}))
    assert "Weights were not made in this run" in page
    assert "Activations farthest" not in page
    assert "Graph only" not in page


def test_models_that_are_too_large_are_listed(entries: tuple[Entry, ...]) -> None:
    page = markdown(collect([*entries[:2], entries[2]], {"test_vit": "needs 9 GiB"}), [INFO])
    assert "## Graph only" in page
    assert "| test_vit | 371,240 | needs 9 GiB |" in page


def test_what_is_not_finite_is_the_worst(entries: tuple[Entry, ...]) -> None:
    init = entries[1].facts
    assert isinstance(init, InitFacts)
    assert init.activations is not None
    infinite = replace(init, activations=replace(init.activations, finite=False, features=math.nan))
    page = markdown(collect([*entries[:1], replace(entries[1], facts=infinite), *entries[2:]]), [INFO])
    worst = page[page.index("### Activations farthest") :].splitlines()[6]
    assert worst.startswith("| test_resnet | no |")
    assert "1 not finite" in page
    assert "finite in 1 of 2" in page
