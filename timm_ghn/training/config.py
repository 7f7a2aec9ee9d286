"""The configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from timm_ghn.errors import CheckpointError, TrainingError
from timm_ghn.ghn.config import GHNConfig
from timm_ghn.training.families import FAMILIES

_POSITIVE = (
    "steps",
    "meta_batch",
    "first",
    "kept",
    "eval_every",
    "eval_images",
    "save_every",
    "log_every",
    "max_skipped",
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the course of a training run.

    Attributes:
        ghn: Hyperparameters of the GHN, but for its number of classes, which follows from images and teacher.
        steps: Number of updates. A run may go on beyond: resume it with more.
        cooldown: Updates at the end of `steps` over which the learning rate falls linearly to zero.
        meta_batch: Networks an update, over all processes.
        batch_size: Images that each of them sees, all different.
        lr: Learning rate after the warm-up.
        warmup: Updates over which the learning rate rises to `lr`.
        average: Decay, for each update, of a running average of the weights, which is what is evaluated and exported.
        weight_decay: Decoupled weight decay.
        clip: Largest norm of the GHN's gradient.
        network_clip: Largest norm of the gradient by one network's predicted parameters: one network that explodes
            does not drown the others.
        components: Weight of the loss of the outputs that name the teacher's components.
        classes: Weight of the cross-entropy of the outputs that name classes.
        whitening: What the teacher's components are divided by: the power of their standard deviation, 0 for nothing
            and 1 for components that all count the same.
        first: Networks to begin with.
        fresh: New networks an update.
        kept: Networks in use at a time: the latest ones.
        families: How often each family of networks is drawn; none that is left out.
        share: How different the kernels of different nodes are to begin with, see `share_decoder`.
        padding: Largest shift, in pixels, of augmented images.
        held_out_classes: Classes that the GHN never sees, for measuring.
        validation: Share of every class's images for validation.
        eval_every: Updates between evaluations.
        eval_images: Images a network in an evaluation.
        save_every: Updates between checkpoints.
        log_every: Updates between lines in the metrics file.
        seed: Seed of everything drawn: what update i of process r draws depends on (seed, i, r) alone.
        num_threads: Threads a process; None leaves torch's choice.
        max_skipped: Updates in a row without a finite gradient after which training gives up.
    """

    ghn: GHNConfig = field(default_factory=lambda: GHNConfig(kernels="orthogonal"))
    steps: int = 10_000
    cooldown: int = 0
    meta_batch: int = 8
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 30
    average: float = 0.995
    weight_decay: float = 1e-4
    clip: float = 5.0
    network_clip: float = 5.0
    components: float = 1.0
    classes: float = 0.0
    whitening: float = 0.5
    first: int = 24
    fresh: float = 0.25
    kept: int = 1024
    families: Mapping[str, float] = field(
        default_factory=lambda: {name: share for name, (share, _) in FAMILIES.items()}
    )
    share: float = 0.5
    padding: int = 2
    held_out_classes: int = 50
    validation: float = 0.04
    eval_every: int = 500
    eval_images: int = 400
    save_every: int = 50
    log_every: int = 20
    seed: int = 0
    num_threads: int | None = 1
    max_skipped: int = 50

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("cooldown", "components", "classes", "fresh", "held_out_classes"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.cooldown > self.steps:
            raise TrainingError(f"a cooldown of {self.cooldown} updates does not fit into a run of {self.steps}")
        if self.batch_size < 2:
            raise TrainingError("batch_size must be at least 2: batch norms use the statistics of the batch")
        if not self.components and not self.classes:
            raise TrainingError("components or classes must have a weight: there is nothing to learn")
        if not 0 <= self.average < 1:
            raise TrainingError(f"average must be at least 0 and less than 1, not {self.average}")
        if not self.lr > 0:
            raise TrainingError(f"lr must be positive, not {self.lr}")
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown:
            raise TrainingError(f"unknown families of networks: {', '.join(unknown)}")
        if not any(share > 0 for share in self.families.values()):
            raise TrainingError("no family of networks has a positive share")

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back."""
        return {**asdict(self), "ghn": self.ghn.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Read `to_dict`'s form.

        Raises:
            TrainingError: If the data is not of that form.
        """
        try:
            return cls(**{**data, "ghn": GHNConfig.from_dict(data["ghn"])})
        except (CheckpointError, KeyError, TypeError) as error:
            raise TrainingError(f"not a training configuration: {error}") from error

    def changed(self, other: TrainConfig) -> list[str]:
        """Names of the settings in which two configurations differ."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(other, entry.name)]

    def learning_rate(self, step: int) -> float:
        """The learning rate of an update, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        left = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * warm * max(0.0, left)

    def in_use(self, step: int) -> tuple[int, int]:
        """The first network that is in use at an update, and the one behind the last."""
        stop = self.first + int(step * self.fresh)
        return max(0, stop - self.kept), stop


PRESETS: dict[str, TrainConfig] = {
    "bundled": TrainConfig(
        ghn=GHNConfig(hypernet="graphormer", layers=4, heads=8, hid=56, kernels="orthogonal", tiles=4, start_layer=1),
        steps=40_000, cooldown=8_000, average=0.998, save_every=25,
    ),
    "smoke": TrainConfig(
        ghn=GHNConfig(hid=16, max_shape=(16, 16, 7, 7), kernels="orthogonal"),
        steps=20, warmup=5, first=4, eval_every=10, eval_images=20, save_every=10, log_every=5,
        components=0.0, classes=1.0,
    ),
}  # fmt: skip
"""Named configurations of `timm-ghn train`: that of the bundled file, and one to try the command."""
