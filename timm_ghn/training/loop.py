"""The training of a GHN: several networks an update, their losses on images, one step of the optimizer.

Each process of a `torchrun` group takes its share of an update's networks; gradients are averaged. What an update draws
depends on (seed, step, process) alone, so a run that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_ghn.errors import TrainingError
from timm_ghn.ghn.checkpoint import read, write_safetensors
from timm_ghn.ghn.model import GHN
from timm_ghn.storage.atomic import save_atomically
from timm_ghn.training.architectures import Network
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.conditioned import as_users_get
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import Splits, take_batch
from timm_ghn.training.dormant import revive
from timm_ghn.training.evaluate import Evaluation, evaluate
from timm_ghn.training.metrics import Meter
from timm_ghn.training.objective import Objective
from timm_ghn.training.optimizer import make_optimizer
from timm_ghn.training.processes import join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_NETWORK_CLIP, _CLIP = 0.1, 5.0
"""Largest norms of the gradient by one network's predicted parameters, so that one that explodes does not drown the
others, and of the GHN's."""
MAX_SKIPPED = 50
"""Updates in a row without a finite gradient after which training gives up."""
_REVIVED_BY = 64
"""How many networks tell which units are dormant."""
_CHECKPOINT_FILES = ("ghn-*.safetensors", "average-*.safetensors", "optimizer-*.pt")


