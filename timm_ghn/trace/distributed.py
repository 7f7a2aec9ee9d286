"""Models that torch.distributed changed: what their modules and tensors are without it.

`fully_shard` (FSDP2) and `parallelize_module` (tensor parallelism) put DTensors in the place of parameters, hooks onto
modules, and `fully_shard` gives modules another class, which refuses to be copied. A DTensor knows the shape of the
whole tensor, and each process (rank) holds a part of its elements.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within what `DistributedDataParallel`, `DataParallel` and `torch.compile` return."""
    while True:
        inner = model._modules.get("_orig_mod")  # of torch.compile: recording it would compile it again
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, so that the process holds a part of it only."""
    module = sys.modules.get("torch.distributed.tensor")  # whose import takes long
    return module is not None and isinstance(tensor, module.DTensor)


def is_flattened(module: nn.Module) -> bool:
    """Whether a module is a `FullyShardedDataParallel` (FSDP1)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process may hold only a part of a model."""
    changed = any(is_flattened(module) or plain_type(module) is not type(module) for module in model.modules())
    return changed or any(map(is_distributed, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Let modules of FSDP2 that hold whole parameters since they ran hold their parts again."""
    for module in model.modules():
        if plain_type(module) is not type(module) and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All elements of a tensor. Of a DTensor they are gathered, so all ranks have to call this."""
    return tensor.full_tensor().detach() if is_distributed(tensor) else tensor


@torch.no_grad()
def place_(target: Tensor, values: Tensor) -> None:
    """Write a tensor, or, into a DTensor, this rank's part of the tensor. Types are converted."""
    if not is_distributed(target):
        target.copy_(values)
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    copies = DTensor.from_local(values.detach().to(target.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
    target.to_local().copy_(copies.redistribute(placements=target.placements).to_local())


def meta_like(tensor: Tensor) -> Tensor:
    """A tensor on the meta device of the same shape and type; of a DTensor, of the whole."""
    if is_distributed(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, below the one that `fully_shard` gave it, which refuses copies."""
    types = (kind for kind in type(module).__mro__ if issubclass(kind, nn.Module))
    return next(kind for kind in types if not _is_of_distributed(vars(kind).get("__deepcopy__")))


def copied_plainly(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a model, whose copy knows nothing of torch.distributed.

    Args:
        model: The model.
        memo: As of `copy.deepcopy`. It has to hold what stands in the copy in the place of DTensors.
    """
    changed = [module for module in model.modules() if _is_changed(module)]
    memo.update((id(module), plain_type(module).__new__(plain_type(module))) for module in changed)
    for module in changed:
        state = {name: _without_distributed(value) for name, value in module.__getstate__().items()}  # type: ignore[no-untyped-call]
        memo[id(module)].__setstate__(copy.deepcopy(state, memo))
    return copy.deepcopy(model, memo)


def _is_changed(module: nn.Module) -> bool:
    hooks = [*getattr(module, "_forward_pre_hooks", {}).values(), *getattr(module, "_forward_hooks", {}).values()]
    return plain_type(module) is not type(module) or any(map(_is_of_distributed, hooks))


def _without_distributed(value: Any) -> Any:
    """A table of a module without the hooks and records of torch.distributed; anything else as it is."""
    if type(value) not in (dict, OrderedDict):
        return value
    of_model = (Tensor, nn.Module)
    dropped = {key for key, item in value.items() if not isinstance(item, of_model) and _is_of_distributed(item)}
    return type(value)((key, item) for key, item in value.items() if key not in dropped) if dropped else value


def _is_of_distributed(item: Any) -> bool:
    """Whether a class, a function, or the class of an object is defined in torch.distributed."""
    while isinstance(item, partial):
        item = item.func
    return str(getattr(item, "__module__", "")).startswith("torch.distributed.")
