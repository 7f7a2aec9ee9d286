"""Models of which a process holds a part: FSDP2, tensor parallelism, and whatever else makes DTensors of parameters.

Each rank computes every tensor of the whole model, one after the other, and keeps its own part. The values depend on
the seed and the name alone, so the ranks need not talk to each other, and the parts fit together to the bits of the
model that is not sharded. A rank holds a few whole tensors at a time.

A model that was built on the meta device and got memory from `to_empty` holds no values. There, `build` says what the
parameters that no method predicts, and the buffers, start from: it builds the model once more, and that model's random
numbers are put off and its memory is only taken when it is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.initialize.hypernetwork import find_hypernetwork
from timm_ghn.initialize.memory import LazyMemory
from timm_ghn.initialize.model import initialize_
from timm_ghn.initialize.plan import make_plan
from timm_ghn.initialize.provenance import model_name, record_
from timm_ghn.initialize.report import Report, Status
from timm_ghn.initialize.stream import stream
from timm_ghn.seeding import PrivateRandom
from timm_ghn.settings import Init, Source
from timm_ghn.trace.distributed import is_distributed, is_flattened, is_sharded, place_, reshard, whole
from timm_ghn.trace.skeleton import skeleton_of

Build = Callable[[], nn.Module]
"""Builds a model: the same on each call, not sharded, on the CPU unless it says otherwise."""

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Attributes of `torch.compile` and of activation checkpointing that hold a part of a model as it was."""


def initialize_sharded_(model: nn.Module, init: Init, build: Build | None, **inputs: Any) -> Report:
    """Initialize a model in place of which this process holds a part; all ranks have to call this with equal arguments.

    Args:
        model: The model, with memory for its parameters.
        init: Settings. The cache is not used.
        build: Builds the model that this one was sharded from, for values that are not predicted and buffers; None if
            the model holds these values.
        **inputs: `input_size` and `example_input` of `init_model`.

    Raises:
        InitError: If a setting is wrong, or the model cannot be initialized as asked.
        CaptureError, GraphError, CheckpointError, UnknownGhnError, DownloadError: As `init_model`.
    """
    start = time.perf_counter()
    _check(model, init, build)
    reshard(model)
    init = replace(init, cache=False)
    if build is None:
        report = _initialize_held(model, init, **inputs)
    elif init.spec.source in (Source.GHN, Source.GAUSSIAN):
        report = _initialize_built(model, init, build, **inputs)
    else:
        report = _initialize_whole(model, init, build, **inputs)
    report = replace(report, seconds=time.perf_counter() - start)
    record_(model, report)
    return report


def _initialize_held(model: nn.Module, init: Init, **inputs: Any) -> Report:
    """Initialize a model that holds values: what is not generated stays as it is."""
    if init.spec.source is Source.TIMM:
        return initialize_(model, init)
    plan = make_plan(model, init, find_hypernetwork(init), **inputs)
    kept = {row.name for row in plan.report("").parameters if row.status is Status.KEPT}
    memory = LazyMemory()
    with memory:
        room = _room_like(model)
    plan = replace(plan, parameters=dict(room.named_parameters()))
    tied = {id(plan.parameters[name]) for name in kept}
    tensors = {name: p for name, p in room.named_parameters(remove_duplicate=False) if id(p) not in tied}
    targets = dict(model.named_parameters(remove_duplicate=False))
    gathered = _Gathered({name: tensor for name, tensor in targets.items() if name not in kept})
    report = stream(plan, room, gathered, memory, tensors, lambda name, tensor: place_(targets[name], tensor))
    return replace(report, model=model_name(model))


