"""Random numbers that depend on a seed alone, and that leave torch's global generators to everybody else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILLS = {
    "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_",
    "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_", "random_",
}  # fmt: skip
"""Calls that fill a tensor with random numbers, by the name of the function."""
_RANDOM = FILLS | {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial", "rand_like",
    "randn_like", "randint_like", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "rrelu", "rrelu_", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d",
}  # fmt: skip
"""All calls that draw random numbers."""

_lock = threading.RLock()
"""Held while the state of torch's global generator is another one than its users expect."""


def seed_of(text: str, byteorder: Literal["little", "big"] = "little") -> int:
    """A 63-bit seed that depends on a text alone, on every machine.

    Args:
        text: Any text.
        byteorder: How the first eight bytes of the text's SHA-256 are read.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], byteorder) >> 1


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the texts of its arguments alone, on every machine."""
    return seed_of("\0".join(str(part) for part in parts))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run with torch's global generators seeded, and leave their states as they were.

    The generators belong to the whole process: what other threads draw meanwhile comes from the seed as well, and is
    rewound. Prefer `PrivateRandom`, or a generator that is passed to each draw.

    Args:
        seed: The seed.
        device: A CUDA device whose generator is seeded besides that of the CPU.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with _lock, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for place in devices:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield


class PrivateRandom(TorchFunctionMode):
    """Within this mode, the calling thread draws from generators of its own.

    The numbers are those that torch's global generators would give after `torch.manual_seed(seed)`. Other threads, and
    the states of the global generators, see nothing of it.

    Args:
        seed: Seed of the generators, one for each device.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch; if it draws, it draws from a generator of this mode."""
        name = getattr(function, "__name__", "")
        if name not in _RANDOM or kwargs.get("generator") is not None:
            return function(*args, **kwargs)
        subject = args[0] if args else kwargs.get("tensor")
        default = subject.device if isinstance(subject, Tensor) else torch.empty(0).device
        device = torch.device(kwargs.get("device") or default)
        if device.type == "meta":
            return function(*args, **kwargs)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        generator = self._generators[device]
        try:
            return function(*args, **{**kwargs, "generator": generator})
        except TypeError:  # some take no generator, others not in older versions of torch
            with _as_global(generator):
                return function(*args, **kwargs)


@contextmanager
def _as_global(generator: torch.Generator) -> Iterator[None]:
    """Lets the global generator of a device go on from the state of another one, which gets the state that results."""
    shared = torch.default_generator
    if generator.device.type == "cuda":
        shared = torch.cuda.default_generators[generator.device.index or torch.cuda.current_device()]
    with _lock:
        before = shared.get_state()
        shared.set_state(generator.get_state())
        try:
            yield
            generator.set_state(shared.get_state())
        finally:
            shared.set_state(before)
