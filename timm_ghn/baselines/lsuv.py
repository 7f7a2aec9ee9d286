"""Layer-sequential unit variance (Mishkin & Matas 2016, arXiv 1511.06422).

Every convolutional and fully-connected weight becomes orthonormal and is then scaled so that the outputs of its layer
have variance 1 on a batch, layer after layer in the order in which they run. Outputs are linear in the weight, so one
scaling is exact and a single pass sets all layers; the paper's loop over steps of one layer would stop after its first.

Applies to every convolution and linear layer whose output follows its weight: weights that a module standardizes
itself get the orthonormal matrix only. Biases become 0, as in the paper. Norm layers normalize by the batch meanwhile;
dropout and stochastic depth are off. Of a module that is used several times, the first use counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from timm_ghn.baselines.setting import Computation, Setting, names_of
from timm_ghn.errors import InitError
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor_
from timm_ghn.seeding import derived_seed
from timm_ghn.trace.capture import failed_module
from timm_ghn.trace.inputs import as_call, checked_size, input_sizes, timm_config

_BATCH = 32
"""Inputs of standard normal noise where no batch is given."""
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_LARGEST_ERROR = 0.1
"""Of the variance, as the paper's tolerance. A layer that does not reach it does not follow its weight."""


def lsuv(setting: Setting) -> Computation:
    """Weights and biases of all convolutions and linear layers.

    Left out are layers whose weight is not a parameter of their own (a parametrization computes it), frozen or empty.

    Raises:
        InitError: If there are none, or nothing says what the model takes.
    """
    names = names_of(setting.model)
    layers: dict[nn.Module, int] = {}
    computed: list[str] = []
    for number, layer in enumerate(module for module in setting.model.modules() if isinstance(module, _LAYERS)):
        own = dict(layer.named_parameters(recurse=False))
        weight = own.get("weight")
        name = "" if weight is None or weight.numel() == 0 else names[id(weight)]
        if name in setting.free and name not in computed:  # tied weights are computed for the first layer
            layers[layer] = number
            computed += [names[id(own[part])] for part in ("weight", "bias") if part in own]
    values = partial(_values, setting, layers, names) if layers else dict[str, Tensor]().items
    computation = setting.computation(computed, values, "it has no convolutions or linear layers that may change")
    _inputs(setting)
    return computation


@torch.no_grad()
def _values(
    setting: Setting, layers: Mapping[nn.Module, int], names: Mapping[int, str]
) -> Iterator[tuple[str, Tensor]]:
    """Run the model once with new weights in place of its own, scaling each layer's when the layer is run.

    Raises:
        InitError: If the forward pass fails.
    """
    model = setting.model
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors: dict[str, Tensor] = {}
    for layer, number in layers.items():
        for part, parameter in layer.named_parameters(recurse=False):
            if part == "weight":
                seed = derived_seed("lsuv", setting.seed, number, tuple(parameter.shape))
                tensors[names[id(parameter)]] = _orthonormal(parameter, seed)
            elif part == "bias" and names[id(parameter)] in setting.free:
                tensors[names[id(parameter)]] = torch.zeros_like(parameter)

    def scale(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        handles[layer].remove()  # the first use of a layer counts
        return _scale_(layer, args, kwargs, output)

    handles = {layer: layer.register_forward_hook(scale, with_kwargs=True) for layer in layers}
    args, kwargs = _inputs(setting)
    try:
        with _measuring(model):
            functional_call(model, {**buffers, **tensors}, args, kwargs)
    except Exception as error:  # any model code may run here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InitError(
            "lsuv measures the outputs of layers, and the forward pass failed at module "
            f"'{failed_module(model, error)}': {reason}. Nothing was changed. Give example_input=, a batch of several "
            "inputs as the model takes them, or input_size=(channels, height, width)"
        ) from error
    finally:
        for handle in handles.values():
            handle.remove()
    yield from tensors.items()


def _inputs(setting: Setting) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of forward: the example if there is one, else standard normal noise.

    Raises:
        InitError: If nothing says what the model takes, or there is nothing to measure in the example.
    """
    parameter = next(p for p in setting.model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(derived_seed("lsuv batch", setting.seed))

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_meta:
            leaf = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return leaf.to(parameter.device, parameter.dtype if leaf.is_floating_point() else leaf.dtype)

    if setting.example_input is not None:
        example = tree_map(place, setting.example_input)
        tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
        if not any(leaf.numel() > 0 and bool((leaf != leaf.flatten()[0]).any()) for leaf in tensors):
            raise InitError("lsuv measures on example_input=, which is empty or holds the same number everywhere")
        return as_call(example)
    size = None if setting.input_size is None else checked_size(setting.model, setting.input_size)
    if size is None and timm_config(setting.model):
        size = input_sizes(setting.model)[0]
    if size is None:
        raise InitError("lsuv measures on a batch of inputs: give example_input=images, or input_size=(3, 224, 224)")
    return (torch.randn(_BATCH, *size, generator=generator).to(parameter.device, parameter.dtype),), {}


def _orthonormal(like: Tensor, seed: int) -> Tensor:
    """A weight whose rows or columns are orthonormal, of the shape, type and device of another one."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    orthogonal_factor_(drawn.view(drawn.shape[0], -1), "weight")
    return torch.empty_like(like).copy_(drawn)


def _scale_(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """Scale a layer's weight for outputs of variance 1.

    Returns:
        The new outputs; None if the weight was left as it was.

    Raises:
        ValueError: If there are outputs that are not finite.
    """
    variance = float(output.float().var()) if output.numel() > 1 else 0.0
    if not math.isfinite(variance):
        raise ValueError("its outputs hold NaN or infinity")
    if variance == 0:
        return None
    weight: Tensor = layer.weight  # type: ignore[assignment]
    before = weight.clone()
    weight.div_(math.sqrt(variance))
    result: Tensor = layer.forward(*args, **kwargs)
    if abs(float(result.float().var()) - 1) > _LARGEST_ERROR:
        weight.copy_(before)
        return None
    return result


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Batch norms normalize by the batch, and nothing random happens; afterwards all modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
