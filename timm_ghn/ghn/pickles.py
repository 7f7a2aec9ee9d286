"""Reading pickled checkpoints without running what is in them: files of `torch.save` and of `joblib.dump`.

A pickle is a program. torch's restricted unpickler runs no foreign code, but it believes what it is told: a few bytes
can make it hash a nested tuple for years, overflow the stack, or ask for memory without end. Checkpoints of GHNs are
tables of plain values and tensors. What they consist of is a small language, so every program is first followed
operation by operation, and refused if it does anything else. Nothing is built, imported or allocated for that. What
passes is then read with `weights_only=True`, or for joblib's files by an unpickler that knows four names.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import gzip
import io
import lzma
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from timm_ghn.errors import CheckpointError
from timm_ghn.ghn.config import MAX_PARAMETERS

ADVICE = "get the file again, or name another GHN"
MAX_BYTES = 8 * MAX_PARAMETERS
"""Largest file, also unpacked: weights, and as much again for an optimizer's state beside them."""
MAX_RATIO = 32
"""How much larger a file may become by unpacking; weights become 1.1 times as large."""
_ZIP, _PICKLE = b"PK", b"\x80"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number with which torch before 1.6 begins a file."""
_LEGACY_PICKLES = 5
"""Pickles in such a file: that number, protocol, system, content, keys of the storages."""


def is_known(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a pickled file, compressed or not."""
    return start.startswith((_ZIP, _PICKLE, *_UNPACKERS))


def load(file: BinaryIO, name: str) -> Any:
    """What a pickled checkpoint holds: tables of plain values and tensors, on the CPU.

    Args:
        file: The open file. It is read from its begin, twice.
        name: What errors call it.

    Raises:
        CheckpointError: If the file is damaged, too large, or holds code or objects.
    """
    try:
        size = file.seek(0, io.SEEK_END)
        if size > MAX_BYTES:
            raise CheckpointError(f"{name} was refused: {size:,} bytes are more than any GHN has")
        file.seek(0)
        start = file.read(len(_LEGACY))
        if start.startswith(_ZIP) or start == _LEGACY:
            return _load_torch(file, size)
        open_ = next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), None)
        limit = size if open_ is None else min(MAX_BYTES, 2**20 + MAX_RATIO * size)
        for read in (
            lambda stream: _Check(stream, _no_storage, nested=True).run(),
            lambda stream: _Joblib(stream).load(),
        ):
            file.seek(0)
            found = read(_Bounded(file if open_ is None else open_(file), limit))
        return found
    except (CheckpointError, MemoryError):
        raise
    except UnsafePickleError as error:
        reason = f"it holds pickled code or objects, which are never run ({error}); save only tensors and plain values"
        raise CheckpointError(f"{name} was refused: {reason}") from error
    except _TooLargeError as error:
        raise CheckpointError(f"{name} was refused: {error}") from error
    except Exception as error:  # damaged files make zipfile, zlib, pickle and torch raise almost anything
        raise CheckpointError(f"{name} is truncated or damaged; {ADVICE}") from error


def _load_torch(file: BinaryIO, size: int) -> Any:
    """The content of a file that `torch.save` wrote, checked first."""
    file.seek(0)
    if file.read(2) == _ZIP:
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, size)
    else:
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _Check(file, lambda _, count: count <= size).run()
    file.seek(0)
    # ghn3 saves the arguments of its command beside the weights; torch before 2.5 has no way to allow that.
    allow = getattr(torch.serialization, "safe_globals", None)
    with allow([argparse.Namespace]) if allow else nullcontext():
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Check the records of an archive; torch itself never compresses, and finds names whatever their case is."""
    records = archive.infolist()
    unpacked = sum(record.file_size for record in records)
    if unpacked > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise _TooLargeError(f"it would unpack to {unpacked:,} bytes; torch does not compress GHNs")
    sizes = {record.filename.lower(): record.file_size for record in records}
    if len(sizes) != len(records):
        raise _TooLargeError("two of its records have the same name")
    for record in records:
        if record.filename.lower().endswith(".pkl"):
            folder = record.filename.lower().rpartition("/")[0]

            def is_possible(key: str, count: int, folder: str = folder) -> bool:
                return count <= sizes[f"{folder}/data/{key}".lower()]

            _Check(io.BytesIO(archive.read(record)), is_possible).run()


# --- joblib: one pickle, compressed or not, in which the data of every tensor is a file of torch before 1.6 ----------


class _Joblib(pickle.Unpickler):
    """Builds tables and tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): _first,
            _NESTED: _load_storage,
        }.get((module, name))
        if found is None:
            raise UnsafePickleError(f"{module}.{name}")
        return found


