"""Reading pickled checkpoints without running what is in them: files of `torch.save` and of `joblib.dump`.

A pickle is a program. torch's restricted unpickler runs no foreign code, but it believes what it is told: a few bytes
can make it hash a nested tuple for years, overflow the stack, or ask for memory without end. Checkpoints of GHNs are
tables of plain values and tensors. What they consist of is a small language, and this module carries out that language
and nothing else: an operation or a name outside of it refuses the file. Memory is taken for data that the file has.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping
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


class UnsafePickleError(ValueError):
    """A pickle that does more than put plain values and tensors into tables."""


class _TooLargeError(ValueError):
    """A file that is not what torch or joblib write: it would need more memory than it should."""


def is_known(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a pickled file, compressed or not."""
    return start.startswith((_ZIP, _PICKLE, *_UNPACKERS))


def load(file: BinaryIO, name: str) -> Any:
    """What a pickled checkpoint holds: tables of plain values and tensors, on the CPU.

    Args:
        file: The open file. It is read from its begin.
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
        file.seek(0)
        if start.startswith(_ZIP):
            return _load_archive(file, size)
        if start == _LEGACY:
            return _load_legacy(_Bounded(file, size), size)
        open_ = next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), None)
        if open_ is None:
            return _Tables(_Bounded(file, size), _JOBLIB).load()
        return _Tables(_Bounded(open_(file), _limit(size)), _JOBLIB).load()
    except (CheckpointError, MemoryError):
        raise
    except UnsafePickleError as error:
        reason = f"it holds pickled code or objects, which are never run ({error}); save only tensors and plain values"
        raise CheckpointError(f"{name} was refused: {reason}") from error
    except _TooLargeError as error:
        raise CheckpointError(f"{name} was refused: {error}") from error
    except Exception as error:  # damaged files make zipfile, zlib, pickletools and torch raise almost anything
        raise CheckpointError(f"{name} is truncated or damaged; {ADVICE}") from error


def _limit(size: int) -> int:
    """How many bytes a compressed file of that size may unpack to."""
    return min(MAX_BYTES, 2**20 + MAX_RATIO * size)


# --- the two formats of torch: the data of tensors stand beside the pickle -------------------------------------------


def _load_archive(file: BinaryIO, size: int) -> Any:
    """The content of an archive of torch: a pickle, and a record for the data of each tensor."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        unpacked = sum(record.file_size for record in records)
        if unpacked > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _TooLargeError(f"it would unpack to {unpacked:,} bytes; torch does not compress GHNs")
        names = [record.filename for record in records]
        if len({name.lower() for name in names}) != len(names):
            raise _TooLargeError("two of its records have the same name")
        folder = next(name for name in names if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise ValueError("the numbers begin with their most significant byte")
        tables = _Tables(io.BytesIO(archive.read(f"{folder}/data.pkl")), _TORCH, size)
        content = tables.load()
        for key, data in tables.data.items():
            with archive.open(f"{folder}/data/{key}") as record:
                _fill(data, cast(BinaryIO, record).read)
        return content


def _load_legacy(stream: BinaryIO | _Bounded, size: int) -> Any:
    """The content of a file of torch before 1.6: pickles of a number, a version, the system, the content, and keys.

    The data of the tensors follow, in the order of the keys. joblib keeps the data of each tensor as such a file.
    """
    for _ in range(3):
        _Tables(stream, _TORCH).load()
    tables = _Tables(stream, _TORCH, size)
    content, keys = tables.load(), _Tables(stream, _TORCH).load()
    if not all(isinstance(key, str) for key in keys) or set(keys) != set(tables.data):
        raise ValueError("data of tensors are missing")
    for key in keys:
        data = tables.data[key]
        if int.from_bytes(stream.read(8), "little") != len(data):
            raise ValueError("a tensor's data have another length")
        _fill(data, stream.read)
    return content


def _fill(data: Tensor, read: Callable[[int], bytes]) -> None:
    """Read the values of a flat tensor, which the file holds as they are in memory."""
    found = read(data.nbytes)
    if len(found) < data.nbytes:
        raise ValueError("a tensor is longer than its data")
    if found:
        data.view(torch.uint8).copy_(torch.frombuffer(bytearray(found), dtype=torch.uint8))


# --- joblib: one pickle, compressed or not ---------------------------------------------------------------------------


class _Bounded:
    """A file of which no more than so many bytes are read, whatever it promises."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left, self._limit = file, limit, limit

    def read(self, size: int) -> bytes:
        """Up to so many bytes."""
        return self._count(self._file.read, size)

    def readline(self) -> bytes:
        """A line."""
        return self._count(self._file.readline, self._limit)

    def _count(self, read: Callable[[int], bytes], size: int) -> bytes:
        # One byte more than there may be tells a file that is too large from one that is cut short.
        data = read(min(size, self._left + 1))
        if len(data) > self._left:
            raise _TooLargeError(f"it would unpack to more than {self._limit:,} bytes")
        self._left -= len(data)
        return data


def _open_zlib(file: BinaryIO) -> BinaryIO:
    """A stream of zlib's, unpacked up to the limit of `load`, or a little further."""
    inflate, packed = zlib.decompressobj(), file.read()
    data = inflate.decompress(packed, _limit(len(packed)) + 1)
    if not inflate.eof and len(data) <= _limit(len(packed)):
        raise EOFError("the stream ends too early")
    return io.BytesIO(data)


def _open_lz4(file: BinaryIO) -> BinaryIO:
    try:
        from lz4.frame import LZ4FrameFile
    except ImportError as error:
        raise CheckpointError("this file is compressed with lz4, which needs a package: pip install lz4") from error
    return cast(BinaryIO, LZ4FrameFile(file))


_UNPACKERS: Mapping[bytes, Callable[[BinaryIO], Any]] = {
    b"\x78": _open_zlib,
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZ": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x5d\x00": lzma.LZMAFile,
    b"\x04\x22\x4d\x18": _open_lz4,
}
"""What unpacks a compressed file, by its first bytes."""


# --- the language ----------------------------------------------------------------------------------------------------


_NAMESPACE = object()
"""Stands for the type of ghn3's command line arguments, which it saves beside the weights."""
_NAMES: Mapping[str, Any] = {
    "collections.OrderedDict": lambda: {},  # noqa: PIE807 - dict would take arguments
    "torch._utils._rebuild_tensor_v2": lambda data, offset, size, stride, *_: data.as_strided(size, stride, offset),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes: sizes,
    "torch.device": lambda *place: place,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
"""Names that a pickle may look up, and what they mean here: functions, types of a tensor's data, or a marker."""
_TORCH = {**_NAMES, "argparse.Namespace": _NAMESPACE}
_JOBLIB = {**_NAMES, "torch.storage._load_from_bytes": lambda data: _load_legacy(io.BytesIO(data), len(data))}

_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL",
    "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
}  # fmt: skip
_MAX_OPERATIONS = 300_000
"""Operations of a pickle; a GHN and its optimizer's state take some thousands."""


class _Dispatch(dict[int, Callable[[Any], None]]):
    """What carries out each operation; the others are refused, and too many."""

    left = _MAX_OPERATIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise UnsafePickleError("more operations than any GHN needs")
        if code not in self:
            names = [operation.name for operation in pickletools.opcodes if ord(operation.code) == code]
            raise UnsafePickleError(f"operation {names[0]}")
        return super().__getitem__(code)


class _Tables(pickle._Unpickler):
    """The unpickler in Python, less all that does more than put plain values and tensors into tables.

    Args:
        stream: At the begin of the pickle.
        names: What the pickle may look up.
        limit: How many bytes the data of its tensors may have that stand beside the pickle.

    Attributes:
        data: Flat tensors by key, whose values stand beside the pickle and are still to be read.
    """

    stack: list[Any]

    def __init__(self, stream: BinaryIO | _Bounded, names: Mapping[str, Any], limit: int = 0) -> None:
        super().__init__(cast(BinaryIO, stream), encoding="utf-8")
        self.data: dict[str, Tensor] = {}
        self._names, self._left = names, limit
        own = {"SETITEM": _Tables._set_item, "SETITEMS": _Tables._set_items, "REDUCE": _Tables._reduce}
        own |= {"NEWOBJ": _Tables._new, "BUILD": lambda self: self.stack.pop()}  # the attributes of an object
        codes = {op.name: ord(op.code) for op in pickletools.opcodes if op.name in _OPERATIONS}
        every = pickle._Unpickler.dispatch
        self.dispatch = _Dispatch({code: own.get(name, every[code]) for name, code in codes.items()})  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        if (found := self._names.get(f"{module}.{name}")) is None:
            raise UnsafePickleError(f"{module}.{name}")
        return found

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        try:
            self.stack.append(function(*arguments))
        except TypeError as error:
            raise UnsafePickleError("a call") from error

    def _new(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _NAMESPACE or arguments != ():
            raise UnsafePickleError("an object")
        self.stack.append({})

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())  # type: ignore[attr-defined]

    def _set(self, items: list[Any]) -> None:
        """Put keys and values into a table. The hash of other keys may take years, or overflow the stack."""
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, (str, int)) for key in items[::2]):
            raise UnsafePickleError("a table with other keys than texts and numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def persistent_load(self, reference: Any) -> Tensor:
        """The data of a tensor: ("storage", type, key, location, number of elements)."""
        try:
            word, dtype, key, _, count, *view = reference
        except (TypeError, ValueError):
            word = dtype = key = count = view = None
        is_known = word == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not is_known or type(count) is not int or view not in ([], [None]):
            raise UnsafePickleError("a reference to something else than a tensor's data")
        if key not in self.data:
            self._left -= count * dtype.itemsize
            if count < 0 or self._left < 0:
                raise ValueError("a tensor is longer than its data")
            self.data[key] = torch.empty(count, dtype=dtype, device="cpu")
        return self.data[key].view(dtype)
