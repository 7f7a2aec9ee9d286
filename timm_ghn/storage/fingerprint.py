"""A hash of a model's code, as long as all of that code is timm's and torch's own.

Name, arguments and versions then determine the graph, and a cached model needs no recording of its forward pass. Other
code may be another one tomorrow: a registered model is edited, a method of timm is replaced. Models that run such code
have no fingerprint, and the cache finds their entries by the recorded graph.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable
from types import CodeType, FunctionType, MethodType

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

_TRUSTED = {"torch", "torchvision", "numpy", "timm", "typing_extensions"} | sys.stdlib_module_names
_PLAIN = (bool, int, float, complex, str, bytes, slice, type(None), torch.dtype, torch.device, torch.Size)
_REGISTERED = {"_parameters", "_buffers", "_modules"}
_UNUSED = {"__doc__", "__module__", "__dict__", "__weakref__", "__annotations__"}
"""Attributes of a class that no instance uses."""
_COMPILING = {"__init__", "__setstate__", "___needs_generation_tag_patch"}
"""Attributes of `nn.Module` that the first `torch.compile` of a process replaces; no forward pass uses them."""


class _ForeignCodeError(Exception):
    """Something is defined outside of torch and timm."""


def fingerprint(model: nn.Module) -> str | None:
    """SHA-256 of a model's modules, their attributes other than tensors, and the code of timm that they run.

    Returns:
        The hash; None if a module, an attribute, a hook or a function that may run comes from elsewhere.
    """
    kinds = dict.fromkeys(base for module in model.modules() for base in type(module).__mro__)
    try:
        attributes = [(name, _attributes(module)) for name, module in model.named_modules()]
        classes = [(_describe(kind), _class_attributes(kind)) for kind in kinds]
        functions = [_describe(value) for value in _functions(kinds)]
        hooks = _describe([*_global_forward_pre_hooks.values(), *_global_forward_hooks.values()])
    except _ForeignCodeError:
        return None
    return hashlib.sha256(repr((attributes, classes, functions, hooks)).encode(errors="surrogatepass")).hexdigest()


def _class_attributes(kind: type) -> list[tuple[str, str]]:
    unused = _UNUSED | _COMPILING if kind is nn.Module else _UNUSED
    return [(key, _describe(value)) for key, value in vars(kind).items() if key not in unused]


def _attributes(module: nn.Module) -> list[object]:
    """What a module holds besides tensors and modules: plain values as they are, texts of others as tuples of one."""
    return [
        (key, value if type(value) in _PLAIN else (_describe(value),))
        for key, value in vars(module).items()
        if key not in _REGISTERED
    ]


def _functions(kinds: Iterable[type]) -> Iterable[object]:
    """Functions and constants of the modules that define these classes, of timm's layers used there, and of torch."""
    names = dict.fromkeys(kind.__module__ for kind in kinds if _package(kind.__module__) == "timm")
    pending = list(names)
    for name in pending:
        for key, value in vars(sys.modules[name]).items():
            if isinstance(value, (FunctionType, *_PLAIN)) and not key.startswith("__"):
                yield value
            home = str(value.__module__) if isinstance(value, FunctionType) else ""
            if home.startswith("timm.layers.") and home not in names:
                names[home] = None
                pending.append(home)
    for space in (torch, torch.Tensor, F):
        yield from (value for value in vars(space).values() if isinstance(value, FunctionType))


def _describe(value: object) -> str:
    """A text that tells a value from others, without the content of tensors.

    Raises:
        _ForeignCodeError: If code belongs to it that neither timm nor torch defines.
    """
    if isinstance(value, dict):  # before others: a module has a dozen, nearly all of them empty
        return _describe([*value.items()]) if value else ""
    if isinstance(value, FunctionType):
        return _describe_function(value)
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return _describe(value.__func__)
    if isinstance(value, property):
        return _describe((value.fget, value.fset))
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return _describe((value.func, value.args, value.keywords))
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_describe, value))})"
    if isinstance(value, (set, frozenset)):
        return " ".join(sorted(map(_describe, value)))
    if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):  # such as an lru_cache
        return _describe_function(wrapped)
    kind = value if isinstance(value, type) else type(value)
    if _package(kind.__module__) not in _TRUSTED:
        raise _ForeignCodeError
    return f"{kind.__module__}.{kind.__qualname__}"


def _describe_function(function: FunctionType) -> str:
    # `functools.wraps` copies `__module__`, but not the globals.
    package = _package(function.__globals__.get("__name__"))
    if package not in _TRUSTED:
        raise _ForeignCodeError
    if package != "timm":
        return function.__qualname__
    defaults = _describe((function.__defaults__, function.__kwdefaults__))
    return f"{function.__qualname__} {_code_digest(function.__code__)} {defaults}"


def _package(module: object) -> str:
    return str(module).partition(".")[0]


@functools.cache
def _code_digest(code: CodeType) -> str:
    """Hash of instructions, constants and names of a function and of those inside of it; not of lines and files."""
    constants = [_code_digest(item) if isinstance(item, CodeType) else _describe(item) for item in code.co_consts]
    return hashlib.sha256(repr((code.co_code, constants, code.co_names, code.co_varnames)).encode()).hexdigest()
