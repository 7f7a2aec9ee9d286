"""One network on its way through training: steps and measurements."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.batches import DeviceImages, epoch_picks, memory_layout
from timm_ghn.finetune.config import FineTuneConfig, learning_rate
from timm_ghn.finetune.data import Task, classes_in_turn
from timm_ghn.seeding import derived_seed, seeded

Step = Callable[[Tensor], None]
"""Takes columns (4, B) of `epoch_picks`, on the device, and updates the network."""

_EVALUATION_BATCH = 500
_SETTLING_IMAGES = 2048


@dataclass(frozen=True)
class Execution:
    """How a run is computed; none of it is meant to change the result.

    Attributes:
        device: Where.
        evaluate_every: Epochs between two measurements; 0 for none. The last epoch is always measured.
        evaluate_at: Further epochs after which to measure.
        keep_weights: Whether the weights of a finished run are kept beside its result.
        capture: What makes a faster step on CUDA of the step of a run; None to launch its kernels one by one.
        report: Called with the newest point of the curve after every epoch; what it raises ends the run.
    """

    device: str = "cpu"
    evaluate_every: int = 10
    evaluate_at: tuple[int, ...] = ()
    keep_weights: bool = False
    capture: Callable[[Run, Step], Step] | None = None
    report: Callable[[Point], None] | None = None


@dataclass(frozen=True)
class Point:
    """A point of the curves.

    Attributes:
        epoch: Finished epochs.
        lr: Learning rate of the last one.
        train_loss: Mean loss over its augmented training images.
        train_accuracy: Share of them that was right.
        loss: Mean loss over the test images; None where it was not measured.
        accuracy: Share of the test images that was right; None where it was not measured.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    loss: float | None = None
    accuracy: float | None = None


class Run:
    """Trains one network.

    Args:
        config: Settings.
        seed: Decides the order and augmentation of images, and what the network draws.
        task: Images.
        network: What to train; moved to the device.
        execution: How to compute.

    Attributes:
        curve: One point for each finished epoch.
        seconds: Time of training, without measurements.
        diverged: Whether the loss stopped being a number; the run then ended.
        measured: Loss and accuracy when the network was last measured.

    Raises:
        FineTuneError: If the device cannot be used.
    """

    def __init__(
        self, config: FineTuneConfig, seed: int, task: Task, network: nn.Module, execution: Execution | None = None
    ) -> None:
        self.config, self.seed = config, seed
        self.execution = execution or Execution()
        self.device = _find_device(self.execution.device)
        self.module: nn.Module = network.to(self.device, memory_format=memory_layout(self.device))  # type: ignore[call-overload]
        self.images = DeviceImages.of(task.train, task, config, self.device, config.padding)
        self.test = DeviceImages.of(task.test, task, config, self.device)
        self._settling: DeviceImages | None = None
        if config.settle and any(isinstance(module, _BatchNorm) for module in self.module.modules()):
            some = task.train.subset(classes_in_turn(task.train.labels, _SETTLING_IMAGES))
            self._settling = DeviceImages.of(some, task, config, self.device)
        self.optimizer = _make_optimizer(config, self.module, self.device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.curve: list[Point] = []
        self.seconds, self.diverged = 0.0, False
        self.measured = (math.nan, math.nan)
        self.step: Step = lambda picks: self.update(*self.images.augmented(picks))
        if self.execution.capture is not None and self.device.type == "cuda":
            self.step = self.execution.capture(self, self.step)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to train."""
        return self.diverged or len(self.curve) >= self.config.epochs

    # Training

    def train_epoch(self, after_step: Callable[[], object] = lambda: None) -> None:
        """Train for an epoch, and measure the network if it is time.

        Args:
            after_step: Called after every step.
        """
        epoch, started = len(self.curve), time.perf_counter()
        picks = epoch_picks(self.config, len(self.images), self.seed, epoch).to(self.device, non_blocking=True)
        rate = learning_rate(self.config, epoch)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.totals.zero_()
        self.module.train()
        parts = list(torch.split(picks, self.config.batch_size, dim=1))
        if len(parts) > 1 and parts[-1].shape[1] == 1:  # batch norms need two images
            parts[-2:] = [torch.cat(parts[-2:], dim=1)]
        for index, part in enumerate(parts):
            self.train_on(part, epoch, index)
            after_step()
        loss, right = (float(value) / len(self.images) for value in self.totals.cpu())
        self.seconds += time.perf_counter() - started
        self.diverged = not math.isfinite(loss)
        self.curve.append(Point(epoch + 1, rate, loss, right))
        every = self.execution.evaluate_every
        if self.is_done or epoch + 1 in self.execution.evaluate_at or (every > 0 and (epoch + 1) % every == 0):
            self.measured = test_loss, accuracy = self.evaluate()
            self.diverged = self.diverged or not math.isfinite(test_loss)
            self.curve[-1] = replace(self.curve[-1], loss=test_loss, accuracy=accuracy)
        if self.execution.report is not None:
            self.execution.report(self.curve[-1])

    def train_on(self, picks: Tensor, epoch: int, index: int) -> None:
        """One step, the `index`-th of an epoch.

        Args:
            picks: Columns (4, B) of `epoch_picks`, on the device.
            epoch: Epoch, from 0.
            index: Number of the step in the epoch, from 0.
        """
        # What dropout and stochastic depth draw depends on seed, epoch and step alone.
        with seeded(derived_seed("fine-tuning step", self.seed, epoch, index), self.device):
            self.step(picks)

    def update(self, inputs: Tensor, labels: Tensor) -> None:
        """Forward, backward, clipping, update; losses and right answers are added to `totals`, float64 (2,)."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._forward(self.module, inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        self.optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            self.totals.add_(torch.stack([loss.detach().double() * len(labels), right.double()]))

    @torch.no_grad()
    def evaluate(self, images: DeviceImages | None = None) -> tuple[float, float]:
        """Mean loss and accuracy over the test images, or over others."""
        test = self.test if images is None else images
        module = self._settled().eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for start in range(0, len(test), _EVALUATION_BATCH):
            inputs, labels = test.plain(start, start + _EVALUATION_BATCH)
            logits = self._forward(module, inputs)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])
        loss_sum, right = (float(value) for value in sums.cpu())
        self.module.train()
        return loss_sum / len(test), right / len(test)

    def _forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Logits in float32."""
        with self._autocast():
            logits: Tensor = module(inputs)
        return logits.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def _settled(self) -> nn.Module:
        """The network, or a copy of it whose batch norms have the statistics of training images."""
        if self._settling is None:
            return self.module
        module, size = copy.deepcopy(self.module), self.config.batch_size
        whole = max(len(self._settling) // size * size, 1)  # a last batch of one image has no variance
        batches = (self._settling.plain(start, start + size)[0] for start in range(0, whole, size))
        seed = derived_seed("fine-tuning statistics", self.seed, len(self.curve))
        with seeded(seed, self.device), self._autocast():
            update_bn(batches, module)
        return module


def _find_device(name: str) -> torch.device:
    """The device of a name; "cuda" is the current one.

    Raises:
        FineTuneError: If there is none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise FineTuneError(f"device {name!r} cannot be used: {error}; use 'cpu'") from error


def _make_optimizer(config: FineTuneConfig, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run. On CUDA the learning rate is a tensor, so that a captured step can read it."""
    on_cuda = device.type == "cuda"
    kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if on_cuda:
        kwargs |= {"lr": torch.tensor(config.lr, device=device), "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), capturable=on_cuda, **kwargs)
    return torch.optim.SGD(network.parameters(), momentum=config.momentum, **kwargs)
