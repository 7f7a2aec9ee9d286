"""The processes of a run: one, or those that `torchrun` started, joined by Accelerate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from timm_ghn.errors import MissingDependencyError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def join_processes(device: torch.device | str = "cpu") -> Accelerator:
    """Join the other processes of a `torchrun` group, if there is one, and choose this process's device.

    Args:
        device: Where to compute. Of several processes on CUDA, each has a GPU of its own, whatever the index.

    Returns:
        Its `prepare` gives the GHN the averaged gradients of all processes (torch's DistributedDataParallel).

    Raises:
        MissingDependencyError: If Accelerate is not installed.
        TrainingError: If there are more processes than GPUs, or the device is neither the CPU nor CUDA.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingDependencyError('training needs Accelerate: pip install "timm-ghn[train]"') from error
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise TrainingError(f"a GHN is trained on the CPU or on CUDA, not on '{device}'")
    if chosen.type == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise TrainingError(f"{processes} processes need as many GPUs, there are {gpus}: --nproc-per-node {gpus}")
        if processes == 1 and chosen.index is not None:
            torch.cuda.set_device(chosen)
    # What a decoder emits no kernel with has no gradient in a step.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=chosen.type == "cpu", kwargs_handlers=[unused])
