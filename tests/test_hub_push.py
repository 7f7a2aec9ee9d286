"""Pushing through huggingface_hub's own client to a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_client import Client, Failed
from hub_server import READER, Hub, Repository
from huggingface_hub import ModelCard
from safetensors.torch import load

NAME = "lab/test_resnet.orth"
WEIGHTS = "model.safetensors"


@pytest.fixture
def ghn(seeded_checkpoint: Path) -> dict[str, str | None]:
    """An environment with a GHN of 1000 classes as the default."""
    return {"TIMM_GHN": str(seeded_checkpoint)}


def push(client: Client, *arguments: str, **environment: str | None) -> str:
    """`timm-ghn push` with a method that needs no GHN; what it prints."""
    done = client.command("push", *arguments, "--org", "lab", "--method", "orth", environment=environment)
    assert done.result == 0, done.out + done.err
    return done.out


def failure(client: Client, code: str, kind: str = "PushError", **values: Any) -> str:
    """The one line of an error."""
    with pytest.raises(Failed) as caught:
        client.run(code, **values)
    assert kind in caught.value.kinds, caught.value.trace
    assert "\n" not in str(caught.value)
    return str(caught.value)


PUSH = "timm_ghn.push('test_resnet', 'lab/test_resnet.orth', init='orth')"


# What is pushed


def test_what_a_repository_holds(hub: Hub, client: Client) -> None:
    out = push(client, "test_resnet")
    assert re.search(r"test_resnet +pushed +lab/test_resnet\.orth +http://127.0.0.1", out)
    assert out.endswith("1 pushed\n")
    files = hub.repositories[NAME].files
    assert files.keys() == {".gitattributes", "README.md", "config.json", WEIGHTS, "timm_ghn.json"}
    config = json.loads(files["config.json"].data)
    assert (config["architecture"], config["pretrained_cfg"]["tag"]) == ("test_resnet", "orth")
    manifest = json.loads(files["timm_ghn.json"].data)
    assert manifest["files"] == {
        WEIGHTS: {"size": len(files[WEIGHTS].data), "sha256": hashlib.sha256(files[WEIGHTS].data).hexdigest()}
    }
    tensors = load(files[WEIGHTS].data)
    rows = {row["name"]: row["shape"] for row in manifest["report"]["parameters"]}
    assert rows.items() <= {name: list(tensor.shape) for name, tensor in tensors.items()}.items()
    assert not hub.repositories[NAME].private


def test_the_card_says_what_was_computed(hub: Hub, client: Client, ghn: dict[str, str | None]) -> None:
    done = client.command(
        "push", "test_resnet", "--org", "lab", "--seed", "3", "--start-layer", "9", "--noise", "0.001",
        environment=ghn,
    )  # fmt: skip
    assert done.result == 0, done.out
    files = hub.repositories["lab/test_resnet.ghn_orth"].files
    text = files["README.md"].data.decode()
    facts = client.run(
        "result = timm_ghn.init_model(timm.create_model('test_resnet')).predicted_share", environment=ghn
    )
    hash_ = json.loads(files["timm_ghn.json"].data)["report"]["provenance"]["ghn_hash"]
    for row in (
        "| L | 9 of 16 layers |",
        "| beta | 0.001 |",
        "| seed | 3 |",
        f"| hash of the GHN | `{hash_}` |",
        f"| predicted by the GHN | {facts.result:.2%} of them |",
        f"| SHA-256 of `model.safetensors` | `{files[WEIGHTS].sha256}` |",
        "https://arxiv.org/abs/2207.10049",
        "title={Pretraining a Neural Network before Knowing Its Architecture}",
        "not trained",
    ):
        assert row in text, row
    metadata = ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "timm"
    assert metadata["license"] == "apache-2.0"
    assert {"timm", "ghn-orth", "not-trained"} <= set(metadata["tags"])
    assert "base_model" not in metadata
    assert metadata == yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    "call",
    [
        "timm_ghn.push('test_resnet', name, init={'method': 'ghn-orth', 'seed': 1})",
        "timm_ghn.push('test_vit', name, init='orth', num_classes=7, img_size=96, dtype=torch.bfloat16)",
        "timm_ghn.push('test_resnet', name, init=timm_ghn.Init('ghn-orth', correlation='ppuda'))",
    ],
)
def test_the_command_of_the_card_makes_the_same_file(
    hub: Hub, client: Client, ghn: dict[str, str | None], call: str, tmp_path: Path
) -> None:
    client.run(call, environment=ghn, name="lab/it")
    files = hub.repositories["lab/it"].files
    block = re.search(r"## Make it yourself.*?```sh\n(.*?)```", files["README.md"].data.decode(), re.DOTALL)
    assert block is not None
    install, command, check = block[1].splitlines()
    assert install.startswith("pip install timm-ghn==")
    program, *arguments = shlex.split(command)
    client.run("os.chdir(folder)", folder=str(tmp_path))
    if program == "timm-ghn":
        assert client.command(*arguments).result == 0
    else:
        client.run(arguments[1])
    made = tmp_path / check.split()[1]
    assert made.read_bytes() == files[WEIGHTS].data
    assert check.split()[-1] == hashlib.sha256(made.read_bytes()).hexdigest()


def test_large_weights_are_split(hub: Hub, client: Client) -> None:
    push(client, "test_resnet")
    push(client, "test_resnet", "--max-shard-size", "1MB", "--overwrite")
    files = hub.repositories[NAME].files
    shards = [name for name in files if name.endswith(".safetensors")]
    assert shards == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert all(len(files[name].data) < 1.1e6 for name in shards)
    index = json.loads(files["model.safetensors.index.json"].data)
    assert index["weight_map"] == {name: shard for shard in shards for name in load(files[shard].data)}
    text = files["README.md"].data.decode()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    done = client.run(
        f"{snippet[1]}\nother = timm.create_model('test_resnet', init='orth').state_dict()\n"
        "result = all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())"
    )
    assert done.result is True
    pulled = client.run(
        "model = timm.create_model('test_resnet', init='hf-hub:lab/test_resnet.orth').state_dict()\n"
        "other = timm.create_model('test_resnet', init='orth').state_dict()\n"
        "result = all(torch.equal(tensor, other[name]) for name, tensor in model.items())"
    )
    assert pulled.result is True


# What is sent


def test_nothing_is_sent_twice(hub: Hub, client: Client) -> None:
    push(client, "test_resnet")
    sent, commits = hub.sent_bytes(), len(hub.repositories[NAME].commits)
    assert sent > 1_000_000
    assert "skipped" in push(client, "test_resnet")
    assert not hub.paths("POST", "commit")[1:]
    # Computed again, the files are the same.
    assert "has these files already" in push(client, "test_resnet", "--overwrite")
    assert len(hub.repositories[NAME].commits) == commits
    # Another licence changes card and description only.
    before = hub.repositories[NAME].files
    client.run("timm_ghn.push('test_resnet', 'lab/test_resnet.orth', init='orth', license='mit')")
    files = hub.repositories[NAME].files
    assert {name for name in files if files[name] != before[name]} == {"README.md", "timm_ghn.json"}
    assert hub.sent_bytes() == sent


def test_weights_of_other_rules_are_replaced(hub: Hub, client: Client) -> None:
    """After a change of what is computed, the weights of before are neither taken nor left."""
    client.run(
        f"from timm_ghn import numerics\nnumerics.VERSION += 1\ntry:\n    {PUSH}\nfinally:\n    numerics.VERSION -= 1"
    )
    done = client.run(
        "model = timm.create_model('test_resnet', init='orth')\nresult = timm_ghn.report_of(model).source",
        {"TIMM_GHN_HUB_ORG": "lab"},
    )
    assert done.result is None
    assert client.run(f"result = {PUSH}.outcome.value").result == "pushed"
    assert client.run(f"result = {PUSH}.outcome.value").result == "skipped"


def test_an_interrupted_push_goes_on(hub: Hub, client: Client) -> None:
    hub.fail("POST", "/commit/", 503, times=1)
    done = client.command("push", "test_resnet", "--org", "lab", "--method", "orth")
    assert done.result == 1
    assert "the Hub fails; try again later (HTTP 503)" in done.out
    sent = hub.sent_bytes()
    assert WEIGHTS not in hub.repositories[NAME].files
    push(client, "test_resnet")
    assert hub.sent_bytes() == sent
    assert WEIGHTS in hub.repositories[NAME].files


def test_an_upload_that_fails_once_and_comes_in_parts(hub: Hub, client: Client) -> None:
    hub.part_size = 400_000
    hub.fail("PUT", "/upload/", 500, times=1)
    push(client, "test_resnet")
    assert len(hub.paths("PUT")) == 6  # five parts of the weights, and one again
    assert load(hub.repositories[NAME].files[WEIGHTS].data)


def test_a_batch_goes_on_past_a_failure(hub: Hub, client: Client) -> None:
    push(client, "test_resnet")
    hub.fail("POST", "test_convnext2.*commit", 500, message="out of order")
    done = client.command("push", "test_conv*", "test_resnet", "--org", "lab", "--method", "orth")
    assert done.result == 1
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines[1:-2]] == [
        ["test_convnext", "pushed"],
        ["test_convnext2", "failed"],
        ["test_convnext3", "pushed"],
        ["test_resnet", "skipped"],
    ]
    assert lines[-1] == "2 pushed, 1 failed, 1 skipped"
    assert "(HTTP 500)" in lines[2]


def test_a_dry_run_does_nothing(hub: Hub, client: Client) -> None:
    push(client, "test_resnet")
    hub.requests.clear()
    out = push(client, "test_resnet", "test_vit", "--dry-run")
    assert re.search(r"test_resnet +skipped", out)
    assert re.search(r"test_vit +to be pushed +lab/test_vit.orth +about 1\.5 MB", out)
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert hub.repositories.keys() == {NAME}


def test_pull_requests_branches_and_private_repositories(hub: Hub, client: Client) -> None:
    out = push(client, "test_resnet", "--create-pr", "--private")
    found = hub.repositories[NAME]
    assert re.search(rf"proposed +{NAME} +http://\S+/discussions/1", out)
    assert found.private
    assert WEIGHTS not in found.files
    assert WEIGHTS in found.commits[found.refs["refs/pr/1"]]
    push(client, "test_resnet", "--revision", "v2")
    assert WEIGHTS in found.commits[found.refs["v2"]]
    assert WEIGHTS not in found.files
    done = client.run(
        "names = ['hf-hub:lab/test_resnet.orth@v2', 'hf-hub:lab/test_resnet.orth@refs/pr/1']\n"
        "models = [timm.create_model('test_resnet', init=name) for name in names]\n"
        "result = [timm_ghn.report_of(model).source for model in models]"
    )
    assert done.result == [f"hf-hub:{NAME}@{found.refs['v2']}", f"hf-hub:{NAME}@{found.refs['refs/pr/1']}"]
    message = failure(client, "timm_ghn.push('test_resnet', 'lab/x', init='orth', create_pr=True, revision='v2')")
    assert "leave `revision` out" in message


# What is not pushed


def test_other_models_are_not_replaced(hub: Hub, client: Client) -> None:
    hub.repositories[NAME] = Repository()
    client.run(
        "huggingface_hub.upload_file(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id=name)", name=NAME
    )
    assert "holds a model that timm-ghn did not make" in failure(client, PUSH)
    client.run(PUSH.replace("init='orth'", "init='orth', overwrite=True"))
    assert WEIGHTS in hub.repositories[NAME].files


def test_a_public_repository_is_not_taken_for_private(hub: Hub, client: Client) -> None:
    hub.repositories[NAME] = Repository()
    message = failure(client, PUSH.replace("init='orth'", "init='orth', private=True"))
    assert "exists already and is public" in message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("timm_ghn.push('test_resnet', 'lab/x', init='rand')", "'rand' is timm's own initialization; there is nothing"),
        (
            "timm_ghn.push(timm.create_model('test_resnet'), 'lab/x')",
            "push takes the name of a timm model, not a ResNet",
        ),
        ("timm_ghn.push('test_resnet', 'lab')", "'lab' names no repository of the Hub"),
        ("timm_ghn.push('test_resnet', 'lab/../x')", "names no repository of the Hub"),
        ("timm_ghn.push('test_resnet', 'lab/x', init='orth', act_layer=torch.nn.ReLU)", "not plain data"),
    ],
)
def test_what_cannot_be_pushed(hub: Hub, client: Client, code: str, message: str) -> None:
    assert message in failure(client, code)
    assert not hub.repositories


def nothing(hub: Hub) -> dict[str, str | None]:
    return {}


@pytest.mark.parametrize(
    ("prepare", "environment", "message"),
    [
        (nothing, {"HF_TOKEN": None}, "a token is needed: run `hf auth login`, or set HF_TOKEN"),
        (nothing, {"HF_TOKEN": "hf_wrong"}, r"the token is missing or wrong.* \(HTTP 401\)"),
        (lambda hub: hub.fail("GET", "/api/models/", 500), {}, r"the Hub fails; try again later \(HTTP 500\)"),
        (lambda hub: hub.fail("GET", "/api/models/", 429), {}, r"too many requests; try again later \(HTTP 429\)"),
        (lambda hub: hub.stall("GET", "/api/models/"), {}, "does not answer in time"),
        (nothing, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        (lambda hub: hub.fail("POST", "/create", 403), {}, "not give the right to do this"),
    ],
)  # fmt: skip
def test_failures_are_told_in_a_line(
    hub: Hub, client: Client, prepare: Callable[[Hub], Any], environment: dict[str, str | None], message: str
) -> None:
    prepare(hub)
    done = client.command("push", "test_resnet", "--org", "lab", "--method", "orth", environment=environment)
    assert done.result in (1, 2), done.out
    lines = (done.out + done.err).splitlines()
    assert re.search(message, "\n".join(lines)), done.out + done.err
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) + len(done.out.splitlines()) <= 4  # an error, or a table of one row


@pytest.mark.parametrize("path", ["/create", "/commit/"])
def test_a_push_does_not_wait_for_a_silent_hub(hub: Hub, client: Client, path: str) -> None:
    hub.stall("POST", path)
    code = f"import timm_ghn.hub.client as c\nc.SILENT_SECONDS = 0.5\ntry: {PUSH}\nfinally: c.SILENT_SECONDS = 60.0"
    assert "does not answer in time" in failure(client, code)
    assert client.run("result = huggingface_hub.get_session().timeout.read").result is None  # as it was


def test_a_reader_may_not_push(hub: Hub, client: Client) -> None:
    hub.repositories[NAME] = Repository()
    done = client.command("push", "test_resnet", "--org", "lab", "--method", "orth", environment={"HF_TOKEN": READER})
    assert "the token does not give the right to do this (it needs to be allowed to write)" in done.out


# GHNs


def test_a_ghn_goes_to_the_hub_and_back(hub: Hub, client: Client, seeded_checkpoint: Path) -> None:
    done = client.command(
        "ghns", "push", str(seeded_checkpoint), "lab/ghn", "--license", "mit", "--description", "Seeded."
    )
    assert done.result == 0, done.err
    files = hub.repositories["lab/ghn"].files
    assert files.keys() == {".gitattributes", "README.md", "config.json", "ghn.safetensors"}
    card = ModelCard(files["README.md"].data.decode())
    assert (card.data.license, card.data.library_name) == ("mit", "timm-ghn")
    assert 'ghn="hf-hub:lab/ghn"' in card.text
    commit = hub.repositories["lab/ghn"].refs["main"]
    hashes = client.run(
        "result = [timm_ghn.load_ghn(source).info.hash for source in sources]",
        sources=[str(seeded_checkpoint), "hf-hub:lab/ghn", f"hf-hub:lab/ghn@{commit}"],
    ).result
    assert len(set(hashes)) == 1
    assert json.loads(files["config.json"].data)["hash"] == hashes[0]
    assert f"| hash | `{hashes[0]}` |" in card.text
    again = client.command(
        "ghns", "push", str(seeded_checkpoint), "lab/ghn", "--license", "mit", "--description", "Seeded."
    )
    assert "skipped" in again.out
    weights = client.run(
        "a, b = (timm.create_model('test_resnet', init={'method': 'ghn', 'ghn': ghn}) for ghn in sources)\n"
        "result = [torch.equal(a.conv1[0].weight, b.conv1[0].weight), timm_ghn.provenance(b)['ghn']]",
        sources=[str(seeded_checkpoint), "hf-hub:lab/ghn"],
    )
    assert weights.result == [True, "hf-hub:lab/ghn"]


def test_the_bundled_ghn_brings_its_card(hub: Hub, client: Client) -> None:
    assert client.command("ghns", "push", "bundled", "lab/small", "--dry-run").result == 0
    assert not hub.repositories
    assert client.command("ghns", "push", "bundled", "lab/small").result == 0
    text = hub.repositories["lab/small"].files["README.md"].data.decode()
    assert "## What it is worth" in text
    assert "license: apache-2.0" in text


def test_a_ghn_without_a_licence_is_not_pushed(client: Client, seeded_checkpoint: Path) -> None:
    done = client.command("ghns", "push", str(seeded_checkpoint), "lab/ghn")
    assert done.result == 2
    assert re.fullmatch(r"timm-ghn: error: .*seeded.pt: say which licence it has.*\n", done.err)


def test_a_response_of_the_loopback_hub_is_real(hub: Hub, client: Client) -> None:
    """The rest of the client works against it as well."""
    client.run("huggingface_hub.create_repo('lab/r'); huggingface_hub.upload_file("
               "path_or_fileobj=b'hello', path_in_repo='a/b.txt', repo_id='lab/r')")  # fmt: skip
    assert client.run("result = huggingface_hub.list_repo_refs('lab/r').branches[0].name").result == "main"
    assert client.run("result = huggingface_hub.file_exists('lab/r', 'a/b.txt')").result is True
    assert client.run("result = open(huggingface_hub.hf_hub_download('lab/r', 'a/b.txt')).read()").result == "hello"
