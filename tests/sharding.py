"""Groups of processes that shard models and initialize them. Each process imports this module."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import timm_ghn
from timm_ghn.initialize import sharded
from timm_ghn.initialize.memory import LazyMemory

_PATIENCE = 240
"""Seconds after which a group of processes is given up."""

_PRELOADED = [
    "timm", "timm_ghn.initialize.sharded", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
]  # fmt: skip
"""What takes long to import. (This module is not found there: pytest alone knows its folder.)"""


@dataclass(frozen=True)
class Case:
    """A model, how it is sharded, and how it is initialized.

    Attributes:
        model: Name of a timm model.
        layout: "fsdp", "tp" (the MLPs of a ViT), or both: "fsdp tp", on a mesh of two by the rest; "hsdp", copies of
            what two ranks share.
        init: Settings.
        arguments: Of `timm.create_model`.
        is_held: Whether the model is sharded from a random one, not from one on the meta device.
    """

    model: str
    layout: str
    init: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    is_held: bool = False

    def build(self, init: Any = None) -> nn.Module:
        """The model, not sharded."""
        model: nn.Module = timm.create_model(self.model, init=init, **self.arguments)
        return model

    def held(self) -> nn.Module:
        """The random model that is sharded, the same on all ranks."""
        return self.build(timm_ghn.Init("rand", seed=5))

    def expected(self) -> nn.Module:
        """What has to result, not sharded."""
        if not self.is_held:
            return self.build(timm_ghn.Init(**self.init))
        model = self.held()
        if self.init["method"] == "post-processing alone":
            timm_ghn.orthogonalize_(model, seed=2)
        else:
            timm_ghn.init_model(model, self.init)
        return model


def start_group(size: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run `work(rank, folder, *args)` in processes that know each other.

    Where the system can fork, they are forked from a process that has imported what takes long, once for all groups.

    Raises:
        Exception: What one of them raised.
    """
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver":
        mp.set_forkserver_preload(_PRELOADED)
    mp.start_processes(_joined, (size, work, folder, *args), size, start_method=method)


def _joined(rank: int, size: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)  # a process that waits for another one in vain
    if sys.platform == "linux":  # else the name of the machine has to be known to the network
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=_PATIENCE))
    try:
        work(rank, folder, *args)
    finally:
        dist.destroy_process_group()


def initialize_cases(rank: int, folder: Path, cases: dict[str, Case]) -> None:
    """Initialize sharded models; `folder / name` gets the whole tensors and the report, or an error."""
    sharded.LazyMemory = partial(LazyMemory, min_bytes=4096)  # even the tensors of small models count as large
    for name, case in cases.items():
        try:
            result = _initialized(case)
        except Exception:  # noqa: BLE001 - the test shows it
            result = {"error": traceback.format_exc()}
        if rank == 0:
            torch.save(result, folder / name)


def initialize_and_refuse(rank: int, folder: Path, cases: dict[str, Case], ghn: str) -> None:
    """Initialize sharded models, then ask for what is not possible.

    `folder / "refusals"` gets for each error its type, its message, and whether the model stayed as it was.
    """
    initialize_cases(rank, folder, cases)
    refusals = _refusals(ghn)
    if rank == 0:
        torch.save(refusals, folder / "refusals")


def _initialized(case: Case) -> dict[str, Any]:
    if case.is_held:
        model = case.held()
        shard(model, case.layout)
        if case.init["method"] == "post-processing alone":
            timm_ghn.orthogonalize_(model, seed=2)
            return {"tensors": whole_tensors(model)}
        if "fsdp" in case.layout:  # leaves whole parameters behind in the outermost module
            model.eval()(torch.zeros(2, 3, *model.pretrained_cfg["input_size"][1:]))
        report = timm_ghn.init_model(model, case.init)
    else:
        with torch.device("meta"):
            model = case.build()
        shard(model, case.layout)
        model.to_empty(device="cpu")
        for tensor in local_tensors(model).values():
            tensor.fill_(7)
        report = timm_ghn.init_model(model, case.init, build=case.build)
    assert timm_ghn.report_of(model) == report
    return {"tensors": whole_tensors(model), "report": report.to_dict(), "provenance": timm_ghn.provenance(model)}


def shard(model: nn.Module, layout: str) -> None:
    """Shard a model over all ranks, see `Case`."""
    size = dist.get_world_size()
    shape, names = ((2, size // 2), ("outer", "inner")) if layout in ("fsdp tp", "hsdp") else ((size,), ("inner",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tp" in layout:
        for block in model.blocks:
            parallelize_module(block.mlp, mesh["inner"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    if layout != "tp":
        mesh = mesh["outer"] if layout == "fsdp tp" else mesh
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def local_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters and buffers, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


def _refusals(ghn: str) -> dict[str, tuple[str, str, bool]]:
    case = Case("test_vit", "fsdp", {})
    held = case.held()
    shard(held, "fsdp")
    with torch.device("meta"):
        on_meta = case.build()
    shard(on_meta, "fsdp")
    flattened = torch.distributed.fsdp.FullyShardedDataParallel(case.held(), device_id=torch.device("cpu"))
    other = Case("test_vit2", "fsdp", {})
    asked: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "a baseline without build": (held, {"method": "mimetic"}),
        "another model": (held, {"method": "orth", "build": other.build}),
        "other classes": (held, {"method": "orth", "build": lambda: timm.create_model("test_vit", num_classes=3)}),
        "no seed": (held, {"method": "rand", "build": case.build}),
        "no such layer": (held, {"method": "ghn-orth", "ghn": ghn, "start_layer": "nowhere"}),
        "no memory": (on_meta, {"method": "orth", "build": case.build}),
        "flattened": (flattened, {"method": "orth"}),
    }
    results = {}
    for name, (model, arguments) in asked.items():
        before = {} if model is on_meta else {key: tensor.clone() for key, tensor in local_tensors(model).items()}
        try:
            timm_ghn.init_model(model, **arguments)
            results[name] = ("nothing", "", False)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            after = local_tensors(model)
            same = all(torch.equal(tensor, after[key]) for key, tensor in before.items())
            results[name] = (type(error).__name__, str(error), same)
    return results
