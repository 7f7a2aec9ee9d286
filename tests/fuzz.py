"""Feeds every reader of files with damaged and hostile content; run by test_fuzz.py, or by hand for longer.

    python tests/fuzz.py --minutes 10

A reader may refuse with its documented error, or read what is right. Anything else ends the run with status 1 and the
content in a file: another exception, a wrong weight, more than `HANG_SECONDS`, more than `MEMORY` beyond what the
program had at its start (a limit of the system, so that a crash is seen as one). Prints the counts as JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch
from ghn_reference import SMALL, ppuda_checkpoint, seeded_ghn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import timm_ghn
from timm_ghn.errors import CheckpointError, TensorFileError
from timm_ghn.ghn import GHN, GHNConfig, content_hash, read
from timm_ghn.ghn.checkpoint import CONFIG_KEY, HASH_KEY
from timm_ghn.hub.client import FileRecord
from timm_ghn.hub.manifest import Manifest
from timm_ghn.storage.cache import WeightCache
from timm_ghn.storage.reader import TensorReader
from timm_ghn.storage.upkeep import DESCRIPTION_KEY, DIGEST_KEY, UNREADABLE
from timm_ghn.storage.writer import write_file

HANG_SECONDS = 20
MEMORY = 2 * 2**30
ROUND = 10
"""Examples of one reader before the next one has its turn."""

REFUSED, READ = "refused", "read"


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        name: What it reads.
        contents: Content to feed it with.
        read: Reads it, and says whether it was refused. Raises anything where it should not have.
    """

    name: str
    contents: st.SearchStrategy[Any]
    read: Callable[[Any], str]


class HangError(Exception):
    """A reader takes too long."""


# --- content --------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, -1])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A real file with a few changes, near its begin (headers) as often as anywhere."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        last = min(draw(st.sampled_from([16, 2000, len(content)])), len(content)) - 1
        place = draw(st.integers(0, last))
        if draw(st.integers(0, 3)) == 0:
            place = len(content) - 1 - place  # the directory of an archive is at its end
        size = draw(st.integers(1, 64))
        change = draw(st.integers(0, 7))
        if change <= 1:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif change == 2:
            content[place] = draw(st.integers(0, 255))
        elif change == 3:
            del content[place : place + size]
        elif change == 4:
            content[place:place] = draw(st.binary(max_size=32))
        elif change == 5:
            content[place : place + size] = content[-size:]
        elif change == 6:
            content[place : place + 8] = struct.pack("<Q", draw(NUMBERS) % 2**64)
        else:
            del content[place:]
    return bytes(content)


@st.composite
def lying_tensors(draw: st.DrawFn, sound: bytes) -> bytes:
    """A safetensors file whose header is JSON of the right kind, and lies."""
    (length,) = struct.unpack("<Q", sound[:8])
    header = json.loads(sound[8 : 8 + length])
    data = sound[8 + length :]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"}) or [""]))
        entry = header.get(name)
        change = draw(st.integers(0, 6))
        if entry is None or change == 0:
            header[draw(st.text(max_size=6))] = draw(JSON)
        elif change == 1:
            del header[name]
        elif change == 2:
            entry["dtype"] = draw(st.sampled_from(["F64", "F16", "BF16", "I8", "U8", "BOOL", "F4", "", None]))
        elif change == 3:
            entry["shape"] = draw(st.lists(NUMBERS, max_size=40))
        elif change == 4:
            entry["data_offsets"] = [draw(NUMBERS), draw(NUMBERS)]
        elif change == 5:
            entry["data_offsets"] = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))].get(
                "data_offsets"
            )
        else:
            header[name] = draw(JSON)
        header = {key: value for key, value in header.items() if key == "__metadata__" or isinstance(value, dict)}
    return packed(header, data)


@st.composite
def lying_metadata(draw: st.DrawFn, sound: bytes, key: str) -> bytes:
    """A safetensors file with a changed description, whose hash is right: what somebody hostile would write."""
    (length,) = struct.unpack("<Q", sound[:8])
    header = json.loads(sound[8 : 8 + length])
    metadata = header["__metadata__"]
    table = json.loads(metadata[key])
    change(draw, table)
    text = json.dumps(table)
    if draw(st.integers(0, 9)) == 0:
        text = draw(st.sampled_from(["[" * 100_000, "{}", "", '{"a":' * 50_000, "9" * 10_000, "NaN", "null"]))
    metadata[key] = text
    if key == DESCRIPTION_KEY and DIGEST_KEY in metadata:
        metadata[DIGEST_KEY] = sha256(text.encode()).hexdigest()
    if draw(st.booleans()):
        metadata.pop(HASH_KEY, None)
    return packed(header, sound[8 + length :])


@st.composite
def lying_table(draw: st.DrawFn, sound: bytes) -> bytes:
    """A JSON file with other values."""
    table = json.loads(sound)
    for _ in range(draw(st.integers(1, 2))):
        change(draw, table)
    return json.dumps(table).encode()


