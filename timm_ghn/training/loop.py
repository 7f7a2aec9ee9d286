"""The training of a GHN: several architectures a step, their losses on images, one update of the GHN.

Each process of a `torchrun` group takes its share of a step's architectures; gradients are averaged. What a step
draws depends on (seed, step, process) alone, so a run that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from timm_ghn.errors import TrainingError
from timm_ghn.ghn.checkpoint import write_safetensors
from timm_ghn.ghn.model import GHN
from timm_ghn.training.architectures import ArchitectureSpec
from timm_ghn.training.checkpoint import Checkpoint
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import BatchSampler, ImageSet, Splits, sample_batch
from timm_ghn.training.evaluate import Evaluation, call_with_features, evaluate
from timm_ghn.training.metrics import Clock, Meter
from timm_ghn.training.networks import build
from timm_ghn.training.objective import Objective, cluster_images, group_classes, kernel_penalties, ridge_loss
from timm_ghn.training.optimizer import make_optimizer
from timm_ghn.training.pool import ArchitecturePool, PoolMember
from timm_ghn.training.processes import join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_CHECKPOINT_FILES = ("ghn-*.safetensors", "average-*.safetensors", "optimizer-*.pt")


class Trainer:
    """Trains a GHN on a pool of architectures.

    Args:
        ghn: GHN to train; it is moved to the device of the processes.
        config: The run.
        splits: Images.
        pool: Architectures to train on.
        eval_pool: Other architectures.
        out: Folder of checkpoints and metrics.
        processes: What `join_processes` gives; this process alone, on the CPU, by default.
        easy: Images of the easy task to begin with; clusters of the training images by default.
    """

    def __init__(
        self,
        ghn: GHN,
        config: TrainConfig,
        splits: Splits,
        pool: ArchitecturePool,
        eval_pool: ArchitecturePool,
        out: Path,
        processes: Accelerator | None = None,
        easy: ImageSet | None = None,
    ) -> None:
        self.processes = join_processes() if processes is None else processes
        self.device = self.processes.device
        self.ghn = ghn.to(self.device)
        self.config = config
        self.splits = splits
        self.pool = pool
        self.eval_pool = eval_pool
        self.out = out
        self.rank, self.world = self.processes.process_index, self.processes.num_processes
        if config.meta_batch % self.world:
            raise TrainingError(f"{config.meta_batch} architectures a step cannot be shared by {self.world} processes")
        classes = ghn.config.num_classes
        if classes != len(splits.train.classes):
            raise TrainingError(f"the GHN has {classes} classes, the images have {len(splits.train.classes)}")
        groups = group_classes(splits.train, config.groups, config.seed)
        self.objective = Objective(classes, splits.train_classes, groups, config.smoothing, self.device)
        self.plain_objective = Objective(classes, splits.train_classes, groups, 0.0, self.device)
        # Its backward pass averages gradients over the processes; the GHN itself where there is one process.
        self._shared_ghn: nn.Module = self.processes.prepare(ghn)
        self.optimizer = make_optimizer(ghn, config.optimizer, config.lr, config.weight_decay)
        self.sampler = BatchSampler(splits.train)
        limit = min(config.clusters, len(splits.train_classes))
        easy = cluster_images(splits.train, limit, config.seed) if easy is None else easy
        if len(easy.classes) > len(splits.train_classes):
            raise TrainingError(f"the easy task has more classes ({len(easy.classes)}) than are trained on")
        self.easy_sampler = BatchSampler(easy)
        # The classes of the easy task borrow the first rows of the classifier.
        borrowed = splits.train_classes[: len(easy.classes)]
        self.easy_objective = Objective(classes, borrowed, torch.zeros_like(groups), device=self.device)
        self._networks: dict[ArchitectureSpec, nn.Module] = {}
        self.average = copy.deepcopy(ghn).requires_grad_(False) if config.average else None
        self.step = 0
        self.skipped = 0
        self.elapsed = 0.0
        self._skipped_in_a_row = 0
        self._started = time.monotonic()
        self.reset_meters()

    def reset_meters(self) -> None:
        """Count from here on."""
        self.meters = {"classes": Meter(), "easy": Meter()}
        self.clock = Clock()

    # Schedules

    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock."""
        share = self.step / self.config.steps
        if self.config.minutes is not None:
            share = max(share, (self.elapsed + time.monotonic() - self._started) / (60 * self.config.minutes))
        return min(1.0, share) if self.config.minutes is None else self._agree(min(1.0, share))

    def _agree(self, value: float) -> float:
        """The first process's value, in all processes."""
        if self.world == 1:
            return value
        of_all = self.processes.gather(torch.tensor([value], dtype=torch.float64, device=self.device))
        return float(of_all[0])

    def learning_rate(self, progress: float) -> float:
        """Warm-up over steps, then the schedule of the configuration."""
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup))
        return self.config.lr * warm * self.config.rate_factor(progress)

    # One step

    def train_step(self, progress: float) -> bool:
        """Draw architectures and images, and update the GHN.

        Returns:
            Whether the GHN was updated; not if a gradient was not finite.
        """
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(_step_seed(self.config.seed, self.step, self.rank))
        count = self.config.meta_batch // self.world
        available = self.config.num_architectures(progress, len(self.pool))
        members = [self.pool[int(i)] for i in torch.randint(available, (count,), generator=generator)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress)
        self.ghn.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.clock.part("ghn_forward"):
            predictions = self._shared_ghn([member.graph for member in members])
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for member, predicted in zip(members, predictions, strict=True):
            grads = self._network_gradients(member, predicted, generator, progress)
            for name, tensor in predicted.items():
                outputs.append(tensor)
                # All processes wait for the gradients of all predictions, those of a network left out as well.
                gradients.append(grads[name] / count if name in grads else torch.zeros_like(tensor))
        with self.clock.part("ghn_backward"):
            torch.autograd.backward(outputs, gradients)
        with self.clock.part("update"):
            updated = self._update()
        self.clock.steps += 1
        self.clock.networks += count
        self.clock.images += count * self.config.batch_size
        self.clock.seconds += time.perf_counter() - started
        return updated

    def _network_gradients(
        self, member: PoolMember, predicted: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, Tensor]:
        """Gradient of one network's loss by its predicted parameters; empty if it is not finite."""
        config = self.config
        easy = float(torch.rand((), generator=generator)) < config.easy_share(progress)
        fitted = bool(config.ridge_weight) and (not easy or config.easy_ways > 0)
        sampler = self.easy_sampler if easy else self.sampler
        with self.clock.part("images"):
            images, index = sample_batch(
                sampler,
                config.batch_size,
                generator,
                self.device,
                ways=config.easy_ways if easy else config.ways,
                padding=config.padding,
            )
        model = self._network(member.spec)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in predicted.items()}
        amp = torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp)
        with self.clock.part("networks_forward"), amp:
            logits, features = call_with_features(model, leaves, images)
        labels = sampler.data.labels[index].to(self.device)
        if easy:
            score = self.easy_objective(logits, self.easy_objective.active[labels])
        else:
            score = self.objective(logits, labels, config.coarse_weight(progress))
        loss = config.head_weight * score.loss
        if fitted and bool(torch.isfinite(features).all()):
            ridge, accuracy = ridge_loss(features, labels)
            loss = loss + config.ridge_weight * ridge
        if not bool(torch.isfinite(loss)):
            return {}
        with self.clock.part("networks_backward"):
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        norm = torch.stack([grad.norm() for grad in found.values()]).norm()
        if not bool(torch.isfinite(norm)):
            return {}
        meter = self.meters["easy" if easy else "classes"]
        meter.add(score)
        if fitted:
            meter.ridge_loss += float(ridge.detach())
            meter.ridge_accuracy += accuracy
        scale = (config.network_clip / (norm + 1e-12)).clamp(max=1.0)
        found = {name: grad * scale for name, grad in found.items()}
        self._add_penalties(leaves, found)
        return found

    def _network(self, spec: ArchitectureSpec) -> nn.Module:
        """The network of a specification, built once. What is not predicted depends on the specification alone."""
        if spec not in self._networks:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._networks[spec] = build(spec, self.ghn.config.num_classes).to(self.device)
        return self._networks[spec]

    def _add_penalties(self, leaves: Mapping[str, Tensor], grads: dict[str, Tensor]) -> None:
        config = self.config
        if not config.norm_penalty and not config.correlation_penalty:
            return
        scale, cosine = kernel_penalties(leaves)
        count = self.config.meta_batch // self.world
        self.clock.norm_penalty += float(scale.detach()) / count
        self.clock.correlation_penalty += float(cosine.detach()) / count
        total = config.norm_penalty * scale + config.correlation_penalty * cosine
        if not total.requires_grad:
            return
        penalties = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, penalties, strict=True):
            if grad is not None:
                grads[name] = grads[name] + grad if name in grads else grad

    def _update(self) -> bool:
        """Clip the gradients and step; skip the step if they are not finite."""
        parameters = [p for p in self.ghn.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        if not bool(torch.isfinite(norm)):
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= self.config.max_skipped:
                raise TrainingError(
                    f"the gradient was not finite in {self._skipped_in_a_row} steps in a row: lower the learning rate"
                )
            return False
        self._skipped_in_a_row = 0
        self.clock.gradient += float(norm)
        self.optimizer.step()
        self._update_average()
        return True

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the running average; it follows faster in the first steps."""
        if self.average is None:
            return
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.parameters(), self.ghn.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    # The run

    def run(self) -> Evaluation:
        """Train to the end of the configuration, and evaluate. SIGTERM ends the run early, with a checkpoint.

        Raises:
            TrainingError: If gradients are not finite again and again.
        """
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._started = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        with (
            _termination() as asked,
            tqdm(total=config.steps, initial=self.step, disable=self.rank > 0, mininterval=5) as bar,
        ):
            while (progress := self.progress()) < 1 and self.step != config.stop_after:
                if self._agree(float(asked.is_set())):
                    break
                self.train_step(progress)
                self.step += 1
                bar.update()
                if self.step % config.log_every == 0:
                    self._log(bar, progress)
                if self.step % config.eval_every == 0 and self.step < config.steps:
                    self._evaluate()
                if self.step % config.save_every == 0:
                    self.save()
        self.save()
        return self._evaluate()

    def _log(self, bar: Any, progress: float) -> None:
        meters, clock = self.meters, self.clock
        self.reset_meters()
        if self.rank > 0:
            return
        row = {
            "step": self.step,
            "progress": progress,
            "seconds": self.elapsed + time.monotonic() - self._started,
            "lr": self.optimizer.param_groups[0]["lr"],
            "coarse": self.config.coarse_weight(progress),
            "architectures": self.config.num_architectures(progress, len(self.pool)),
            "skipped": self.skipped,
            **meters["classes"].summary(),
            **{f"easy_{name}": value for name, value in meters["easy"].summary().items()},
            **clock.summary(),
        }
        self._write_metrics(row)
        shown = {name: f"{row[name]:.3f}" for name in ("accuracy", "ridge_accuracy", "easy_accuracy") if name in row}
        bar.set_postfix(**shown, skipped=self.skipped)

    def _evaluate(self) -> Evaluation:
        """Evaluate in the first process while the others wait."""
        config = self.config
        result = Evaluation(math.nan, math.nan, math.nan, math.nan, {})
        if self.rank == 0:
            result = evaluate(
                self.average or self.ghn,
                self.eval_pool,
                self.splits,
                self.plain_objective,
                num_images=config.eval_images,
                seed=config.seed,
                device=self.device,
                easy=(self.easy_sampler.data, self.easy_objective),
            )
            self._write_metrics({"step": self.step, **result.to_dict()})
            logger.info("step %d: held-out architectures: %s", self.step, result)
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
        self.out.mkdir(parents=True, exist_ok=True)
        weights, state = f"ghn-{self.step:07d}.safetensors", f"optimizer-{self.step:07d}.pt"
        write_safetensors(self.ghn, self.out / weights, {"step": str(self.step)})
        average = f"average-{self.step:07d}.safetensors" if self.average is not None else None
        if self.average is not None and average is not None:
            write_safetensors(self.average, self.out / average, {"step": str(self.step)})
        temporary = self.out / f".{state}.tmp"
        torch.save({"optimizer": self.optimizer.state_dict()}, temporary)
        os.replace(temporary, self.out / state)
        elapsed = self.elapsed + time.monotonic() - self._started
        Checkpoint(self.step, self.skipped, elapsed, weights, average, state, self.config).write(self.out)
        for old in [path for pattern in _CHECKPOINT_FILES for path in self.out.glob(pattern)]:
            if old.name not in (weights, average, state):
                old.unlink(missing_ok=True)

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
            weights = load_file(self.out / latest.weights, device=str(self.device))
            state = torch.load(self.out / latest.optimizer, map_location=self.device, weights_only=True)
            self.ghn.load_state_dict(weights)
            if self.average is not None:
                self.average.load_state_dict(load_file(self.out / latest.exported, device=str(self.device)))
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
