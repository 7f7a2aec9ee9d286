"""Post-processing of weights (arXiv 2207.10049): noise (Eq. 1), then orthogonalization (Eq. 2), in parallel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.errors import InitError
from timm_ghn.orthogonalization.kronecker import orthogonalize_kronecker_
from timm_ghn.orthogonalization.layers import WeightLayer, resolve_start_layer, weight_layers
from timm_ghn.orthogonalization.noise import add_normal_, correlation_std
from timm_ghn.orthogonalization.orthogonal import checked_scales, orthogonal_factor_, wide_dtype
from timm_ghn.orthogonalization.tiled import orthogonalize_tiled_
from timm_ghn.settings import NOISE, Correlation, check_choice, check_noise, check_seed
from timm_ghn.threads import Workers, single_threaded
from timm_ghn.trace.distributed import is_distributed, place_, unwrapped, whole
from timm_ghn.trace.inputs import check_model

_logger = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Bytes, as of memory that torch allocates on CPUs. Matrix products round in another way elsewhere."""


@dataclass(frozen=True)
class PostProcess:
    """Settings of the post-processing.

    Attributes:
        noise: `beta` of Eq. 1; 0 for none.
        orthogonal: Whether Eq. 2 is applied.
        seed: Seed of the noise.
        correlation: What Eq. 1 correlates: the channels ("paper"), or the rows of the tall matrix ("ppuda").

    Raises:
        InitError: A setting has the wrong type or lies outside of its range.
    """

    noise: float = NOISE
    orthogonal: bool = True
    seed: int = 0
    correlation: Correlation = "paper"

    def __post_init__(self) -> None:
        check_noise(self.noise)
        check_seed(self.seed)
        check_choice("correlation", self.correlation, Correlation)
        if not isinstance(self.orthogonal, bool):
            raise InitError(f"orthogonal={self.orthogonal!r}: expected True or False")


def postprocess_tensor(weight: Tensor, layer: WeightLayer, settings: PostProcess, *, in_place: bool = False) -> Tensor:
    """Post-processes one weight: Eq. 1, then Eq. 2.

    The result depends on the weight, the number of the layer and the settings alone, so it is computed on the CPU by
    one thread, wherever the weight lies. A weight of more than two dimensions is the matrix `K x rest` of its first
    dimension as stored, also that of a transposed convolution, as in ppuda. The kernels of a mixture (`kernel` of the
    layer) are post-processed one by one, each with noise of its own.

    Args:
        weight: `(K, ...)` of a floating dtype, of two or more dimensions.
        layer: Which layer it is.
        settings: What is done.
        in_place: Whether the weight is overwritten with the result. A float32 or float64 tensor on the CPU, contiguous
            and aligned, is also where the result is computed; of others there is a copy. Beyond these, less than the
            size of the weight is allocated if it is wide, and less than twice its size if it is tall or its channels do
            not repeat.

    Returns:
        The weight if it is overwritten, else a new tensor of the same shape, dtype and device.

    Raises:
        InitError: The weight has fewer than two dimensions, lies on the meta device, or holds NaN or infinity. It is
            then not changed.
    """
    _check_weight(weight, layer)
    # Tensors made in inference mode are changed in that mode alone, and threads do not inherit it.
    with torch.inference_mode(in_place and weight.is_inference()), torch.no_grad():
        source = weight.detach()
        dtype = wide_dtype(source.dtype)
        is_on_cpu = source.device.type == "cpu" and source.dtype == dtype and source.is_contiguous()
        here = in_place and is_on_cpu and source.data_ptr() % _ALIGNMENT == 0
        result = source if here else torch.empty(source.shape, dtype=dtype, device="cpu").copy_(source)
        if result.numel() > 0:
            with single_threaded():
                _process_(result, layer, settings)
        if in_place:
            return weight if here else weight.copy_(result)
        return result.to(device=weight.device, dtype=weight.dtype)


def _process_(weight: Tensor, layer: WeightLayer, settings: PostProcess) -> None:
    """Post-processes a contiguous float32 or float64 tensor on the CPU, one kernel after the other."""
    kernels = weight.view(weight.shape[0], *layer.kernel) if layer.kernel else weight.unsqueeze(0)
    noise, name = settings.noise, layer.parameter
    for index, kernel in enumerate(kernels):
        matrix = kernel.view(kernel.shape[0], -1)
        if settings.orthogonal and orthogonalize_kronecker_(matrix, noise, name):  # no correlation is more than 1
            continue
        deviation = noise * correlation_std(matrix, settings.correlation, name) if noise > 0 else 0.0
        add_ = partial(add_normal_, layer=layer.number, seed=settings.seed, shape=kernel.shape, expert=index)
        if deviation > 0:
            if settings.orthogonal and orthogonalize_tiled_(matrix, deviation, partial(add_, deviation=1.0), name):
                continue
            add_(matrix, deviation)
        if settings.orthogonal:
            orthogonal_factor_(matrix, name)


Waiting = Tensor | Callable[[], Tensor]
"""A weight, or what makes it."""


