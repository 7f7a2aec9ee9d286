"""Memory for a model that is never held as a whole: taken when a tensor is written, given back one tensor at a time."""

from __future__ import annotations

import logging
import mmap
import sys
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_logger = logging.getLogger(__name__)

MIN_BYTES = 1 << 20
"""Tensors from this size on get memory of their own."""

_FACTORIES = (torch.empty, torch.zeros)
_IS_SUPPORTED = hasattr(mmap, "MAP_ANONYMOUS") and hasattr(mmap.mmap, "madvise")  # not on Windows


class LazyMemory(TorchFunctionMode):
    """Makes large new tensors on the CPU out of pages that the system provides when they are first written.

    A model that is built within this mode, and within `DeferredRandom`, takes addresses but nearly no memory. Reads
    of what was not written give zeros. Where the system has no such memory (Windows), tensors are made as usual.

    Args:
        min_bytes: Size from which tensors count as large.
    """

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        super().__init__()
        self._min_bytes = min_bytes
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address; the tensors own them

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and _is_usual(kwargs):
            like: Tensor = func(*args, **{**kwargs, "device": "meta"})
            if like.is_contiguous() and like.numel() * like.element_size() >= self._min_bytes:
                return self._make(like)
        return func(*args, **kwargs)

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of a tensor that is never used again; one of this mode reads as zeros from then on."""
        pages = self._maps.get(tensor.untyped_storage().data_ptr())
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED if sys.platform == "linux" else mmap.MADV_FREE)
            return
        try:
            tensor.untyped_storage().resize_(0)
        except RuntimeError as error:  # memory that torch does not own
            _logger.debug("the memory of a tensor cannot be given back: %s", error)

    def _make(self, like: Tensor) -> Tensor:
        """A tensor of zeros on the CPU, of the shape and type of one on the meta device."""
        size = like.numel() * like.element_size()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)  # Python 3.13
        pages = mmap.mmap(-1, size, flags=flags)
        with torch._C.DisableTorchFunction():
            tensor = torch.frombuffer(pages, dtype=like.dtype).view(like.shape).requires_grad_(like.requires_grad)
            self._maps[tensor.data_ptr()] = pages
        return tensor


def _is_usual(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a factory makes a plain tensor on the CPU."""
    special = kwargs.get("out") is not None or kwargs.get("pin_memory") or kwargs.get("layout") is not None
    return _IS_SUPPORTED and not special and torch.device(kwargs.get("device") or "cpu").type == "cpu"
