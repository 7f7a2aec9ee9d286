"""GHNs by name: downloads from a loopback server, the cache, and the default."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from ghn_reference import SMALL, ppuda_checkpoint, seeded_ghn

from timm_ghn.errors import CheckpointError, DownloadError, UnknownGhnError
from timm_ghn.ghn import GHN, content_hash, default_ghn, list_ghns, load_ghn, registry, write_safetensors

NAME = "ghn2-imagenet"


class Server:
    """A mirror on the loopback interface that counts requests, and that misbehaves as told."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.declared: int | None = None
        self.status = 200
        self.stalls = False
        self.go_on = threading.Event()
        self.paths: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.paths.append(self.path)
                self.send_response(server.status)
                length = len(server.body) if server.declared is None else server.declared
                if length >= 0:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                half = len(server.body) // 2
                self.wfile.write(server.body[:half])
                self.wfile.flush()
                if server.stalls:
                    server.go_on.wait(60)
                self.wfile.write(server.body[half:])

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that gave up

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/mirror"


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn(SMALL)


@pytest.fixture(scope="module")
def published(ghn: GHN) -> bytes:
    """A file as the ppuda repository would hold it."""
    buffer = io.BytesIO()
    torch.save(ppuda_checkpoint(ghn), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bytes) -> None:
    """An empty cache, a process that has tried nothing, and a table with the hash of `published`."""
    for variable in ("TIMM_GHN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TIMM_GHN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIMM_GHN_GHN_URL", "http://127.0.0.1:9/nowhere")
    monkeypatch.setattr(registry, "FAILURES", [])
    entry = replace(registry.NAMED_GHNS[NAME], git_blob_sha1=registry.git_blob_sha1(published))
    monkeypatch.setitem(registry.NAMED_GHNS, NAME, entry)


