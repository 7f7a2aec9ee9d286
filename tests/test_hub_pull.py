"""Taking weights and GHNs from a Hub on loopback, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_client import DIGEST, Client, Done, Failed
from hub_server import Blob, Hub, Repository, Response
from safetensors.torch import load, save

NAME = "lab/test_resnet.orth"
SOURCE = f"hf-hub:{NAME}"
WEIGHTS = "model.safetensors"
ORGANIZATION: dict[str, str | None] = {"TIMM_GHN_HUB_ORG": "lab"}
TAKE = f"model = timm.create_model('test_resnet', init='{SOURCE}')"


@pytest.fixture(scope="module")
def pushed(_loopback: Hub, _loopback_client: Client) -> dict[str, Blob]:
    """The files of a repository of weights."""
    _loopback.faults.clear()
    _loopback_client.run(f"timm_ghn.push('test_resnet', '{NAME}', init='orth')")
    return dict(_loopback.repositories[NAME].files)


@pytest.fixture
def stocked(hub: Hub, client: Client, pushed: dict[str, Blob]) -> Hub:
    """A Hub with that repository, and a client that has nothing."""
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit("main", dict(pushed), "weights")
    return hub


def replace(hub: Hub, **files: bytes) -> None:
    """Replace files of the repository, whose names have no dots here."""
    found = dict(hub.repositories[NAME].files)
    names = {"weights": WEIGHTS, "description": "timm_ghn.json"}
    for key, data in files.items():
        found[names[key]] = Blob(data, key == "weights")
    hub.repositories[NAME].commit("main", found, "changed")


def describe(hub: Hub, data: bytes, **changes: Any) -> bytes:
    """The description of other weights."""
    manifest = json.loads(hub.repositories[NAME].files["timm_ghn.json"].data)
    manifest["files"] = {WEIGHTS: {"size": len(data), "sha256": Blob(data, True).sha256}}
    return json.dumps({**manifest, **changes}).encode()


def refused(client: Client, kind: str = "DownloadError", code: str = TAKE, **environment: str | None) -> str:
    """The one line of an error, after which no download is left half-written."""
    with pytest.raises(Failed) as caught:
        client.run(code, environment)
    assert kind in caught.value.kinds, caught.value.trace
    assert "\n" not in str(caught.value)
    home: Path = client.home  # type: ignore[attr-defined]
    assert not list(home.rglob("*.incomplete"))
    return str(caught.value)


def blobs(client: Client) -> list[str]:
    """What huggingface_hub keeps of the repository."""
    home: Path = client.home  # type: ignore[attr-defined]
    return sorted(path.name for path in (home / "hf" / "hub").glob("models--*/blobs/*"))


# Ready-made weights


def test_weights_and_provenance_are_those_that_were_pushed(stocked: Hub, client: Client) -> None:
    done = client.run(
        f"{DIGEST}{TAKE}\nother = timm.create_model('test_resnet', init='orth')\nreport = timm_ghn.report_of(model)\n"
        "result = [digest(model) == digest(other), timm_ghn.provenance(model) == timm_ghn.provenance(other),\n"
        "          report.source, str(report), report.parameters == timm_ghn.report_of(other).parameters]"
    )
    commit = stocked.repositories[NAME].refs["main"]
    same_weights, same_provenance, source, text, same_report = done.result
    assert (same_weights, same_provenance, same_report) == (True, True, True)
    assert source == f"{SOURCE}@{commit}"
    assert f"({source}, " in text


def test_nothing_is_downloaded_twice(stocked: Hub, client: Client) -> None:
    client.run(TAKE)
    stocked.requests.clear()
    client.run(TAKE)
    assert [request.method for request in stocked.requests] == ["GET", "HEAD", "HEAD"]  # whether it is still the same
    stocked.requests.clear()
    client.run(TAKE, {"HF_HUB_OFFLINE": "1"})
    assert not stocked.requests
    stocked.fail("GET", "/api/models/", 503)
    client.run(TAKE)


def test_another_classifier_keeps_its_initialization(stocked: Hub, client: Client) -> None:
    done = client.run(
        f"small = lambda: timm.create_model('test_resnet', init='{SOURCE}', num_classes=7)\n"
        "model, again = small(), small()\n"
        f"whole = timm.create_model('test_resnet', init='{SOURCE}')\n"
        "result = [torch.equal(model.conv1[0].weight, whole.conv1[0].weight), list(model.fc.weight.shape),\n"
        "          torch.equal(model.fc.weight, again.fc.weight), bool(model.fc.weight.std() > 0),\n"
        "          [row.reason for row in timm_ghn.report_of(model).parameters if row.name == 'fc.weight']]"
    )
    assert done.result == [True, [7, 96], True, True, ["classifier of another size"]]


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (f"timm.create_model('test_vit', init='{SOURCE}')", "InitError", "has weights of test_resnet, not of test_vit"),
        (
            f"timm.create_model('test_resnet', init='{SOURCE}', in_chans=1)",
            "InitError",
            r"does not fit the model: conv1\.0\.weight is \(.*\) there and \(.*\) here. timm adapts weights",
        ),
        (f"timm.create_model('test_resnet', True, init='{SOURCE}')", "InitError", "pretrained=True ask for different"),
        (f"timm.create_model('test_resnet.orth', init='{SOURCE}')", "InitError", "the tag 'orth' ask for different"),
        ("timm.create_model('test_resnet', init='hf-hub:test_resnet')", "DownloadError", "names no repository"),
        (f"timm.create_model('test_resnet', init='{SOURCE}@../x')", "DownloadError", "there is no such revision"),
    ],
)
def test_what_does_not_fit(stocked: Hub, client: Client, code: str, kind: str, message: str) -> None:
    assert re.search(message, refused(client, kind, code))


# Nothing that was not described


def test_damaged_and_lying_repositories(stocked: Hub, client: Client) -> None:
    """Every one is refused with a message of its own, and nothing of it reaches a model."""
    good = stocked.repositories[NAME].files[WEIGHTS].data
    description = stocked.repositories[NAME].files["timm_ghn.json"].data
    flipped = bytearray(good)
    flipped[-100] ^= 1
    tensors = load(good)

    def weights(**changes: Any) -> bytes:
        return save({name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None})

    bias = tensors["fc.bias"]
    header = b"\x00\x00\x00\x00\x00\x00\x00\x7f" + good[8:]
    described: list[tuple[bytes, str]] = [
        (weights(**{"fc.bias": None}), "fc.bias is missing in the files of weights"),
        (weights(**{"fc.bias": bias[:-1]}), r"fc.bias is \(999,\) in the files of weights, and \(1000,\) in their"),
        (weights(**{"fc.bias": bias / 0}), "fc.bias has values that are not finite"),
        (header, f"{WEIGHTS} cannot be read"),
        (b"PK\x03\x04 not safetensors", f"{WEIGHTS} cannot be read"),
    ]
    replace(stocked, weights=bytes(flipped))
    assert "does not have the size and hash that timm_ghn.json gives" in refused(client, "CheckpointError")
    for data, message in described:
        replace(stocked, weights=data, description=describe(stocked, data))
        assert re.search(message, refused(client, "CheckpointError")), message
    extra = weights(extra=bias.clone())
    replace(stocked, weights=extra, description=describe(stocked, extra))
    assert "does not fit the model: extra is (1000,) there and missing here" in refused(client, "InitError")
    outside = {"../../evil.safetensors": {"size": 1, "sha256": "0" * 64}}
    for text, message in (
        (b"{", "is not a description of initialized weights"),
        (b'{"format": 99}', "it is of format '99', not 2"),
        (describe(stocked, good, report={}), "'parameters' is missing"),
        (description.replace(b'"method": "orth"', b'"method": "magic"'), "unknown initialization 'magic'"),
        (description.replace(b'"license": "apache-2.0"', b'"license": "a\\nb"'), "a text is not one of a line"),
        (describe(stocked, good, files=outside), "is not a name of a file of weights"),
        (description.replace(b'"seed": 0', b'"seed": NaN'), "NaN is not JSON"),
        (b"[" * 100_000, "is not a description"),
    ):
        replace(stocked, description=text)
        assert message in refused(client, "CheckpointError")
    replace(stocked, description=b" " * (17 * 2**20))
    assert "are more than the 16,777,216 that are read here" in refused(client)
    files = dict(stocked.repositories[NAME].files)
    del files["timm_ghn.json"]
    stocked.repositories[NAME].commit("main", files, "no description")
    assert "has no weights that timm-ghn made" in refused(client)


def other_content(response: Response) -> Response:
    response.body = bytes(len(response.body))
    return response


def endless(response: Response) -> Response:
    """As much again as was announced, in chunks, so that no length is given."""
    body = response.body * 2
    response.headers["Transfer-Encoding"] = "chunked"
    response.body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    return response


def test_another_host_cannot_send_other_weights(stocked: Hub, client: Client) -> None:
    """Large files come from another host, which never sees the token and whose content is checked."""
    stocked.change("GET", "/cdn/", other_content)
    assert "what arrived does not have the hash that the Hub gives; it was removed" in refused(client)
    assert stocked.repositories[NAME].files[WEIGHTS].sha256 not in blobs(client)
    stocked.faults.clear()
    client.run(TAKE)
    assert not [request for request in stocked.requests if "/cdn/" in request.path and request.token]


def test_more_than_was_announced_is_refused(stocked: Hub, client: Client) -> None:
    stocked.change("GET", "/cdn/", endless)
    refused(client)
    assert stocked.repositories[NAME].files[WEIGHTS].sha256 not in blobs(client)


def test_a_download_that_breaks_off_is_resumed(stocked: Hub, client: Client) -> None:
    """Where it broke off, in steps of the 10 MiB that huggingface_hub writes at once."""
    size = 25 * 2**20

    def cut(response: Response) -> Response:
        response.cut = 11 * 2**20
        return response

    replace(stocked, weights=random.Random(0).randbytes(size))
    stocked.change("GET", "/cdn/", cut, times=2)
    done = client.run(
        "from timm_ghn.hub.client import HubSource, fetch, look_up\n"
        "from timm_ghn.storage.paths import file_sha256\n"
        f"snapshot = look_up(HubSource('{NAME}'))\n"
        f"result = file_sha256(fetch(snapshot, '{WEIGHTS}', limit={size}))"
    )
    assert done.result == stocked.repositories[NAME].files[WEIGHTS].sha256
    ranges = [request.headers.get("Range") for request in stocked.requests if "/cdn/" in request.path]
    assert ranges == [None, f"bytes={10 * 2**20}-", f"bytes={20 * 2**20}-"]


@pytest.mark.parametrize(
    ("prepare", "environment", "message"),
    [
        (lambda hub: hub.repositories.clear(), {}, "there is no such repository, or it is private"),
        (lambda hub: setattr(hub.repositories[NAME], "private", True), {"HF_TOKEN": None}, "or it is private"),
        (lambda hub: setattr(hub.repositories[NAME], "gated", True), {"HF_TOKEN": "hf_reader"}, "access is restricted"),
        (lambda hub: None, {"HF_TOKEN": "hf_wrong"}, r"the token is missing or wrong.*\(HTTP 401\)"),
        (lambda hub: hub.fail("GET", "/cdn/", 404), {}, r"\(HTTP 404\)"),
        (lambda hub: hub.fail("GET|HEAD", "resolve", 403, message="no"), {}, r"\(HTTP 403\)"),
        (lambda hub: hub.fail("GET", "/cdn/", 500), {}, r"the Hub fails; try again later \(HTTP 500\)"),
        (lambda hub: hub.stall("GET", "/api/models/"), {}, "it is not on disk"),
        (lambda hub: None, {"HF_HUB_OFFLINE": "1"}, "it is not on disk"),
    ],
)
def test_failures_are_told_in_a_line(
    stocked: Hub, client: Client, prepare: Callable[[Hub], Any], environment: dict[str, str | None], message: str
) -> None:
    prepare(stocked)
    assert re.search(message, refused(client, **environment))


def test_a_revision_that_does_not_exist(stocked: Hub, client: Client) -> None:
    message = refused(client, code=f"timm.create_model('test_resnet', init='{SOURCE}@v9')")
    assert message == f"{SOURCE}@v9: there is no such revision"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [30.0])
def test_a_server_that_stalls_in_the_middle_is_given_up(stocked: Hub, client: Client, seconds: float) -> None:
    """huggingface_hub asks six times."""
    stocked.stall("GET", "/cdn/", seconds)
    assert "does not answer in time" in refused(client)


# An organization that is looked into first


def create(client: Client, arguments: str = "init='orth'", code: str = "", **environment: str | None) -> Done:
    """A model that the organization may have: its weights, where they are from, and what was logged."""
    return client.run(
        f"{DIGEST}{code}\nimport logging, io\nlog = io.StringIO()\nhandler = logging.StreamHandler(log)\n"
        "logger = logging.getLogger('timm_ghn')\nlogger.addHandler(handler); logger.setLevel('INFO')\n"
        f"try:\n    model = timm.create_model('test_resnet', {arguments})\n"
        "finally:\n    logger.removeHandler(handler); logger.setLevel('WARNING')\n"
        "report = timm_ghn.report_of(model)\n"
        "result = [digest(model), report.source, log.getvalue(), timm_ghn.provenance(model)]",
        {**ORGANIZATION, **environment},
    )


def test_weights_of_the_organization_are_those_that_are_computed(stocked: Hub, client: Client) -> None:
    computed = create(client, TIMM_GHN_HUB_ORG=None)
    taken = create(client)
    assert computed.result[1] is None
    assert taken.result[1] == f"{SOURCE}@{stocked.repositories[NAME].refs['main']}"
    assert taken.result[0] == computed.result[0]
    assert taken.result[3] == computed.result[3]
    assert create(client, HF_HUB_OFFLINE="1").result[:2] == [taken.result[0], SOURCE + "@main"]
    stocked.repositories[NAME].tags["v1"] = stocked.repositories[NAME].refs["main"]
    assert create(client, TIMM_GHN_HUB_ORG="lab@v1").result[1] == taken.result[1]


def test_weights_predicted_by_a_ghn_come_from_the_organization(
    hub: Hub, client: Client, seeded_checkpoint: Path
) -> None:
    ghn = {"TIMM_GHN": str(seeded_checkpoint)}
    client.run("timm_ghn.push('test_resnet', 'lab/test_resnet.ghn_orth')", ghn)
    computed = create(client, "init='ghn-orth'", TIMM_GHN_HUB_ORG=None, **ghn)
    taken = create(client, "init='ghn-orth'", **ghn)
    assert taken.result[1].startswith("hf-hub:lab/test_resnet.ghn_orth@")
    assert (taken.result[0], taken.result[3]) == (computed.result[0], computed.result[3])
    other = create(client, "init='ghn-orth'", TIMM_GHN="bundled")
    assert other.result[1] is None
    assert "ghn_hash: '" in other.result[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("init={'method': 'orth', 'seed': 1}", "seed: 0 there, 1 here"),
        ("init={'method': 'orth', 'start_layer': 3}", "start_layer: 1 there, 3 here"),
        ("init='orth', num_classes=5", "arguments: {} there, {'num_classes': 5} here"),
        ("init='orth', dtype=torch.bfloat16", "dtype: 'float32' there, 'bfloat16' here"),
    ],
)
def test_other_weights_are_computed(stocked: Hub, client: Client, arguments: str, message: str) -> None:
    code = "import torch\ntorch.Tensor.numpy" if "bfloat16" not in arguments else "digest = lambda model: ''"
    done = create(client, arguments, code=code)
    assert done.result[1] is None
    assert "are not those that are asked for, and are computed" in done.result[2]
    assert message in done.result[2]
    assert not stocked.paths("GET", "/cdn/")


def test_what_the_organization_cannot_give_is_computed(stocked: Hub, client: Client) -> None:
    expected = create(client, TIMM_GHN_HUB_ORG=None).result[0]
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: stocked.fail("GET", "/api/models/", 500), "the Hub fails; try again later"),
        (lambda: stocked.change("GET", "/cdn/", other_content), "does not have the hash that the Hub gives"),
        (lambda: replace(stocked, description=b"{}"), "is not a description"),
        (lambda: stocked.repositories.clear(), "there is no such repository"),
    ]
    for prepare, message in cases:
        stocked.faults.clear()
        prepare()
        done = create(client)
        assert done.result[:2] == [expected, None]
        assert message in done.result[2]


def test_a_hub_that_does_not_answer_is_not_asked_by_every_call(stocked: Hub, client: Client) -> None:
    stocked.stall("GET", "/api/models/silent", 3.0)
    first = create(client, TIMM_GHN_HUB_ORG="silent")
    assert first.result[1] is None
    assert "does not answer in time" in first.result[2]
    stocked.requests.clear()
    second = create(client, TIMM_GHN_HUB_ORG="silent")
    assert second.result[:2] == first.result[:2]
    assert not stocked.requests
    assert create(client).result[1].startswith(SOURCE)


def test_weights_on_disk_are_taken_with_a_warning_while_the_hub_fails(stocked: Hub, client: Client) -> None:
    taken = create(client)
    stocked.fail("GET", "/api/models/", 503)
    again = create(client)
    assert again.result[:2] == [taken.result[0], f"{SOURCE}@main"]
    assert "the Hub fails; try again later (HTTP 503). Looking on disk instead" in again.result[2]


def test_nothing_is_asked_without_an_organization_or_a_cache(stocked: Hub, client: Client) -> None:
    create(client, TIMM_GHN_HUB_ORG=None)
    create(client, "init={'method': 'orth', 'cache': False}")
    assert not stocked.requests


# GHNs


@pytest.fixture
def ghns(hub: Hub, client: Client, seeded_checkpoint: Path) -> Hub:
    """A Hub with a GHN."""
    client.run("timm_ghn.push_ghn(path, 'lab/ghn', license='mit')", path=str(seeded_checkpoint))
    return hub


def load_ghn(client: Client, source: str, **environment: str | None) -> Any:
    return client.run(f"result = timm_ghn.load_ghn('{source}').info.name", environment).result


def test_revisions_of_a_ghn_and_offline(ghns: Hub, client: Client) -> None:
    found = ghns.repositories["lab/ghn"]
    found.tags["v1"] = found.refs["main"]
    assert load_ghn(client, "hf-hub:lab/ghn@v1") == "hf-hub:lab/ghn@v1"
    ghns.requests.clear()
    assert load_ghn(client, "hf-hub:lab/ghn@v1", HF_HUB_OFFLINE="1") == "hf-hub:lab/ghn@v1"
    assert not ghns.requests


def test_ghns_that_are_not_what_they_should_be(ghns: Hub, client: Client) -> None:
    found = ghns.repositories["lab/ghn"]
    good = found.files["ghn.safetensors"].data
    code = "timm_ghn.load_ghn('hf-hub:lab/ghn')"
    for data, kind, message in (
        (good[:-4], "CheckpointError", "truncated or damaged"),
        (good[:-4] + b"\0\0\0\0", "CheckpointError", "does not have the hash that it was written with"),
    ):
        found.commit("main", {**found.files, "ghn.safetensors": Blob(data, True)}, "damaged")
        assert message in refused(client, kind, code)
    found.commit("main", {"ghn.pt": Blob(good, True)}, "pickled")
    assert "Pickled checkpoints (.pt) are not read from the Hub" in refused(client, code=code)
    assert "there is no such revision" in refused(client, code="timm_ghn.load_ghn('hf-hub:lab/ghn@v3')")
    assert "there is no such repository" in refused(client, code="timm_ghn.load_ghn('hf-hub:lab/none')")