def _initialize_built(model: nn.Module, init: Init, build: Build, **inputs: Any) -> Report:
    """Initialize a model whose values mean nothing, tensor after tensor."""
    memory, deferred = LazyMemory(), DeferredRandom(init.seed or 0)
    with torch.device("cpu"), deferred, memory:
        built = build()
    targets = _targets(model, built)
    plan = make_plan(built, init, find_hypernetwork(init), deferred=deferred, **inputs)
    tensors = dict(_tensors(built))
    return stream(plan, built, deferred, memory, tensors, lambda name, tensor: place_(targets[name], tensor))


def _initialize_whole(model: nn.Module, init: Init, build: Build, **inputs: Any) -> Report:
    """Initialize a model whose values mean nothing as a whole, which baselines look at; timm draws in an order."""
    deferred = DeferredRandom(init.seed or 0)
    drawing: AbstractContextManager[object] = deferred
    if init.spec.source is Source.TIMM:
        drawing = nullcontext() if init.seed is None else PrivateRandom(init.seed)
    with torch.device("cpu"), drawing:
        built = build()
    targets = _targets(model, built)
    report = initialize_(built, init, deferred=deferred, **inputs)
    for name, tensor in _tensors(built):
        place_(targets[name], tensor)
    return report


class _Gathered(DeferredRandom):
    """Stands for "put off" where values are on several ranks: `replay` gathers them.

    Args:
        sharded: Parameters that are gathered, by name; others are left alone.
    """

    def __init__(self, sharded: Mapping[str, Tensor]) -> None:
        super().__init__(0)
        self._sharded = sharded

    def replay(self, tensor: Tensor, label: str) -> None:
        """Write the values of the parameter of this name into a tensor."""
        if label in self._sharded:
            tensor.detach().copy_(whole(self._sharded[label]))


def _room_like(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU without values, with whole parameters; tied ones stay tied."""
    room, _ = skeleton_of(model)
    made: dict[int, nn.Parameter] = {}
    for module in room.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    memory = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    return room


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _targets(model: nn.Module, built: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model by the names that they have in the model that was built.

    `requires_grad` of the built model becomes that of the model: frozen parameters are not predicted.

    Raises:
        InitError: If the two do not fit together.
    """
    sharded = {_plain_name(name): tensor for name, tensor in _tensors(model)}
    plain = {_plain_name(name): (name, tensor) for name, tensor in _tensors(built)}
    for name in [*sharded.keys() ^ plain.keys()][:1]:
        where = "the model" if name in sharded else "what build() returns"
        raise InitError(f"{name} is in {where} only: build has to build the model that was sharded")
    for name, (_, tensor) in plain.items():
        if tensor.shape != sharded[name].shape:
            shapes = f"{tuple(sharded[name].shape)} in the model and {tuple(tensor.shape)} in what build() returns"
            raise InitError(f"{name} is {shapes}: build has to build the model that was sharded")
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(sharded[name].requires_grad)
    return {name: sharded[plain_name] for plain_name, (name, _) in plain.items()}


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check(model: nn.Module, init: Init, build: Build | None) -> None:
    """Raise InitError for models and methods that cannot go together."""
    if any(map(is_flattened, model.modules())):
        raise InitError(
            "FullyShardedDataParallel flattens parameters: initialize the model before it is wrapped, or use "
            "torch.distributed.fsdp.fully_shard"
        )
    in_parts = is_sharded(model)
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            raise InitError(
                f"{name} is on the meta device: call model.to_empty(device=...) first, and give build=, a function "
                "that builds the model, for what is not predicted"
            )
        if is_distributed(tensor) and any(placement.is_partial() for placement in tensor.placements):
            raise InitError(f"{name} is the sum of what the ranks hold (Partial), which no parameter is")
    if in_parts and build is None and init.spec.source is Source.BASELINE:
        raise InitError(
            f"{init.method} looks at the whole model, and this one is sharded: give build=, a function that builds the "
            "model, if there is memory for all of it on each rank"
        )
    if in_parts and build is not None and init.seed is None:
        raise InitError(f"{init.method} on a sharded model needs a seed=, so that all ranks draw the same numbers")
