"""One network on its way through training: steps, measurements, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.batches import DeviceImages, epoch_picks
from timm_ghn.finetune.config import FineTuneConfig, learning_rate
from timm_ghn.finetune.data import Task, classes_in_turn
from timm_ghn.finetune.network import Network
from timm_ghn.finetune.steps import CapturedStep, EagerStep, Step, forward, make_optimizer, set_learning_rate
from timm_ghn.seeding import derived_seed, seeded
from timm_ghn.storage.atomic import write_atomically

_EVALUATION_BATCH = 500
_SETTLING_IMAGES = 2048


@dataclass(frozen=True)
class Execution:
    """How a run is computed; none of it is meant to change the result.

    Attributes:
        device: Where.
        channels_last: Whether images and weights have this memory format.
        capture: Whether steps are replayed as CUDA graphs; only on CUDA.
        compile: Whether the network goes through `torch.compile`.
        evaluate_every: Epochs between two measurements; 0 for none. The last epoch is always measured.
        evaluate_at: Further epochs after which to measure.
        keep_weights: Whether the weights of a finished run are kept beside its result.
        save_seconds: Seconds between two checkpoints.
    """

    device: str = "cpu"
    channels_last: bool = True
    capture: bool = True
    compile: bool = False
    evaluate_every: int = 10
    evaluate_at: tuple[int, ...] = ()
    keep_weights: bool = False
    save_seconds: float = 60.0


def _find_device(name: str) -> torch.device:
    """The device of a name; "cuda" is the current one.

    Raises:
        FineTuneError: If there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FineTuneError(f"device {name!r}: {error}") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise FineTuneError(f"device {name!r}: there is no CUDA device, or torch was built without CUDA; use 'cpu'")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True)
