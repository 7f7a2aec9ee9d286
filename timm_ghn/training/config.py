"""The configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from timm_ghn.errors import CheckpointError, TrainingError
from timm_ghn.ghn.config import GHNConfig
from timm_ghn.training.families import FAMILIES

_AT_LEAST = {
    **dict.fromkeys(
        ("steps", "meta_batch", "first", "kept", "eval_every", "eval_images", "save_every", "log_every"), 1
    ),
    **dict.fromkeys(("cooldown", "fresh", "held_out_classes"), 0),
    "batch_size": 2,  # batch norms use the statistics of the batch
}


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
        first: Networks to begin with.
        fresh: New networks an update.
        kept: Networks in use at a time: the latest ones.
        families: How often each family of networks is drawn; none that is left out.
        held_out_classes: Classes that the GHN never sees, for measuring.
        validation: Share of every class's images for validation.
        eval_every: Updates between evaluations.
        eval_images: Images a network in an evaluation.
        save_every: Updates between checkpoints.
        log_every: Updates between lines in the metrics file.
        seed: Seed of everything drawn: what update i of process r draws depends on (seed, i, r) alone.
        num_threads: Threads a process; None leaves torch's choice.
    """

    ghn: GHNConfig = field(default_factory=lambda: GHNConfig(kernels="orthogonal"))
    steps: int = 10_000
    cooldown: int = 0
    meta_batch: int = 8
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 30
    average: float = 0.995
    first: int = 24
    fresh: float = 0.25
    kept: int = 1024
    families: Mapping[str, float] = field(
        default_factory=lambda: {name: share for name, (share, _) in FAMILIES.items()}
    )
    held_out_classes: int = 50
    validation: float = 0.04
    eval_every: int = 500
    eval_images: int = 400
    save_every: int = 50
    log_every: int = 20
    seed: int = 0
    num_threads: int | None = 1

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise TrainingError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.cooldown > self.steps:
            raise TrainingError(f"a cooldown of {self.cooldown} updates does not fit into a run of {self.steps}")
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
        """Read `to_dict`'s form; settings that earlier versions had, and this one has not, are left out.

        Raises:
            TrainingError: If the data is not of that form.
        """
        known = {entry.name: data[entry.name] for entry in fields(cls) if entry.name in data}
        try:
            return cls(**{**known, "ghn": GHNConfig.from_dict(data["ghn"])})
        except (CheckpointError, KeyError, TypeError) as error:
            raise TrainingError(f"not a training configuration: {error}") from error

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
    ),
}  # fmt: skip
"""Named configurations of `timm-ghn train`: that of the bundled file, and one to try the command."""
