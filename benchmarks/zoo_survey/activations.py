"""Activations of a network on noise images: are they finite, and how large are they beside those of another start?

    reference = measure_activations(timm.create_model("resnet50"))
    candidate = measure_activations(timm.create_model("resnet50", init="ghn-orth"))
    print(activation_ratio(candidate, reference))

What counts as a block is decided by structure alone: a module that was called, has parameters and children, and is

- a direct child of the model, or
- an entry of a `Sequential`, `ModuleList` or `ModuleDict` (or of a subclass of these) at any depth, and not itself such
  a plain container.

So blocks and stages are both measured, and what lies between the layers of a block is not: a scale that a norm layer
is about to remove says nothing about the network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.errors import CaptureError, InitError
from timm_ghn.orthogonalization import weight_layers
from timm_ghn.seeding import seeded
from timm_ghn.trace.inputs import input_sizes

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class BlockActivation:
    """What a block returned, all of its floating tensors taken together.

    Attributes:
        name: Qualified name of the module; from its second call on followed by "#2", "#3", ...
        rms: Root of the mean square; NaN if a value is not finite.
        std: Standard deviation of all values; NaN if one is not finite.
        finite: Whether all values are finite.
    """

    name: str
    rms: float
    std: float
    finite: bool


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations of one network in one forward pass.

    Attributes:
        blocks: What the blocks returned, in the order in which they returned.
        features: What the classifier read; without one, what the last block returned. None if there is neither.
        logits: What the model returned, all tensors of a tuple, list or dictionary together.
    """

    blocks: tuple[BlockActivation, ...]
    features: BlockActivation | None
    logits: BlockActivation

    @property
    def finite(self) -> bool:
        """Whether all activations are."""
        features = () if self.features is None else (self.features,)
        return all(item.finite for item in (*self.blocks, *features, self.logits))

    @property
    def logits_std(self) -> float:
        """Standard deviation of the logits."""
        return self.logits.std

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return {"finite": self.finite, **asdict(self)}


def log_distance(ratio: float) -> float:
    """Distance from 1 on a logarithmic scale, as a factor: 3 for ratios of 3 and 1/3, infinity for 0, NaN, infinity."""
    return max(ratio, 1 / ratio) if ratio > 0 and math.isfinite(ratio) else math.inf


@dataclass(frozen=True, slots=True)
class BlockRatio:
    """How much larger a block's activations (root mean square) are than in the reference.

    Attributes:
        name: Name of the block.
        candidate: Root mean square; NaN if a value is not finite.
        reference: That of the reference.
    """

    name: str
    candidate: float
    reference: float

    @property
    def ratio(self) -> float:
        """Candidate / reference; NaN if the candidate's are not finite."""
        return self.candidate / self.reference

    @property
    def distance(self) -> float:
        """How far the ratio is from 1, as a factor."""
        return log_distance(self.ratio)


@dataclass(frozen=True, slots=True)
class ActivationRatio:
    """Activations of one start beside those of another, of the same network and input.

    Attributes:
        finite: Whether all activations of the candidate are finite.
        logits: Ratio of the logits; None if the reference's are all zero (timm starts some heads from zero).
        features: Ratio of what the classifier reads; None if the reference's is zero or there is no classifier.
        worst: The block whose ratio is farthest from 1; None if there is no block to compare.
        blocks: All blocks whose reference is not zero.
    """

    finite: bool
    logits: float | None
    features: float | None
    worst: BlockRatio | None
    blocks: tuple[BlockRatio, ...]

    @property
    def distance(self) -> float:
        """The farthest of all ratios from 1, as a factor; infinity if something is not finite, or vanished."""
        outer = (log_distance(ratio) for ratio in (self.logits, self.features) if ratio is not None)
        return max((*(block.distance for block in self.blocks), *outer), default=1.0) if self.finite else math.inf

    def within(self, factor: float) -> bool:
        """Whether all is finite and no ratio lies outside of [1 / factor, factor]."""
        return self.distance <= factor

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return {**asdict(self), "distance": self.distance}

    def __str__(self) -> str:
        parts = ["finite" if self.finite else "not finite"]
        parts += [f"{word} x {ratio:.3g}" for word, ratio in (("logits", self.logits), ("features", self.features))
                  if ratio is not None]  # fmt: skip
        if self.worst is not None:
            parts.append(f"worst block {self.worst.name} x {self.worst.ratio:.3g}")
        return ", ".join(parts)


@torch.no_grad()
def measure_activations(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    example_input: Any = None,
    batch: int = 2,
    seed: int = 0,
    batch_statistics: bool = False,
) -> Activations:
    """Run a model on noise images and measure what its blocks return.

    A copy of its structure runs that shares the parameters, so the model keeps its modes, hooks, buffers and caches;
    the global generators keep their state.

    Args:
        model: Any module with memory, of any floating dtype, on any device.
        input_size: (channels, height, width) of one image; what a timm model says of itself by default.
        example_input: Instead of images: a tensor, or a tuple (positional) or dict (keyword arguments) of tensors, on
            the model's device.
        batch: Number of images, standard normal noise.
        seed: Seed of the noise.
        batch_statistics: Whether norm layers that keep running statistics use those of the batch, as in training.
            Everything else (dropout, stochastic depth, auxiliary outputs) is always as in evaluation.

    Raises:
        InitError: If the model is on the meta device.
        CaptureError: If the forward pass fails.
    """
    _check_memory(model)
    twin = _twin(model)
    twin.eval()
    if batch_statistics:
        for module in twin.modules():
            module.training = keeps_statistics(module)
    recorder = _Recorder(twin)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    failure: Exception | None = None
    for args, kwargs in _calls(model, input_size, example_input, batch, seed):
        recorder.clear()
        try:
            with seeded(seed, device), recorder, torch.autocast(device.type, enabled=False):
                output = twin(*args, **kwargs)
            return recorder.activations(output)
        except Exception as error:  # noqa: BLE001 - any model code may run here; it is re-raised
            failure = failure or error
    shape = "the example input" if example_input is not None else f"noise images of size {input_size or 'its own'}"
    raise CaptureError(f"the forward pass of {type(model).__name__} on {shape} failed: {failure}") from failure


