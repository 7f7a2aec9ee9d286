"""The file of a run's folder that names its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from timm_ghn.errors import TrainingError
from timm_ghn.storage.atomic import write_atomically
from timm_ghn.training.config import TrainConfig

LATEST = "latest.json"
"""The file, within the run's folder."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Attributes:
        step: Updates so far.
        skipped: Steps without an update, because gradients were not finite.
        elapsed: Seconds of training.
        weights: File of the GHN.
        average: File of the running average of its weights, which is what a run is worth.
        optimizer: File of the optimizer's state.
        config: The run.
    """

    step: int
    skipped: int
    elapsed: float
    weights: str
    average: str
    optimizer: str
    config: TrainConfig

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint of a folder; None if there is none.

        Raises:
            TrainingError: If it is damaged.
        """
        path = folder / LATEST
        try:
            data = json.loads(path.read_text())
            average = data.get("average") or data["weights"]  # earlier versions had runs without an average
            return cls(**{**data, "average": average, "config": TrainConfig.from_dict(data["config"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, TrainingError) as error:
            raise TrainingError(f"{path} is damaged: {error}") from error

    def write(self, folder: Path) -> None:
        """Name this checkpoint as the folder's, atomically."""
        write_atomically(
            folder / LATEST, json.dumps({**asdict(self), "config": self.config.to_dict()}, indent=2).encode()
        )
