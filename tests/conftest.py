"""Every test has a cache of its own, remembers no model, and has no network. No property is timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ghn_reference import ppuda_checkpoint, seeded_ghn
from hub_fixtures import _loopback, _loopback_client, client, hub, remote, repository  # noqa: F401
from hypothesis import settings

import timm_ghn
from timm_ghn.threads import single_threaded

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _own_cache_and_no_network(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TIMM_GHN", raising=False)
    timm_ghn.uninstall()  # forgets the models of other tests
    timm_ghn.install()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in this process, as a run of `timm-ghn train` has."""
    with single_threaded():
        yield


@pytest.fixture(scope="session")
def seeded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GHN of the reference outputs, as a file in ppuda's format."""
    path = tmp_path_factory.mktemp("ghn") / "seeded.pt"
    torch.save(ppuda_checkpoint(seeded_ghn()), path)
    return path
