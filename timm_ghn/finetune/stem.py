"""Adjusting the first layers of an ImageNet network to small images, by structure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from timm_ghn.errors import FineTuneError

_STEM_CONVS = 3
"""Convolutions in front of a stem's max-pool, at most: one (ResNet, DenseNet), two (VGG) or three (ResNet-D)."""


@dataclass(frozen=True)
class StemChange:
    """What `adjust_stem` did.

    Attributes:
        conv: What became of the first convolution; empty if it stayed.
        pool: Name of the max-pool that was removed; empty if there was none.
    """

    conv: str = ""
    pool: str = ""

    def __str__(self) -> str:
        pool = f"max-pool {self.pool} removed" if self.pool else ""
        return "; ".join(part for part in (self.conv, pool) if part) or "unchanged"


@torch.no_grad()
def adjust_stem(model: nn.Module, input_size: tuple[int, int, int]) -> StemChange:
    """Keep more of a small image's resolution, as ppuda does for torchvision's networks on 32 x 32 images.

    - A first convolution whose windows overlap (7 x 7, stride 2; 3 x 3, stride 2) becomes 3 x 3 with stride 1; its
      weights are the central 3 x 3 of what they were.
    - One whose windows tile the image (ConvNeXt: 4 x 4, stride 4) keeps its kernel and gets stride 1, like ppuda's
      ConvNeXt. Where that costs too much, give `patch_size=2` to `timm.create_model` and leave the stem as it is.
    - A max-pool right behind it (after three convolutions at most) is removed.
    - Patch embeddings of transformers stay: the number of tokens belongs to the network. Choose it with `patch_size=`
      and `img_size=`.

    The first convolution is the first that runs, whatever its name.

    Args:
        model: Network with values; changed in place. Do this before weights are predicted.
        input_size: (channels, height, width) that it will be used with.

    Raises:
        FineTuneError: If the network cannot run at this size, before or after the change, or has no convolution. The
            network is then as before.
    """
    trial = copy.deepcopy(model)
    change = _adjust_(trial, *_first_layers(trial, input_size))
    if change != StemChange():
        try:
            _first_layers(trial, input_size)
        except FineTuneError as error:
            raise FineTuneError(
                f"{type(model).__name__} cannot run with other first layers ({change}), because later ones expect the "
                f"size of what they return: {error.__cause__}; use --stem original"
            ) from error
    return _adjust_(model, *_first_layers(model, input_size))


def _adjust_(model: nn.Module, convs: Sequence[tuple[str, nn.Conv2d]], pools: Sequence[tuple[str, int]]) -> StemChange:
    """Change the first layers, given all of them in the order in which they run."""
    if not convs:
        raise FineTuneError(f"{type(model).__name__} has no 2-D convolution to adjust: --stem original")
    name, conv = convs[0]
    if any(isinstance(module, PatchEmbed) for module in _ancestors(model, name)):
        return StemChange()
    change = _adjust_conv_(conv, name)
    pool = next((found for found, before in pools if before <= _STEM_CONVS), "")
    if pool:
        parent = model.get_submodule(pool.rpartition(".")[0])
        setattr(parent, pool.rpartition(".")[2], nn.Identity())
    return StemChange(change, pool)


def _first_layers(
    model: nn.Module, input_size: tuple[int, int, int]
) -> tuple[list[tuple[str, nn.Conv2d]], list[tuple[str, int]]]:
    """Convolutions by name in the order in which they run, and max-pools with the number of convolutions before."""
    convs: list[tuple[str, nn.Conv2d]] = []
    pools: list[tuple[str, int]] = []

    def seen(name: str, module: nn.Module) -> Any:
        def hook(*_: Any) -> None:
            if isinstance(module, nn.Conv2d):
                convs.append((name, module))
            else:
                pools.append((name, len(convs)))

        return module.register_forward_pre_hook(hook)

    handles = [seen(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    modes = [(module, module.training) for module in model.modules()]
    try:
        parameter = next(model.parameters())
        model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise FineTuneError(
            f"{type(model).__name__} cannot take images of {'x'.join(map(str, input_size))}: {error}; some need "
            "--model-kwargs img_size=... or a larger --image-size"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return convs, pools


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]


def _adjust_conv_(conv: nn.Conv2d, name: str) -> str:
    """Give a convolution stride 1, and a 3 x 3 kernel if its windows overlap."""
    kernel, stride = tuple(conv.kernel_size), tuple(conv.stride)
    if max(stride) == 1 and max(kernel) <= 3:
        return ""
    before = f"{name} {kernel[0]}x{kernel[1]}, stride {stride[0]}"
    conv.stride = (1, 1)
    if kernel[0] > stride[0] and max(kernel) > 3:
        top, left = (kernel[0] - 3) // 2, (kernel[1] - 3) // 2
        conv.weight = nn.Parameter(conv.weight[:, :, top : top + 3, left : left + 3].clone(), conv.weight.requires_grad)
        conv.kernel_size = (3, 3)
        conv.padding = (1, 1)
    return f"{before} -> {conv.kernel_size[0]}x{conv.kernel_size[1]}, stride 1"
