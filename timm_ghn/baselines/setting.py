"""What a baseline is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_ghn.errors import InitError


@dataclass(frozen=True)
class Setting:
    """A model that a baseline is to initialize.

    Attributes:
        model: The model; it is not changed.
        method: Name of the baseline.
        seed: Seed of whatever is drawn.
        free: Names of the parameters that may change.
        input_size: (channels, height, width) of one image, where the caller gave it.
        example_input: A batch of inputs, where the caller gave one: a tensor, or a tuple or dict of tensors.
    """

    model: nn.Module
    method: str
    seed: int
    free: frozenset[str]
    input_size: int | Sequence[int] | None = None
    example_input: Any = None

    def computation(
        self, names: Iterable[str], values: Callable[[], Iterable[tuple[str, Tensor]]], needs: str
    ) -> Computation:
        """The answer of the baseline.

        Args:
            names: Parameters that the baseline computes; those that are not free are left out.
            values: Computes them.
            needs: What the model lacks if there are none: "it has no ...".

        Raises:
            InitError: If there are none.
        """
        found = tuple(name for name in dict.fromkeys(names) if name in self.free)
        if not found:
            raise InitError(f"{self.method} has nothing to initialize in {type(self.model).__name__}: {needs}")
        return Computation(found, values)


@dataclass(frozen=True)
class Computation:
    """Parameters that a baseline is going to compute.

    Attributes:
        names: Their names.
        values: Computes them, from the model as it then is: names and values, some of which may be of parameters that
            are not among `names`. The model is not changed, also if this fails with an InitError.
    """

    names: tuple[str, ...]
    values: Callable[[], Iterable[tuple[str, Tensor]]]


def names_of(model: nn.Module) -> dict[int, str]:
    """Names of a model's parameters by identity; tied ones have one."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
