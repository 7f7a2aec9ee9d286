"""Carrying out a plan without ever holding the model: each tensor is handed on when it is final, and then forgotten."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_ghn.deferred import DeferredRandom, storage_id
from timm_ghn.initialize.fill import fill_generated, fill_others
from timm_ghn.initialize.memory import LazyMemory
from timm_ghn.initialize.plan import Plan, postprocess_settings
from timm_ghn.initialize.provenance import model_name
from timm_ghn.initialize.report import Report


def stream(
    plan: Plan,
    model: nn.Module,
    deferred: DeferredRandom,
    memory: LazyMemory,
    tensors: Mapping[str, Tensor],
    write: Callable[[str, Tensor], None],
) -> Report:
    """Compute the parameters of a model one after the other, hand them on, and give their memory back.

    Args:
        plan: The plan.
        model: The model of the plan, built within `memory`; it holds no values afterwards.
        deferred: What was put off while the model was built.
        memory: What gives memory back.
        tensors: Parameters and buffers of the model that are handed on, by all of their names.
        write: Called with name and tensor. A tensor that shares memory with others is handed on with the last of them,
            and one that is no parameter at the end.

    Returns:
        What every parameter got.
    """
    parameters = dict(model.named_parameters())
    waiting = Counter(storage_id(parameter) for parameter in parameters.values())
    entries: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)  # by storage
    for name, tensor in tensors.items():
        entries[storage_id(tensor)].append((name, tensor))
    size = sum(tensor.nbytes for tensor in tensors.values())
    bar = tqdm(desc="writing", total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=None)

    def hand_on(storage: int) -> None:
        for name, tensor in entries.get(storage, ()):
            write(name, tensor)
            bar.update(tensor.nbytes)

    def finished(name: str, *_: object) -> None:
        """A parameter is final; it is handed on when all others in the same memory are, too."""
        storage = storage_id(parameters[name])
        waiting[storage] -= 1
        if waiting[storage] == 0:
            hand_on(storage)
            memory.release(parameters[name])

    report = plan.report(model_name(model))
    settings, queued = postprocess_settings(plan.init, plan.hypernetwork), torch.get_num_threads()
    with closing(bar):
        scaled = fill_generated(plan, deferred, finished, queued=queued)
        fill_others(model, report, plan.processed, settings, deferred, finished, queued=queued)
        for storage in entries.keys() - waiting.keys():  # what belongs to no parameter
            hand_on(storage)
    return plan.report(report.model, scaled)
