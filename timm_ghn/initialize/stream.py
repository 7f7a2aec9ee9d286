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
    report = plan.report(model_name(model))
    settings, queued = postprocess_settings(plan.init, plan.hypernetwork), torch.get_num_threads()
    outlet = _Stream(model, memory, tensors, write)
    with closing(outlet.bar):
        scaled = fill_generated(plan, deferred, outlet.finished, queued=queued)
        fill_others(model, report, plan.processed, settings, deferred, outlet.finished, queued=queued)
        outlet.hand_on_others()
    return plan.report(report.model, scaled)


class _Stream:
    """Hands on what has become final, under all its names, and gives its memory back; see `stream`."""

    def __init__(
        self,
        model: nn.Module,
        memory: LazyMemory,
        tensors: Mapping[str, Tensor],
        write: Callable[[str, Tensor], None],
    ) -> None:
        self._memory = memory
        self._write = write
        self._parameters = dict(model.named_parameters())
        self._waiting = Counter(storage_id(parameter) for parameter in self._parameters.values())
        self._entries: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)  # by storage
        for name, tensor in tensors.items():
            self._entries[storage_id(tensor)].append((name, tensor))
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.bar = tqdm(desc="writing", total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=None)

    def finished(self, name: str, *_: object) -> None:
        """A parameter is final; it is handed on when all others in the same memory are, too."""
        storage = storage_id(self._parameters[name])
        self._waiting[storage] -= 1
        if self._waiting[storage] == 0:
            self._hand_on(storage)
            self._memory.release(self._parameters[name])

    def hand_on_others(self) -> None:
        """Hand on what belongs to no parameter."""
        for storage in self._entries.keys() - self._waiting.keys():
            self._hand_on(storage)

    def _hand_on(self, storage: int) -> None:
        for name, tensor in self._entries.get(storage, ()):
            self._write(name, tensor)
            self.bar.update(tensor.nbytes)
