"""`timm_ghn.json`: what a repository of initialized weights says of itself, so that it can be checked before use.

It is plain data. Everything in it is checked when it is read, and none of it chooses what is built or run: a model is
built by the name that the user gives, and takes tensors of the names, shapes and hashes that stand here.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch

from timm_ghn._version import __version__
from timm_ghn.errors import CheckpointError
from timm_ghn.initialize.report import ParameterReport, Status
from timm_ghn.settings import METHODS

FILE = "timm_ghn.json"
FORMAT = 1
MAX_BYTES = 16 * 2**20
"""The largest model of timm takes 1 MB."""
MAX_WEIGHTS_BYTES = 2**40
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""Names that files of weights may have; nothing else is downloaded."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 500


@dataclass(frozen=True)
class FileRecord:
    """A file of weights.

    Attributes:
        size: Bytes.
        sha256: Hash of the content.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a repository of initialized weights says of itself.

    Attributes:
        architecture: timm's name of the model.
        arguments: Arguments of `timm.create_model`, JSON-compatible.
        num_classes: Number of classes.
        license: SPDX name of the licence.
        max_shard_size: Size above which weights were split.
        provenance: What determines the weights (`timm_ghn.provenance`).
        parameters: What every parameter got.
        tensors: Type of every tensor of the state dict, by name, and its shape.
        versions: Versions and processor that the weights were computed with.
        files: Files of weights by name.
    """

    architecture: str
    arguments: Mapping[str, Any]
    num_classes: int
    license: str
    max_shard_size: str
    provenance: Mapping[str, Any]
    parameters: tuple[ParameterReport, ...]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.provenance["method"])

    @property
    def num_bytes(self) -> int:
        """Size of all files of weights."""
        return sum(record.size for record in self.files.values())

    def to_json(self) -> str:
        """The text of the file, the same for the same content."""
        head = {
            "format": FORMAT,
            "architecture": self.architecture,
            "arguments": dict(self.arguments),
            "num_classes": self.num_classes,
            "license": self.license,
            "max_shard_size": self.max_shard_size,
            "provenance": dict(self.provenance),
            "versions": dict(self.versions),
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        # A line for each tensor: readable, and a quarter of the size.
        tensors = [
            f"  {json.dumps(name)}: {json.dumps([dtype, shape])}" for name, (dtype, shape) in self.tensors.items()
        ]
        rows = [
            f"  {json.dumps([row.name, row.shape, row.status.value, row.reason, row.factor])}"
            for row in self.parameters
        ]
        lines = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
        listed, told = ",\n".join(tensors), ",\n".join(rows)
        return f'{lines},\n "tensors": {{\n{listed}\n }},\n "parameters": [\n{told}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> Manifest:
        """Read the file.

        Args:
            text: Its content.
            name: What errors call it.

        Raises:
            CheckpointError: If it is not a manifest of this format.
        """
        try:
            data = json.loads(text, parse_constant=_no_constant)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                found = data.get("format") if isinstance(data, dict) else None
                raise ValueError(
                    f"it is of format {str(found)[:20]!r}, not {FORMAT}; another version of timm-ghn made it"
                )
            return cls(
                architecture=_text(data, "architecture"),
                arguments=_table(data, "arguments"),
                num_classes=_count(data["num_classes"], 10**7),
                license=_text(data, "license"),
                max_shard_size=_text(data, "max_shard_size"),
                provenance=_provenance(_table(data, "provenance")),
                parameters=tuple(_row(row) for row in data["parameters"]),
                tensors={_name(key): _tensor(value) for key, value in _table(data, "tensors").items()},
                versions={key: _text(_table(data, "versions"), key) for key in _table(data, "versions")},
                files={_file_name(key): _file(value) for key, value in _table(data, "files").items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{name} is not a description of initialized weights: {reason[:200]}") from error


def versions() -> dict[str, str]:
    """Versions and processor that decide the last bits of computed weights."""
    return {
        "timm-ghn": __version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": str(torch.backends.cpu.get_cpu_capability()) if hasattr(torch.backends, "cpu") else "",
    }


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _table(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not a table")
    return value


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"{key} is not a text of a line")
    return value


def _name(value: Any) -> str:
    return _text({"a name": value}, "a name")


def _count(value: Any, maximum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise ValueError(f"{str(value)[:40]!r} is not a number from 0 to {maximum:,}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError("a shape is not a short list")
    shape = tuple(_count(size, 2**40) for size in value)
    _count(math.prod(shape), 2**40)
    return shape


def _row(value: Any) -> ParameterReport:
    name, shape, status, reason, *factor = value  # weights of earlier versions have no factor
    return ParameterReport(_name(name), _shape(shape), Status(status), _name(reason), *map(float, factor[:1]))


def _tensor(value: Any) -> tuple[str, tuple[int, ...]]:
    dtype, shape = value
    return _name(dtype), _shape(shape)


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not WEIGHTS.fullmatch(value):
        raise ValueError(f"{str(value)[:60]!r} is not a name of a file of weights")
    return value


def _file(value: Any) -> FileRecord:
    if not isinstance(value, dict) or set(value) != {"size", "sha256"}:
        raise ValueError("a file is described by its size and its sha256")
    if not isinstance(value["sha256"], str) or not _SHA256.fullmatch(value["sha256"]):
        raise ValueError("a sha256 is not one")
    return FileRecord(_count(value["size"], MAX_WEIGHTS_BYTES), value["sha256"])


def _provenance(data: dict[str, Any]) -> dict[str, Any]:
    """Plain values only, and the ones that every reader needs."""
    for key, value in data.items():
        if isinstance(value, str):
            _text(data, key)
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise ValueError(f"provenance: {_name(key)} is not a plain value")
    if data["method"] not in METHODS:
        raise ValueError(f"provenance: {data['method']!r} is no method")
    for key in ("num_layers", "seed", *(["start_layer"] if data["start_layer"] is not None else [])):
        _count(abs(data[key]) if key == "seed" else data[key], 2**63)
    if not isinstance(data["noise"], (int, float)) or not isinstance(data["version"], str):
        raise ValueError("provenance: noise or version is malformed")
    for key in ("ghn", "ghn_hash"):
        if data[key] is not None and not isinstance(data[key], str):
            raise ValueError(f"provenance: {key} is malformed")
    return data