class Point:
    """A point of the curves.

    Attributes:
        epoch: Finished epochs.
        lr: Learning rate of the last one.
        train_loss: Mean loss over its augmented training images.
        train_accuracy: Share of them that was right.
        loss: Mean loss over the test images; None where it was not measured.
        accuracy: Share of them that was right; likewise.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    loss: float | None = None
    accuracy: float | None = None


@dataclass
class Progress:
    """What a run has come to.

    Attributes:
        epoch: Finished epochs.
        seconds: Time of training, without measurements.
        curve: One point an epoch.
        diverged: Whether the loss stopped being a number; the run then ended.
    """

    epoch: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    diverged: bool = False


class Run:
    """Trains one network.

    Args:
        config: Settings.
        seed: Decides the order and augmentation of images, and what the network draws.
        task: Images.
        network: What to train; moved to the device.
        execution: How to compute.
    """

    def __init__(
        self, config: FineTuneConfig, seed: int, task: Task, network: Network, execution: Execution | None = None
    ) -> None:
        self.config, self.seed, self.network = config, seed, network
        self.execution = execution or Execution()
        self.device = _find_device(self.execution.device)
        last = self.execution.channels_last
        self.module: nn.Module = network.module.to(self.device)
        if last:
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images = DeviceImages.of(task.train, task, config, self.device, padding=config.padding, channels_last=last)
        self.test = DeviceImages.of(task.test, task, config, self.device, padding=0, channels_last=last)
        self._settling: DeviceImages | None = None
        if config.settle and any(isinstance(module, _BatchNorm) for module in self.module.modules()):
            some = task.train.subset(classes_in_turn(task.train.labels, _SETTLING_IMAGES))
            self._settling = DeviceImages.of(some, task, config, self.device, padding=0, channels_last=last)
        self.optimizer = make_optimizer(config, self.module, self.device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.progress = Progress()
        self._wait_for_transfers()
        trained: Any = torch.compile(self.module) if self.execution.compile else self.module
        eager = EagerStep(trained, self.optimizer, self.images, config, self.totals)
        captured = self.stream is not None and self.execution.capture
        self.step: Step = CapturedStep(eager, self.stream) if captured and self.stream is not None else eager

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to train."""
        return self.progress.diverged or self.progress.epoch >= self.config.epochs

    # Training

    def epoch(self) -> Iterator[None]:
        """Train for an epoch; yields after every step, so that several runs can take turns."""
        epoch = self.progress.epoch
        with self.on_stream():
            picks = epoch_picks(self.config, len(self.images), self.seed, epoch).to(self.device, non_blocking=True)
            set_learning_rate(self.optimizer, learning_rate(self.config, epoch))
            self.totals.zero_()
        self.module.train()
        started = time.perf_counter()
        away = 0.0
        for index, part in enumerate(self._parts(picks)):
            self.train_on(part, epoch, index)
            left = time.perf_counter()
            yield
            away += time.perf_counter() - left
        self._finish_epoch(started + away)

    def train_on(self, picks: Tensor, epoch: int, index: int) -> None:
        """One step, the `index`-th of an epoch.

        Args:
            picks: Columns (4, B) of `epoch_picks`, on the device.
        """
        # What dropout and stochastic depth draw depends on seed, epoch and step alone.
        with self.on_stream(), seeded(derived_seed("fine-tuning step", self.seed, epoch, index), self.device):
            self.step(picks)

    def _parts(self, picks: Tensor) -> list[Tensor]:
        """The table of an epoch in batches; a last image alone joins the batch before (batch norms need two)."""
        parts = list(torch.split(picks, self.config.batch_size, dim=1))
        if len(parts) > 1 and parts[-1].shape[1] == 1:
            parts[-2:] = [torch.cat(parts[-2:], dim=1)]
        return parts

    def _finish_epoch(self, started: float) -> None:
        """Read what the epoch came to, and measure if it is time."""
        with self.on_stream():
            loss, right = (float(value) / len(self.images) for value in self.totals.cpu())
        progress = self.progress
        progress.seconds += time.perf_counter() - started
        progress.epoch += 1
        progress.diverged = not math.isfinite(loss)
        measured: tuple[float, float] | tuple[None, None] = (None, None)
        if self._is_measured():
            measured = self.evaluate()
            progress.diverged = progress.diverged or not math.isfinite(measured[0])
        rate = learning_rate(self.config, progress.epoch - 1)
        progress.curve.append(Point(progress.epoch, rate, loss, right, *measured))

    def _is_measured(self) -> bool:
        """Whether accuracy is measured after the epoch that has just ended."""
        epoch, every = self.progress.epoch, self.execution.evaluate_every
        return self.is_done or epoch in self.execution.evaluate_at or (every > 0 and epoch % every == 0)

    @torch.no_grad()
    def evaluate(self, images: DeviceImages | None = None) -> tuple[float, float]:
        """Mean loss and accuracy over the test images, or over others."""
        test = self.test if images is None else images
        module = self._settled().eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self.on_stream():
            for start in range(0, len(test), _EVALUATION_BATCH):
                inputs, labels = test.plain(start, start + _EVALUATION_BATCH)
                logits = forward(module, inputs, self.config)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])
            loss_sum, right = (float(value) for value in sums.cpu())
        self.module.train()
        return loss_sum / len(test), right / len(test)

    def _settled(self) -> nn.Module:
        """The network, or a copy of it whose batch norms have the statistics of training images."""
        if self._settling is None:
            return self.module
        module, size = copy.deepcopy(self.module), self.config.batch_size
        whole = max(len(self._settling) // size * size, 1)  # a last batch of one image has no variance
        batches = (self._settling.plain(start, start + size)[0] for start in range(0, whole, size))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        seed = derived_seed("fine-tuning statistics", self.seed, self.progress.epoch)
        with self.on_stream(), seeded(seed, self.device), autocast:
            update_bn(batches, module)
        return module

    def _wait_for_transfers(self) -> None:
        """Let the run's own stream begin after what was put on the device before."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Let what follows run on this run's own CUDA stream, if it has one."""
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    # Checkpoints

    def save(self, path: Path) -> None:
        """Write everything that a run needs to go on, atomically."""
        buffer = io.BytesIO()
        progress = self.progress
        state = {
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": progress.epoch,
            "seconds": progress.seconds,
            "curve": [asdict(point) for point in progress.curve],
            "config": self.config.to_dict(),
            "seed": self.seed,
        }
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            FineTuneError: If it is damaged or of another run.
        """
        try:
            state: Mapping[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            if state["seed"] != self.seed or FineTuneConfig.from_dict(state["config"]) != self.config:
                raise FineTuneError(f"{path} is the checkpoint of a run with other settings")
            self.module.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._wait_for_transfers()
            curve = [Point(**point) for point in state["curve"]]
            self.progress = Progress(int(state["epoch"]), float(state["seconds"]), curve)
        except FineTuneError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise FineTuneError(f"{path} is damaged: {error}; delete it to start this run again") from error
