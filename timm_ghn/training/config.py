"""The configuration of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from timm_ghn.errors import TrainingError
from timm_ghn.training.optimizer import OPTIMIZERS
from timm_ghn.training.sampling import SamplerConfig

_COUNTS = (
    "steps",
    "meta_batch",
    "groups",
    "clusters",
    "pretext_images",
    "pool_size",
    "pool_start",
    "eval_pool_size",
    "eval_every",
    "eval_images",
    "save_every",
    "log_every",
    "max_skipped",
)
"""Settings that must be positive."""


EASY_TASKS = ("pretext", "clusters")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the course of a training run.

    Attributes:
        steps: Number of updates.
        stop_after: If given, training ends at this step, while the schedules stay those of `steps`.
        minutes: If given, the schedules follow the clock and training ends after so many minutes (or `steps`).
            Such a run cannot be repeated exactly.
        meta_batch: Architectures a step, over all processes.
        batch_size: Images that each of them sees, all different.
        optimizer: "adamw", or "muon" for orthogonalized updates of the GHN's matrices, see
            `timm_ghn.training.optimizer`.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
        schedule: What follows the warm-up: "cosine" to zero at the end of the run, or "constant", for runs whose end is
            open (use it with `average`).
        cooldown: Share of the run at its end over which a constant learning rate falls linearly to zero.
        average: Decay, for each step, of a running average of the weights, which is what is evaluated and exported;
            0 for none.
        weight_decay: AdamW's.
        clip: Largest norm of the GHN's gradient.
        network_clip: Largest norm of the gradient by one network's predicted parameters: one network that explodes
            does not drown the others.
        smoothing: Label smoothing.
        coarse_until: Share of the run after which the loss is over classes alone; before, the weight of groups of
            classes falls linearly from `coarse_from` on.
        coarse_from: Share of the run up to which the loss is over groups of classes alone.
        coarse_rest: Weight of the groups that stays until the end.
        groups: Number of groups of classes.
        ways: Classes in a batch of images; 0 draws images of any class.
        head_weight: Weight of the loss of the predicted classifier.
        ridge_weight: Weight of the loss of a classifier fitted to half of a batch (needs `ways`).
        easy: The easy task that training begins with: "pretext" (crops of photographs and drawings, see
            `timm_ghn.training.pretext`) or "clusters" (clusters of the images by how they look).
        easy_ways: Classes in a batch of the easy task; 0 draws images of any class, and fits no classifier to them.
        clusters: Number of clusters.
        pretext_images: Images of each class of the pretext.
        easy_from: Share of the run up to which batches are of the easy task, never of the classes.
        easy_until: Share of the run from which they are so with probability `easy_rest`; linear in between.
        easy_rest: See there.
        pool_start: Architectures to begin with: the first of the pool.
        pool_full: Share of the run from which the whole pool is used; the number grows exponentially up to there.
        kernels: What the GHN does to the blocks that it emits, see `timm_ghn.ghn.config.GHNConfig`.
        share: How different the kernels of different nodes are to begin with, see `share_decoder`.
        norm_penalty: Weight of the penalty on predicted kernels that leave the scale of He's initialization.
        correlation_penalty: Weight of the penalty on correlated channels in predicted kernels.
        padding: Largest shift, in pixels, of augmented images.
        held_out_classes: Classes that the GHN never sees, for measuring.
        validation: Share of every class's images for validation.
        pool_size: Distinct architectures to train on.
        eval_pool_size: Other architectures to evaluate on.
        eval_every: Steps between evaluations.
        eval_images: Images an architecture in an evaluation.
        save_every: Steps between checkpoints.
        log_every: Steps between lines in the metrics file.
        seed: Seed of everything drawn: what step i of process r draws depends on (seed, i, r) alone.
        num_threads: Threads a process; None leaves torch's choice.
        amp: Whether networks run in bfloat16 (CUDA).
        compile: Whether the conditioning of kernels is compiled.
        max_skipped: Steps with non-finite gradients in a row after which training gives up.
        sampler: What architectures are drawn.
    """

    steps: int = 10_000
    stop_after: int | None = None
    minutes: float | None = None
    meta_batch: int = 8
    batch_size: int = 48
    optimizer: str = "adamw"
    lr: float = 1e-3
    warmup: int = 200
    schedule: str = "cosine"
    cooldown: float = 0.0
    average: float = 0.0
    weight_decay: float = 1e-4
    clip: float = 5.0
    network_clip: float = 5.0
    smoothing: float = 0.0
    coarse_from: float = 0.05
    coarse_until: float = 0.4
    coarse_rest: float = 0.0
    groups: int = 20
    ways: int = 8
    head_weight: float = 1.0
    ridge_weight: float = 1.0
    easy: str = "clusters"
    easy_ways: int = 8
    clusters: int = 64
    pretext_images: int = 900
    easy_from: float = 0.1
    easy_until: float = 0.5
    easy_rest: float = 0.15
    pool_start: int = 8
    pool_full: float = 0.5
    kernels: str = "raw"
    share: float = 0.3
    norm_penalty: float = 0.0
    correlation_penalty: float = 0.0
    padding: int = 2
    held_out_classes: int = 50
    validation: float = 0.04
    pool_size: int = 1500
    eval_pool_size: int = 18
    eval_every: int = 500
    eval_images: int = 240
    save_every: int = 250
    log_every: int = 50
    seed: int = 0
    num_threads: int | None = 1
    amp: bool = False
    compile: bool = False
    max_skipped: int = 50
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size < 2:
            raise TrainingError("batch_size must be at least 2: batch norms use the statistics of the batch")
        if self.ridge_weight and self.ways < 2:
            raise TrainingError("ridge_weight needs batches of at least 2 ways")
        if self.easy not in EASY_TASKS:
            raise TrainingError(f"easy is '{self.easy}', not one of {', '.join(EASY_TASKS)}")
        if self.optimizer not in OPTIMIZERS:
            raise TrainingError(f"optimizer is '{self.optimizer}', not one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule is '{self.schedule}', not one of {', '.join(SCHEDULES)}")
        if not 0 <= self.cooldown <= 1:
            raise TrainingError(f"cooldown is a share of the run, from 0 to 1, not {self.cooldown}")
        if not 0 <= self.average < 1:
            raise TrainingError(f"average must be at least 0 and less than 1, not {self.average}")
        if not self.lr > 0:
            raise TrainingError(f"lr must be positive, not {self.lr}")
        if not 0 <= self.coarse_from <= self.coarse_until <= 1:
            raise TrainingError("the curriculum needs 0 <= coarse_from <= coarse_until <= 1")
        if not 0 <= self.easy_from <= self.easy_until <= 1:
            raise TrainingError("the curriculum needs 0 <= easy_from <= easy_until <= 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Read `to_dict`'s form.

        Raises:
            TrainingError: If the data is not of that form.
        """
        try:
            return cls(**{**data, "sampler": SamplerConfig(**data["sampler"])})
        except (KeyError, TypeError) as error:
            raise TrainingError(f"not a training configuration: {error}") from error

    def rate_factor(self, progress: float) -> float:
        """What the peak learning rate is multiplied with at a share of the run, after the warm-up."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (1 - progress) / self.cooldown) if self.cooldown else 1.0

    def coarse_weight(self, progress: float) -> float:
        """Weight of the groups of classes at a share of the run."""
        return _ramp(progress, self.coarse_from, self.coarse_until, self.coarse_rest)

    def easy_share(self, progress: float) -> float:
        """Probability that a batch is about clusters of images, at a share of the run."""
        return _ramp(progress, self.easy_from, self.easy_until, self.easy_rest)

    def num_architectures(self, progress: float, available: int) -> int:
        """How many of the pool's architectures are used at a share of the run."""
        if progress >= self.pool_full or self.pool_start >= available:
            return available
        return int(self.pool_start * (available / self.pool_start) ** (progress / self.pool_full))


def _ramp(progress: float, start: float, stop: float, rest: float) -> float:
    """1 until `start`, `rest` from `stop` on, linear in between."""
    if progress <= start:
        return 1.0
    if progress >= stop:
        return rest
    return 1.0 - (progress - start) / (stop - start) * (1.0 - rest)


PRESETS: dict[str, TrainConfig] = {
    "bundled": TrainConfig(
        steps=9800,
        batch_size=64,
        optimizer="muon",
        lr=2e-3,
        warmup=30,
        schedule="constant",
        cooldown=0.25,
        average=0.99,
        easy="pretext",
        easy_ways=0,
        easy_from=0.1,
        easy_until=0.18,
        easy_rest=0.3,
        coarse_from=0.1,
        coarse_until=0.33,
        coarse_rest=0.2,
        pool_start=24,
        pool_full=0.16,
        kernels="orthogonal",
        share=0.5,
        pool_size=480,
        eval_every=250,
        save_every=50,
        log_every=20,
        sampler=SamplerConfig(
            families={"basic": 3, "bottleneck": 2, "inverted": 2, "convnext": 4, "attention": 3},
            style="common",
            max_macs=6e6,
            max_outputs=1.8e5,
            max_layers=40,
        ),
    ),
    "smoke": replace(
        TrainConfig(), steps=20, warmup=5, pool_size=16, eval_pool_size=4, eval_every=10, save_every=10, log_every=5
    ),
}
"""Named configurations of `timm-ghn train`: that of the bundled file, and one to try the command."""
