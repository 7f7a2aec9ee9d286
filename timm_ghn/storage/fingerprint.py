"""A hash of what a model computes: its modules, their settings, and the code of its forward pass.

The cache needs it because a name and arguments do not determine a graph: a registered model may have another `forward`
than yesterday, and a method of timm may have been replaced. The walk starts at the `forward` of every module and
follows all that this code names: methods, globals, closures and defaults. It ends at torch and the standard library,
whose functions are identified by their names; the version of torch is part of a key.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

_TRUSTED = {"torch", "torchvision", "numpy"} | sys.stdlib_module_names
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_REGISTERED = {"_parameters", "_buffers", "_modules"}
_CONSTRUCTION = {"__init__", "__new__", "__doc__", "__module__", "__dict__", "__weakref__", "__annotations__"}
"""Attributes of a class that do not matter once there is an instance, whose own attributes are noted."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the modules of a model, of their attributes other than tensors, and of the code that they run."""
    walk = _Walk(dict.fromkeys(type(module) for module in model.modules()))
    for name, module in model.named_modules():
        kind = type(module)
        walk.note(name, f"{kind.__module__}.{kind.__qualname__}")
        for key in sorted(vars(module).keys() - _REGISTERED):
            walk.note(key, walk.describe(vars(module)[key]))
    for name, value in vars(F).items():  # what layers of torch call may have been replaced
        if _is_foreign(value):
            walk.note(name, walk.describe(value))
    for hooks in (_global_forward_pre_hooks, _global_forward_hooks):  # of all modules
        walk.note(walk.describe([*hooks.values()]))
    return walk.finish()


class _Walk:
    """Collects texts for the hash, and follows code.

    Args:
        kinds: The classes of a model's modules.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self._digest = hashlib.sha256()
        self._pending: list[types.FunctionType | type] = []
        self._numbers: dict[int, int] = {}  # of what was met, by id
        self._alive: list[object] = []  # what was met, so that no id is used twice
        self._members: dict[str, list[object]] = defaultdict(list)  # of the classes, by name
        for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__):
            for name, value in vars(base).items():
                if not _is_trusted(base) or _is_foreign(value):  # a method of torch may have been replaced
                    self._members[name].append(value)
        self._follow_members(sorted(name for name in self._members if name == "forward" or name.startswith("__")))

    def note(self, *parts: str) -> None:
        """Add texts to the hash."""
        self._digest.update("\0".join(parts).encode(errors="surrogatepass") + b"\1")

    def finish(self) -> str:
        """Follow everything that was met, and give the hash of it all."""
        while self._pending:
            found = self._pending.pop()
            if isinstance(found, types.FunctionType):
                self._note_function(found)
            else:
                for key in sorted(vars(found).keys() - _CONSTRUCTION):
                    self.note(key, self.describe(vars(found)[key]))
        return self._digest.hexdigest()

    def describe(self, value: object) -> str:
        """A text that tells a value from others, without the content of tensors; what it may run is followed."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, (types.FunctionType, type)):
            return self._of_code(value)
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            return self.describe(value.__func__)
        if isinstance(value, property):
            return self._of_list((value.fget, value.fset))
        if isinstance(value, functools.partial):
            return self._of_list((value.func, value.args, value.keywords))
        if isinstance(value, Mapping):
            return self._of_list(item for pair in value.items() for item in pair)
        if isinstance(value, (list, tuple)):
            return self._of_list(value)
        if isinstance(value, (set, frozenset)):
            return " ".join(sorted(map(self.describe, value)))
        return self._of_object(value)

    def _of_list(self, values: Iterable[object]) -> str:
        return f"({', '.join([self.describe(value) for value in values])})"

    def _of_code(self, value: types.FunctionType | type) -> str:
        name = f"{value.__module__}.{value.__qualname__}"
        if _is_trusted(value):
            return name
        number, is_new = self._meet(value)
        if is_new:
            self._pending.append(value)
        return f"{name} {number}"

    def _of_object(self, value: object) -> str:
        """Class, name and attributes of any other object; no attributes of tensors, modules and what torch defines."""
        kind = type(value)
        text = f"{self._of_code(kind)} {getattr(value, '__qualname__', '')}"
        if isinstance(wrapped := getattr(value, "__wrapped__", None), types.FunctionType):  # such as an lru_cache
            return f"{text} {self.describe(wrapped)}"
        if _is_trusted(kind) or isinstance(value, (torch.Tensor, nn.Module)):
            return text
        number, is_new = self._meet(value)
        return f"{text} {number} {self.describe(getattr(value, '__dict__', None)) if is_new else ''}"

    def _meet(self, value: object) -> tuple[int, bool]:
        """The number of an object, and whether it is new."""
        is_new = id(value) not in self._numbers
        if is_new:
            self._alive.append(value)
        return self._numbers.setdefault(id(value), len(self._numbers)), is_new

    def _follow_members(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in _CONSTRUCTION:
                for value in self._members.pop(name, ()):
                    self.note(name, self.describe(value))

    def _note_function(self, function: types.FunctionType) -> None:
        self.note(_code_digest(function.__code__), self._of_list((function.__defaults__, function.__kwdefaults__)))
        for cell in function.__closure__ or ():
            try:
                self.note(self.describe(cell.cell_contents))
            except ValueError:  # an empty cell
                continue
        names = _names(function.__code__)
        # A name that `getattr` gets may be put together while the code runs.
        self._follow_members(sorted(self._members) if "getattr" in names else names)
        spaces = [function.__globals__]
        for space in spaces:
            is_trusted = space is not function.__globals__ and _is_trusted_name(space.get("__name__"))
            for name in names:
                value = space.get(name)
                if isinstance(value, types.ModuleType):
                    if not any(other is vars(value) for other in spaces):
                        spaces.append(vars(value))
                elif name in space and (not is_trusted or _is_foreign(value)):
                    self.note(name, self.describe(value))


def _is_trusted_name(module: object) -> bool:
    return str(module).partition(".")[0] in _TRUSTED


def _is_trusted(value: types.FunctionType | type) -> bool:
    # `functools.wraps` copies `__module__`, but not the globals.
    return _is_trusted_name(value.__module__ if isinstance(value, type) else value.__globals__.get("__name__"))


def _is_foreign(value: object) -> bool:
    """Whether a value is a function that torch and the standard library do not define."""
    return isinstance(value, types.FunctionType) and not _is_trusted(value)


@functools.cache
def _code_digest(code: types.CodeType) -> str:
    """Hash of instructions, constants and names of a function and of those inside of it; not of lines and files."""
    constants = [_code_digest(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    return hashlib.sha256(repr((code.co_code, constants, code.co_names, code.co_varnames)).encode()).hexdigest()


def _constant(value: object) -> str:
    """The same text in every process, which that of a set of texts is not."""
    return " ".join(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals and attributes that a function uses, or one inside of it."""
    return tuple(sorted({*code.co_names, *(name for inner in _inner(code) for name in _names(inner))}))


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (item for item in code.co_consts if isinstance(item, types.CodeType))
