"""Results of runs on disk, one file a run, and their means."""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from timm_ghn._version import __version__
from timm_ghn.errors import FineTuneError
from timm_ghn.finetune.config import FineTuneConfig
from timm_ghn.finetune.run import Point
from timm_ghn.storage.atomic import write_atomically

_logger = logging.getLogger(__name__)
_SUFFIXES = {"runs": "json", "locks": "lock", "weights": "safetensors"}


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        key: Its name.
        config: Its settings.
        seed: Its seed.
        accuracy: Share of the images of `config.split` that the network gets right after the last epoch.
        loss: Mean loss on them.
        diverged: Whether the loss stopped being a number; accuracy is then what that network reaches.
        seconds: Time of training, without measurements.
        images_per_second: Training images a second.
        curve: One point an epoch.
        data: Name, copy, digest and sizes of the data.
        network: Number of parameters, and where the weights came from.
        environment: Versions, device, threads.
    """

    key: str
    config: FineTuneConfig
    seed: int
    accuracy: float
    loss: float
    diverged: bool
    seconds: float
    images_per_second: float
    curve: tuple[Point, ...]
    data: Mapping[str, Any]
    network: Mapping[str, Any]
    environment: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        return {**vars(self), "config": self.config.to_dict(), "curve": [asdict(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], settings: type[FineTuneConfig] = FineTuneConfig) -> RunResult:
        """A result from `to_dict`.

        Args:
            values: What `to_dict` gave.
            settings: The type of its settings.

        Raises:
            KeyError, TypeError, FineTuneError: If it is none.
        """
        curve = tuple(Point(**point) for point in values["curve"])
        return cls(**{**values, "config": settings.from_dict(values["config"]), "curve": curve})


class ResultStore:
    """A folder of results. Several processes may work on one.

    Args:
        folder: Where `runs/`, `weights/` and `locks/` are.
        settings: The type of the settings of its runs.
    """

    def __init__(self, folder: str | Path, settings: type[FineTuneConfig] = FineTuneConfig) -> None:
        self.folder, self.settings = Path(folder), settings

    def path(self, key: str, kind: Literal["runs", "locks", "weights"] = "runs") -> Path:
        """File of a finished run; or of what it has learned; or what is locked while a process works on it."""
        return self.folder / kind / f"{key}.{_SUFFIXES[kind]}"

    def read(self, key: str) -> RunResult | None:
        """The result of a run; None if it is not finished or its file is damaged."""
        path = self.path(key)
        try:
            return RunResult.from_dict(json.loads(path.read_text(encoding="utf-8")), self.settings)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, FineTuneError) as error:
            _logger.warning("%s is no result and does not count: %s", path, error)
            return None

    def write(self, result: RunResult, weights: Mapping[str, Tensor] | None = None) -> None:
        """Keep a result.

        Args:
            result: The result.
            weights: What the run has learned; written first, so that no result is without them.

        Raises:
            FineTuneError: If it cannot be written.
        """
        try:
            if weights is not None:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
                write_atomically(self.path(result.key, "weights"), save(tensors, {"format": "pt"}))
            write_atomically(self.path(result.key), json.dumps(result.to_dict(), indent=1).encode())
        except OSError as error:
            raise FineTuneError(f"the result of {result.key} cannot be written: {error}") from error

    def all(self) -> tuple[RunResult, ...]:
        """All finished runs, by name."""
        found = (self.read(path.stem) for path in sorted((self.folder / "runs").glob("*.json")))
        return tuple(result for result in found if result is not None)

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Whether this process may work on a run; no other may meanwhile, and a killed one loses its claim."""
        path = self.path(key, "locks")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        with suppress(Timeout):  # of this lock alone, not of what is done meanwhile
            lock.acquire()
        try:
            yield lock.is_locked
        finally:
            lock.release()


@dataclass(frozen=True)
class Summary:
    """Runs of the same settings with different seeds.

    Attributes:
        config: The settings.
        accuracies: Accuracy by seed, of runs that did not diverge.
        diverged: How many runs diverged.
    """

    config: FineTuneConfig
    accuracies: Mapping[int, float]
    diverged: int

    @property
    def mean(self) -> float:
        """Mean accuracy; NaN if all runs diverged."""
        return statistics.fmean(self.accuracies.values()) if self.accuracies else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation of the accuracies; 0 for a single run."""
        return spread(self.accuracies.values())


def spread(values: Collection[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summarize(results: Iterable[RunResult]) -> tuple[Summary, ...]:
    """Group runs that differ in their seeds alone, in the order of their first appearance."""
    groups: dict[str, list[RunResult]] = defaultdict(list)
    for result in results:
        groups[json.dumps([result.config.to_dict(), result.data["digest"]], sort_keys=True)].append(result)
    return tuple(
        Summary(
            group[0].config,
            {run.seed: run.accuracy for run in sorted(group, key=lambda run: run.seed) if not run.diverged},
            sum(result.diverged for result in group),
        )
        for group in groups.values()
    )


def differences(first: Summary, second: Summary) -> list[float]:
    """Accuracy of the first less that of the second, for every seed that both have; there may be none."""
    return [first.accuracies[seed] - second.accuracies[seed] for seed in first.accuracies if seed in second.accuracies]


def environment(device: torch.device) -> dict[str, str]:
    """Versions, device and threads of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "timm_ghn": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
    }
