"""A model too large for one device: built without memory, sharded by FSDP2, initialized, trained for a step.

    torchrun --nproc-per-node 2 examples/init_sharded.py [MODEL]

On CPUs (gloo) or on one GPU a process (NCCL). Each process holds its part of the weights, and together they are those
of `timm.create_model(MODEL, init="ghn-orth")`, bit for bit.
"""

import os
import sys
from functools import partial

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import timm_ghn


def shard(model: nn.Module, device: str) -> None:
    """Shard each block of a model on its own, so that one block at a time is gathered, then the rest."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for group in model.children():
        if isinstance(group, (nn.Sequential, nn.ModuleList)):
            for block in group:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main() -> None:
    """Build, shard, initialize, and train for one step on random images."""
    build = partial(timm.create_model, sys.argv[1] if len(sys.argv) > 1 else "vit_small_patch16_224", num_classes=10)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")

    with torch.device("meta"):  # 1. no memory, no values
        model = build()
    shard(model, device)  # 2. each rank holds a part of each parameter,
    model.to_empty(device=device)  # 3. and has memory for the part
    report = timm_ghn.init_model(model, "ghn-orth", build=build)  # 4. values, the same with any number of ranks

    images = torch.randn(8, *model.pretrained_cfg["input_size"], device=device)
    labels = torch.randint(10, (8,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()

    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    if dist.get_rank() == 0:
        print(report)
        print(f"rank 0 of {dist.get_world_size()} holds {held:,} of {report.num_parameters:,} parameters")
        print(f"loss of the first step: {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
