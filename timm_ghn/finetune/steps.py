"""One step of training, as it is or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.finetune.batches import DeviceImages
from timm_ghn.finetune.config import FineTuneConfig

Step = Callable[[Tensor], None]
"""Takes columns (4, B) of `epoch_picks`, on the device, and updates the network."""

_WARM_UPS = 3
"""Steps before a capture, as in PyTorch's documentation: libraries choose algorithms and allocate in them."""


def make_optimizer(config: FineTuneConfig, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run. On CUDA the learning rate is a tensor, so that a captured step can read it."""
    on_cuda = device.type == "cuda"
    lr: Any = torch.tensor(config.lr, device=device) if on_cuda else config.lr
    kwargs: dict[str, Any] = {"fused": True} if on_cuda else {}
    if config.optimizer == "adamw":
        if on_cuda:
            kwargs["capturable"] = True
        return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=config.weight_decay, **kwargs)
    return torch.optim.SGD(
        network.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, **kwargs
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


@dataclass(frozen=True, eq=False)
class EagerStep:
    """Forward, backward, clipping, update.

    Attributes:
        network: The network, in training mode.
        optimizer: Its optimizer.
        images: Training images.
        config: Settings.
        totals: float64 (2,) on the device: sums of losses and of right answers, which every step adds to.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    images: DeviceImages
    config: FineTuneConfig
    totals: Tensor

    def __call__(self, picks: Tensor) -> None:
        """Update the network on a batch."""
        self.on_batch(*self.images.augmented(picks))

    def on_batch(self, inputs: Tensor, labels: Tensor) -> None:
        """Update the network on inputs that are there already."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = forward(self.network, inputs, self.config)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            self.totals.add_(torch.stack([loss.detach().double() * len(labels), right.double()]))


def forward(network: nn.Module, inputs: Tensor, config: FineTuneConfig) -> Tensor:
    """Logits in float32."""
    if config.precision == "float32":
        logits: Tensor = network(inputs)
        return logits
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = network(inputs)
    return logits.float()


class CapturedStep:
    """Steps replayed as CUDA graphs, one for each size of a batch.

    A small network's step is hundreds of kernels of a few microseconds; replaying them as one graph takes the time of
    the kernels instead of that of launching them.

    Args:
        step: What to capture. Its network, optimizer and totals are as before after a capture.
        stream: Where the step runs.
    """

    def __init__(self, step: EagerStep, stream: torch.cuda.Stream) -> None:
        self._step = step
        self._stream = stream
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._draws = False

    def __call__(self, picks: Tensor) -> None:
        """Update the network on a batch."""
        size = picks.shape[1]
        if size not in self._graphs:
            self._graphs[size] = self._capture(picks)
        graph, place = self._graphs[size]
        place.copy_(picks)
        if not self._draws:
            graph.replay()
            return
        # The graphs of a device read seed and offset from the same two tensors, which every replay of them writes:
        # steps that draw random numbers must not overlap.
        common = torch.cuda.default_stream(self._stream.device)
        self._stream.wait_stream(common)
        graph.replay()
        common.wait_stream(self._stream)

    def _capture(self, picks: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        place = picks.clone()
        # Afterwards the generators are as before, so that the first replay draws what an uncaptured step would.
        with torch.random.fork_rng(devices=[place.device]):
            before = _snapshot(self._step)
            generator = torch.cuda.get_rng_state(place.device)
            for _ in range(_WARM_UPS):
                self._step(place)
            self._draws = not torch.equal(torch.cuda.get_rng_state(place.device), generator)
            _restore(self._step, before)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            self._step.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self._step(place)
        return graph, place


def _tensors(step: EagerStep) -> Mapping[str, Tensor]:
    """Every tensor that a step changes, by a name."""
    found = {f"network.{name}": tensor for name, tensor in step.network.state_dict(keep_vars=True).items()}
    for index, state in enumerate(step.optimizer.state.values()):
        found.update({f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)})
    return {**found, "totals": step.totals}


def _snapshot(step: EagerStep) -> Mapping[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(step).items()}


@torch.no_grad()
def _restore(step: EagerStep, before: Mapping[str, Tensor]) -> None:
    """Undo steps in place. Optimizer states that did not exist become 0, from which the first step is the same."""
    for name, tensor in _tensors(step).items():
        if name in before:
            tensor.copy_(before[name])
        else:
            tensor.zero_()
