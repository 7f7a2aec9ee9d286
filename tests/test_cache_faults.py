"""Everything that can happen to a cache while it is used, caused for real: never a wrong weight, never a failure."""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_ghn
import timm_ghn.errors
from timm_ghn.ghn import Prediction
from timm_ghn.graph import Layout
from timm_ghn.graph.nodes import Role, Target
from timm_ghn.storage.cache import WeightCache
from timm_ghn.storage.reader import TensorReader
from timm_ghn.storage.upkeep import UNREADABLE

WORKER = Path(__file__).with_name("cache_worker.py")
MODEL = "test_vit"

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


def create() -> tuple[dict[str, torch.Tensor], bool]:
    model = timm.create_model(MODEL, init="ghn-orth")
    report = timm_ghn.report_of(model)
    assert report is not None
    return model.state_dict(), report.from_cache


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return timm.create_model(MODEL, init=timm_ghn.Init("ghn-orth", ghn="bundled", cache=False)).state_dict()


def run_worker(*arguments: str, timeout: int) -> dict[str, object]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


# Processes


@needs_fork
def test_sixteen_processes_at_once_compute_once() -> None:
    results = run_worker("crowd", "16", timeout=300)["results"]
    assert isinstance(results, list)
    assert len(results) == 16
    assert len({result["digest"] for result in results}) == 1
    assert [result["from_cache"] for result in results].count(False) == 1


@needs_fork
@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_processes_leave_nothing_that_is_wrong(count: int) -> None:
    found = run_worker("kill", str(count), "7", timeout=120 + 10 * count)
    assert found["kills"] == count
    outcomes = found["outcomes"]
    assert isinstance(outcomes, dict)
    assert sum(outcomes.values()) == count
    if count >= 100:  # the instants were spread over all that can happen
        assert min(outcomes.values()) > 0


