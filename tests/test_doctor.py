"""`timm-ghn doctor`: a sound installation, and what is wrong with others."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from ghn_reference import SMALL, ppuda_checkpoint, seeded_ghn

import timm_ghn
from timm_ghn.cli import doctor, main
from timm_ghn.ghn.registry import NAMED_GHNS
from timm_ghn.storage.cache import WeightCache


@pytest.fixture(autouse=True)
def _a_default_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN", "bundled")


@pytest.fixture
def server() -> Iterator[str]:
    """A server that knows nothing, which is an answer."""
    found = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "--json"])
    found: dict[str, dict[str, str]] = json.loads(capsys.readouterr().out)
    return status, found


def test_a_sound_installation_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    timm.create_model("test_vit", init=timm_ghn.Init("ghn-orth", ghn="bundled"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40
    assert out.endswith("no problems found\n")
    for text in (timm_ghn.__version__, f"torch {torch.__version__.partition('+')[0]}", "timm.create_model knows init="):
        assert text in out
    status, found = findings(capsys)
    assert (status, found["ok"], found["problems"]) == (0, True, [])
    assert found["GHNs"]["bundled"].startswith("sound, sha256 ")
    assert found["GHNs"]["default"] == "bundled (TIMM_GHN)"
    assert re.match(r"1, \d\.\d MB; ", found["cache"]["entries"])
    assert "(writable)" in found["cache"]["folder"]
    assert list(found["Hub"].values()) == ["not tried (HF_HUB_OFFLINE)"]


def test_damaged_entries_and_leftovers(capsys: pytest.CaptureFixture[str]) -> None:
    timm.create_model("test_vit", init=timm_ghn.Init("ghn-orth", ghn="bundled"))
    cache = WeightCache.default()
    (info,) = cache.entries()
    info.path.write_bytes(info.path.read_bytes()[:1000])
    (cache.weights / ".x.safetensors.1.00000000.tmp").touch()
    os.utime(cache.weights / ".x.safetensors.1.00000000.tmp", (0, 0))
    status, found = findings(capsys)
    assert status == 1
    assert str(info.path) in found["cache"]["health"]
    assert found["cache"]["leftovers"].startswith("1 files of killed processes")
    main(["doctor"])
    assert "! health" in capsys.readouterr().out


def test_a_damaged_ghn(capsys: pytest.CaptureFixture[str]) -> None:
    entry = NAMED_GHNS["ghn2-imagenet"]
    entry.path.parent.mkdir(parents=True)
    torch.save(ppuda_checkpoint(seeded_ghn(SMALL)), entry.manual_path)
    status, found = findings(capsys)
    assert status == 1
    assert "not the published 7b5d6733" in found["GHNs"]["ghn2-imagenet"]
    entry.path.write_bytes(b"damaged")
    assert "ghn2-imagenet.safetensors is not a GHN" in findings(capsys)[1]["GHNs"]["ghn2-imagenet"]


def test_an_unknown_default_and_a_missing_hook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMM_GHN", "nonsense")
    timm_ghn.uninstall()
    try:
        status, found = findings(capsys)
    finally:
        timm_ghn.install()
    assert status == 1
    assert found["GHNs"]["default"].startswith("nonsense (TIMM_GHN) cannot be used: no GHN is named 'nonsense'")
    assert found["hook"]["state"] == "timm.create_model does not know init="
    assert len(found["problems"]) == 2


@pytest.mark.parametrize("place", ["cache", "cache/weights", "cache/ghns"])
def test_a_cache_that_cannot_be_written(
    place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    monkeypatch.setenv("TIMM_GHN_CACHE", str(tmp_path / "cache"))
    status, found = findings(capsys)
    assert status == 1
    assert f"{tmp_path / place} (not writable: " in found["cache"]["folder"]
    assert len(found["problems"]) == 1


def test_which_ghn_will_be_used(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no GHN")
    monkeypatch.setenv("TIMM_GHN", str(tmp_path / "model.safetensors"))
    status, found = findings(capsys)
    assert status == 1
    assert "model.safetensors (TIMM_GHN) cannot be used: " in found["GHNs"]["default"]
    monkeypatch.setenv("TIMM_GHN", "hf-hub:lab/ghn")
    assert "hf-hub:lab/ghn (TIMM_GHN) is not on disk, and cannot be fetched" in findings(capsys)[1]["GHNs"]["default"]
    monkeypatch.delenv("TIMM_GHN")
    status, found = findings(capsys)
    assert status == 1
    assert found["GHNs"]["default"].startswith("bundled, a small one, because ghn2-imagenet is not on disk, and cannot")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("TIMM_GHN_GHN_URL", server)
    status, found = findings(capsys)
    assert status == 0
    assert found["GHNs"]["default"] == "ghn2-imagenet, not on disk: it is downloaded when it is first used"


def test_the_hub_is_reached_or_not(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert findings(capsys)[1]["Hub"] == {server: "reachable"}
    monkeypatch.setenv("HF_ENDPOINT", "http://name:secret@127.0.0.1:9")
    status, found = findings(capsys)
    assert status == 0
    assert found["Hub"]["http://127.0.0.1:9"].startswith("not reachable: ")
    assert "secret" not in json.dumps(found)


def test_a_hub_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(("127.0.0.1", 0)) as listening:  # which never answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        found = doctor.diagnose()[-1]
    assert found.section == "Hub"
    assert found.value.startswith("not reachable")
