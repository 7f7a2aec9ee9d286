"""The cache of results: hits, misses, damage, and many processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import timm
import torch

import timm_ghn
from timm_ghn import initialize
from timm_ghn.cache import WeightCache, cache_key


@pytest.fixture
def settings(seeded_checkpoint: Path) -> timm_ghn.Init:
    return timm_ghn.Init("ghn-orth", ghn=str(seeded_checkpoint))


def entries() -> list[Path]:
    return sorted(WeightCache.default().root.glob("weights/*.safetensors"))


def create(settings: timm_ghn.Init) -> dict[str, torch.Tensor]:
    return timm.create_model("test_vit", init=settings).state_dict()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    compute = initialize._compute
    monkeypatch.setattr(initialize, "_compute", lambda *args: (counted.append(1), compute(*args))[1])
    return counted


def test_the_second_call_reads_what_the_first_wrote(settings: timm_ghn.Init, computations: list[int]) -> None:
    first, second = create(settings), create(settings)
    assert equal(first, second)
    assert len(computations) == 1
    assert len(entries()) == 1


def test_the_cache_can_be_turned_off(settings: timm_ghn.Init, computations: list[int]) -> None:
    off = timm_ghn.Init.of(settings, cache=False)
    assert equal(create(off), create(off))
    assert len(computations) == 2
    assert entries() == []


def test_everything_that_matters_is_in_the_key(settings: timm_ghn.Init, computations: list[int]) -> None:
    for changes in ({}, {"seed": 1}, {"noise": 1e-4}, {"start_layer": 3}, {"method": "ghn"}, {"correlation": "ppuda"}):
        create(timm_ghn.Init.of(settings, **changes))
    timm.create_model("test_vit", init=settings, num_classes=4)
    timm.create_model("test_vit", init=settings, dtype=torch.bfloat16)
    assert len(computations) == len(entries()) == 8


@pytest.mark.parametrize("place", [4, 100, -1, -50_000])
def test_a_damaged_entry_is_noticed_and_computed_again(
    settings: timm_ghn.Init, computations: list[int], place: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = create(settings)
    (path,) = entries()
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert equal(first, create(settings))
    assert len(computations) == 2
    assert "damaged cache entry" in caplog.text
    assert equal(first, create(settings))
    assert len(computations) == 2


@pytest.mark.parametrize("size", [0, 3, 1000])
def test_a_truncated_entry_is_computed_again(settings: timm_ghn.Init, computations: list[int], size: int) -> None:
    first = create(settings)
    (path,) = entries()
    os.truncate(path, size)
    assert equal(first, create(settings))
    assert len(computations) == 2


def test_an_entry_of_something_else_is_not_served(settings: timm_ghn.Init, computations: list[int]) -> None:
    first = create(settings)
    other = create(timm_ghn.Init.of(settings, seed=1))
    one, two = entries()
    two.write_bytes(one.read_bytes())
    assert equal(first, create(settings))
    assert equal(other, create(timm_ghn.Init.of(settings, seed=1)))
    assert len(computations) == 3


def test_a_recipe_finds_the_entry_without_recording_the_graph(
    settings: timm_ghn.Init, computations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create(settings)
    report = timm_ghn.report_of(timm.create_model("test_vit", init=settings, drop_rate=0.1))
    monkeypatch.setattr(initialize, "make_plan", lambda *args, **kwargs: pytest.fail("the graph was recorded"))
    again = timm.create_model("test_vit", init=settings)
    assert equal(first, again.state_dict())
    found = timm_ghn.report_of(again)
    assert found is not None
    assert report is not None
    assert (found.from_cache, report.from_cache) == (True, True)  # the other recipe led to the same entry
    assert found.parameters == report.parameters
    assert len(computations) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 3}', '{"key": "../../x"}', '{"key": "00"}'])
def test_a_damaged_recipe_is_ignored(settings: timm_ghn.Init, computations: list[int], content: str) -> None:
    first = create(settings)
    for path in (WeightCache.default().root / "recipes").glob("*.json"):
        path.write_text(content)
    assert equal(first, create(settings))
    assert len(computations) == 1


def test_arguments_that_are_not_plain_data_have_no_recipe(settings: timm_ghn.Init) -> None:
    timm.create_model("test_vit", init=settings, norm_layer=torch.nn.LayerNorm)
    assert not (WeightCache.default().root / "recipes").exists()
    assert len(entries()) == 1


def test_an_entry_is_much_smaller_than_the_model(settings: timm_ghn.Init) -> None:
    model = timm.create_model("resnet50", init=settings)
    (path,) = entries()
    assert path.stat().st_size < 0.8 * sum(4 * p.numel() for p in model.parameters())


def test_a_cache_that_cannot_be_written_is_a_warning(
    settings: timm_ghn.Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("TIMM_GHN_CACHE", str(blocked))
    with caplog.at_level(logging.WARNING):
        weights = create(settings)
    assert equal(weights, create(timm_ghn.Init.of(settings, cache=False)))
    assert "cannot be kept in the cache" in caplog.text
    assert blocked.read_text() == "in the way"


def test_a_full_disk_leaves_nothing_behind(
    settings: timm_ghn.Init, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def save_to_full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        Path("/dev/full").write_bytes(b"x")

    monkeypatch.setattr("timm_ghn.cache.save_file", save_to_full_disk)
    with caplog.at_level(logging.WARNING):
        create(settings)
    assert "No space left" in caplog.text
    assert [p for p in (WeightCache.default().root / "weights").iterdir() if p.suffix != ".lock"] == []


def _work(settings: timm_ghn.Init, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    model = timm.create_model("test_vit", init=settings)
    total = sum(float(tensor.double().sum()) for tensor in model.state_dict().values())
    results.put((total, WeightCache.default().path("").parent.as_posix()))  # type: ignore[attr-defined]


def test_many_processes_get_equal_weights_and_compute_once(settings: timm_ghn.Init) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_work, args=(settings, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    totals = {results.get(timeout=240)[0] for _ in workers}
    for worker in workers:
        worker.join(timeout=60)
    assert len(totals) == 1
    assert len(entries()) == 1


def test_the_lock_makes_others_wait(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    with cache.locked("key"):
        context = multiprocessing.get_context("spawn")
        waiting = context.Process(target=_take_lock, args=(tmp_path,))
        waiting.start()
        time.sleep(4)
        assert not (tmp_path / "taken").exists()
    waiting.join(timeout=120)
    assert (tmp_path / "taken").exists()


def _take_lock(root: Path) -> None:
    with WeightCache(root).locked("key"):
        (root / "taken").touch()


def test_keys_do_not_depend_on_order() -> None:
    assert cache_key({"a": 1, "b": [2, 3]}) == cache_key({"b": [2, 3], "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})