def change(draw: st.DrawFn, table: Any) -> None:
    """Change something in a table or below it."""
    while True:
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(table[key], (dict, list)) and draw(st.integers(0, 4)):
            table = table[key]
            continue
        table[key] = draw(JSON | st.lists(NUMBERS, min_size=1, max_size=5))
        return


def packed(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode(errors="replace")
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def repacked(draw: st.DrawFn, sound: bytes) -> bytes:
    """An archive whose pickle is damaged and whose checksums are right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sound)) as source, zipfile.ZipFile(target, "w") as archive:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                content = draw(damaged(content))
            elif draw(st.integers(0, 40)) == 0:
                content = draw(damaged(content or b"x"))
            compression = zipfile.ZIP_DEFLATED if draw(st.integers(0, 60)) == 0 else zipfile.ZIP_STORED
            archive.writestr(record.filename, content, compression)
    return target.getvalue()


def bombs(sound: bytes) -> st.SearchStrategy[bytes]:
    """Bare pickles of a few bytes that mean a lot of work, written as opcodes: building them here is the trap."""
    shared = b")" + b"q\x01h\x01\x86" * 60  # a tuple of 2^60 empty ones
    doubled = b")" + b"2\x86" * 60
    deep = b")" + b"\x85" * 200_000
    values = [
        b"}" + shared + b"K\x01s",
        b"}" + doubled + b"K\x01s",
        b"}" + deep + b"K\x01s",
        b"}(" + shared + b"K\x01u",
        shared,
        deep,
        b"ccollections\nOrderedDict\n(" + shared + b"K\x01\x86]" + b"tR",
        b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R",
        b"\x8b" + struct.pack("<i", 3000) + b"\x7f" * 3000,  # an integer of 7,000 digits
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x06\0\0\0\0\0\x10NtQ",
        b"]" + b"q\x01h\x01a" + b"]q\x02h\x01ah\x02",
    ]
    end = sound.rindex(b"optimzer")
    tables = [legacy(content(value)) for value in values for content in CONTENTS]
    return st.sampled_from(tables) | st.sampled_from(tables).flatmap(damaged) | st.just(sound[:end])


CONTENTS: list[Callable[[bytes], bytes]] = [
    lambda value: b"}(" + text("state_dict") + b"}" + text("config") + value + b"u.",
    lambda value: b"}(" + text("state_dict") + value + text("config") + b"}u.",
    lambda value: b"}(" + text("state_dict") + b"}" + text("config") + b"}" + text("hid") + value + b"su.",
    lambda value: value + b".",
]
"""Pickles of a checkpoint's table, around a value."""


def text(value: str) -> bytes:
    """The opcode of a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def legacy(program: bytes) -> bytes:
    """A file as torch before 1.6 wrote it: magic number, protocol, system, content, keys of the storages."""
    first = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in first) + b"\x80\x02" + program + pickle.dumps([], 2)


# --- readers --------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Builds the sound files, and reads what becomes of them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "content"
        self.ghn = seeded_ghn(SMALL)
        self.hash = content_hash(self.ghn)
        os.environ["TIMM_GHN_CACHE"] = str(folder / "cache")
        self.model = timm.create_model("test_vit", init=timm_ghn.Init("ghn-orth", ghn="bundled"))
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.cache = WeightCache.default()
        (self.entry,) = self.cache.entries()

    def readers(self) -> list[Reader]:
        archive, bare = io.BytesIO(), io.BytesIO()
        torch.save(ppuda_checkpoint(self.ghn), archive)
        torch.save(ppuda_checkpoint(self.ghn), bare, _use_new_zipfile_serialization=False)
        metadata = {CONFIG_KEY: json.dumps(self.ghn.config.to_dict()), HASH_KEY: self.hash}
        write_file(self.path, self.ghn.state_dict(), metadata)
        tensors = self.path.read_bytes()
        pt, old, config = archive.getvalue(), bare.getvalue(), self.ghn.config.to_dict()
        manifest = self.make_manifest().to_json().encode()
        entry = self.entry.path.read_bytes()
        return [
            Reader("ppuda checkpoint (zip)", damaged(pt) | repacked(pt), self.read_checkpoint),
            Reader("ppuda checkpoint (bare pickle)", damaged(old) | bombs(old), self.read_checkpoint),
            Reader(
                "GHN safetensors",
                damaged(tensors) | lying_tensors(tensors) | lying_metadata(tensors, CONFIG_KEY),
                self.read_checkpoint,
            ),
            Reader("GHN configuration", JSON | configs(config), self.read_config),
            Reader("any file as GHN", st.binary(max_size=200) | st.sampled_from(STARTS), self.read_checkpoint),
            Reader("cache entry", damaged(entry) | lying_tensors(entry), self.read_entry),
            Reader("cache entry, hashed again", lying_metadata(entry, DESCRIPTION_KEY), self.read_forged_entry),
            Reader("description on the Hub", damaged(manifest) | lying_table(manifest), self.read_manifest),
            Reader("safetensors header", damaged(tensors) | lying_tensors(tensors), self.read_tensors),
        ]

    def read_checkpoint(self, content: bytes) -> str:
        self.path.write_bytes(content)
        try:
            ghn = read(self.path)
        except CheckpointError as error:
            check_message(error)
            return REFUSED
        if not isinstance(ghn, GHN) or not all(bool(torch.isfinite(p).all()) for p in ghn.parameters()):
            raise AssertionError("a GHN with values that are not finite")
        return READ

    def read_config(self, content: Any) -> str:
        try:
            config = GHNConfig.from_dict(content)
        except CheckpointError as error:
            check_message(error)
            return REFUSED
        if GHNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) != config:
            raise AssertionError("a configuration that does not come back")
        return READ

    def read_entry(self, content: bytes) -> str:
        result = self.read_forged_entry(content)
        if result == READ:
            wrong = [name for name, p in self.model.named_parameters() if not torch.equal(p, self.weights[name])]
            if wrong:
                raise AssertionError(f"wrong weights: {wrong}")
        return result

    def read_forged_entry(self, content: bytes) -> str:
        self.entry.path.write_bytes(content)
        self.cache.entries()
        found = self.cache.open(self.entry.key)
        if found is None:
            return REFUSED
        parameters = {name: p.data for name, p in self.model.named_parameters()}
        try:
            found.copy_to(parameters)
        except UNREADABLE:
            return REFUSED
        return READ

    def make_manifest(self) -> Manifest:
        report = timm_ghn.report_of(self.model)
        if report is None:
            raise AssertionError("the model was not initialized")
        return Manifest(
            report=replace(report, parameters=report.parameters[:5], from_cache=False, seconds=0.0),
            arguments={"num_classes": 10},
            dtype="float32",
            num_classes=10,
            license="apache-2.0",
            max_shard_size="5GB",
            versions={"torch": "2"},
            files={"model.safetensors": FileRecord(100, "0" * 64)},
        )

    def read_manifest(self, content: bytes) -> str:
        try:
            found = Manifest.from_json(content, "file")
        except CheckpointError as error:
            check_message(error)
            return REFUSED
        if Manifest.from_json(found.to_json(), "again") != found:
            raise AssertionError("a description that does not come back")
        return READ

    def read_tensors(self, content: bytes) -> str:
        self.path.write_bytes(content)
        try:
            with TensorReader(self.path) as file:
                total = sum(file.read(name).nbytes for name in file.specs)
        except TensorFileError as error:
            check_message(error)
            return REFUSED
        if total > len(content):
            raise AssertionError("more data than the file has")
        return READ


STARTS = [
    b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"\x80\x02.", b"\x80\x02}.", b"\x80\x04" + b"(" * 10_000,
    struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 10**6) + b"{" * 10**6, struct.pack("<Q", 200_000) + b"[" * 200_000,
    b"\x80\x02" + b"\x8a\xff" * 100, b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
    b"\x80\x02" + b"\x85" * 1000 + b".", b"\x80\x02X\xff\xff\xff\xffabc",
]  # fmt: skip
"""Begins that a reader takes for its own."""


@st.composite
def configs(draw: st.DrawFn, sound: dict[str, Any]) -> dict[str, Any]:
    """A configuration with other values."""
    table = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        change(draw, table)
    return dict(table)


def check_message(error: Exception) -> None:
    """Errors are read by people."""
    if not str(error) or len(str(error)) > 2000:
        raise AssertionError(f"a message of {len(str(error))} characters")


# --- the run --------------------------------------------------------------------------------------------------------


def run(seconds: float, start: int) -> dict[str, dict[str, int]]:
    """Feed all readers in turns until the time is over; the counts of each."""
    logging.disable(logging.CRITICAL)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        readers = Fuzzer(Path(folder)).readers()
        limit_memory()
        deadline = time.monotonic() + seconds
        number = start
        while time.monotonic() < deadline or not counts:
            for reader in readers:
                feed(reader, number, counts.setdefault(reader.name, Counter()))
            number += 1
    return {name: dict(count) for name, count in counts.items()}


def feed(reader: Reader, number: int, count: Counter[str]) -> None:
    """Some examples for a reader."""

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(reader.contents)
    def one(content: Any) -> None:
        signal.alarm(HANG_SECONDS)
        try:
            count[reader.read(content)] += 1
        except BaseException:
            signal.alarm(0)
            path = Path(tempfile.mkstemp(prefix="timm-ghn-fuzz-")[1])
            path.write_bytes(content if isinstance(content, bytes) else repr(content).encode())
            print(f"{reader.name}, round {number}: see {path}", file=sys.stderr)
            raise
        signal.alarm(0)

    one()


def limit_memory() -> None:
    """No more than `MEMORY` beyond what there is; more raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def on_alarm(number: int, frame: Any) -> None:
    raise HangError(f"more than {HANG_SECONDS} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, on_alarm)
    result = run(60 * arguments.minutes, arguments.seed)
    print(json.dumps(result, indent=2))
