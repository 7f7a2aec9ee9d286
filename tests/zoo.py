"""All models of the installed timm: which modules there are, and the smallest model of each, found by counting.

Counting takes minutes, so its result is kept in data/smallest_models.json; what the file does not know is counted.

    python tests/zoo.py     # count all again, and write the file
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.models import list_modules
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from timm_ghn.trace.skeleton import build_on_meta

MODULES: tuple[str, ...] = tuple(list_modules())
"""Modules of timm.models that register models."""


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model of timm on the meta device."""
    model: nn.Module = build_on_meta(lambda: timm.create_model(name, **kwargs))
    return model


def models_of(module: str) -> list[str]:
    """Names of the models that a module registers."""
    names: list[str] = timm.list_models(module=module)
    return names


@cache
def smallest_model(module: str) -> str:
    """The model of a module that has the fewest parameters, as far as the file knows; counted for a new module."""
    known = kept_count()["smallest"].get(module)
    return known if known in models_of(module) else count_smallest_model(module)


def kept_count() -> dict[str, Any]:
    """Content of the file: the smallest model by module, and the version of timm whose models were counted."""
    content: dict[str, Any] = json.loads(_KEPT.read_text())
    return content


_KEPT = Path(__file__).parent / "data" / "smallest_models.json"


def count_smallest_model(module: str) -> str:
    """The model of a module that has the fewest parameters, the first of several by name."""
    least, found = math.inf, ""
    for name in models_of(module):
        count = _parameters_below(name, least)
        if count < least:
            least, found = count, name
    return found


class _TooManyParametersError(Exception):
    pass


class WithoutFills(TorchFunctionMode):
    """Skips what changes parameters in place, their initialization: memory that is not touched costs nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _parameters_below(name: str, limit: float) -> float:
    """Number of parameters that a model registers; infinity from the limit on, where the construction is given up."""
    count = 0

    def add(module: nn.Module, key: str, parameter: Tensor | None) -> None:
        nonlocal count
        count += 0 if parameter is None else parameter.numel()
        if count >= limit:
            raise _TooManyParametersError

    handle = register_module_parameter_registration_hook(add)
    try:
        with WithoutFills():  # older timm builds some models on the CPU only
            timm.create_model(name)
    except _TooManyParametersError:
        return math.inf
    finally:
        handle.remove()
    return count


if __name__ == "__main__":
    counted = {module: count_smallest_model(module) for module in MODULES}
    _KEPT.write_text(json.dumps({"timm": timm.__version__, "smallest": counted}, indent=1) + "\n")
