"""A fixed set of sampled architectures with their graphs, kept on disk so that training starts at once."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timm_ghn.errors import GraphError, TrainingError
from timm_ghn.graph import to_graph
from timm_ghn.graph.graph import Graph
from timm_ghn.storage.atomic import write_atomically
from timm_ghn.training.architectures import ArchitectureSpec
from timm_ghn.training.networks import build
from timm_ghn.training.sampling import SamplerConfig, sample_architecture

_FORMAT = 1


@dataclass(frozen=True)
class PoolConfig:
    """What a pool holds: equal configurations give equal pools.

    Attributes:
        size: Number of distinct architectures.
        seed: Seed of the draws.
        stream: Name of the stream of draws; pools of different streams are independent ("train", "evaluation").
        sampler: What is drawn.
    """

    size: int = 2000
    seed: int = 0
    stream: str = "train"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


@dataclass(frozen=True, slots=True)
class PoolMember:
    """An architecture and its graph."""

    spec: ArchitectureSpec
    graph: Graph


class ArchitecturePool(Sequence[PoolMember]):
    """Distinct architectures with their graphs."""

    def __init__(self, config: PoolConfig, members: Sequence[PoolMember]) -> None:
        if not members:
            raise TrainingError("a pool needs at least one architecture")
        self.config = config
        self._members = tuple(members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        return self._members[index]

    def __iter__(self) -> Iterator[PoolMember]:
        return iter(self._members)

    @classmethod
    def build(
        cls,
        config: PoolConfig,
        *,
        exclude: Sequence[PoolMember] = (),
        workers: int = 1,
        progress: bool = True,
    ) -> ArchitecturePool:
        """Draw the architectures and record their graphs.

        Args:
            config: What to draw.
            exclude: Members of other pools, which may not be drawn again.
            workers: Processes; 1 works in this one.
            progress: Whether to show a bar.

        Raises:
            TrainingError: If there are too few distinct architectures.
        """
        seen = {member.spec for member in exclude}
        members: list[PoolMember] = []
        bar = tqdm(total=config.size, desc=f"{config.stream} architectures", disable=not progress)
        with bar:
            for member in _draw_all(config, workers):
                if member.spec in seen:
                    continue
                seen.add(member.spec)
                members.append(member)
                bar.update()
                if len(members) == config.size:
                    return cls(config, members)
        raise TrainingError(f"only {len(members)} distinct architectures of {config.size} were found")

    def save(self, path: Path) -> None:
        """Write the pool as gzipped JSON lines, atomically."""
        header = {"format": _FORMAT, "config": self.config.to_dict()}
        lines = [json.dumps(header)]
        lines += [json.dumps({"spec": m.spec.to_dict(), "graph": m.graph.to_dict()}) for m in self._members]
        write_atomically(path, gzip.compress("\n".join(lines).encode(), compresslevel=3))

    @classmethod
    def load(cls, path: Path, config: PoolConfig) -> ArchitecturePool:
        """Read a saved pool.

        Raises:
            TrainingError: If the file is damaged or holds a pool of another configuration.
        """
        try:
            with gzip.open(path, "rt") as file:
                header = json.loads(file.readline())
                if header.get("format") != _FORMAT or header.get("config") != config.to_dict():
                    raise TrainingError(f"{path} holds architectures of another configuration: remove it")
                rows = [json.loads(line) for line in file]
            members = [PoolMember(ArchitectureSpec.from_dict(r["spec"]), Graph.from_dict(r["graph"])) for r in rows]
        except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
            raise TrainingError(f"cannot read architectures from {path}: {error}") from error
        return cls(config, members)

    @classmethod
    def load_or_build(
        cls,
        path: Path,
        config: PoolConfig,
        *,
        exclude: Sequence[PoolMember] = (),
        workers: int = 1,
        progress: bool = True,
    ) -> ArchitecturePool:
        """Read a pool, or build and save it if there is no file."""
        if path.exists():
            return cls.load(path, config)
        pool = cls.build(config, exclude=exclude, workers=workers, progress=progress)
        pool.save(path)
        return pool


def _draw_all(config: PoolConfig, workers: int) -> Iterator[PoolMember]:
    draw = partial(draw_member, config)
    indices = range(4 * config.size + 16)
    if workers <= 1:
        yield from map(draw, indices)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        chunk = 16 * workers
        for start in range(0, len(indices), chunk):
            yield from pool.map(draw, indices[start : start + chunk], chunksize=4)


def draw_member(config: PoolConfig, index: int) -> PoolMember:
    """Draw the architecture of an index, and its graph; the result depends on nothing else.

    Raises:
        TrainingError: If a graph cannot be recorded.
    """
    rng = random.Random(f"{config.seed}/{config.stream}/{index}")
    spec = sample_architecture(rng, config.sampler)
    return PoolMember(spec, architecture_graph(spec))


def architecture_graph(spec: ArchitectureSpec, num_classes: int = 200) -> Graph:
    """Graph of an architecture with a given number of classes.

    Raises:
        TrainingError: If the graph cannot be recorded.
    """
    with torch.device("meta"):
        model = build(spec, num_classes)
    try:
        return to_graph(model, input_size=(3, spec.input_size, spec.input_size))
    except GraphError as error:
        raise TrainingError(f"no graph of {spec}: {error}") from error
