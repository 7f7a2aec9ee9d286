"""Fixtures for tests against a Hub."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_client import Client, client_environment
from hub_server import ORGANIZATION, WRITER, Hub, serve

TEST_ORGANIZATION = "TIMM_GHN_TEST_ORG"


@pytest.fixture(scope="session")
def _loopback() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="session")
def _loopback_client(_loopback: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("client")
    client = Client(client_environment(home, _loopback.url, WRITER))
    client.home = home  # type: ignore[attr-defined]
    yield client
    client.close()


@pytest.fixture
def hub(_loopback: Hub) -> Hub:
    """An empty Hub."""
    for collection in (_loopback.repositories, _loopback.objects, _loopback.parts):
        collection.clear()
    _loopback.requests.clear()
    _loopback.faults.clear()
    _loopback.part_size = None
    return _loopback


@pytest.fixture
def client(hub: Hub, _loopback_client: Client) -> Client:
    """A process that talks to it, whose caches are empty."""
    home: Path = _loopback_client.home  # type: ignore[attr-defined]
    for folder in (home / "hf", home / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    return _loopback_client


@dataclass(frozen=True)
class Remote:
    """A Hub, real or not."""

    client: Client
    organization: str
    hub: Hub | None
    environment: dict[str, str]


@pytest.fixture(params=["loopback", "huggingface.co"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    """The loopback Hub, and the real one if there is a token for it; what is pushed there is removed again."""
    if request.param == "loopback":
        hub: Hub = request.getfixturevalue("hub")
        client: Client = request.getfixturevalue("client")
        home: Path = client.home  # type: ignore[attr-defined]
        yield Remote(client, ORGANIZATION, hub, client_environment(home, hub.url, WRITER))
        return
    organization = os.environ.get(TEST_ORGANIZATION)
    if not organization or not os.environ.get("HF_TOKEN"):
        pytest.skip(f"needs HF_TOKEN and {TEST_ORGANIZATION}")
    environment = client_environment(tmp_path, None, None)
    client = Client(environment)
    yield Remote(client, organization, None, environment)
    client.close()


@pytest.fixture
def repository(remote: Remote) -> Iterator[str]:
    """A name that nothing has yet."""
    name = f"{remote.organization}/timm-ghn-test-{secrets.token_hex(4)}"
    yield name
    if remote.hub is None:
        remote.client.run("huggingface_hub.delete_repo(name, missing_ok=True)", name=name)
