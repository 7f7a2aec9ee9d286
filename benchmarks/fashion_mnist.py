"""Data sets by name and path, and Fashion-MNIST from Debian's package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune import Benchmark, load_benchmark
from timm_ghn.finetune.data import DATASETS
from timm_ghn.images import ImageSet

CHOICES = (*DATASETS, "folder", "shards")
"""Names that `load_dataset` takes."""
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""


def load_dataset(name: str, path: str | Path | None = None, *, size: int = 32, **kwargs: Any) -> Benchmark:
    """Load a data set; Fashion-MNIST that is not in the folder is taken from Debian's package.

    Args:
        name: One of `CHOICES`.
        path: Folder of the data set ("data" by default), or prefix of shards.
        size: As of `load_benchmark`.
        **kwargs: As of `load_benchmark`.

    Raises:
        FineTuneError: As `load_benchmark`, or if a file of the package is damaged.
    """
    data = f"{name}:{path or ''}" if name in DATASETS else str(path or "data")
    if name != "fashion-mnist" or not DEBIAN_FASHION.is_dir():
        return load_benchmark(data, size=size, **kwargs)
    try:
        return load_benchmark(data, size=size, **{**kwargs, "download": False})
    except FineTuneError:
        return _from_debian(size)


def _from_debian(size: int) -> Benchmark:
    """Fashion-MNIST from gzipped IDX files."""

    def part(prefix: str) -> ImageSet:
        images = _read_idx(DEBIAN_FASHION / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(DEBIAN_FASHION / f"{prefix}-labels-idx1-ubyte.gz").long()
        return ImageSet(_grey(images, size), labels, tuple(FashionMNIST.classes))

    return Benchmark("fashion-mnist", part("train"), part("t10k"), "Debian package dataset-fashion-mnist")


def _read_idx(path: Path) -> Tensor:
    """An array of bytes in the format of MNIST."""
    try:
        data = gzip.decompress(path.read_bytes())
        shape = struct.unpack_from(f">{data[3]}I", data, 4)
        array = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
        return torch.from_numpy(array)
    except (OSError, EOFError, ValueError, IndexError, struct.error) as error:
        raise FineTuneError(f"{path} is damaged: {error}; reinstall dataset-fashion-mnist") from error


def _grey(images: Tensor, size: int) -> Tensor:
    """Bytes (N, H, W) as (N, 3, size, size): centered on black if they are smaller, resized otherwise."""
    border = size - images.shape[-1]
    if border >= 0:
        pads = (border // 2, border - border // 2) * 2
        images = F.pad(images, pads)
    else:
        resized = F.interpolate(images[:, None].float(), (size, size), mode="bilinear", antialias=True)
        images = resized[:, 0].round().clamp(0, 255).to(torch.uint8)
    return images[:, None].expand(-1, 3, -1, -1).contiguous()
