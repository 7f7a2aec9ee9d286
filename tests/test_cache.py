"""The cache of results: hits, misses, damage, and many processes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import pytest
import timm
import torch

import timm_ghn
from timm_ghn.cli import main
from timm_ghn.cli.cache import parse_age, parse_size
from timm_ghn.initialize import model as initialize
from timm_ghn.storage.cache import WeightCache, cache_key


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
    fill = initialize.fill_generated
    monkeypatch.setattr(initialize, "fill_generated", lambda *args, **kw: (counted.append(1), fill(*args, **kw))[1])
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
    assert caplog.text.count("damaged cache entry") == 1
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


def test_the_second_call_does_not_record_the_graph(settings: timm_ghn.Init, monkeypatch: pytest.MonkeyPatch) -> None:
    first = timm.create_model("test_vit", init=settings)
    monkeypatch.setattr(initialize, "make_plan", lambda *args, **kwargs: pytest.fail("the graph was recorded"))
    again = timm.create_model("test_vit", init=settings)
    assert equal(first.state_dict(), again.state_dict())
    reports = timm_ghn.report_of(first), timm_ghn.report_of(again)
    assert [report.from_cache for report in reports if report is not None] == [False, True]
    assert reports[0].parameters == reports[1].parameters  # type: ignore[union-attr]


def test_without_a_name_the_graph_finds_the_entry(settings: timm_ghn.Init) -> None:
    """For `init_model`, and for arguments of `create_model` that are not plain data."""
    reports = [
        timm_ghn.init_model(timm.create_model("test_vit"), settings),
        timm_ghn.init_model(timm.create_model("test_vit"), settings),
        timm_ghn.report_of(timm.create_model("test_vit", init=settings, norm_layer=torch.nn.LayerNorm)),
    ]
    assert [report.from_cache for report in reports if report is not None] == [False, True, True]
    assert len(entries()) == 1


def test_the_cache_works_in_inference_mode(settings: timm_ghn.Init, caplog: pytest.LogCaptureFixture) -> None:
    first = create(settings)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        model = timm.create_model("test_vit", init=settings)
        report = timm_ghn.report_of(model)
        assert report is not None
        assert report.from_cache
        assert equal(first, model.state_dict())
    assert caplog.text == ""


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


def test_keys_do_not_depend_on_order() -> None:
    assert cache_key({"a": 1, "b": [2, 3]}) == cache_key({"b": [2, 3], "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})


# Upkeep


@pytest.fixture
def three(settings: timm_ghn.Init) -> list[str]:
    """Keys of three entries, the last used first; used one, two and three days ago."""
    keys = []
    for seed in range(3):
        create(timm_ghn.Init.of(settings, seed=seed))
        (new,) = [info for info in WeightCache.default().entries() if info.key not in keys]
        keys.append(new.key)
        when = time.time() - (seed + 1) * 86400
        os.utime(new.path, (when, when))
    return keys


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_entries_say_what_made_them(three: list[str], settings: timm_ghn.Init) -> None:
    infos = WeightCache.default().entries()
    assert [info.key for info in infos] == three
    assert [info.made["seed"] for info in infos] == [0, 1, 2]
    made = infos[0].made
    assert (made["model"], made["method"], made["version"]) == ("test_vit", "ghn-orth", timm_ghn.__version__)
    assert (made["start_layer"], made["num_layers"]) == (1, 26)
    assert all(info.size == info.path.stat().st_size and not info.problem for info in infos)


def test_reading_an_entry_is_a_use(three: list[str], settings: timm_ghn.Init) -> None:
    create(timm_ghn.Init.of(settings, seed=2))
    assert [info.key for info in WeightCache.default().entries()] == [three[2], three[0], three[1]]


def test_the_least_recently_used_go_first(three: list[str]) -> None:
    cache = WeightCache.default()
    size = cache.entries()[0].size
    pruned = cache.prune(max_bytes=2 * size, dry_run=True)
    assert [info.key for info in pruned.removed] == [three[2]]
    assert len(cache.entries()) == 3
    pruned = cache.prune(max_bytes=2 * size)
    assert [info.key for info in pruned.removed] == [three[2]]
    assert pruned.kept == 2 * size
    assert pruned.freed == size
    assert [info.key for info in cache.entries()] == three[:2]
    pruned = cache.prune(max_age=1.5 * 86400)
    assert [info.key for info in pruned.removed] == [three[1]]
    assert cache.prune(max_bytes=0).kept == 0
    assert list(cache.weights.iterdir()) == []


def test_an_entry_may_be_removed_while_its_lock_is_held(
    three: list[str], settings: timm_ghn.Init, computations: list[int]
) -> None:
    cache = WeightCache.default()
    expected = create(settings)
    before = len(computations)
    with cache.locked(three[0]):
        assert [info.key for info in cache.remove([three[0]]).removed] == [three[0]]
        assert equal(create(settings), expected)
    assert equal(create(settings), expected)
    assert len(computations) == before + 1


def test_leftovers_of_killed_processes_go(three: list[str]) -> None:
    cache = WeightCache.default()
    old, new, future = (
        cache.weights / f".{three[0]}.safetensors.{os.getpid()}.{number:08x}.tmp" for number in range(3)
    )
    other = cache.weights / "notes.tmp"
    lock, new_lock = cache.lock_path("0" * 64), cache.lock_path("1" * 64)
    for path in (old, new, future, other, lock, new_lock):
        path.write_bytes(b"half of it")
    for path in (old, other, lock, cache.lock_path(three[0])):
        age(path, 7200)
    age(future, -1e6)
    pruned = cache.prune()
    assert set(pruned.leftovers) == {old, future, lock}
    assert pruned.freed == 30
    assert pruned.removed == ()
    assert all(path.exists() for path in (new, other, new_lock, cache.lock_path(three[0])))


def test_a_use_in_the_future_counts_as_now(three: list[str]) -> None:
    cache = WeightCache.default()
    age(cache.path(three[2]), -400 * 86400)
    assert cache.entries()[0].key == three[2]
    assert cache.entries()[0].last_use <= time.time()
    cache.prune(max_age=1.5 * 86400)
    assert [info.key for info in cache.entries()] == [three[2], three[0]]


def test_verify_names_what_is_damaged(three: list[str]) -> None:
    cache = WeightCache.default()
    assert [info.problem for info in cache.verify()] == ["", "", ""]
    data = bytearray(cache.path(three[1]).read_bytes())
    data[-1] ^= 1
    cache.path(three[1]).write_bytes(data)
    damaged = [info for info in cache.verify() if info.problem]
    assert [info.path for info in damaged] == [cache.path(three[1])]
    assert "does not match its hash" in damaged[0].problem


def run(*arguments: str) -> int:
    return main(["cache", *arguments])


def test_the_command_lists_verifies_and_removes(three: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith(three[0][:12])
    assert "1 d ago   test_vit  ghn-orth" in out
    assert "3 entries, 4.5 MB" in out
    assert run("ls", "--json") == 0
    assert [info["key"] for info in json.loads(capsys.readouterr().out)] == three
    assert run("verify") == 0
    assert run("prune", "--older-than", "36h", "--dry-run") == 0
    assert "would remove 2 entries" in capsys.readouterr().out
    assert run("rm", three[0][:8]) == 0
    assert f"removed {three[0][:12]}" in capsys.readouterr().out
    os.truncate(WeightCache.default().path(three[1]), 5000)
    assert run("verify") == 1
    assert f"damaged: {WeightCache.default().path(three[1])}: " in capsys.readouterr().out
    assert run("ls") == 0
    assert three[1][:12] in capsys.readouterr().out
    assert run("rm", "--all") == 0
    assert WeightCache.default().entries() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rm"], "rm takes keys, or --all"),
        (["rm", "--all", "abcd"], "rm takes keys, or --all"),
        (["rm", "abcd"], "no entries have a key that begins with abcd"),
    ],
)
def test_wrong_uses_of_the_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("500 kb", 500_000), ("1.5GiB", 3 * 2**29), ("7", 7), ("3M", 3_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "20XB", "-5MB", "1e9"])
def test_wrong_sizes_and_ages(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size(text)
    with pytest.raises(argparse.ArgumentTypeError, match="is no age"):
        parse_age(text)
