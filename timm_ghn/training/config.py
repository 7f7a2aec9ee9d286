"""The configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from timm_ghn.checked import Checked, setting
from timm_ghn.errors import CheckpointError, TrainingError
from timm_ghn.ghn.config import GHNConfig
from timm_ghn.training.families import FAMILIES


def _all_families() -> dict[str, float]:
    return {name: share for name, (share, _) in FAMILIES.items()}


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Everything that decides the course of a training run. What update i of process r draws depends on (seed, i, r).

    Raises:
        TrainingError: If a value is out of range.
    """

    error = TrainingError

    ghn: GHNConfig = setting(
        text="hyperparameters of the GHN, but for its number of classes, which follows from images and teacher",
        made=lambda: GHNConfig(kernels="orthogonal"),
    )
    steps: int = setting(10_000, "updates of the GHN; a run may go on beyond: resume it with more", 1)
    cooldown: int = setting(0, "updates at the end over which the learning rate falls linearly to zero", 0)
    meta_batch: int = setting(8, "networks an update, over all processes", 1)
    batch_size: int = setting(64, "images a network; batch norms use their statistics", 2)
    lr: float = setting(2e-3, "learning rate after the warm-up", 1e-12)
    warmup: int = setting(30, "updates over which the learning rate rises", 0)
    average: float = setting(
        0.995, "decay, for each update, of the running average of the weights that is evaluated and exported", 0
    )
    first: int = setting(24, "networks to begin with", 1)
    fresh: float = setting(0.25, "new networks an update", 0)
    kept: int = setting(1024, "networks in use at a time: the latest ones", 1)
    families: Mapping[str, float] = setting(
        text="how often each family of networks is drawn; none that is left out", made=_all_families
    )
    held_out_classes: int = setting(50, "classes that the GHN never sees, for measuring", 0)
    validation: float = setting(0.04, "share of every class's images for validation", 0)
    eval_every: int = setting(500, "updates between evaluations", 1)
    eval_images: int = setting(400, "images a network in an evaluation", 1)
    save_every: int = setting(50, "updates between checkpoints", 1)
    log_every: int = setting(20, "updates between lines in metrics.jsonl", 1)
    seed: int = setting(0, "seed of everything drawn, but for what is held out")
    num_threads: int | None = setting(1, "threads a process; None leaves torch's choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cooldown > self.steps:
            raise TrainingError(f"a cooldown of {self.cooldown} updates does not fit into a run of {self.steps}")
        if self.average >= 1:
            raise TrainingError(f"average must be less than 1, got {self.average}")
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
        ghn=GHNConfig(
            hypernet="graphormer", layers=4, heads=8, hid=56, kernels="orthogonal", tiles=4, signs=True, start_layer=1,
        ),
        steps=40_000, cooldown=8_000, average=0.998, fresh=1.0, save_every=25,
    ),
    "smoke": TrainConfig(
        ghn=GHNConfig(hid=16, max_shape=(16, 16, 7, 7), kernels="orthogonal"),
        steps=20, warmup=5, first=4, eval_every=10, eval_images=20, save_every=10, log_every=5,
    ),
}  # fmt: skip
"""Named configurations of `timm-ghn train`: that of the bundled file, and one to try the command."""
