"""Fine-tuning: data, batches, steps, results; on small networks and images."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fashion_mnist
import numpy as np
import pytest
import timm
import torch
from class_parts import part_of
from cuda_graphs import CapturedStep
from fashion_mnist import load_dataset
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from paired import sign_flip_p
from PIL import Image
from presets import PRESETS
from processes import grid, run_together
from protocol import PaperConfig
from safetensors.torch import save_file
from shards import noisy_images as images
from shards import write_shard
from throughput import measure_throughput
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF

import timm_ghn
from timm_ghn.errors import FineTuneError, ImageError, InitError
from timm_ghn.finetune import Execution, FineTuneConfig, Job, ResultStore, differences, load_benchmark, run_jobs, tune
from timm_ghn.finetune.batches import DeviceImages, epoch_picks
from timm_ghn.finetune.config import learning_rate
from timm_ghn.finetune.data import (
    Benchmark,
    Task,
    classes_in_turn,
    first_of_each_class,
    make_task,
    statistics_of,
    stratified,
)
from timm_ghn.finetune.experiment import best_of, explained_memory
from timm_ghn.finetune.results import Summary, summarize
from timm_ghn.finetune.run import Run
from timm_ghn.finetune.verdict import comparison_table
from timm_ghn.images import ImageSet
from timm_ghn.training.data import split

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "finetune.py"
sys.path.insert(0, str(SCRIPT.parent))
finetune = importlib.import_module("finetune")
sys.path.pop(0)

CONFIG = FineTuneConfig(
    "test_resnet",
    "rand",
    image_size=16,
    epochs=4,
    batch_size=10,
    labels_per_class=7,
    padding=2,
    lr=0.02,
)
PAPER = PaperConfig(**CONFIG.to_dict(), stem="original")
CPU = Execution(evaluate_every=2)


@pytest.fixture(scope="module")
def benchmark() -> Benchmark:
    return Benchmark("synthetic", images(90, 0), images(40, 1), "made for tests")


def write_folder(root: Path, data: ImageSet) -> None:
    for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        folder = root / data.classes[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")


def new_run(config: FineTuneConfig, task: Task, seed: int = 0, execution: Execution = CPU) -> Run:
    return Run(config, seed, task, config.build(3, seed), execution)


def train(run: Run, epochs: int) -> None:
    for _ in range(epochs):
        run.train_epoch()


def state(run: Run) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in run.module.state_dict().items()}
    for index, values in enumerate(run.optimizer.state.values()):
        found.update({f"{index}.{k}": v.clone() for k, v in values.items() if isinstance(v, Tensor)})
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# --- which images ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=60), st.integers(1, 3))
def test_the_first_of_each_class(labels: list[int], count: int) -> None:
    labels = labels + [0, 1, 2, 3] * 3
    data = ImageSet(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), torch.tensor(labels), ("a", "b", "c", "d"))
    chosen = first_of_each_class(data, count).tolist()
    assert chosen == sorted(chosen)
    for label in range(4):
        members = [index for index, value in enumerate(labels) if value == label]
        assert [index for index in chosen if labels[index] == label] == members[:count]


def test_more_labels_than_there_are(benchmark: Benchmark) -> None:
    with pytest.raises(FineTuneError, match=r"500 labels a class .* 'class 0' has \d+ training images; .*--labels 0"):
        make_task(benchmark, replace(CONFIG, labels_per_class=500))


def test_tuning_does_not_look_at_the_test_images(benchmark: Benchmark) -> None:
    task = make_task(benchmark, replace(CONFIG, split="validation"))
    tenths = [round(count / 10) for count in torch.bincount(benchmark.train.labels).tolist()]
    assert torch.bincount(task.test.labels).tolist() == tenths  # 5,000 of CIFAR-10's 50,000
    used = {bytes(image.numpy().tobytes()) for image in task.train.images}
    assert not used & {bytes(image.numpy().tobytes()) for image in task.test.images}
    other = replace(benchmark, test=images(40, 2))
    assert make_task(other, replace(CONFIG, split="validation")).digest == task.digest
    assert make_task(other, CONFIG).digest != make_task(benchmark, CONFIG).digest


def test_a_folder_that_is_sorted_by_class_is_tuned_and_tested_on_every_class(tmp_path: Path) -> None:
    size, classes = 20, 10
    labels = torch.arange(classes).repeat_interleave(size)
    write_folder(tmp_path, ImageSet(images(size * classes, 0).images, labels, tuple("abcdefghij")))
    data = load_benchmark(str(tmp_path), size=16)
    assert torch.bincount(data.test.labels).tolist() == [4] * classes
    task = make_task(data, replace(CONFIG, split="validation", labels_per_class=None))
    assert torch.bincount(task.test.labels).tolist() == [2] * classes
    assert torch.bincount(task.train.labels).tolist() == [14] * classes
    again = load_benchmark(str(tmp_path), size=16)
    assert torch.equal(data.test.images, again.test.images)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60).filter(lambda labels: len(set(labels)) < len(labels)))
def test_a_stratified_draw_takes_some_of_every_class_and_leaves_some(labels: list[int]) -> None:
    drawn = stratified(torch.tensor(labels), 0.2, "a test")
    for label in set(labels):
        members = [bool(drawn[index]) for index, value in enumerate(labels) if value == label]
        assert sum(members) == (max(1, round(0.2 * len(members))) if len(members) > 1 else 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 64))
def test_a_few_images_are_of_all_classes(labels: list[int], count: int) -> None:
    chosen = classes_in_turn(torch.tensor(labels), count).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, len(labels))
    counts = [sum(labels[index] == label for index in chosen) for label in set(labels)]
    for label, found in zip(set(labels), counts, strict=True):
        assert found in (labels.count(label), max(counts), max(counts) - 1)


def test_classes_that_a_ghn_was_trained_on_and_those_that_it_never_saw() -> None:
    data = Benchmark("many", images(300, 0, classes=12), images(120, 1, classes=12), "made for tests")
    held_out = split(data.train, held_out=5).held_out
    assert held_out is not None
    hidden = torch.unique(held_out.labels).tolist()
    seen, unseen = part_of(data, "trained", held_out=5), part_of(data, "held-out", held_out=5)
    assert part_of(data, "all") is data
    assert unseen.train.classes == unseen.test.classes == tuple(f"class {label}" for label in hidden)
    assert set(seen.train.classes) | set(unseen.train.classes) == set(data.train.classes)
    assert len(seen.train) + len(unseen.train) == len(data.train)
    assert len(seen.test) + len(unseen.test) == 120
    for part in (seen, unseen):  # images keep the names of their classes
        for image, label in zip(part.test.images, part.test.labels, strict=True):
            (index,) = torch.nonzero((data.test.images == image).flatten(1).all(1)).flatten().tolist()
            assert data.test.classes[int(data.test.labels[index])] == part.test.classes[int(label)]
    with pytest.raises(FineTuneError, match="50 of 12 classes cannot be held out"):
        part_of(data, "held-out")


def test_statistics(benchmark: Benchmark) -> None:
    mean, std = statistics_of(benchmark.train)
    pixels = benchmark.train.images.permute(1, 0, 2, 3).reshape(3, -1).double()
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std(1, correction=0), rtol=1e-5, atol=0)


# --- batches --------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_every_image_once_and_depends_on_seed_and_epoch_alone() -> None:
    picks = epoch_picks(CONFIG, 50, 3, 7)
    torch.randn(5)
    assert torch.equal(picks, epoch_picks(CONFIG, 50, 3, 7))
    assert sorted(picks[0].tolist()) == list(range(50))
    assert int(picks[1:3].min()) == 0
    assert int(picks[1:3].max()) == 4
    assert set(picks[3].tolist()) == {0, 1}
    assert not torch.equal(picks, epoch_picks(CONFIG, 50, 3, 8))
    assert not torch.equal(picks, epoch_picks(CONFIG, 50, 4, 7))
    assert not epoch_picks(replace(CONFIG, flip=False), 50, 3, 7)[3].any()


@pytest.mark.parametrize("side", [16, 24, 12])
def test_batches_are_what_torchvision_makes(benchmark: Benchmark, side: int) -> None:
    config = replace(CONFIG, image_size=side)
    task = make_task(benchmark, config)
    store = DeviceImages.of(task.train, task, config, torch.device("cpu"), padding=2)
    picks = epoch_picks(config, len(store), 0, 0)[:, :6]
    batch, labels = store.augmented(picks)
    for row, (index, top, left, mirrored) in enumerate(picks.T.tolist()):
        image = TF.pad(TF.to_pil_image(task.train.images[index]), [2])
        image = TF.crop(image, top, left, 16, 16)
        pixels = TF.pil_to_tensor(TF.hflip(image) if mirrored else image).float()
        expected = TF.normalize(pixels, store.mean.flatten().tolist(), store.std.flatten().tolist())
        if side != 16:
            expected = TF.resize(expected, [side, side], antialias=True)
        torch.testing.assert_close(batch[row], expected, rtol=1e-5, atol=1e-5)
        assert int(labels[row]) == int(task.train.labels[index])
    assert batch.is_contiguous()  # channels last crashes torch 2.14.1 on CPUs


def test_normalization_of_enlarged_images_and_pretrained_weights_is_imagenets(benchmark: Benchmark) -> None:
    task = make_task(benchmark, CONFIG)
    own = DeviceImages.of(task.train, task, CONFIG, torch.device("cpu"))
    assert own.mean.flatten().tolist() == pytest.approx(task.mean)
    assert own.std.flatten().tolist() == pytest.approx(task.std)
    for config in (replace(CONFIG, image_size=32), replace(CONFIG, init="pretrained")):
        task = make_task(benchmark, config)
        store = DeviceImages.of(task.train, task, config, torch.device("cpu"))
        assert store.mean.flatten().tolist() == pytest.approx([255 * value for value in (0.485, 0.456, 0.406)])


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_agree_with_a_plain_loop(benchmark: Benchmark, optimizer: str) -> None:
    """The reference: textbook updates, gradients clipped by hand, contiguous float32, images one by one."""
    config = replace(CONFIG, optimizer=optimizer, clip=0.5, weight_decay=0.05, smoothing=0.1, epochs=2)
    task = make_task(benchmark, config)
    run = new_run(config, task, execution=Execution())
    network = config.build(3, 0).train()
    parameters = list(network.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    number, losses = 0, []
    for epoch in range(config.epochs):
        rate = 0.02 * (1 + np.cos(np.pi * epoch / 2)) / 2
        # 21 images: a last batch of a single one joins the one before.
        for part in epoch_picks(config, 21, 0, epoch).split([10, 11], dim=1):
            inputs = []
            for index, top, left, mirrored in part.T.tolist():
                pixels = F.pad(task.train.images[index].double(), (2, 2, 2, 2))[:, top : top + 16, left : left + 16]
                pixels = pixels.flip(2) if mirrored else pixels
                inputs.append(TF.normalize(pixels, task.mean, task.std).float())
            loss = F.cross_entropy(network(torch.stack(inputs)), task.train.labels[part[0]], label_smoothing=0.1)
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, parameters)
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            scale = min(1.0, 0.5 / (float(norm) + 1e-6))
            number += 1
            with torch.no_grad():
                for p, grad, m, v in zip(parameters, grads, first, second, strict=True):
                    g = grad * scale
                    if optimizer == "sgd":
                        m.mul_(0.9).add_(g + 0.05 * p)
                        p -= rate * m
                    else:
                        p *= 1 - rate * 0.05
                        m.mul_(0.9).add_(0.1 * g)
                        v.mul_(0.999).add_(0.001 * g * g)
                        p -= rate * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
    train(run, 2)
    assert run.curve[1].lr == pytest.approx(0.01)
    expected = dict(network.named_parameters())
    far = [
        (value - expected[name]).abs() > 2e-5 + 2e-4 * expected[name].abs()
        for name, value in run.module.named_parameters()
    ]
    # AdamW divides by the gradient's size, so entries whose gradient is nothing but rounding go anywhere.
    assert float(torch.cat([part.flatten() for part in far]).double().mean()) <= (0.01 if optimizer == "adamw" else 0)
    assert run.curve[0].train_loss == pytest.approx((10 * losses[0] + 11 * losses[1]) / 21, rel=1e-5)
    assert run.curve[1].train_loss == pytest.approx((10 * losses[2] + 11 * losses[3]) / 21, rel=1e-4)


def test_bfloat16_is_close_to_float32() -> None:
    """At 32 x 32: on CPUs with AMX, torch's bfloat16 gradients of convolutions on tiny maps are not always finite."""
    config = replace(CONFIG, image_size=32)
    task = make_task(Benchmark("larger", images(90, 0, size=32), images(40, 1, size=32), "made for tests"), config)
    losses = []
    for precision in ("float32", "bfloat16"):
        run = new_run(replace(config, precision=precision), task)
        train(run, 1)
        losses.append(run.curve[0].train_loss)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for epoch in range(20):
        assert learning_rate(replace(CONFIG, lr=0.3, epochs=20), epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_it_learns_and_the_accuracy_is_that_of_timms_own_forward(benchmark: Benchmark) -> None:
    task = make_task(benchmark, replace(CONFIG, labels_per_class=None))
    run = new_run(replace(CONFIG, labels_per_class=None, epochs=6), task)
    train(run, 6)
    assert run.curve[-1].accuracy is not None
    assert run.curve[-1].accuracy > 0.8
    with torch.no_grad():
        inputs = TF.normalize(task.test.images.float(), task.mean, task.std)
        right = (run.module.eval()(inputs).argmax(1) == task.test.labels).float().mean()
    assert run.curve[-1].accuracy == pytest.approx(float(right))


def test_a_run_that_diverges_ends_and_does_not_count(
    benchmark: Benchmark, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(
        CONFIG, model="test_vit", model_kwargs={"img_size": 16, "patch_size": 4}, lr=1e30, epochs=50, clip=1e30
    )
    (result,) = run_jobs([Job(config, 0)], benchmark, ResultStore(tmp_path), CPU)
    assert result.diverged
    assert len(result.curve) < 50
    assert "diverged in epoch 1: its loss is not finite, and it does not count" in caplog.text
    (summary,) = summarize([result])
    assert (dict(summary.accuracies), summary.diverged) == ({}, 1)
    assert "0 (1 diverged)  -" in comparison_table([summary])[1]
    (sound,) = summarize(run_jobs([Job(CONFIG, 0)], benchmark, ResultStore(tmp_path), CPU))
    assert best_of([summary, sound]) == CONFIG


def test_settled_batch_norms_do_not_depend_on_running_averages(benchmark: Benchmark) -> None:
    config = replace(CONFIG, settle=True, labels_per_class=None)
    run = new_run(config, make_task(benchmark, config))
    train(run, 1)
    before = state(run)
    settled = run.evaluate()
    assert_same(before, state(run))  # training goes on as if nothing had been measured
    for module in run.module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.fill_(100)
    assert run.evaluate() == settled
    plain = new_run(replace(config, settle=False), make_task(benchmark, config))
    plain.module.load_state_dict(run.module.state_dict())
    assert plain.evaluate() != settled


# --- many runs ------------------------------------------------------------------------------------------------------

WITH_DROPS = replace(
    CONFIG,
    model="test_convnext",
    model_kwargs={"drop_path_rate": 0.3, "drop_rate": 0.2},
    image_size=32,
    optimizer="adamw",
    lr=2e-3,
)


def test_runs_at_the_same_time_end_with_the_same_bits_as_alone(benchmark: Benchmark, tmp_path: Path) -> None:
    jobs = [Job(replace(WITH_DROPS, epochs=2), 0), Job(replace(WITH_DROPS, epochs=2), 1)]
    alone = run_jobs(jobs, benchmark, ResultStore(tmp_path / "alone"), CPU)
    together = run_together(jobs, benchmark, ResultStore(tmp_path / "together"), CPU, together=2)
    for first, second in zip(alone, together, strict=True):
        assert first.curve == second.curve
        assert first.accuracy == second.accuracy
    assert alone[0].curve != alone[1].curve


def test_a_finished_run_is_not_made_again(benchmark: Benchmark, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    (first,) = run_jobs([Job(CONFIG, 0)], benchmark, store, CPU)
    written = store.path(first.key).stat().st_mtime_ns
    assert run_jobs([Job(CONFIG, 0)], benchmark, store, CPU) == (first,)
    assert store.path(first.key).stat().st_mtime_ns == written
    run_jobs([Job(replace(CONFIG, lr=0.03), 0), Job(CONFIG, 1)], benchmark, store, CPU)
    assert len(store.all()) == 3


def test_accuracy_is_measured_after_the_epochs_that_were_asked_for(benchmark: Benchmark, tmp_path: Path) -> None:
    execution = Execution(evaluate_every=0, evaluate_at=(1, 3))
    (result,) = run_jobs([Job(CONFIG, 0)], benchmark, ResultStore(tmp_path), execution)
    assert [point.epoch for point in result.curve if point.accuracy is not None] == [1, 3, 4]


def test_weights_of_a_finished_run_are_a_start_for_another(benchmark: Benchmark, tmp_path: Path) -> None:
    store = ResultStore(tmp_path, PaperConfig)
    (result,) = run_jobs([Job(PAPER, 0)], benchmark, store, Execution(keep_weights=True))
    config = replace(PAPER, init_file=str(store.path(result.key, "weights")), epochs=1, lr=1e-9)
    (again,) = run_jobs([Job(config, 0)], benchmark, store, CPU)
    assert not store.path(again.key, "weights").exists()
    assert again.accuracy == pytest.approx(result.accuracy, abs=0.03)
    assert again.curve[0].train_loss < 0.9 * result.curve[0].train_loss


def test_a_damaged_result_is_made_again(benchmark: Benchmark, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ResultStore(tmp_path)
    (first,) = run_jobs([Job(CONFIG, 0)], benchmark, store, CPU)
    store.path(first.key).write_text('{"key": 1')
    (second,) = run_jobs([Job(CONFIG, 0)], benchmark, store, CPU)
    assert second.curve == first.curve
    assert "is no result and does not count" in caplog.text


def test_a_run_of_another_process_is_left_to_it(benchmark: Benchmark, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    (first,) = run_jobs([Job(CONFIG, 0)], benchmark, store, CPU)
    store.path(first.key).unlink()
    with FileLock(store.path(first.key, "locks")):
        assert run_jobs([Job(CONFIG, 0)], benchmark, store, CPU) == ()
        with pytest.raises(FineTuneError, match="1 of 2 trials are left to other processes"):
            tune(grid(CONFIG, (0.02, 0.1), ()), (0,), benchmark, _store_with_claim(store, benchmark), CPU)


def test_a_claim_ends_with_an_error_and_hides_none(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)

    def work() -> None:
        with store.claimed("a") as is_ours:
            assert is_ours
            with store.claimed("a") as is_again:
                assert not is_again
            raise Timeout("another lock")

    with pytest.raises(Timeout, match="another lock"):
        work()
    with store.claimed("a") as is_ours:
        assert is_ours


def _store_with_claim(store: ResultStore, benchmark: Benchmark) -> ResultStore:
    """A store in which a trial of the grid is claimed."""
    trial = replace(CONFIG, split="validation")
    key = trial.key(0, make_task(benchmark, trial).digest)
    lock = FileLock(store.path(key, "locks"))
    lock.acquire()
    store.held = lock  # type: ignore[attr-defined]
    return store


def test_a_killed_process_loses_no_finished_run(benchmark: Benchmark, tmp_path: Path) -> None:
    write_folder(tmp_path / "images" / "train", benchmark.train)
    write_folder(tmp_path / "images" / "test", benchmark.test)
    out = tmp_path / "out"
    arguments = [
        *("--model", "test_resnet", "--inits", "rand", "--dataset", "folder", "--data", str(tmp_path / "images")),
        *("--image-size", "16", "--stem", "original", "--labels", "7", "--epochs", "15", "--num-seeds", "3"),
        *("--device", "cpu", "--out", str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=environment)
    while not list((out / "runs").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    assert 1 <= len(before) < 3
    assert finetune.main(arguments) == 0
    assert [result.seed for result in ResultStore(out, PaperConfig).all()] == [0, 1, 2]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


# --- results --------------------------------------------------------------------------------------------------------


def test_tuning_chooses_by_validation_images(benchmark: Benchmark, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    config = replace(CONFIG, labels_per_class=15, epochs=5)
    tuned = tune(grid(config, (1e-7, 0.03), ()), (5,), benchmark, store, CPU)
    assert tuned == replace(config, lr=0.03)
    assert {result.config.split for result in store.all()} == {"validation"}
    assert tune(grid(config, (0.7,), ()), (5,), benchmark, store, CPU).lr == 0.7
    assert len(store.all()) == 2


def test_results_survive_a_round_trip(benchmark: Benchmark, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    (result,) = run_jobs([Job(replace(CONFIG, epochs=3), 4)], benchmark, store, CPU)
    assert store.all() == (result,)
    assert [point.accuracy is not None for point in result.curve] == [False, True, True]
    assert result.data["copy"] == "made for tests"
    assert result.network["parameters"] == sum(
        p.numel() for p in timm.create_model("test_resnet", num_classes=3).parameters()
    )
    assert json.loads(store.path(result.key).read_text())["config"]["lr"] == 0.02


def summary(init: str, values: dict[int, float]) -> Summary:
    return Summary(replace(CONFIG, init=init), values, 0)


def test_comparison_is_paired_by_seed() -> None:
    first = summary("ghn", {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8, 4: 0.9})
    found = differences(first, summary("rand", {0: 0.4, 1: 0.55, 2: 0.6, 3: 0.7, 4: 0.8, 9: 0.0}))
    assert found == pytest.approx([0.1, 0.05, 0.1, 0.1, 0.1])
    assert sign_flip_p(found) == 2 / 32
    assert sign_flip_p(differences(first, first)) == 1
    assert differences(first, summary("rand", {7: 0.1})) == []


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=7))
def test_p_values_do_not_depend_on_who_is_first(values: list[float]) -> None:
    one = summary("ghn", dict(enumerate(values)))
    other = summary("rand", dict.fromkeys(range(len(values)), 0.0))
    p_value = sign_flip_p(differences(one, other))
    assert p_value == sign_flip_p(differences(other, one))
    assert 2 / 2 ** len(values) <= p_value <= 1


def test_measuring(benchmark: Benchmark) -> None:
    found = measure_throughput(CONFIG, make_task(benchmark, CONFIG), CPU, rounds=2, steps=2)
    assert found.batch_size == 10
    assert 0.1 < found.ratio < 10
    assert found.seconds_per_run == pytest.approx(21 * 4 / found.loop)


# --- data sets ------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray, *, compress: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if compress else data)


def write_fashion(folder: Path, *, compress: bool) -> np.ndarray:
    suffix = ".gz" if compress else ""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", pixels, compress=compress)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(30) % 10, compress=compress)
    return pixels


def test_fashion_mnist_from_debian_and_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FASHION", tmp_path / "debian")
    with pytest.raises(FineTuneError, match=r"fashion-mnist is not in .*--download gets it.*--data"):
        load_dataset("fashion-mnist", tmp_path)
    pixels = write_fashion(tmp_path / "debian", compress=True)
    debian = load_dataset("fashion-mnist", tmp_path)
    assert debian.copy == "Debian package dataset-fashion-mnist"
    assert debian.train.images.shape == (30, 3, 32, 32)
    assert np.array_equal(debian.train.images[3, 1, 2:30, 2:30].numpy(), pixels[3])
    assert int(debian.train.images[:, :, :2].max()) == 0
    assert debian.train.classes[9] == "Ankle boot"
    assert load_dataset("fashion-mnist", tmp_path, size=14).test.images.shape == (30, 3, 14, 14)
    write_fashion(tmp_path / "FashionMNIST" / "raw", compress=False)
    assert load_dataset("fashion-mnist", tmp_path).copy == "original files, torchvision"
    shutil.rmtree(tmp_path / "FashionMNIST")
    (tmp_path / "debian" / "t10k-images-idx3-ubyte.gz").write_bytes(b"no")
    with pytest.raises(FineTuneError, match=r"t10k-images.*is damaged"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_data_says_how_to_get_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(FineTuneError, match=rf"{name} is not in .*: --download gets it"):
        load_benchmark(f"{name}:{tmp_path}")


def test_unknown_data_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FineTuneError, match=r"there is no folder mnist, .* no data set is named so; known are cifar10"):
        load_benchmark("mnist")
    write_shard(tmp_path / "x-train.safetensors", images(3, 0))
    with pytest.raises(FineTuneError, match=r"there are no shards .*x-test\*\.safetensors beside"):
        load_benchmark(str(tmp_path / "x"))
    (tmp_path / "train").mkdir()
    with pytest.raises(FineTuneError, match="neither 'test' nor 'val'"):
        load_benchmark(str(tmp_path))


def test_a_folder_of_classes(tmp_path: Path, benchmark: Benchmark) -> None:
    write_folder(tmp_path / "whole", benchmark.train)
    whole = load_benchmark(str(tmp_path / "whole"), size=16)
    assert len(whole.train) + len(whole.test) == 90
    counts = torch.bincount(benchmark.train.labels)
    assert torch.equal(torch.bincount(whole.test.labels), counts // 5)
    (tmp_path / "whole" / "class 1" / "bad.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(ImageError, match=r"cannot decode .*bad\.jpg"):
        load_benchmark(str(tmp_path / "whole"), size=16)


def test_jpeg_shards(tmp_path: Path, benchmark: Benchmark) -> None:
    write_shard(tmp_path / "cifar10-train.safetensors", benchmark.train)
    write_shard(tmp_path / "cifar10-test.safetensors", benchmark.test)
    first = load_benchmark(f"cifar10:{tmp_path}", size=16)
    assert "JPEG" in first.copy
    assert torch.equal(first.train.labels, benchmark.train.labels)
    second = load_benchmark(str(tmp_path / "cifar10"), size=16)
    assert torch.equal(second.test.images, first.test.images)
    assert second.train.classes == first.train.classes


# --- settings and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", 0.0, "lr must be at least 1e-12"),
        ("epochs", 0, "epochs must be at least 1"),
        ("batch_size", 1, "batch_size must be at least 2"),
        ("optimizer", "adam", "optimizer must be one of sgd, adamw"),
        ("precision", "float16", "precision must be one of float32, bfloat16"),
        ("weight_decay", float("nan"), "weight_decay must be at least 0"),
    ],
)
def test_settings_out_of_range(setting: str, value: object, message: str) -> None:
    with pytest.raises(FineTuneError, match=message):
        replace(CONFIG, **{setting: value})


def test_settings_round_trip_and_name_the_run() -> None:
    assert FineTuneConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(FineTuneError, match="unknown or missing settings of a run: colour"):
        FineTuneConfig.from_dict({**CONFIG.to_dict(), "colour": 1})
    former = {
        **CONFIG.to_dict(),
        "stem": "original",
        "init_file": None,
        "normalization": "auto",
    }  # as earlier versions wrote them
    assert FineTuneConfig.from_dict(former) == CONFIG
    assert CONFIG.key(0, "d") == PAPER.key(0, "d") == "test_resnet-rand-s0-44c3e5d19b"
    with pytest.raises(FineTuneError, match="unknown or missing settings of a run: stem"):
        FineTuneConfig.from_dict({**former, "stem": "adjusted"})
    keys = {CONFIG.key(0, "d"), CONFIG.key(1, "d"), CONFIG.key(0, "e"), CONFIG.key(0, "d", "w")}
    assert len(keys | {replace(CONFIG, lr=0.1).key(0, "d")}) == 5


def test_presets_are_the_papers() -> None:
    resnet, convnext = (PRESETS[name].config for name in ("paper-resnet50", "paper-convnext_base"))
    assert (resnet.optimizer, resnet.batch_size, resnet.epochs, resnet.start_layer) == ("sgd", 96, 300, 37)
    assert (convnext.optimizer, convnext.batch_size, convnext.lr, convnext.start_layer) == ("adamw", 48, 1e-3, 94)
    assert resnet.labels_per_class == convnext.labels_per_class == 100
    assert resnet.noise == convnext.noise == 3e-5


def test_models_that_cannot_be_made(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(FineTuneError, match="timm has no model 'resnet5000'"):
        replace(CONFIG, model="resnet5000").build(3, 0)
    with pytest.raises(FineTuneError, match=r"test_resnet cannot be created: .*colour"):
        replace(CONFIG, model_kwargs={"colour": 1}).build(3, 0)
    for name in ("num_classes", "pretrained"):  # what the run decides
        with pytest.raises(FineTuneError, match=rf"test_resnet cannot be created: .*multiple values.*{name}"):
            replace(CONFIG, model_kwargs={name: 1}).build(3, 0)
    with pytest.raises(FineTuneError, match=r"--init-file .*none.safetensors cannot be read"):
        run_jobs(
            [Job(replace(PAPER, init_file=str(tmp_path / "none.safetensors")), 0)],
            benchmark,
            ResultStore(tmp_path),
            CPU,
        )


def test_starting_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=20)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    config = replace(PAPER, init_file=str(tmp_path / "a.safetensors"))
    network = config.build(3, 0)
    head = {"fc.weight", "fc.bias"}
    for name, value in network.state_dict().items():
        assert name in head or torch.equal(value, source.state_dict()[name])
    with pytest.raises(FineTuneError, match=r"does not fit the model: .* is missing or has another shape"):
        replace(config, model="test_convnext").build(3, 0)


@pytest.mark.parametrize("init", ["rand", "orth", "ghn", "ghn-orth"])
def test_weights_depend_on_the_seed_alone(init: str, seeded_checkpoint: Path) -> None:
    config = replace(CONFIG, init=init, ghn=str(seeded_checkpoint))
    torch.manual_seed(1)
    first = config.build(3, 0)
    torch.manual_seed(2)
    assert_same(first.state_dict(), config.build(3, 0).state_dict())
    report = timm_ghn.report_of(first)
    assert (report is None) == (init == "rand")
    assert report is None or report.provenance["method"] == init
    other = config.build(3, 1).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in first.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(benchmark: Benchmark) -> None:
    with pytest.raises(FineTuneError, match=r"device 'cuda' cannot be used: .*; use 'cpu'"):
        new_run(CONFIG, make_task(benchmark, CONFIG), execution=Execution("cuda"))


def test_out_of_memory_says_what_to_change() -> None:
    with (
        pytest.raises(
            FineTuneError, match=r"test_resnet .*try a smaller --batch-size than 10, .*, or fewer runs at a time"
        ),
        explained_memory(CONFIG),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_the_command_reports_errors_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--model", "test_resnet", "--inits", "rand", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune.py: error: cifar10 is not in ")
    assert error.count("\n") == 1


def test_unknown_initializations_fail_before_data_are_read() -> None:
    arguments = ["--model", "resnet18", "--inits", "rand", "ghn-ort", "--data", "none"]
    with pytest.raises(InitError, match="did you mean 'ghn-orth'"):
        finetune.run(finetune.make_parser().parse_args(arguments))


def test_presets_can_be_changed() -> None:
    arguments = finetune.make_parser().parse_args(["--preset", "paper-resnet50", "--lr", "0.5", "--labels", "0"])
    configs = finetune.make_configs(arguments)
    assert [config.init for config in configs] == ["rand", "orth", "ghn", "ghn-orth"]
    assert {(config.lr, config.labels_per_class, config.weight_decay) for config in configs} == {(0.5, None, 0.01)}


# --- CUDA -----------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("config", [CONFIG, WITH_DROPS], ids=["sgd", "adamw, dropout"])
def test_captured_steps_agree_with_eager_ones(benchmark: Benchmark, config: FineTuneConfig) -> None:
    task = make_task(benchmark, config)
    eager = new_run(config, task, execution=Execution("cuda"))
    captured = new_run(config, task, execution=Execution("cuda", capture=CapturedStep))
    train(eager, 3)
    train(captured, 3)
    second = state(captured)
    for name, value in state(eager).items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert captured.curve[-1].train_loss == pytest.approx(eager.curve[-1].train_loss, rel=1e-3)


@needs_cuda
def test_cuda_agrees_with_the_cpu(benchmark: Benchmark) -> None:
    task = make_task(benchmark, CONFIG)
    runs = [new_run(CONFIG, task, execution=Execution(device, evaluate_every=1)) for device in ("cpu", "cuda")]
    for run in runs:
        train(run, 2)
    first, second = (run.curve for run in runs)
    assert [p.train_loss for p in second] == pytest.approx([p.train_loss for p in first], rel=1e-2)


@needs_cuda
@pytest.mark.parametrize("config", [CONFIG, WITH_DROPS], ids=["sgd", "adamw, dropout"])
def test_runs_at_the_same_time_on_a_gpu_agree_with_runs_alone(
    benchmark: Benchmark, config: FineTuneConfig, tmp_path: Path
) -> None:
    jobs = [Job(config, seed) for seed in range(3)]
    execution = Execution("cuda", evaluate_every=1, capture=CapturedStep)
    alone = run_jobs(jobs, benchmark, ResultStore(tmp_path / "alone"), execution)
    together = run_together(jobs, benchmark, ResultStore(tmp_path / "together"), execution, together=3)
    for first, second in zip(alone, together, strict=True):
        assert second.curve[-1].train_loss == pytest.approx(first.curve[-1].train_loss, rel=1e-3)


@needs_cuda
def test_the_data_path_is_not_the_bottleneck_on_cuda(benchmark: Benchmark) -> None:
    config = replace(
        CONFIG, model="resnet50", image_size=32, batch_size=96, labels_per_class=None, precision="bfloat16"
    )
    data = replace(benchmark, train=images(1000, 0, 32), test=images(100, 1, 32))
    found = measure_throughput(
        config, make_task(data, config), Execution("cuda", capture=CapturedStep), rounds=5, steps=20
    )
    assert found.ratio >= 0.95