def test_a_lock_that_nobody_releases_is_not_waited_for_endlessly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("timm_ghn.storage.cache.LOCK_PATIENCE_SECONDS", 0.2)
    cache = WeightCache(tmp_path)
    cache.weights.mkdir()
    program = (
        "import filelock, sys\n"
        f"with filelock.FileLock({str(cache.lock_path('key'))!r}):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with caplog.at_level(logging.WARNING), cache.locked("key"):
        pass
    holder.communicate("")
    assert "Going on without the lock" in caplog.text


def test_locks_that_the_file_system_refuses_are_done_without(
    expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = WeightCache.default()
    create()
    (locked,) = cache.weights.glob(".*.lock")
    locked.unlink()
    locked.mkdir()  # opening it fails, whoever asks
    assert equal(create()[0], expected)
    (entry,) = cache.entries()
    entry.path.unlink()
    assert equal(create()[0], expected)
    assert create()[1]


# Disks


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system in a folder, or the test is skipped."""
    if not is_root or not shutil.which("mount"):
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["4k", "100k", "400k"])
def test_a_full_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: dict[str, torch.Tensor],
    size: str,
) -> None:
    monkeypatch.setenv("TIMM_GHN_CACHE", str(tmp_path))
    with mounted(tmp_path, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        with caplog.at_level(logging.WARNING):
            assert equal(create()[0], expected)
        assert "cannot be kept in the cache" in caplog.text
        assert "No space left on device" in caplog.text
        assert equal(create()[0], expected)
        assert WeightCache(tmp_path).entries() == []
        assert list(tmp_path.rglob("*.tmp")) == []


@needs_fork
def test_a_limit_on_the_size_of_files(caplog: pytest.LogCaptureFixture, expected: dict[str, torch.Tensor]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with caplog.at_level(logging.WARNING):
            assert equal(create()[0], expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in caplog.text
    assert WeightCache.default().entries() == []
    assert list(WeightCache.default().root.rglob("*.tmp")) == []


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written: a read-only mount for root, whom permissions do not bind, else permissions."""
    if is_root:
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield
        return
    paths = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in paths:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(0o755)


def test_a_read_only_cache_is_read_and_else_computed(
    caplog: pytest.LogCaptureFixture, expected: dict[str, torch.Tensor]
) -> None:
    cache = WeightCache.default()
    with read_only(cache.root), caplog.at_level(logging.WARNING):
        weights, from_cache = create()
        assert equal(weights, expected)
        assert not from_cache
        assert "cannot be kept in the cache" in caplog.text
    create()
    caplog.clear()
    with read_only(cache.root), caplog.at_level(logging.WARNING):
        weights, from_cache = create()
        assert equal(weights, expected)
        assert from_cache
        assert cache.prune(max_bytes=0).removed == ()
    assert "cannot be removed" in caplog.text


def test_a_file_that_vanishes_or_shrinks_while_it_is_read(expected: dict[str, torch.Tensor]) -> None:
    create()
    cache = WeightCache.default()
    (info,) = cache.entries()
    with TensorReader(info.path) as file:
        os.truncate(info.path, info.size // 2)  # a mapped file would end the process here
        last = max(file.specs, key=lambda name: file.offsets[name])
        with pytest.raises(timm_ghn.errors.TensorFileError, match=f"the file ends inside of tensor {last}"):
            file.read(last)
    assert equal(create()[0], expected)


# Damage


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An entry and its bytes."""
    root = tmp_path_factory.mktemp("entry")
    before = os.environ.get("TIMM_GHN_CACHE")
    os.environ["TIMM_GHN_CACHE"] = str(root)
    try:
        timm.create_model(MODEL, init=timm_ghn.Init("ghn-orth", ghn="bundled"))
    finally:
        os.environ.pop("TIMM_GHN_CACHE") if before is None else os.environ.update(TIMM_GHN_CACHE=before)
    (info,) = WeightCache(root).entries()
    return info.path, info.path.read_bytes()


@functools.cache
def scratch() -> dict[str, torch.Tensor]:
    """Memory to read weights into."""
    return {name: parameter.data for name, parameter in timm.create_model(MODEL).named_parameters()}


def is_served(entry: tuple[Path, bytes], content: bytes) -> bool:
    """Whether a damaged entry would be used."""
    path, sound = entry
    path.write_bytes(content)
    try:
        found = WeightCache(path.parent.parent).open(path.stem)
        if found is None:
            return False
        found.copy_to({name: tensor for name, tensor in scratch().items() if name in found.names})
    except UNREADABLE:
        return False
    else:
        return True
    finally:
        path.write_bytes(sound)


def test_the_sound_entry_is_served(entry: tuple[Path, bytes]) -> None:
    assert is_served(entry, entry[1])


def sections(entry: tuple[Path, bytes]) -> dict[str, range]:
    with TensorReader(entry[0]) as file:
        spans = {
            name: range(file.offsets[name], file.offsets[name] + spec.num_bytes) for name, spec in file.specs.items()
        }
    start = min(span.start for span in spans.values())
    return {"length": range(8), "header": range(8, start), **spans}


def test_a_flipped_bit_in_every_part_is_noticed(entry: tuple[Path, bytes]) -> None:
    parts = sections(entry)
    assert sum(len(part) for part in parts.values()) == len(entry[1])
    places = [place for part in parts.values() for place in {part[0], part[len(part) // 2], part[-1]}]
    for number, place in enumerate(places):
        content = bytearray(entry[1])
        content[place] ^= 1 << number % 8
        # A space behind the header's table may become another one: nothing depends on it.
        assert not is_served(entry, bytes(content)) or is_blank(entry[1], content, place)


def is_blank(sound: bytes, content: bytearray, place: int) -> bool:
    return sound[place : place + 1].isspace() and bytes(content[place : place + 1]).isspace()


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_in_the_header_is_noticed(entry: tuple[Path, bytes], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(sections(entry)["header"]))
    content = bytearray(entry[1])
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    assert not is_served(entry, bytes(content)) or is_blank(entry[1], content, place)


@settings(max_examples=30)
@given(st.data())
def test_any_cut_is_noticed(entry: tuple[Path, bytes], data: st.DataObject) -> None:
    assert not is_served(entry, entry[1][: data.draw(st.integers(0, len(entry[1]) - 1))])


@pytest.mark.parametrize(("block", "kernel"), [((0, 2), (4, 4)), ((2, 2), (4,)), ((2, 2), ("a", 4))])
def test_a_description_that_makes_no_sense_is_refused(block: tuple[int, ...], kernel: Any, tmp_path: Path) -> None:
    prediction = Prediction(Target("w", (4, 4), Role.WEIGHT, Layout.PLAIN), torch.ones(block), kernel, True)
    WeightCache(tmp_path).write("0" * 64, {}, {"w": prediction}, {})
    entry = WeightCache(tmp_path).open("0" * 64)
    assert entry is not None
    with pytest.raises(UNREADABLE):
        entry.copy_to({"w": torch.zeros(4, 4)})


def test_a_cache_from_another_machine_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = create()
    shutil.copytree(WeightCache.default().root, tmp_path / "copy")
    monkeypatch.setenv("TIMM_GHN_CACHE", str(tmp_path / "copy"))
    again, from_cache = create()
    assert from_cache
    assert equal(first, again)


def test_two_formats_live_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    create()
    with monkeypatch.context() as other:
        other.setattr("timm_ghn.storage.cache.FORMAT", 99)
        assert not create()[1]
        assert create()[1]
    assert create()[1]
    assert len(WeightCache.default().entries()) == 2
