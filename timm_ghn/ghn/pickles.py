"""A look at the program that a pickle is, before torch runs it with `weights_only=True`.

torch's restricted unpickler runs no code, but it believes what it is told: a few bytes can make it hash a nested tuple
for years, overflow the stack, or ask for memory without end, and older versions read beyond the end of a tensor's
data. ppuda's checkpoints are tables of plain values and tensors; what they consist of is a small language, and
anything else is refused here. Nothing is built, imported or allocated.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_STORAGE_BYTES: Mapping[str, int] = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
_ORDERED_DICT = ("collections", "OrderedDict")
_GLOBALS = {
    _ORDERED_DICT,
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", name) for name in _STORAGE_BYTES),
}
_CONSTANTS = {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME", "STOP"}
_PROTOCOLS = range(2, 6)

_MAX_OPERATIONS = 300_000
"""A GHN and its optimizer's state take some thousands."""

StorageCheck = Callable[[str, int], bool]
"""Whether the storage of that key can have so many bytes."""


class UnsafePickleError(ValueError):
    """A pickle that does more than put plain values and tensors into tables."""


class _Other:
    """A value that nothing depends on."""


class _Mark:
    """Begin of the arguments of an operation."""


class _Global(tuple[str, str]):
    """A name that is looked up: module and attribute."""


_OTHER, _MARK = _Other(), _Mark()


def check(stream: BinaryIO, is_possible: StorageCheck) -> None:
    """Read a pickle to its end.

    Args:
        stream: At the begin of the pickle.
        is_possible: What a tensor's data may be.

    Raises:
        UnsafePickleError: If it does anything but build tables of plain values and tensors.
        ValueError, IndexError, KeyError: If it is damaged.
    """
    machine = _Machine(is_possible)
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > _MAX_OPERATIONS:
            raise UnsafePickleError("more operations than any GHN needs")
        machine.step(opcode.name, argument)


class _Machine:
    """Follows what is on the stack, as far as it matters: integers, texts, tuples, names."""

    def __init__(self, is_possible: StorageCheck) -> None:
        self._is_possible = is_possible
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _IGNORED:
            if name == "PROTO" and argument not in _PROTOCOLS:
                raise UnsafePickleError(f"protocol {argument}")
            return
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS or name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append(_OTHER)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _PUTS:
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(items)
        elif name == "TUPLE":
            stack.append(tuple(self._pop_mark()))
        else:
            self._act(name, argument)

    def _act(self, name: str, argument: Any) -> None:
        """Operations that build tables, or that look up and call."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(module, attribute))
        elif name == "SETITEM":
            stack.pop()
            self._check_key(stack.pop())
        elif name == "SETITEMS":
            for key in self._pop_mark()[::2]:
                self._check_key(key)
        elif name == "APPEND" or name == "BUILD":
            stack.pop()
        elif name == "APPENDS":
            self._pop_mark()
        elif name == "REDUCE":
            self._call(arguments=stack.pop(), function=stack.pop())
        elif name == "BINPERSID":
            self._check_storage(stack.pop())
            stack.append(_OTHER)
        else:
            raise UnsafePickleError(f"operation {name}")

    def _pop_mark(self) -> list[Any]:
        """What has been put on the stack since the last mark."""
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _global(self, module: Any, attribute: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(attribute, str) or (module, attribute) not in _GLOBALS:
            raise UnsafePickleError(f"{module}.{attribute}" if isinstance(module, str) else "a computed name")
        return _Global((module, attribute))

    def _call(self, arguments: Any, function: Any) -> None:
        is_known = isinstance(function, _Global) and function[1] not in _STORAGE_BYTES
        if not is_known or not isinstance(arguments, tuple) or (function == _ORDERED_DICT and arguments):
            raise UnsafePickleError("a call")
        self._stack.append(_OTHER)

    @staticmethod
    def _check_key(key: Any) -> None:
        """Texts and integers only: the hash of a tuple may take years, or overflow the stack."""
        if not isinstance(key, (str, int)):
            raise UnsafePickleError("a table with other keys than texts and numbers")

    def _check_storage(self, reference: Any) -> None:
        """Check that a tensor's data are as long as it says: ("storage", type, key, location, number of elements)."""
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise UnsafePickleError("a reference to something else than a tensor's data")
        kind, key, count = reference[1], reference[2], reference[4]
        if not isinstance(kind, _Global) or kind[1] not in _STORAGE_BYTES:
            raise UnsafePickleError("tensors of an unknown type")
        if not isinstance(key, str) or not isinstance(count, int):
            raise UnsafePickleError("a reference to something else than a tensor's data")
        if count < 0 or not self._is_possible(key, count * _STORAGE_BYTES[kind[1]]):
            raise ValueError("a tensor is longer than its data")
