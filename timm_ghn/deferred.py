"""Building a model without paying for random weights that will be overwritten.

Within `DeferredRandom`, random in-place fills of tensors (`uniform_`, `kaiming_normal_`, ...) are written down instead
of carried out. Later each tensor's fills are either dropped (its values come from a GHN) or replayed (it keeps timm's
own initialization). Memory of a dropped tensor is not even touched before the prediction is written to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from timm_ghn.seeding import FILLS, PrivateRandom, derived_seed
from timm_ghn.trace.recorder import tensors_in

_CONSTANT_FILLS = {"zero_", "fill_", "constant_", "zeros_", "ones_", "copy_"}
# Calls that read no values: they may run while fills are pending, since what they return shares the memory.
_VIEWS = {
    "__get__", "__set__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "storage_offset", "untyped_storage", "element_size", "data_ptr", "__len__", "__hash__", "requires_grad_",
    "view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "expand", "narrow", "select",
    "squeeze", "unsqueeze", "detach", "chunk", "split", "unbind", "__getitem__", "empty_like", "zeros_like",
    "ones_like", "new_empty", "new_zeros", "new_ones", "get_device", "_set_grad_enabled",
}  # fmt: skip


_Fill = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""An in-place call that was put off: function, arguments, keyword arguments."""


class DeferredRandom(PrivateRandom):
    """Puts off random fills, and what is done in place to a tensor after one, until `replay`.

    What is drawn otherwise while a model is built comes from private generators.

    Args:
        seed: Seed of replayed fills. What a tensor gets depends on it and on the tensor's label alone.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._pending: dict[int, list[_Fill]] = {}
        self._count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self._pending and name not in FILLS:
            return self.call(func, args, kwargs)
        subject = args[0] if args else kwargs.get("tensor")
        if name in FILLS and isinstance(subject, Tensor):
            # A meta tensor has no values, and the first draw into one imports code for seconds.
            return subject if subject.is_meta else self._defer(subject, (func, args, kwargs), overwrites=True)
        if name in _VIEWS:
            return func(*args, **kwargs)
        touched = [tensor for tensor in tensors_in((*args, *kwargs.values())) if self.is_pending(tensor)]
        if touched and all(leaf is subject for leaf in touched) and name.endswith("_") and not name.endswith("__"):
            if name not in _CONSTANT_FILLS or not _is_whole(touched[0]):
                return self._defer(touched[0], (func, args, kwargs), overwrites=False)
            self.drop([touched[0]])
        else:  # some code of the model is about to read these values
            for tensor in touched:
                self._count += 1
                with torch._C.DisableTorchFunction():
                    self.replay(tensor, f"read during construction, {self._count}")
        return self.call(func, args, kwargs)

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Forget what was put off for these tensors, whose values will be written by someone else."""
        for tensor in tensors:
            self._pending.pop(storage_id(tensor), None)

    def replay(self, tensor: Tensor, label: str) -> None:
        """Carry out what was put off for a tensor, with random numbers that depend on the seed and the label."""
        fills = self._pending.pop(storage_id(tensor), None)
        if not fills:
            return
        draws = PrivateRandom(derived_seed(self._seed, label))
        with torch.no_grad():
            for fill in fills:
                draws.call(*fill)

    def _defer(self, tensor: Tensor, fill: _Fill, *, overwrites: bool) -> Tensor:
        fills = self._pending.setdefault(storage_id(tensor), [])
        if overwrites and _is_whole(tensor):
            fills.clear()
        fills.append(fill)
        return tensor

    def is_pending(self, tensor: Tensor) -> bool:
        """Whether something was put off for a tensor, so that its values mean nothing yet."""
        return tensor.device.type != "meta" and storage_id(tensor) in self._pending


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors that share memory, while one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def _is_whole(tensor: Tensor) -> bool:
    """Whether the tensor covers all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
