"""Steps of training replayed as CUDA graphs; `Execution(capture=CapturedStep)` asks for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from timm_ghn.finetune.run import Run, Step

_WARM_UPS = 3
"""Steps before a capture, as in PyTorch's documentation: libraries choose algorithms and allocate in them."""


class CapturedStep:
    """Steps replayed as CUDA graphs, one for each size of a batch.

    A small network's step is hundreds of kernels of a few microseconds; replaying them as one graph takes the time of
    the kernels instead of that of launching them.

    Args:
        run: The run. Its network, optimizer and totals are as before after a capture.
        step: What to capture.
    """

    def __init__(self, run: Run, step: Step) -> None:
        self._run, self._step = run, step
        self._stream = torch.cuda.Stream(run.device)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, picks: Tensor) -> None:
        """Update the network on a batch."""
        size, current = picks.shape[1], torch.cuda.current_stream(self._run.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            if size not in self._graphs:
                self._graphs[size] = self._capture(picks)
            graph, place = self._graphs[size]
            place.copy_(picks)
            graph.replay()
        current.wait_stream(self._stream)

    def _capture(self, picks: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        place = picks.clone()
        # Afterwards the generators are as before, so that the first replay draws what an uncaptured step would.
        with torch.random.fork_rng(devices=[place.device]):
            before = {name: tensor.detach().clone() for name, tensor in _tensors(self._run).items()}
            for _ in range(_WARM_UPS):
                self._step(place)
            _restore(self._run, before)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            self._run.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self._step(place)
        return graph, place


def _tensors(run: Run) -> Mapping[str, Tensor]:
    """Every tensor that a step changes, by a name."""
    found = {f"network.{name}": tensor for name, tensor in run.module.state_dict(keep_vars=True).items()}
    for index, state in enumerate(run.optimizer.state.values()):
        found.update({f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)})
    return {**found, "totals": run.totals}


@torch.no_grad()
def _restore(run: Run, before: Mapping[str, Tensor]) -> None:
    """Undo steps in place. Optimizer states that did not exist become 0, from which the first step is the same."""
    for name, tensor in _tensors(run).items():
        if name in before:
            tensor.copy_(before[name])
        else:
            tensor.zero_()
