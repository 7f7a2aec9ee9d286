"""Training: images, sampled architectures, the loop and its command."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_ghn.errors import TrainingError
from timm_ghn.ghn import GHN, GHNConfig, content_hash, read
from timm_ghn.training import evaluate as evaluate_module
from timm_ghn.training import sampling
from timm_ghn.training.architectures import ArchitectureSpec, StageSpec
from timm_ghn.training.begin import rescale_decoder, smooth_sizes
from timm_ghn.training.cli import add_train_arguments, make_config, run_train
from timm_ghn.training.config import PRESETS, TrainConfig
from timm_ghn.training.data import (
    BatchSampler,
    ImageSet,
    augment,
    from_dataset,
    load_images,
    sample_batch,
    split,
)
from timm_ghn.training.evaluate import evaluate
from timm_ghn.training.export import fill_unseen_sizes
from timm_ghn.training.loop import Trainer
from timm_ghn.training.networks import build, count_macs
from timm_ghn.training.objective import Objective, cluster_images, group_classes, kernel_penalties, ridge_loss
from timm_ghn.training.pool import ArchitecturePool, PoolConfig, PoolMember, architecture_graph
from timm_ghn.training.probe import few_labels, probe
from timm_ghn.training.sampling import FAMILY_WEIGHTS, SamplerConfig, sample_architecture

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("ant", "bee", "cow", "dog", "elk", "fox")


def _jpeg(color: int, rng: np.random.Generator) -> bytes:
    pixels = np.clip(rng.normal(color, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % len(CLASSES)
    files = [_jpeg(30 + 40 * int(label), rng) for label in labels]
    path = tmp_path_factory.mktemp("shards") / "train.safetensors"
    tensors = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]).astype(np.int64),
        "labels": labels.astype(np.int64),
    }
    save_file(tensors, path, {"classes": " ".join(CLASSES)})
    return path


@pytest.fixture(scope="module")
def images(shard: Path) -> ImageSet:
    return load_images([shard], progress=False)


# Images


def test_shard_gives_images_labels_and_classes(images: ImageSet) -> None:
    assert images.images.shape == (120, 3, 32, 32)
    assert images.images.dtype == torch.uint8
    assert images.classes == CLASSES
    assert images.labels[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    means = [images.images[images.labels == label].float().mean() for label in range(6)]
    assert means == sorted(means)


def test_two_shards_are_joined(shard: Path) -> None:
    assert len(load_images([shard, shard], progress=False)) == 240


def test_images_are_resized(shard: Path) -> None:
    assert load_images([shard], 16, progress=False).images.shape[-2:] == (16, 16)


def test_folder_and_dataset_agree(tmp_path: Path) -> None:
    for name, color in (("a", 10), ("b", 200)):
        (tmp_path / name / "images").mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 32), (color, index, 0)).save(tmp_path / name / "images" / f"{index}.png")
    folder = load_images([tmp_path], progress=False)
    items = [
        (Image.open(tmp_path / name / "images" / f"{index}.png"), label)
        for label, name in enumerate("ab")
        for index in range(3)
    ]

    class Items(list):  # type: ignore[type-arg]
        classes = ["a", "b"]

    dataset = from_dataset(Items(items), progress=False)
    assert folder.classes == dataset.classes == ("a", "b")
    assert torch.equal(folder.images, dataset.images)
    assert torch.equal(folder.labels, dataset.labels)


def test_dataset_of_tensors() -> None:
    data = from_dataset([(torch.ones(3, 32, 32), 1), (torch.zeros(1, 32, 32), 0)], progress=False)
    assert data.images[0].unique().tolist() == [255]
    assert data.images[1].unique().tolist() == [0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(ramp).save(tmp_path / "a" / f"x.{suffix}")
    (image,) = load_images([tmp_path], progress=False).images
    assert image[0].tolist() == image[2].tolist() == np.round(ramp / 257).astype(int).tolist()


def test_images_of_floating_point_numbers_are_scaled_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "a" / "x.tif")
    (image,) = load_images([tmp_path], progress=False).images
    assert image[1].tolist() == np.round(255 * ramp.astype(np.float64)).astype(int).tolist()
    Image.fromarray(1000 * ramp).save(tmp_path / "a" / "x.tif")
    with pytest.raises(TrainingError, match=r"x\.tif: its pixels run from 0 to 1000, but 0 is black and 1 is white"):
        load_images([tmp_path], progress=False)
    Image.fromarray((1000 * ramp).astype(np.int32)).save(tmp_path / "a" / "x.tif")
    with pytest.raises(TrainingError, match=r"x\.tif: its pixels run from 0 to 1000, but 0 is black and 255 is white"):
        load_images([tmp_path], progress=False)


@pytest.mark.parametrize("item", [torch.randn(3, 8, 8), torch.full((3, 8, 8), 300), torch.full((3, 8, 8), np.nan)])
def test_tensors_that_are_no_images_are_refused(item: torch.Tensor) -> None:
    with pytest.raises(TrainingError, match=r"item 1 of the data set .* its pixels run from"):
        from_dataset([(torch.ones(3, 8, 8), 0), (item, 1)], 8, progress=False)


def test_an_image_that_is_too_large_to_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "a" / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TrainingError, match=r"cannot decode .*x\.png: Image size"):
        load_images([tmp_path], progress=False)


def test_hidden_files_and_folders_are_neither_images_nor_classes(tmp_path: Path) -> None:
    places = (".ipynb_checkpoints", "__MACOSX/a", "a", "a/.thumbnails", "a/@eaDir", "b/images")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "x.png")
    (tmp_path / "a" / "._x.png").write_bytes(b"not an image")
    data = load_images([tmp_path], 8, progress=False)
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 1]


def test_missing_images_say_where_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"tiny-imagenet-200\.zip"):
        load_images([tmp_path / "nothing"])
    with pytest.raises(TrainingError, match="no images"):
        load_images([])


def test_bad_images_are_named(tmp_path: Path, shard: Path) -> None:
    with pytest.raises(TrainingError, match="no sub-folders"):
        load_images([tmp_path])
    (tmp_path / "a").mkdir()
    with pytest.raises(TrainingError, match="has no images"):
        load_images([tmp_path])
    (tmp_path / "a" / "x.png").write_bytes(b"not an image")
    with pytest.raises(TrainingError, match=r"cannot decode .*x\.png"):
        load_images([tmp_path], progress=False)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot read"):
        load_images([broken])
    save_file({"labels": np.zeros(1, np.int64)}, broken)
    with pytest.raises(TrainingError, match="no tensor named jpeg, offsets"):
        load_images([broken])


def test_damaged_shards(tmp_path: Path) -> None:
    good = {"jpeg": np.zeros(10, np.uint8), "offsets": np.array([0, 10]), "labels": np.array([0])}
    path = tmp_path / "shard.safetensors"
    save_file(good, path)
    with pytest.raises(TrainingError, match="names no classes"):
        load_images([path])
    save_file(good, path, {"classes": "a"})
    with pytest.raises(TrainingError, match="cannot decode image 0"):
        load_images([path], progress=False)
    save_file({**good, "offsets": np.array([0, 11])}, path, {"classes": "a"})
    with pytest.raises(TrainingError, match="offsets"):
        load_images([path])


def test_labels_must_have_names() -> None:
    with pytest.raises(TrainingError, match="labels run from 0 to 3"):
        ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 3]), ("a", "b"))


def test_splits_are_disjoint_and_repeatable(images: ImageSet) -> None:
    first, second = (split(images, held_out=2, validation=0.2, seed=1) for _ in range(2))
    assert first.held_out_classes == second.held_out_classes
    assert first.held_out is not None
    held_out = set(first.held_out.labels.tolist())
    assert held_out == set(first.held_out_classes)
    assert not held_out & set(first.train_classes)
    assert len(first.train) + len(first.validation) + len(first.held_out) == len(images)
    assert torch.bincount(first.validation.labels).max() == 4
    assert torch.equal(first.train.images, second.train.images)
    named = split(images, held_out=["cow"], validation=0.2)
    assert named.held_out_classes == (2,)
    with pytest.raises(TrainingError, match="do not exist: owl"):
        split(images, held_out=["owl"])
    with pytest.raises(TrainingError, match="cannot hold out 6"):
        split(images, held_out=6)


def test_augmentation_flips_and_shifts(images: ImageSet) -> None:
    batch = images.images[:64]
    generator = torch.Generator().manual_seed(0)
    kept = augment(batch, generator, padding=0)
    same = (kept == batch).flatten(1).all(1)
    flipped = (kept == batch.flip(3)).flatten(1).all(1)
    assert bool((same | flipped).all())
    assert 10 < int(same.sum()) < 54
    moved = augment(batch, generator, padding=3)
    assert moved.shape == batch.shape
    assert not torch.equal(moved, kept)


def test_batches_have_equal_halves(images: ImageSet) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, index = sample_batch(BatchSampler(images), 24, generator, torch.device("cpu"), ways=3)
    labels = images.labels[index]
    assert pixels.shape == (24, 3, 32, 32)
    assert len(labels.unique()) == 3
    assert torch.equal(labels[:12].bincount(), labels[12:].bincount())
    assert abs(float(pixels.mean())) < 3
    plain = BatchSampler(images).draw(50, 0, generator)
    assert len(images.labels[plain].unique()) > 3


# Architectures


def _specs(count: int, config: SamplerConfig | None = None) -> list[ArchitectureSpec]:
    return [sample_architecture(random.Random(f"test {i}"), config) for i in range(count)]


def test_sampling_is_repeatable_and_json_able() -> None:
    first, second = _specs(6), _specs(6)
    assert first == second
    assert len(set(first)) == 6
    for spec in first:
        assert ArchitectureSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(TrainingError, match="not an architecture"):
        ArchitectureSpec.from_dict({"stages": [{"depth": 1}]})


@pytest.mark.parametrize("family", sorted(FAMILY_WEIGHTS))
def test_families_give_networks_whose_kernels_are_all_predicted(family: str) -> None:
    config = SamplerConfig(families={family: 1.0})
    spec = _specs(1, config)[0]
    assert spec.family == family
    model = build(spec, 10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with torch.device("meta"):
        macs, outputs = count_macs(build(spec, 10), 32)
    assert config.min_macs * 0.9 <= macs <= config.max_macs
    assert 0 < outputs <= config.max_outputs
    graph = architecture_graph(spec, 10)
    named = {target.name: target.shape for target in graph.targets}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert all(parameters[name] == shape for name, shape in named.items())
    missing = {name for name in parameters if name not in named}
    assert all(name.endswith(("gamma", "layer_scale1.scale", "layer_scale2.scale", ".scale")) for name in missing)


def test_batch_norms_use_the_batch() -> None:
    spec = ArchitectureSpec("basic", "conv3", 8, (StageSpec("basic", 1, 8, 1),))
    model = build(spec, 3).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.running_mean is None for norm in norms)
    assert not torch.equal(model(torch.randn(4, 3, 32, 32)), model(torch.randn(4, 3, 32, 32)))


def test_bad_specifications(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_MAX_DRAWS", 3)
    stage = StageSpec("basic", 1, 8, 1)
    with pytest.raises(TrainingError, match="unknown stem 'x'"):
        build(ArchitectureSpec("basic", "x", 8, (stage,)), 3)
    with pytest.raises(TrainingError, match="unknown kind of block 'y'"):
        build(ArchitectureSpec("basic", "conv3", 8, (replace(stage, kind="y"),)), 3)
    with pytest.raises(TrainingError, match="unknown head"):
        build(ArchitectureSpec("basic", "conv3", 8, (stage,), head="z"), 3)
    with pytest.raises(TrainingError, match="unknown families"):
        SamplerConfig(families={"transformerish": 1.0})
    with pytest.raises(TrainingError, match="MACs"):
        sample_architecture(random.Random(0), SamplerConfig(min_macs=1, max_macs=2))
    with pytest.raises(TrainingError, match="style is 'odd', not 'any' or 'common'"):
        SamplerConfig(style="odd")
    with pytest.raises(TrainingError, match="families in the common style are basic, bottleneck"):
        SamplerConfig(style="common", families={"dense": 1.0})


def test_common_architectures_are_those_of_popular_models() -> None:
    config = PRESETS["bundled"].sampler
    assert set(config.all_families) == set(config.families)
    specs = [
        sample_architecture(random.Random(f"{family} {i}"), replace(config, families={family: 1.0}))
        for family in config.families
        for i in range(2)
    ]
    assert {spec.family for spec in specs} == set(config.families)
    for spec in specs:
        kinds = {stage.kind for stage in spec.stages}
        is_vit = spec.family == "attention"
        assert kinds == {"vit" if is_vit else spec.family}
        widths = [stage.width for stage in spec.stages]
        assert widths == sorted(widths)
        is_modern = spec.family in ("convnext", "attention")
        assert {(stage.norm, stage.act) for stage in spec.stages} <= (
            {("ln", "gelu")} if is_modern else {("bn", "relu"), ("bn", "silu")}
        )
        assert spec.stem.startswith("patch") == is_modern
        with torch.device("meta"):
            macs, outputs = count_macs(build(spec, 10), 32)
        assert macs <= config.max_macs * (3 if is_vit else 1)
        assert outputs <= config.max_outputs


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_vision_transformers_are_timms(pool: str) -> None:
    spec = ArchitectureSpec("attention", "patch8", 48, (StageSpec("vit", 3, 48, 1, norm="ln", act="gelu"),), pool)
    model = build(spec, 7)
    assert isinstance(model, VisionTransformer)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    predicted = {target.name for target in architecture_graph(spec, 7).targets}
    assert {name for name, _ in model.named_parameters()} - predicted == ({"cls_token"} if pool == "token" else set())


@pytest.mark.slow
def test_a_thousand_architectures_cover_the_tables() -> None:
    specs = _specs(300)
    assert len(set(specs)) == 300
    assert {spec.family for spec in specs} == set(FAMILY_WEIGHTS)
    widths = {stage.width for spec in specs for stage in spec.stages}
    assert {8, 16, 24, 32, 40, 48, 64, 96, 128} <= widths
    assert len({spec.stem for spec in specs}) == 8
    assert {3, 5, 7, 9, 11} <= {stage.kernel for spec in specs for stage in spec.stages}


# Pools

TINY = SamplerConfig(families={"basic": 1.0, "convnext": 1.0}, min_macs=2e5, max_macs=3e6, max_outputs=2e5)


@pytest.fixture(scope="module")
def pools() -> tuple[ArchitecturePool, ArchitecturePool]:
    config = PoolConfig(3, 0, "evaluation", TINY)
    held_out = ArchitecturePool.build(config, progress=False)
    return ArchitecturePool.build(PoolConfig(4, 0, "train", TINY), exclude=held_out, progress=False), held_out


def test_pools_are_distinct_and_can_be_saved(pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path) -> None:
    pool, held_out = pools
    assert not {m.spec for m in pool} & {m.spec for m in held_out}
    path = tmp_path / "pool.jsonl.gz"
    pool.save(path)
    again = ArchitecturePool.load_or_build(path, pool.config)
    assert list(again) == list(pool)
    with pytest.raises(TrainingError, match="another configuration"):
        ArchitecturePool.load(path, replace(pool.config, seed=1))
    path.write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="cannot read"):
        ArchitecturePool.load(path, pool.config)


# Objectives


def test_groups_are_sums_of_classes() -> None:
    groups = torch.tensor([0, 0, 1, 1, 1, 0])
    objective = Objective(6, (0, 1, 2, 3), groups)
    logits, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 2])
    p = logits[:, :4].softmax(1)
    expected_group = -torch.stack([p[:, :2].sum(1), p[:, 2:].sum(1)], 1).log()[torch.arange(5), groups[labels]].mean()
    expected_class = -p.log()[torch.arange(5), labels].mean()
    torch.testing.assert_close(objective(logits, labels, 1.0).loss, expected_group)
    torch.testing.assert_close(objective(logits, labels, 0.0).loss, expected_class)
    torch.testing.assert_close(objective(logits, labels, 0.25).loss, 0.25 * expected_group + 0.75 * expected_class)


def test_similar_classes_are_grouped(images: ImageSet) -> None:
    groups = group_classes(images, 3)
    assert groups.shape == (6,)
    assert len(groups.unique()) == 3
    assert groups.bincount().max() <= 3
    clusters = cluster_images(images, 4)
    assert len(clusters) == len(images)
    assert len(clusters.labels.unique()) > 1


def test_ridge_loss_sees_separable_features() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(12)
    noise = torch.randn(48, 16, generator=generator)
    random_loss, random_accuracy = ridge_loss(noise, labels)
    features = (noise + 10 * torch.eye(16)[labels]).requires_grad_()
    good_loss, good_accuracy = ridge_loss(features, labels)
    assert good_accuracy > 0.95 > random_accuracy
    assert float(good_loss.detach()) < float(random_loss)
    good_loss.backward()
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())


def test_kernel_penalties() -> None:
    he = {"a": torch.randn(64, 64, 3, 3) * (2 / 576) ** 0.5, "b": torch.ones(5)}
    scale, cosine = kernel_penalties(he)
    assert float(scale) < 0.01
    assert float(cosine) < 0.01
    scale, cosine = kernel_penalties({"a": torch.ones(64, 64, 3, 3)})
    assert float(scale) > 1
    assert float(cosine) > 0.99


# The loop

CONFIG = TrainConfig(
    steps=4,
    meta_batch=2,
    batch_size=12,
    ways=3,
    warmup=2,
    groups=2,
    clusters=3,
    held_out_classes=1,
    validation=0.2,
    pool_size=4,
    eval_pool_size=3,
    eval_every=2,
    eval_images=20,
    save_every=2,
    log_every=2,
    norm_penalty=0.1,
    correlation_penalty=0.1,
    num_threads=1,
    sampler=TINY,
)


def _trainer(
    images: ImageSet,
    pools: tuple[ArchitecturePool, ArchitecturePool],
    out: Path,
    config: TrainConfig = CONFIG,
    easy: ImageSet | None = None,
) -> Trainer:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(16, 16, 11, 11), num_classes=6, hid=8))
    splits = split(images, held_out=config.held_out_classes, validation=config.validation)
    graphs = [_for_six(member) for member in pools[0]], [_for_six(member) for member in pools[1]]
    pool, held_out = (ArchitecturePool(p.config, g) for p, g in zip(pools, graphs, strict=True))
    return Trainer(ghn, config, splits, pool, held_out, out, easy=easy)


def _for_six(member: PoolMember) -> PoolMember:
    return PoolMember(member.spec, architecture_graph(member.spec, 6))


def test_training_and_exact_resume(
    images: ImageSet, pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path
) -> None:
    whole = _trainer(images, pools, tmp_path / "whole")
    before = {name: p.detach().clone() for name, p in whole.ghn.named_parameters()}
    result = whole.run()
    assert whole.step == 4
    assert 0 <= result.accuracy <= 1
    assert 0 <= result.few_shot <= 1
    assert any(not torch.equal(before[name], p) for name, p in whole.ghn.named_parameters())

    half = _trainer(images, pools, tmp_path / "half")
    while half.step < 2:
        half.train_step(half.progress())
        half.step += 1
    half.save()
    resumed = _trainer(images, pools, tmp_path / "half")
    assert resumed.resume()
    assert resumed.step == 2
    resumed.run()
    for name, parameter in whole.ghn.state_dict().items():
        assert torch.equal(parameter, resumed.ghn.state_dict()[name]), name

    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {"latest.json", "metrics.jsonl", "ghn-0000004.safetensors", "optimizer-0000004.pt"}
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"easy_loss", "easy_ridge_accuracy", "ghn_share", "architectures"} <= set(rows[0])
    assert any("eval_few_shot" in row for row in rows)
    assert read(tmp_path / "whole" / "ghn-0000004.safetensors").config.num_classes == 6


def test_averaged_weights_are_evaluated_resumed_and_exported(
    images: ImageSet, pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=8, stop_after=4, average=0.9, schedule="constant", warmup=1, optimizer="muon")
    whole = _trainer(images, pools, tmp_path / "whole", config)
    whole.run()
    assert whole.step == 4
    assert whole.learning_rate(0.9) == config.lr

    half = _trainer(images, pools, tmp_path / "half", replace(config, stop_after=2))
    half.run()
    resumed = _trainer(images, pools, tmp_path / "half", config)
    assert resumed.resume()
    resumed.run()
    assert whole.average is not None
    assert resumed.average is not None
    for name, mean in whole.average.state_dict().items():
        assert torch.equal(mean, resumed.average.state_dict()[name]), name
    assert any(not torch.equal(p, whole.average.state_dict()[n]) for n, p in whole.ghn.state_dict().items())
    written = read(tmp_path / "whole" / "average-0000004.safetensors")
    assert content_hash(written) == content_hash(whole.average)


def test_termination_ends_a_run_with_a_checkpoint(
    images: ImageSet,
    pools: tuple[ArchitecturePool, ArchitecturePool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = _trainer(images, pools, tmp_path, replace(CONFIG, steps=50))
    step = trainer.train_step

    def interrupted(progress: float) -> bool:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(progress)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    trainer.run()
    assert trainer.step == 3
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_easy_images_may_be_given_and_must_fit_the_classifier(
    images: ImageSet, pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path
) -> None:
    config = replace(CONFIG, easy_from=1.0, easy_until=1.0, easy_ways=0)
    easy = ImageSet(images.images, images.labels % 2, ("even", "odd"))
    trainer = _trainer(images, pools, tmp_path, config, easy)
    assert trainer.train_step(0.0)
    assert trainer.meters["easy"].networks == 2
    assert trainer.meters["classes"].networks == 0
    assert trainer.meters["easy"].ridge_loss == 0
    score = trainer._evaluate().easy
    assert score is not None
    assert 0 <= score <= 1
    with pytest.raises(TrainingError, match=r"more classes \(6\) than are trained on"):
        _trainer(images, pools, tmp_path, config, images)


def test_resume_without_a_checkpoint_and_with_a_damaged_one(
    images: ImageSet, pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path
) -> None:
    trainer = _trainer(images, pools, tmp_path)
    assert not trainer.resume()
    trainer.save()
    (tmp_path / "optimizer-0000000.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="cannot resume"):
        trainer.resume()


def test_networks_that_explode_are_left_out(
    images: ImageSet,
    pools: tuple[ArchitecturePool, ArchitecturePool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = _trainer(images, pools, tmp_path)
    call = evaluate_module.predict_and_call
    calls: list[int] = []

    def explode(*args: object) -> torch.Tensor:
        calls.append(1)
        return call(*args) * (float("nan") if len(calls) == 1 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate_module, "predict_and_call", explode)
    assert trainer.train_step(0.0)
    assert sum(meter.networks for meter in trainer.meters.values()) == 1
    assert all(bool(torch.isfinite(p).all()) for p in trainer.ghn.parameters())


def test_steps_with_bad_gradients_are_skipped_and_counted(
    images: ImageSet, pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path
) -> None:
    trainer = _trainer(images, pools, tmp_path, replace(CONFIG, max_skipped=2))
    before = {name: p.detach().clone() for name, p in trainer.ghn.named_parameters()}
    next(trainer.ghn.parameters()).register_hook(lambda grad: grad * float("inf"))
    assert not trainer.train_step(0.0)
    assert trainer.skipped == 1
    assert all(torch.equal(before[name], p) for name, p in trainer.ghn.named_parameters())
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.train_step(0.0)


def test_rescaled_decoder_predicts_at_he_scale(pools: tuple[ArchitecturePool, ArchitecturePool]) -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(16, 16, 11, 11), num_classes=200, hid=8))
    graphs = [member.graph for member in pools[0]]
    assert rescale_decoder(ghn, graphs) > 1
    assert rescale_decoder(ghn, graphs) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(TrainingError, match="convolutional"):
        rescale_decoder(GHN(GHNConfig(max_shape=(4, 4, 3, 3), decoder="mlp", hid=8)), graphs)


def test_sizes_are_smooth_and_filled_in(pools: tuple[ArchitecturePool, ArchitecturePool]) -> None:
    ghn = GHN(GHNConfig(max_shape=(16, 16, 11, 11), num_classes=200, hid=8))
    smooth_sizes(ghn)
    weight, table = ghn.shape_enc.embed_channel.weight, ghn.shape_enc.channels
    a, b, c = (weight[table.index(size)] for size in (1024, 1040, 8))
    assert float((a - b).norm().detach()) < 0.2 * float((a - c).norm().detach())
    with torch.no_grad():
        weight.normal_()
    before = weight.detach().clone()
    assert fill_unseen_sizes(ghn, [member.graph for member in pools[0]]) > 300
    assert torch.equal(weight[table.index(8192)], weight[table.index(4096)])
    assert torch.equal(weight[table.index(200)], before[table.index(200)])
    assert torch.equal(weight[table.index(3)], before[table.index(3)])


def test_evaluation_restores_the_mode(
    images: ImageSet, pools: tuple[ArchitecturePool, ArchitecturePool], tmp_path: Path
) -> None:
    trainer = _trainer(images, pools, tmp_path)
    trainer.ghn.train()
    first, second = (
        evaluate(trainer.ghn, trainer.eval_pool, trainer.splits, trainer.plain_objective, num_images=20)
        for _ in range(2)
    )
    assert trainer.ghn.training
    assert first == second


# Configuration and command


def test_configuration_is_json_able_and_checked() -> None:
    for config in PRESETS.values():
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TrainingError, match="not a training configuration"):
        TrainConfig.from_dict({"stepz": 1})
    with pytest.raises(TrainingError, match="steps must be at least 1"):
        TrainConfig(steps=0)
    with pytest.raises(TrainingError, match="lr must be positive"):
        TrainConfig(lr=0)
    with pytest.raises(TrainingError, match="coarse_from"):
        TrainConfig(coarse_from=0.9)
    with pytest.raises(TrainingError, match="ways"):
        TrainConfig(ways=0)
    with pytest.raises(TrainingError, match="easy is 'hard', not one of pretext, clusters"):
        TrainConfig(easy="hard")
    with pytest.raises(TrainingError, match="schedule is 'linear'"):
        TrainConfig(schedule="linear")
    with pytest.raises(TrainingError, match="average must be"):
        TrainConfig(average=1.0)
    with pytest.raises(TrainingError, match="cooldown is a share of the run"):
        TrainConfig(cooldown=1.5)


def test_a_constant_rate_cools_down_to_zero() -> None:
    config = TrainConfig(schedule="constant", cooldown=0.25)
    assert [config.rate_factor(progress) for progress in (0, 0.75, 0.875, 1)] == pytest.approx([1, 1, 0.5, 0])
    assert TrainConfig(schedule="constant").rate_factor(1) == 1
    cosine = TrainConfig()
    assert [cosine.rate_factor(progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_curriculum_moves_from_groups_to_classes() -> None:
    config = TrainConfig(coarse_from=0.2, coarse_until=0.6, coarse_rest=0.1)
    weights = [config.coarse_weight(progress) for progress in (0, 0.2, 0.4, 0.6, 1)]
    assert weights == pytest.approx([1, 1, 0.55, 0.1, 0.1])


def _arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    return parser.parse_args(line)


def test_command_line_overrides_the_preset(tmp_path: Path) -> None:
    config = make_config(_arguments("--out", str(tmp_path), "--steps", "7", "--without-family", "convnext"))
    assert config.steps == 7
    assert "convnext" not in config.sampler.families
    assert config.lr == PRESETS["bundled"].lr


def test_command_without_images_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="tiny-imagenet"):
        run_train(_arguments("--out", str(tmp_path)))
    with pytest.raises(TrainingError, match="no such file"):
        run_train(_arguments("--out", str(tmp_path), "--images", str(tmp_path / "none"), "--device", "cpu"))


def test_only_a_run_can_be_exported(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="needs --export FILE"):
        run_train(_arguments("--out", str(tmp_path), "--export-only"))
    with pytest.raises(TrainingError, match="holds no training run"):
        run_train(_arguments("--out", str(tmp_path), "--export-only", "--export", str(tmp_path / "x.safetensors")))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, shard: Path) -> None:
    (tmp_path / "latest.json").write_text("{}")
    line = ["--out", str(tmp_path), "--images", str(shard), "--device", "cpu"]
    with pytest.raises(TrainingError, match="--resume"):
        run_train(_arguments(*line))
    with pytest.raises(TrainingError, match="damaged"):
        run_train(_arguments(*line, "--resume"))


@pytest.mark.slow
def test_command_trains_and_exports(tmp_path: Path, shard: Path) -> None:
    line = ["--out", str(tmp_path / "run"), "--images", str(shard), "--device", "cpu", "--preset", "smoke"]
    line += ["--steps", "2", "--meta-batch", "2", "--pool-size", "4", "--eval-pool-size", "2", "--batch-size", "16"]
    line += ["--held-out-classes", "1", "--export", str(tmp_path / "ghn.safetensors"), "--groups", "3"]
    assert run_train(_arguments(*line)) == 0
    ghn = read(tmp_path / "ghn.safetensors")
    assert ghn.config.num_classes == 6
    again = ["--out", str(tmp_path / "run"), "--export-only", "--export", str(tmp_path / "again.safetensors")]
    assert run_train(_arguments(*again)) == 0
    assert content_hash(read(tmp_path / "again.safetensors")) == content_hash(ghn)
    assert (tmp_path / "ghn.safetensors").stat().st_size < 10e6
    line[1] = str(tmp_path / "more")
    line += ["--from-ghn", str(tmp_path / "ghn.safetensors"), "--from-step", "1"]
    with pytest.raises(TrainingError, match="has 'raw' kernels, the run 'orthogonal' ones"):
        run_train(_arguments(*line, "--kernels", "orthogonal"))
    assert run_train(_arguments(*line)) == 0
    assert json.loads((tmp_path / "more" / "latest.json").read_text())["step"] == 2
    assert content_hash(read(tmp_path / "more" / "ghn-0000002.safetensors")) != content_hash(ghn)
    line[1] = str(tmp_path / "tiled")
    assert run_train(_arguments(*line, "--tiles", "4")) == 0
    assert run_train(_arguments(*line, "--resume", "--steps", "3")) == 0  # as many tiles as before, without a word
    assert read(tmp_path / "tiled" / "ghn-0000003.safetensors").config.tiles == 4


# The probe


def test_probe_reads_features_and_leaves_the_model_alone(images: ImageSet) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, test = few_labels(images, 10)
    assert len(train) == 60
    assert probe(model.eval(), train, test) > 0.8
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(TrainingError, match="20 images, 20 \\+ 1 are needed"):
        few_labels(images, 20)