def activation_ratio(candidate: Activations, reference: Activations) -> ActivationRatio:
    """Compare the activations of two starts of one network on the same input.

    Args:
        candidate: Activations of the start in question.
        reference: Those of another start, such as timm's own.

    Raises:
        InitError: If the two do not have the same blocks.
    """
    if [block.name for block in candidate.blocks] != [block.name for block in reference.blocks]:
        raise InitError("activations of different networks cannot be compared: their blocks have different names")
    pairs = zip(candidate.blocks, reference.blocks, strict=True)
    blocks = tuple(BlockRatio(block.name, block.rms, other.rms) for block, other in pairs if other.rms != 0)
    return ActivationRatio(
        finite=candidate.finite,
        logits=_ratio(candidate.logits, reference.logits),
        features=_ratio(candidate.features, reference.features),
        worst=max(blocks, key=lambda block: block.distance, default=None),
        blocks=blocks,
    )


def _ratio(candidate: BlockActivation | None, reference: BlockActivation | None) -> float | None:
    if candidate is None or reference is None or reference.rms == 0:
        return None
    return candidate.rms / reference.rms


def _check_memory(model: nn.Module) -> None:
    """Raises InitError for a model without values."""
    on_meta = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if on_meta is not None:
        raise InitError(f"{on_meta} is on the meta device and has no values; initialize the model first")


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the model's own parameters and copies of its buffers."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module itself, not one inside of it, keeps running statistics."""
    return any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


def _calls(
    model: nn.Module, input_size: Sequence[int] | None, example_input: Any, batch: int, seed: int
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Positional and keyword arguments worth trying, best first."""
    if isinstance(example_input, Mapping):
        yield (), dict(example_input)
    elif example_input is not None:
        yield example_input if isinstance(example_input, tuple) else (example_input,), {}
    else:
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        for size in [tuple(input_size)] if input_size is not None else input_sizes(model):
            noise = torch.randn((batch, *size), generator=torch.Generator().manual_seed(seed))
            yield (noise.to(parameter.device, parameter.dtype),), {}


class _Recorder:
    """Hooks that measure what the blocks of a model return while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = dict(_blocks(model))
        self._heads = [model.get_submodule(layer.module) for layer in weight_layers(model) if layer.is_classifier]
        self._handles: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self._found: list[BlockActivation] = []
        self._calls: dict[str, int] = {}
        self._features: list[Tensor] = []

    def __enter__(self) -> None:
        for name, module in self._blocks.items():
            hook = lambda _, __, output, name=name: self._add(name, output)  # noqa: E731
            self._handles.append(module.register_forward_hook(hook))
        for module in self._heads:
            self._handles.append(module.register_forward_pre_hook(self._read))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def activations(self, output: Any) -> Activations:
        """Everything that was measured in a forward pass with that output."""
        last = self._found[-1] if self._found else None
        features = _measure("features", self._features) if self._features else last
        return Activations(tuple(self._found), features, _measure("logits", output))

    def _add(self, name: str, output: Any) -> None:
        self._calls[name] = count = self._calls.get(name, 0) + 1
        self._found.append(_measure(name if count == 1 else f"{name}#{count}", output))

    def _read(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Later in-place calls must not change what the classifier read.
        self._features += [tensor.clone() for tensor in _tensors(inputs[:1])]


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks by name; see the module's docstring."""
    inside = {id(entry) for module in model.modules() if isinstance(module, _CONTAINERS) for entry in module.children()}
    outer = {id(child) for child in model.children()}
    for name, module in model.named_modules():
        is_entry = id(module) in inside and type(module) not in _CONTAINERS
        is_layer = next(module.children(), None) is None or next(module.parameters(), None) is None
        if (is_entry or id(module) in outer) and not is_layer:
            yield name, module


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating tensors of nested tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for entry in output.values():
            yield from _tensors(entry)
    elif isinstance(output, (list, tuple)):
        for entry in output:
            yield from _tensors(entry)


def _measure(name: str, output: Any) -> BlockActivation:
    """Statistics in float64 of values divided by the largest, so that squares neither overflow nor vanish."""
    tensors = [tensor.detach() for tensor in _tensors(output) if tensor.numel()]
    count = sum(tensor.numel() for tensor in tensors)
    largest = max((float(tensor.abs().max()) for tensor in tensors), default=0.0)
    if not math.isfinite(largest):
        return BlockActivation(name, math.nan, math.nan, False)
    if largest == 0:
        return BlockActivation(name, 0.0, 0.0, True)
    scaled = [tensor.float() / largest for tensor in tensors]
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in scaled) / count
    square = sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in scaled) / count
    variance = max(square - mean * mean, 0.0)
    return BlockActivation(name, largest * math.sqrt(square), largest * math.sqrt(variance), True)
