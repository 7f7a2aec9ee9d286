"""`timm_ghn.json`: the description of a repository of initialized weights, which is checked before they are used.

The file is plain data. Nothing in it chooses what is built or run: a model is built by the name that the user gives,
and takes tensors whose names and shapes are its own, from files that have the hashes that stand here.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import timm
import torch
from torch import nn

from timm_ghn._version import __version__
from timm_ghn.errors import CheckpointError
from timm_ghn.hub.client import FileRecord
from timm_ghn.initialize.report import Report
from timm_ghn.request import Request
from timm_ghn.settings import Init
from timm_ghn.storage.header import TensorSpec

FILE = "timm_ghn.json"
FORMAT = 2
MAX_BYTES = 16 * 2**20
"""The largest model of timm takes 2 MB."""
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""Names that files of weights may have; nothing else is downloaded."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 500
_KINDS = {"arguments": dict, "versions": dict, "num_classes": int, "license": str, "max_shard_size": str}


@dataclass(frozen=True)
class Manifest:
    """Description of a repository of initialized weights.

    Attributes:
        report: What every parameter got, and what determines that; without the time that it took.
        arguments: Arguments of `timm.create_model`, JSON-compatible.
        dtype: Type of the parameters, such as "float32".
        num_classes: Number of classes.
        license: SPDX name of the licence.
        max_shard_size: Size above which weights were split.
        versions: Versions and processor that the weights were computed with.
        files: Files of weights by name.
    """

    report: Report
    arguments: Mapping[str, Any]
    dtype: str
    num_classes: int
    license: str
    max_shard_size: str
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The settings, versions and hashes that determine the weights."""
        return self.report.provenance

    def to_json(self) -> str:
        """The text of the file, the same for the same content."""
        report = replace(self.report, from_cache=False, seconds=0.0, source=None).to_dict()
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        rest = {entry.name: getattr(self, entry.name) for entry in fields(self)[1:-1]}
        data = {"format": FORMAT, **rest, "files": files, "report": report}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

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
            found = data.pop("format", None)
            if found != FORMAT:
                raise ValueError(
                    f"it is of format {str(found)[:20]!r}, not {FORMAT}; another version of timm-ghn made it"
                )
            _check_texts(data)
            report = _report(data.pop("report"))
            manifest = cls(report=report, files=_files(data.pop("files")), **data)
            for key, kind in _KINDS.items():
                if type(data[key]) is not kind:
                    raise ValueError(f"{key} is of the wrong kind")
            TensorSpec(manifest.dtype, ())
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{name} is not a description of initialized weights: {reason[:200]}") from error
        return manifest

    def difference(self, request: Request, origin: Mapping[str, Any], dtype: str) -> str:
        """The first difference between these weights and those that are asked for; empty if they are the same.

        Args:
            request: What is asked for.
            origin: Provenance that the initialization would have (`timm_ghn.initialize.plan.expected_origin`).
            dtype: Type of the parameters, such as "float32".
        """
        name, arguments = request.name.partition(".")[0], request.plain_arguments()
        here = {"model": name, "dtype": dtype, "arguments": arguments, **origin}
        there = {"model": self.report.model, "dtype": self.dtype, "arguments": dict(self.arguments), **self.provenance}
        for key in sorted({*here, *there} - {"ghn"}):  # a name of a GHN, whose hash stands beside it
            if here.get(key) != there.get(key):
                return f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        return ""


def settings_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an initialization, as arguments of `Init`."""
    return {entry.name: provenance[entry.name] for entry in fields(Init) if entry.name in provenance}


def dtype_of(model: nn.Module) -> str:
    """Type of a model's parameters."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


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


def _check_texts(value: Any) -> None:
    """Raises ValueError for texts that are longer than a line or not printable, which logs and tables would show."""
    if isinstance(value, str) and (len(value) > _MAX_TEXT or not value.isprintable()):
        raise ValueError("a text is not one of a line")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for item in value if isinstance(value, list) else ():
        _check_texts(item)


def _report(data: Any) -> Report:
    report = Report.from_dict(data)
    origin = report.provenance
    Init.of(settings_of(origin))  # every setting has a value that it may have
    for key, kinds in (("start_layer", (int, type(None))), ("ghn", (str, type(None))), ("ghn_hash", (str, type(None)))):
        if not isinstance(origin[key], kinds):
            raise ValueError(f"provenance: {key} is malformed")
    return replace(report, from_cache=False, seconds=0.0, source=None)


def _files(data: Mapping[str, Any]) -> dict[str, FileRecord]:
    files = {name: FileRecord(**value) for name, value in data.items()}
    for name, record in files.items():
        if not WEIGHTS.fullmatch(name):
            raise ValueError(f"{name[:60]!r} is not a name of a file of weights")
        if type(record.size) is not int or not 0 <= record.size < 2**63 or not _SHA256.fullmatch(str(record.sha256)):
            raise ValueError("a file is described by its size and its sha256")
    return files