@pytest.fixture
def server(published: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(published)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("TIMM_GHN_GHN_URL", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def bundled(ghn: GHN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled GHN, in place of the package's."""
    path = tmp_path / "bundled" / "ghn.safetensors"
    write_safetensors(ghn, path)
    monkeypatch.setattr(registry.importlib.resources, "files", lambda package: tmp_path)
    return path


# Downloads


def test_a_published_ghn_is_downloaded_once_and_converted(server: Server, ghn: GHN, tmp_path: Path) -> None:
    first, second = load_ghn(NAME), load_ghn(NAME)
    assert server.paths == ["/mirror/checkpoints/ghn2_imagenet.pt"]
    assert content_hash(first) == content_hash(second) == content_hash(ghn)
    assert first.info is not None
    assert first.info.name == NAME
    assert second.info is not None
    assert second.info.name == NAME
    assert second.info.metadata["epoch"] == "7"
    assert [path.name for path in (tmp_path / "cache" / "ghns").iterdir()] == [f"{NAME}.safetensors"]


def test_the_git_hash_is_that_of_git() -> None:
    assert registry.git_blob_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def refused(server: Server, message: str) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        load_ghn(NAME)
    assert server.url in str(caught.value)
    assert str(registry.NAMED_GHNS[NAME].manual_path) in str(caught.value)
    assert not registry.NAMED_GHNS[NAME].on_disk


def test_another_content_is_refused_before_it_is_parsed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.body += b"!"
    monkeypatch.setattr("timm_ghn.ghn.checkpoint.parse", lambda *args: pytest.fail("parsed"))
    refused(server, "has git hash [0-9a-f]{40}, not the published [0-9a-f]{40}")


def test_a_truncated_body_is_refused(server: Server) -> None:
    server.declared = len(server.body) + 100
    refused(server, r"the connection ended after [\d,]+ of [\d,]+ bytes")


def test_a_missing_file_is_refused(server: Server) -> None:
    server.status = 404
    refused(server, "HTTP Error 404")


def test_a_stalled_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SILENCE_SECONDS", 0.2)
    server.stalls = True
    refused(server, "the server does not answer")  # it still waits
    server.go_on.set()


@pytest.mark.parametrize("declared", [10**12, -1])
def test_a_large_body_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch, declared: int) -> None:
    monkeypatch.setattr(registry, "MAX_DOWNLOAD_BYTES", 1000)
    server.declared = declared
    refused(server, "more than any published GHN has")


def test_an_unreachable_server_is_refused() -> None:
    with pytest.raises(DownloadError, match=r"could not be fetched from http://127.0.0.1:9/nowhere"):
        load_ghn(NAME)


@pytest.mark.parametrize("offline", [True, False])
def test_the_network_is_not_used_when_that_is_forbidden(
    server: Server, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="the network may not be used"):
        load_ghn(NAME, download=offline)
    assert server.paths == []


# Files on disk


def test_a_file_put_there_by_hand_is_verified_and_converted(published: bytes, ghn: GHN) -> None:
    entry = registry.NAMED_GHNS[NAME]
    entry.manual_path.parent.mkdir(parents=True)
    entry.manual_path.write_bytes(published)
    assert content_hash(load_ghn(NAME, download=False)) == content_hash(ghn)
    assert entry.path.is_file()

    entry.path.unlink()
    entry.manual_path.write_bytes(published[:-1])
    with pytest.raises(DownloadError, match="has git hash"):
        load_ghn(NAME, download=False)


def test_a_damaged_cache_is_replaced(server: Server, ghn: GHN, caplog: pytest.LogCaptureFixture) -> None:
    load_ghn(NAME)
    path = registry.NAMED_GHNS[NAME].path
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        assert content_hash(load_ghn(NAME)) == content_hash(ghn)
    assert "Ignoring a damaged file in the cache" in caplog.text
    assert len(server.paths) == 2


def test_a_cache_that_cannot_be_written_is_survived(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TIMM_GHN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert load_ghn(NAME).config == SMALL
    assert "Cannot keep GHN" in caplog.text


def test_paths_modules_and_ghns_are_sources(ghn: GHN, tmp_path: Path, published: bytes) -> None:
    path = tmp_path / "my.pt"
    path.write_bytes(published)
    assert load_ghn(ghn) is ghn
    assert content_hash(load_ghn(path)) == content_hash(load_ghn(str(path))) == content_hash(ghn)
    with pytest.raises(CheckpointError, match="Linear is not a GHN"):
        load_ghn(torch.nn.Linear(2, 2))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownGhnError, match=r"did you mean 'ghn2-imagenet'.*Known names: ghn2-imagenet"):
        load_ghn("ghn2-imagnet")
    with pytest.raises(UnknownGhnError, match=r"no such file\. Known names"):
        load_ghn("/no/such/file.pt")


def test_the_list_says_what_is_on_disk(server: Server, tmp_path: Path) -> None:
    assert [row.name for row in list_ghns() if row.on_disk and row.name != "bundled"] == []
    load_ghn(NAME)
    row = next(row for row in list_ghns() if row.on_disk and row.name != "bundled")
    assert (row.name, row.trained_on, row.path) == (
        NAME,
        "ImageNet",
        tmp_path / "cache" / "ghns" / f"{NAME}.safetensors",
    )


@pytest.mark.parametrize(("variable", "expected"), [("TIMM_GHN_CACHE", "x"), ("HF_HOME", "x/timm_ghn")])
def test_the_cache_directory_follows_the_environment(
    variable: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIMM_GHN_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "x"))
    assert registry.cache_directory() == tmp_path / expected


# The default


def test_the_default_is_the_published_one(server: Server) -> None:
    assert (info := default_ghn().info) is not None
    assert info.name == NAME


def test_the_default_falls_back_with_one_warning_and_one_attempt(
    server: Server, bundled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.status = 404
    with caplog.at_level(logging.WARNING):
        found = [default_ghn() for _ in range(3)]
    assert {ghn.info.name for ghn in found if ghn.info} == {"bundled"}
    assert len(server.paths) == 1
    assert len(caplog.records) == 1
    assert "HTTP Error 404" in caplog.text
    assert "You can put the file there by hand" in caplog.text
    assert "Set TIMM_GHN=bundled to choose it without this message" in caplog.text


def test_only_the_first_of_several_processes_warns(
    server: Server, bundled: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 404
    monkeypatch.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.WARNING):
        default_ghn()
    assert not caplog.records


def test_the_default_prefers_a_published_file_that_appears_later(
    server: Server, bundled: Path, published: bytes
) -> None:
    server.status = 404
    assert (info := default_ghn().info) is not None
    assert info.name == "bundled"
    path = registry.NAMED_GHNS[NAME].manual_path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(published)
    assert (info := default_ghn().info) is not None
    assert info.name == NAME


def test_the_environment_names_the_default(server: Server, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN", "bundled")
    assert (info := default_ghn().info) is not None
    assert info.name == "bundled"
    assert server.paths == []
    monkeypatch.setenv("TIMM_GHN", "nonsense")
    with pytest.raises(UnknownGhnError, match="nonsense"):
        default_ghn()


def test_without_any_ghn_the_error_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(DownloadError, match=r"could not be fetched.*no bundled GHN"):
        default_ghn()