def postprocess_many(
    items: Iterable[tuple[WeightLayer, Waiting]],
    settings: PostProcess,
    workers: Workers,
    *,
    in_place: bool = False,
    queued: int | None = None,
) -> Iterator[tuple[WeightLayer, Tensor]]:
    """Post-processes a stream of weights in parallel, one thread to a weight.

    The stream is read in the calling thread while the workers work, so a generator that predicts one weight at a time
    overlaps with the post-processing of the weights before it. Only a few weights are held at a time.

    Args:
        items: Layers and their weights, or what makes them in the thread that processes them; all of them are
            processed.
        settings: What is done.
        workers: The threads. Their number does not change the result.
        in_place: As of `postprocess_tensor`. After an error, or if the iterator is not exhausted, some weights are
            final and others are not.
        queued: How many weights are worked on or wait at once, see `Workers.in_order`. Only those that are worked on
            need memory beyond their own.

    Yields:
        The layers in the order of the stream, with what `postprocess_tensor` returns for them.

    Raises:
        InitError: As `postprocess_tensor`.
    """

    def process(layer: WeightLayer, weight: Waiting) -> tuple[WeightLayer, Tensor]:
        weight = weight if isinstance(weight, Tensor) else weight()
        return layer, postprocess_tensor(weight, layer, settings, in_place=in_place)

    return workers.in_order((partial(process, layer, weight) for layer, weight in items), queued)


def selected_layers(layers: Sequence[WeightLayer], start: int) -> tuple[WeightLayer, ...]:
    """Returns the layers that are post-processed: from number `start` on, without the classifier and what is kept."""
    return tuple(layer for layer in layers if layer.number >= start and not layer.is_classifier and not layer.kept)


@torch.no_grad()
def orthogonalize_(
    model: nn.Module,
    *,
    start_layer: int | float | str | None = None,
    noise: float = NOISE,
    seed: int = 0,
    orthogonal: bool = True,
    correlation: Correlation = "paper",
    progress: Callable[[int, int, str], None] | None = None,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
) -> tuple[str, ...]:
    """Adds a little noise to the weights of a model and orthogonalizes them, from layer `L` on, in place.

        model = timm.create_model("resnet50", pretrained=True)
        timm_ghn.orthogonalize_(model, start_layer="layer3.3.conv3")  # noise=0 for none

    The classifier stays as it is, as do weights that are computed from other parameters (weight normalization,
    pruning) and those of other types than float16, bfloat16, float32 and float64; a warning names them. Everything is
    checked before anything is changed. Frozen weights (`requires_grad=False`) are changed as well. Dtype, device and
    `requires_grad` of the parameters stay as they are, and neither the global random state nor the number of threads
    changes.

    Args:
        model: The model, on any device but "meta". Its parameters may be DTensors; then all ranks have to call this.
        start_layer: `L`, see `resolve_start_layer`; None for `default_start_layer`.
        noise: `beta` of Eq. 1; 0 for no noise.
        seed: Seed of the noise.
        orthogonal: Whether Eq. 2 is applied.
        correlation: What Eq. 1 correlates, "paper" or "ppuda".
        progress: Called after each layer with the number of finished layers, their total, and the parameter's name.
        input_size: (channels, height, width) of one image. It is only needed for a model with weights in modules that
            neither torch nor timm knows: a forward pass tells whether these are layers.
        example_input: Instead of `input_size`: a tensor, or a tuple or dict of tensors.

    Returns:
        The names of the changed parameters, in order.

    Raises:
        InitError: A setting is invalid, the model has no layers or none that can be changed, or a weight is on the meta
            device or not finite.
    """
    settings = PostProcess(noise=noise, orthogonal=orthogonal, seed=seed, correlation=correlation)
    check_model(model)
    model = unwrapped(model)
    layers = weight_layers(model, input_size=input_size, example_input=example_input)
    start = resolve_start_layer(layers, start_layer)
    selected = selected_layers(layers, start)
    kept = [f"{layer.parameter} ({layer.kept})" for layer in layers if layer.number >= start and layer.kept]
    if kept and not selected:
        raise InitError(f"nothing can be orthogonalized: {', '.join(kept)}")
    weights = [model.get_parameter(layer.parameter) for layer in selected]
    with single_threaded():
        for layer, weight in zip(selected, weights, strict=True):
            _check_weight(weight, layer)
            if weight.numel():
                checked_scales(whole(weight), layer.parameter)
    if kept:
        _logger.warning("kept as they are: %s", ", ".join(kept))
    source = ((layer, whole(weight)) for layer, weight in zip(selected, weights, strict=True))
    with Workers() as workers:
        results = postprocess_many(source, settings, workers, in_place=True)
        for done, ((layer, result), weight) in enumerate(zip(results, weights, strict=True), start=1):
            if is_distributed(weight):
                place_(weight, result)
            if progress is not None:
                progress(done, len(selected), layer.parameter)
    return tuple(layer.parameter for layer in selected)


def _check_weight(weight: Tensor, layer: WeightLayer) -> None:
    """Raises InitError for a tensor that is not a matrix with values."""
    if weight.dim() < 2 or not weight.is_floating_point():
        raise InitError(
            f"{layer.parameter}: expected a floating weight of two or more dimensions, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.is_meta:
        raise InitError(
            f"{layer.parameter} is on the meta device and has no values: create the model outside of "
            'torch.device("meta"), or load weights first, by model.load_state_dict(..., assign=True)'
        )
