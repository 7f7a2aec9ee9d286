"""A GHN-3 wherever a GHN-2 is used: cache, folders, Hub, report, survey, comparison, training.

By name it comes from a Hub on loopback, which holds a file of joblib's as the authors' repository does.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import timm
from ghn_reference import SMALL, ghn3_config, released_ghn3, seeded_ghn, seeded_ghn3
from hub_client import DIGEST, Client
from hub_server import Hub
from shards import noisy_images, write_shard
from test_ghn3_hub import publish
from zoo_survey.examine import Settings, examine

from timm_ghn import init_model, load_ghn
from timm_ghn.cli import main
from timm_ghn.ghn import GHN, content_hash
from timm_ghn.initialize.report import GHN3_NOTE
from timm_ghn.training.cli import add_train_arguments, make_config
from timm_ghn.training.processes import join_processes
from timm_ghn.training.run import prepare

BY_NAME: dict[str, str | None] = {"TIMM_GHN": "ghn3-t"}


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn3(ghn3_config(16, 2, 4))


@pytest.fixture
def published(hub: Hub, ghn: GHN) -> Hub:
    publish(hub, released_ghn3(ghn))
    return hub


@pytest.fixture
def file(ghn: GHN, tmp_path: Path) -> Path:
    path = tmp_path / "mine.pt"
    joblib.dump(released_ghn3(ghn), path)
    return path


def test_results_are_kept_in_the_cache(published: Hub, client: Client) -> None:
    code = f"{DIGEST}model = timm.create_model('test_vit', init='ghn-orth')\nreport = timm_ghn.report_of(model)\n"
    code += "result = [digest(model), report.from_cache, report.provenance['ghn'], report.predicted_share > 0.99]"
    weights, *facts = client.run(code, BY_NAME).result
    assert facts == [False, "ghn3-t", True]
    assert client.run(code, BY_NAME).result == [weights, True, "ghn3-t", True]
    other, *facts = client.run(code, {"TIMM_GHN": "bundled"}).result
    assert facts[:2] == [False, "bundled"]
    assert other != weights


def test_weights_are_streamed_to_a_folder(published: Hub, client: Client, tmp_path: Path) -> None:
    done = client.command("init", "test_vit", "--out", str(tmp_path / "out"), environment=BY_NAME)
    assert done.result == 0, done.err
    assert GHN3_NOTE in done.out.splitlines()
    code = f"{DIGEST}model = timm.create_model('test_vit', init=timm_ghn.Init('ghn-orth', cache=False))\n"
    code += f"saved = timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)\n"
    code += "result = digest(model) == digest(saved)"
    assert client.run(code, BY_NAME).result is True


def test_weights_are_pushed_and_pulled(published: Hub, client: Client, ghn: GHN) -> None:
    done = client.command("push", "test_vit", "--org", "lab", environment=BY_NAME)
    assert done.result == 0, done.out + done.err
    files = published.repositories["lab/test_vit.ghn_orth"].files
    provenance = json.loads(files["timm_ghn.json"].data)["report"]["provenance"]
    assert [provenance[name] for name in ("ghn", "ghn_hash", "ghn_kind")] == ["ghn3-t", content_hash(ghn), "GHN-3"]
    assert "| GHN | `ghn3-t` |" in files["README.md"].data.decode()
    code = f"{DIGEST}a = timm.create_model('test_vit', init='hf-hub:lab/test_vit.ghn_orth')\n"
    code += "b = timm.create_model('test_vit', init=timm_ghn.Init('ghn-orth', cache=False))\n"
    code += "table = timm_ghn.report_of(a).table().splitlines()\n"
    code += "result = [digest(a) == digest(b), timm_ghn.report_of(a).source is not None, table[-1]]"
    assert client.run(code, BY_NAME).result == [True, True, GHN3_NOTE]


def test_the_report_of_any_ghn3_says_what_is_not_known(ghn: GHN, file: Path) -> None:
    own_layer = seeded_ghn3(replace(ghn.config, start_layer=1))
    for source, is_told in ((ghn, True), (str(file), True), (own_layer, False), (seeded_ghn(SMALL), False)):
        report = init_model(timm.create_model("test_resnet"), ghn=source)
        assert (report.table().splitlines()[-1] == GHN3_NOTE) == is_told
        assert type(report).from_dict(report.to_dict()).table() == report.table()


def test_a_model_is_surveyed(file: Path) -> None:
    found = examine("test_vit", Settings(ghn=str(file)))
    assert found.graph is not None
    assert found.init is not None
    assert found.init.predicted == found.graph.predictable > 0
    assert found.init.activations is not None
    assert found.init.activations.finite


def test_starts_are_compared(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "data-train.safetensors", noisy_images(40, 0, 32))
    write_shard(tmp_path / "data-test.safetensors", noisy_images(20, 1, 32))
    command = ["compare", "test_vit", "--data", str(tmp_path / "data"), "--image-size", "32", "--seeds", "1"]
    command += ["--inits", "ghn-orth", "--ghn", str(file), "--epochs", "1", "--device", "cpu"]
    assert main([*command, "--model-kwargs", "patch_size=8", "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"^ghn-orth +0\.001 +1 ", capsys.readouterr().out, re.MULTILINE)
    (run,) = (tmp_path / "out" / "runs").glob("*.json")
    assert load_ghn(str(file)).info is not None
    assert content_hash(load_ghn(str(file))) in run.read_text()


@pytest.mark.usefixtures("one_thread")
def test_training_begins_with_it(tmp_path: Path) -> None:
    """The run takes over the sizes of the GHN, and changes it."""
    ghn = seeded_ghn3(ghn3_config(16, 2, 4, num_classes=6))
    joblib.dump(released_ghn3(ghn), tmp_path / "ghn3.pt")
    write_shard(tmp_path / "train.safetensors", noisy_images(80, 0, 32, classes=6))
    line = ["--images", str(tmp_path / "train.safetensors"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    line += ["--preset", "smoke", "--meta-batch", "1", "--batch-size", "12", "--held-out-classes", "1"]
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    args = parser.parse_args([*line, "--from-ghn", str(tmp_path / "ghn3.pt")])
    trainer = prepare(args.images, make_config(args), args.out, join_processes("cpu"), ghn=args.from_ghn)
    assert trainer.ghn.config == ghn.config
    assert content_hash(trainer.ghn) == content_hash(ghn)
    trainer.train_step()
    assert content_hash(trainer.ghn) != content_hash(ghn)
    assert all(bool(value.isfinite().all()) for value in trainer.ghn.state_dict().values())