def _first(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _Bounded:
    """A file of which no more than so many bytes are read, whatever it promises."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left, self._limit = file, limit, limit

    def read(self, size: int = -1) -> bytes:
        return self._count(self._file.read, size)

    def readline(self, size: int = -1) -> bytes:
        return self._count(self._file.readline, size)

    def _count(self, read: Callable[[int], bytes], size: int) -> bytes:
        # One byte more than there may be tells a file that is too large from one that is cut short.
        data = read(self._left + 1 if size < 0 else min(size, self._left + 1))
        if len(data) > self._left:
            raise _TooLargeError(f"it would unpack to more than {self._limit:,} bytes")
        self._left -= len(data)
        return data


class _ZlibFile(io.RawIOBase):
    """A stream of zlib's, unpacked as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._inflate = file, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._file.read(1 << 16)
            if not packed:
                raise EOFError("the stream ends too early")
            data = self._inflate.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _open_lzma(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(file))


def _open_lz4(file: BinaryIO) -> BinaryIO:
    try:
        from lz4.frame import LZ4FrameFile
    except ImportError as error:
        raise CheckpointError("this file is compressed with lz4, which needs a package: pip install lz4") from error
    return cast(BinaryIO, LZ4FrameFile(file))


_UNPACKERS: Mapping[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x78": lambda file: cast(BinaryIO, io.BufferedReader(_ZlibFile(file), 1 << 20)),
    b"\x1f\x8b": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    b"BZ": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    b"\xfd7zXZ": _open_lzma,
    b"\x5d\x00": _open_lzma,
    b"\x04\x22\x4d\x18": _open_lz4,
}
"""What unpacks a compressed file, by its first bytes."""


# --- following a pickle without running it --------------------------------------------------------------------------


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
_ORDERED_DICT, _NAMESPACE = ("collections", "OrderedDict"), ("argparse", "Namespace")
_NESTED = ("torch.storage", "_load_from_bytes")
"""What joblib's files call with the data of a tensor."""
_GLOBALS = {
    _ORDERED_DICT,
    _NAMESPACE,
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
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
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


class _TooLargeError(ValueError):
    """A file that is not what torch or joblib write: it would need more memory than it should."""


class _Other:
    """A value that nothing depends on."""


class _Mark:
    """Begin of the arguments of an operation."""


class _Global(tuple[str, str]):
    """A name that is looked up: module and attribute."""


_OTHER, _MARK = _Other(), _Mark()


def _no_storage(_: str, __: int) -> bool:
    return False


class _Check:
    """Follows what a pickle puts on its stack, as far as it matters: integers, texts, tuples, names.

    Args:
        stream: At the begin of the pickle.
        is_possible: What a tensor's data may be.
        nested: Whether the data of tensors are files of torch within the pickle, as in joblib's.
    """

    def __init__(self, stream: BinaryIO | _Bounded, is_possible: StorageCheck, nested: bool = False) -> None:
        self._stream, self._is_possible, self._nested = stream, is_possible, nested
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> None:
        """Read the pickle to its end.

        Raises:
            UnsafePickleError: If it does anything but build tables of plain values and tensors.
            ValueError, IndexError, KeyError: If it is damaged.
        """
        for number, (opcode, argument, _) in enumerate(pickletools.genops(cast(Any, self._stream))):
            if number > _MAX_OPERATIONS:
                raise UnsafePickleError("more operations than any GHN needs")
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _IGNORED:
            if name == "PROTO" and argument not in _PROTOCOLS:
                raise UnsafePickleError(f"protocol {argument}")
            return
        if name in _VALUES:
            stack.append(argument)
        elif name in _BYTES and self._nested:
            self._check_nested(argument)
            stack.append(_OTHER)
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
        elif name == "APPEND":
            stack.pop()
        elif name == "BUILD":
            stack.pop()
            if isinstance(stack[-1], _Global):
                raise UnsafePickleError("a change of what it names")
        elif name == "APPENDS":
            self._pop_mark()
        elif name == "REDUCE":
            self._call(arguments=stack.pop(), function=stack.pop())
        elif name == "NEWOBJ":
            arguments, kind = stack.pop(), stack.pop()
            if kind != _NAMESPACE or arguments != ():
                raise UnsafePickleError("an object")
            stack.append(_OTHER)
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
        known = {*_GLOBALS, _NESTED} if self._nested else _GLOBALS
        if not isinstance(module, str) or not isinstance(attribute, str) or (module, attribute) not in known:
            raise UnsafePickleError(f"{module}.{attribute}" if isinstance(module, str) else "a computed name")
        return _Global((module, attribute))

    def _call(self, arguments: Any, function: Any) -> None:
        is_known = isinstance(function, _Global) and function[1] not in (*_STORAGE_BYTES, _NAMESPACE[1])
        if not is_known or not isinstance(arguments, tuple) or (function == _ORDERED_DICT and arguments):
            raise UnsafePickleError("a call")
        self._stack.append(_OTHER)

    @staticmethod
    def _check_nested(data: bytes) -> None:
        """Check the data of a tensor in a file of joblib's."""
        stream = io.BytesIO(data)
        for _ in range(_LEGACY_PICKLES):
            _Check(stream, lambda _, count: count <= len(data)).run()

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
