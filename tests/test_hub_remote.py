"""Round trips that ask nothing of the server itself: on loopback, and on the real Hub if there is a token for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub_client import Failed
from hub_fixtures import Remote

FILES = {".gitattributes", "README.md", "config.json", "model.safetensors", "timm_ghn.json"}
DIGEST = (
    "import hashlib\n"
    "def digest(model):\n"
    "    found = hashlib.sha256()\n"
    "    for name, tensor in model.state_dict().items():\n"
    "        found.update(name.encode() + tensor.numpy().tobytes())\n"
    "    return found.hexdigest()\n"
)


def refused(remote: Remote, code: str, environment: dict[str, str | None] | None = None) -> str:
    """The one line of an error."""
    with pytest.raises(Failed) as caught:
        remote.client.run(code, environment)
    assert "TimmGhnError" in caught.value.kinds, caught.value.trace
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_card_and_config(remote: Remote, repository: str) -> None:
    files, card, config = remote.client.run(
        "timm_ghn.push('test_resnet', repository, init='orth', private=True)\n"
        "api = huggingface_hub.HfApi()\n"
        "card = huggingface_hub.ModelCard.load(repository)\n"
        "config = open(huggingface_hub.hf_hub_download(repository, 'config.json')).read()\n"
        "result = [api.list_repo_files(repository), card.data.to_dict(), config]",
        repository=repository,
    ).result
    assert set(files) == FILES
    assert card["library_name"] == "timm"
    assert "base_model" not in card
    assert json.loads(config)["pretrained_cfg"]["tag"] == "orth"


def test_branches_pull_requests_and_revisions(remote: Remote, repository: str) -> None:
    outcomes, sources, listed = remote.client.run(
        "def push(seed, **kwargs):\n"
        "    init = {'method': 'orth', 'seed': seed}\n"
        "    return timm_ghn.push('test_resnet', repository, init=init, private=True, **kwargs).outcome.value\n"
        "def pull(revision):\n"
        "    model = timm.create_model('test_resnet', init=f'hf-hub:{repository}@{revision}')\n"
        "    return [timm_ghn.provenance(model)['seed'], timm_ghn.report_of(model).source.partition('@')[0]]\n"
        "outcomes = [push(0), push(1, revision='v2'), push(2, create_pr=True), push(0)]\n"
        "sources = [pull('main'), pull('v2'), pull('refs/pr/1')]\n"
        "refs = huggingface_hub.HfApi().list_repo_refs(repository)\n"
        "result = [outcomes, sources, sorted(branch.name for branch in refs.branches)]",
        repository=repository,
    ).result
    assert outcomes == ["pushed", "pushed", "proposed", "skipped"]
    assert sources == [[seed, f"hf-hub:{repository}"] for seed in (0, 1, 2)]
    assert listed == ["main", "v2"]


def test_what_is_not_there(remote: Remote, repository: str) -> None:
    take = f"timm.create_model('test_resnet', init='hf-hub:{repository}')"
    assert refused(remote, take).startswith(f"hf-hub:{repository}: ")
    remote.client.run("timm_ghn.push('test_resnet', repository, init='orth')", repository=repository)
    message = refused(remote, take.replace("')", "@v9')"))
    assert message == f"hf-hub:{repository}@v9: there is no such revision"
    assert "401" in refused(remote, f"timm_ghn.push('test_vit', '{repository}', init='orth')", {"HF_TOKEN": "hf_wrong"})


def test_a_ghn_there_and_back(remote: Remote, repository: str, seeded_checkpoint: Path) -> None:
    arguments = ("ghns", "push", str(seeded_checkpoint), repository, "--license", "mit", "--description", "Seeded.")
    done = remote.client.command(*arguments)
    assert done.result == 0, done.err
    hashes = remote.client.run(
        "commit = huggingface_hub.HfApi().model_info(repository).sha\n"
        "sources = [path, f'hf-hub:{repository}', f'hf-hub:{repository}@{commit}']\n"
        "result = [timm_ghn.load_ghn(source).info.hash for source in sources]",
        repository=repository,
        path=str(seeded_checkpoint),
    ).result
    assert len(set(hashes)) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", hashes[0])
    assert "skipped" in remote.client.command(*arguments).out


def test_the_organization_is_asked_first(remote: Remote) -> None:
    name = f"{remote.organization}/test_resnet.orth"
    if remote.client.run("result = huggingface_hub.repo_exists(name)", name=name).result:
        pytest.skip(f"{name} exists already")
    create = DIGEST + "model = timm.create_model('test_resnet', init='orth')\n"
    result = "result = [digest(model), timm_ghn.report_of(model).source]"
    try:
        computed = remote.client.run(create + result).result
        remote.client.run("timm_ghn.push('test_resnet', name, init='orth')", name=name)
        taken = remote.client.run(create + result, {"TIMM_GHN_HUB_ORG": remote.organization}).result
    finally:
        remote.client.run("huggingface_hub.delete_repo(name, missing_ok=True)", name=name)
    assert computed[1] is None
    assert taken[1].startswith(f"hf-hub:{name}@")
    assert taken[0] == computed[0]
