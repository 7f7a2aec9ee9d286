"""Small labelled images made for tests, and JPEG shards of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_ghn.images import ImageSet


def noisy_images(count: int, seed: int, size: int = 16, classes: int = 3) -> ImageSet:
    """Noisy images whose class is their brightest channel, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    pixels = torch.randint(0, 120, (count, 3, size, size), generator=generator)
    pixels[torch.arange(count), labels % 3] += 90
    return ImageSet(pixels.to(torch.uint8), labels, tuple(f"class {i}" for i in range(classes)))


def write_shard(path: Path, data: ImageSet) -> None:
    """Write images as a JPEG shard; spaces in names of classes become dashes."""
    files = []
    for image in data.images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = torch.tensor([0, *np.cumsum([len(file) for file in files]).tolist()])
    tensors = {"jpeg": torch.from_numpy(np.concatenate(files)), "offsets": offsets, "labels": data.labels}
    save_file(tensors, path, {"classes": " ".join(name.replace(" ", "-") for name in data.classes)})