@dataclass(eq=False)
class Trainer:
    """Trains a GHN on a stream of networks.

    Args:
        ghn: GHN to train; it is moved to the device of the processes.
        config: The run.
        splits: Images.
        networks: The networks to train on, by number.
        eval_networks: Gives other networks, of which the first evaluation needs all.
        out: Folder of checkpoints and metrics; made if it is not there.
        processes: What `join_processes` gives; this process alone, on the CPU, by default.
    """

    ghn: GHN
    config: TrainConfig
    splits: Splits
    networks: Callable[[int], Network]
    eval_networks: Callable[[], Iterable[Network]]
    out: Path
    processes: Accelerator = field(default_factory=join_processes)

    def __post_init__(self) -> None:
        ghn, config, splits = self.ghn, self.config, self.splits
        self.device = self.processes.device
        ghn.to(self.device)
        self.rank, self.world = self.processes.process_index, self.processes.num_processes
        if config.meta_batch % self.world:
            raise TrainingError(f"{config.meta_batch} networks an update cannot be shared by {self.world} processes")
        if ghn.config.num_classes != splits.num_outputs:
            raise TrainingError(
                f"the GHN has {ghn.config.num_classes} outputs, images and teacher have {splits.num_outputs}: "
                "give those that it was trained with"
            )
        self.objective = Objective(splits, self.device)
        # Its backward pass averages gradients over the processes; the GHN itself where there is one process.
        self._shared_ghn: nn.Module = self.processes.prepare(ghn)
        self.optimizer = make_optimizer(ghn, config.lr)
        self.average = copy.deepcopy(ghn).requires_grad_(False)
        self.step = 0
        self.skipped = 0
        self.elapsed = 0.0
        self._skipped_in_a_row = 0
        self._started = time.monotonic()
        self.meter = Meter()
        self.out.mkdir(parents=True, exist_ok=True)

    # One update

    def train_step(self) -> None:
        """Draw networks and images, and update the GHN unless a gradient is not finite."""
        generator = torch.Generator().manual_seed(_step_seed(self.config.seed, self.step, self.rank))
        count = self.config.meta_batch // self.world
        start, stop = self.config.in_use(self.step)
        with self.meter.part("drawing"):
            networks = [self.networks(int(i)) for i in torch.randint(start, stop, (count,), generator=generator)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.step)
        self.ghn.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.meter.part("ghn_forward"):
            predictions = self._shared_ghn([network.graph for network in networks])
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for network, predicted in zip(networks, predictions, strict=True):
            grads = self._network_gradients(network, predicted, generator)
            for name, tensor in predicted.items():
                outputs.append(tensor)
                # All processes wait for the gradients of all predictions, those of a network left out as well.
                gradients.append(grads[name] / count if name in grads else torch.zeros_like(tensor))
        with self.meter.part("ghn_backward"):
            torch.autograd.backward(outputs, gradients)
        with self.meter.part("update"):
            self._update()
        self.meter.steps += 1

    def _network_gradients(
        self, network: Network, predicted: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Gradient of one network's loss by its predicted parameters; empty if it is not finite."""
        with self.meter.part("images"):
            index = torch.randint(len(self.splits.train), (self.config.batch_size,), generator=generator)
            batch = take_batch(self.splits.train, index, self.device, generator)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in predicted.items()}
        with self.meter.part("networks_forward"):
            given = as_users_get(leaves, network.assignments, self.ghn.config, self.step)
            loss, seen = self.objective(network(given, batch.images)[0], batch)
        if not bool(torch.isfinite(loss)):
            return self._left_out(network)
        with self.meter.part("networks_backward"):
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        norm = torch.stack([grad.norm() for grad in found.values()]).norm()
        if not bool(torch.isfinite(norm)):
            return self._left_out(network)
        self.meter.add({**seen, "left_out": 0.0, "network_gradient": float(norm)})
        scale = (_NETWORK_CLIP / (norm + 1e-12)).clamp(max=1.0)
        return {name: grad * scale for name, grad in found.items()}

    def _left_out(self, network: Network) -> dict[str, Tensor]:
        self.meter.add({"left_out": 1.0})
        logger.warning("step %d: the loss of %s is not finite; it is left out", self.step, network.architecture)
        return {}

    def _update(self) -> None:
        """Clip the gradients and step; skip the step if they are not finite."""
        parameters = [p for p in self.ghn.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, _CLIP)
        if not bool(torch.isfinite(norm)) or not bool(norm):
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MAX_SKIPPED:
                raise TrainingError(
                    f"no gradient was finite in {self._skipped_in_a_row} updates in a row: lower the learning rate"
                )
            return
        self._skipped_in_a_row = 0
        self.meter.add({"gradient": float(norm)})
        self.optimizer.step()
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the running average; it follows faster in the first steps."""
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.ghn.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    def _revive(self) -> None:
        """Let dormant units begin anew, the same in all processes."""
        seed = _step_seed(self.config.seed, self.step, 0)
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(*self.config.in_use(self.step), (_REVIVED_BY,), generator=generator)
        graphs = [self.networks(int(number)).graph for number in numbers]
        count = revive(self.ghn, self.average, self.optimizer, graphs, seed)
        if count and self.rank == 0:
            logger.info("step %d: %d dormant units of the decoder of vectors begin anew", self.step, count)

    # The run

    def run(self, *, stop_after: int | None = None, until: float | None = None) -> Evaluation | None:
        """Train to the end of the configuration, and evaluate. SIGTERM ends the run early, with a checkpoint.

        Args:
            stop_after: Step after which the run ends early, to be resumed.
            until: Time of `time.monotonic` from which no update begins.

        Returns:
            What networks that were never trained on reach; None in all processes but the first.

        Raises:
            TrainingError: If gradients are not finite again and again.
        """
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._started = time.monotonic()
        end = config.steps if stop_after is None else min(stop_after, config.steps)
        with (
            _termination() as asked,
            tqdm(total=config.steps, initial=self.step, disable=self.rank > 0, mininterval=5) as bar,
        ):
            while self.step < end and not self._agree(asked.is_set() or (until and time.monotonic() > until)):
                self.train_step()
                self.step += 1
                bar.update()
                if self.step % config.log_every == 0:
                    self._log(bar)
                if self.step % config.eval_every == 0 and self.step < config.steps:
                    self.evaluate()
                    self._revive()
                if self.step % config.save_every == 0:
                    self.save()
        self.save()
        return None if asked.is_set() else self.evaluate()

    def _agree(self, value: bool | float | None) -> bool:
        """The first process's value, in all processes."""
        return bool(self.processes.gather(torch.tensor([float(bool(value))], device=self.device))[0])

    def _log(self, bar: Any) -> None:
        summary, self.meter = self.meter.summary(), Meter()
        if self.rank > 0:
            return
        row = {
            "step": self.step,
            "seconds": round(self._seconds(), 1),
            "lr": self.optimizer.param_groups[0]["lr"],
            "networks": self.config.in_use(self.step)[1],
            "skipped": self.skipped,
            **{name: round(value, 4) for name, value in summary.items()},
        }
        self._write_metrics(row)
        shown = {name: f"{row[name]:.3f}" for name in ("loss", "cosine", "accuracy") if name in row}
        bar.set_postfix(**shown, skipped=self.skipped)

    def evaluate(self) -> Evaluation | None:
        """Evaluate in the first process while the others wait."""
        result = None
        if self.rank == 0:
            what = (self.eval_networks(), self.splits, self.objective, self.config)
            result = evaluate(self.average, *what, device=self.device)
            self._write_metrics({"step": self.step, "evaluation": asdict(result)})
            logger.info("step %d: other networks: %s", self.step, result.values)
        self.processes.wait_for_everyone()
        return result

    def _write_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    # Checkpoints

    def save(self) -> None:
        """Write weights and optimizer state, and then, atomically, the file that names them."""
        if self.rank > 0:
            return
        weights, average, state = files = [pattern.replace("*", f"{self.step:07d}") for pattern in _CHECKPOINT_FILES]
        for ghn, name in ((self.ghn, weights), (self.average, average)):
            write_safetensors(ghn, self.out / name, {"step": str(self.step)})
        save_atomically(self.out / state, lambda path: torch.save({"optimizer": self.optimizer.state_dict()}, path))
        Checkpoint(self.step, self.skipped, self._seconds(), weights, average, state, self.config).write(self.out)
        for old in [path for pattern in _CHECKPOINT_FILES for path in self.out.glob(pattern)]:
            if old.name not in files:
                old.unlink(missing_ok=True)

    def _seconds(self) -> float:
        """Time of training, that before the last checkpoint included."""
        return self.elapsed + time.monotonic() - self._started

    def resume(self) -> bool:
        """Go on from the folder's checkpoint.

        Returns:
            Whether there was one.

        Raises:
            TrainingError: If it is damaged.
        """
        latest = Checkpoint.read(self.out)
        if latest is None:
            return False
        try:
            # Onto the CPU first: the name of a process's device, cpu:0, is none that torch.load maps to.
            state = torch.load(self.out / latest.optimizer, map_location="cpu", weights_only=True)
            for ghn, name in ((self.ghn, latest.weights), (self.average, latest.average)):
                saved = read(self.out / name)
                ghn.load_state_dict(saved.state_dict())
                ghn.seen = saved.seen
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.skipped, self.elapsed = latest.step, latest.skipped, latest.elapsed
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            raise TrainingError(f"cannot resume from {self.out}: {error}") from error
        return True


@contextlib.contextmanager
def _termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in the main thread; the handler that was there before comes back."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for what a step of a process draws (splitmix64 of the three)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) % 2**63
