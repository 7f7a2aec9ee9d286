"""The file of a run's folder that names its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from timm_ghn.errors import TrainingError
from timm_ghn.storage.atomic import write_atomically
from timm_ghn.training.config import TrainConfig

_LATEST = "latest.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Attributes:
        step: Updates so far.
        skipped: Steps without an update, because gradients were not finite.
        elapsed: Seconds of training.
        weights: File of the GHN.
        average: File of the running average of its weights; None without one.
        optimizer: File of the optimizer's state.
        config: The run.
    """

    step: int
    skipped: int
    elapsed: float
    weights: str
    average: str | None
    optimizer: str
    config: TrainConfig

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder holds a checkpoint, damaged or not."""
        return (folder / _LATEST).exists()

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint of a folder; None if there is none.

        Raises:
            TrainingError: If it is damaged.
        """
        path = folder / _LATEST
        try:
            data = json.loads(path.read_text())
            return cls(**{"average": None, **data, "config": TrainConfig.from_dict(data["config"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, TrainingError) as error:
            raise TrainingError(f"{path} is damaged: {error}") from error

    def write(self, folder: Path) -> None:
        """Name this checkpoint as the folder's, atomically."""
        write_atomically(
            folder / _LATEST, json.dumps({**asdict(self), "config": self.config.to_dict()}, indent=2).encode()
        )

    @property
    def exported(self) -> str:
        """File of the GHN that is worth most: the average where there is one."""
        return self.average or self.weights
