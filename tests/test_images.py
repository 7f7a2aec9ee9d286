"""Images for training, read from shards, folders and data sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from timm.data import ImageDataset

from timm_ghn.errors import ImageError
from timm_ghn.images import ImageSet, from_dataset, load_images

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
    return load_images([shard])


# Images


def test_shard_gives_images_labels_and_classes(images: ImageSet) -> None:
    assert images.images.shape == (120, 3, 32, 32)
    assert images.images.dtype == torch.uint8
    assert images.classes == CLASSES
    assert images.labels[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    means = [images.images[images.labels == label].float().mean() for label in range(6)]
    assert means == sorted(means)


def test_two_shards_are_joined(shard: Path) -> None:
    assert len(load_images([shard, shard])) == 240


def test_images_are_resized(shard: Path) -> None:
    assert load_images([shard], 16).images.shape[-2:] == (16, 16)


def test_folder_and_dataset_agree(tmp_path: Path) -> None:
    for name, color in (("a", 10), ("b", 200)):
        (tmp_path / name / "images").mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 32), (color, index, 0)).save(tmp_path / name / "images" / f"{index}.png")
    folder = load_images([tmp_path])
    items = [
        (Image.open(tmp_path / name / "images" / f"{index}.png"), label)
        for label, name in enumerate("ab")
        for index in range(3)
    ]

    class Items(list):  # type: ignore[type-arg]
        classes = ["a", "b"]

    dataset = from_dataset(Items(items))
    assert folder.classes == dataset.classes == ("a", "b")
    assert torch.equal(folder.images, dataset.images)
    assert torch.equal(folder.labels, dataset.labels)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    for name in ("images/a", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / name / "x.png")
    (tmp_path / "images" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "b").symlink_to(tmp_path / "elsewhere")
    assert load_images([tmp_path / "images"], progress=False).labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(ramp).save(tmp_path / "a" / f"x.{suffix}")
    (image,) = load_images([tmp_path]).images
    assert image[0].tolist() == image[2].tolist() == np.round(ramp / 257).astype(int).tolist()


def test_the_largest_number_of_12_bits_is_read_from_tiff_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 4
    Image.fromarray(ramp).save(tmp_path / "a" / "x.tif", tiffinfo={281: 4095})
    (image,) = load_images([tmp_path], progress=False).images
    assert image[0].tolist() == np.round(ramp * (255 / 4095)).astype(int).tolist()


def test_images_that_are_all_dark_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((32, 32), 4095, dtype=np.uint16)).save(tmp_path / "a" / "x.png")
    load_images([tmp_path], progress=False)
    assert "the brightest pixel of all 1 images is 16 of 255; if the files hold 10 or 12 bits" in caplog.text
    caplog.clear()
    Image.fromarray(np.full((32, 32), 255, dtype=np.uint8)).save(tmp_path / "a" / "y.png")
    load_images([tmp_path], progress=False)
    assert not caplog.text


def test_images_of_floating_point_numbers_are_scaled_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "a" / "x.tif")
    (image,) = load_images([tmp_path]).images
    assert image[1].tolist() == np.round(255 * ramp.astype(np.float64)).astype(int).tolist()
    Image.fromarray(1000 * ramp).save(tmp_path / "a" / "x.tif")
    with pytest.raises(ImageError, match=r"x\.tif: its pixels run from 0 to 1000, but 0 is black and 1 is white"):
        load_images([tmp_path])
    Image.fromarray((1000 * ramp).astype(np.int32)).save(tmp_path / "a" / "x.tif")
    with pytest.raises(ImageError, match=r"x\.tif: its pixels run from 0 to 1000, but 0 is black and 255 is white"):
        load_images([tmp_path])


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees
    return exif


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("P", "png", {}),
        ("P", "png", {"transparency": 3}),
        ("1", "png", {}),
        ("LA", "png", {}),
        ("RGBA", "png", {}),
        ("RGB", "png", {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "red")]}),
        ("RGB", "jpg", {"exif": _turned()}),
        ("CMYK", "jpg", {}),
    ],
)
def test_pixels_are_those_of_timms_folders(tmp_path: Path, mode: str, suffix: str, options: dict[str, Any]) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    image = Image.fromarray(pixels) if mode in ("RGBA", "LA") else Image.fromarray(pixels[..., :3])
    image.convert(mode).save(tmp_path / "a" / f"x.{suffix}", **options)
    expected, _ = ImageDataset(str(tmp_path))[0]
    (found,) = load_images([tmp_path], progress=False).images
    assert found.permute(1, 2, 0).tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    frames = [Image.new("RGB", (32, 32), color) for color in ("blue", "red")]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / "a" / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
    (found,) = load_images([tmp_path], progress=False).images
    assert found.flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 255]


def test_an_image_that_is_too_large_to_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "a" / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"cannot decode .*x\.png: Image size"):
        load_images([tmp_path])


def test_hidden_files_and_folders_are_neither_images_nor_classes(tmp_path: Path) -> None:
    places = (".ipynb_checkpoints", "__MACOSX/a", "a", "a/.thumbnails", "a/@eaDir", "b/images")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "x.png")
    (tmp_path / "a" / "._x.png").write_bytes(b"not an image")
    data = load_images([tmp_path], 8)
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [0, 1]


def test_missing_images_say_where_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"tiny-imagenet-200\.zip"):
        load_images([tmp_path / "nothing"])
    with pytest.raises(ImageError, match="no images"):
        load_images([])


def test_bad_images_are_named(tmp_path: Path, shard: Path) -> None:
    with pytest.raises(ImageError, match="no sub-folders"):
        load_images([tmp_path])
    (tmp_path / "a").mkdir()
    with pytest.raises(ImageError, match=r"has no images \(\.avif \.bmp"):
        load_images([tmp_path])
    (tmp_path / "a" / "x.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"cannot decode .*x\.png"):
        load_images([tmp_path])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ImageError, match="cannot read"):
        load_images([broken])
    save_file({"labels": np.zeros(1, np.int64)}, broken)
    with pytest.raises(ImageError, match="no tensor named jpeg, offsets"):
        load_images([broken])


def test_damaged_shards(tmp_path: Path) -> None:
    good = {"jpeg": np.zeros(10, np.uint8), "offsets": np.array([0, 10]), "labels": np.array([0])}
    path = tmp_path / "shard.safetensors"
    save_file(good, path)
    with pytest.raises(ImageError, match="names no classes"):
        load_images([path])
    save_file(good, path, {"classes": "a"})
    with pytest.raises(ImageError, match="cannot decode image 0"):
        load_images([path])
    save_file({**good, "offsets": np.array([0, 11])}, path, {"classes": "a"})
    with pytest.raises(ImageError, match="offsets"):
        load_images([path])


def test_labels_must_have_names() -> None:
    with pytest.raises(ImageError, match="labels run from 0 to 3"):
        ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 3]), ("a", "b"))
