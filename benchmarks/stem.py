"""Adjusting the first layers of an ImageNet network to small images, by structure."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from timm_ghn.errors import FineTuneError

_STEM_CONVS = 3
"""Convolutions in front of a stem's max-pool, at most: one (ResNet, DenseNet), two (VGG) or three (ResNet-D)."""


@torch.no_grad()
def adjust_stem(model: nn.Module, input_size: tuple[int, int, int]) -> str:
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

    Returns:
        What was changed, or "unchanged".

    Raises:
        FineTuneError: If the network cannot run at this size, before or after the change, or has no convolution. The
            network is then as before.
    """
    conv, pool = _first_layers(model, input_size)
    parents = [model.get_submodule(conv[:end]) for end, letter in enumerate(conv) if letter == "."]
    if any(isinstance(module, PatchEmbed) for module in (model, *parents)):
        return "unchanged"
    trial = copy.deepcopy(model)
    change = _adjust_(trial, conv, pool)
    if not change:
        return "unchanged"
    try:
        _first_layers(trial, input_size)
    except FineTuneError as error:
        raise FineTuneError(
            f"{type(model).__name__} cannot run with other first layers ({change}), because later ones expect the size "
            f"of what they return: {error.__cause__}; use --stem original"
        ) from error
    return _adjust_(model, conv, pool)


def _first_layers(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[str, str]:
    """Names of the first convolution that runs, and of the first max-pool if it is part of the stem, else empty.

    Raises:
        FineTuneError: If the network cannot run at this size, or has no convolution.
    """
    layers = (nn.Conv2d, nn.MaxPool2d)
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if isinstance(module, layers)}
    order: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: order.append(module)) for module in names]
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
    is_conv = [isinstance(module, nn.Conv2d) for module in order]
    if not any(is_conv):
        raise FineTuneError(f"{type(model).__name__} has no 2-D convolution to adjust: --stem original")
    pool = is_conv.index(False) if not all(is_conv) else len(order)
    return names[order[is_conv.index(True)]], names[order[pool]] if pool <= _STEM_CONVS and pool < len(order) else ""


def _adjust_(model: nn.Module, conv: str, pool: str) -> str:
    """Change the first convolution and remove the max-pool, if there is one; the text says what was done."""
    layer: Any = model.get_submodule(conv)
    changes = [_adjust_conv_(layer, conv)]
    if pool:
        parent, _, own = pool.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Identity())
        changes.append(f"max-pool {pool} removed")
    return "; ".join(filter(None, changes))


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
