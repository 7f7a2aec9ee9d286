"""Reading and writing GHNs: safetensors, and the pickled files of ppuda and ghn3.

Whatever the file, the configuration and the shape of every tensor are checked before a GHN is built, and nothing in a
file is executed (see `timm_ghn.ghn.pickles`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import CheckpointError, TensorFileError
from timm_ghn.ghn import pickles
from timm_ghn.ghn.config import GHNConfig, GHNInfo
from timm_ghn.ghn.model import GHN
from timm_ghn.ghn.pickles import ADVICE
from timm_ghn.ghn.seen import Seen
from timm_ghn.storage.atomic import save_atomically
from timm_ghn.storage.reader import TensorReader
from timm_ghn.storage.writer import write_file

CONFIG_KEY = "timm_ghn"
"""Metadata key of a safetensors file whose value is the GHN's configuration as JSON."""
HASH_KEY = "ghn_hash"
"""Metadata key whose value is the `content_hash` that the file had when it was written."""

SEEN_KEY = "seen"
"""Tensor of a safetensors file that holds the codes of `timm_ghn.ghn.seen`, and metadata key of their networks."""
MAX_SEEN = 2**20
"""More codes than any table has."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_IN_FIRST_LAYER = ("centrality_embed_in.", "centrality_embed_out.", "input_dist_embed.")
"""Tensors that the released files of GHN-3 hold outside of its first layer."""


def read(path: str | os.PathLike[str], *, shared: bool = False) -> GHN:
    """Read a GHN from a file; the content decides which format the file has, not the extension.

    Args:
        path: A safetensors file, or a file that `torch.save` or `joblib.dump` wrote.
        shared: Whether a safetensors file's GHN may be one that this process keeps and hands out again. It must then
            not be changed. A file that has not changed is read and verified once per process.

    Returns:
        The GHN, float32 on the CPU and in eval mode. `info.metadata` has what the file says beside the configuration.

    Raises:
        CheckpointError: If the file cannot be read, is damaged, holds code, or is not a GHN.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            raise CheckpointError(f"{path} cannot be read: it is not a file")
        with open(path, "rb") as file:
            start = file.read(9)
            # A safetensors file begins with the length of its header in 8 bytes, which may look like another format.
            if start[4:9] != b"\0\0\0\0{" and pickles.is_known(start):
                return parse(file, str(path))
        if start[8:9] != b"{":
            raise CheckpointError(f"{path} is not a GHN checkpoint: it is neither a safetensors nor a pickled file")
        ghn = _read_safetensors(str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        return ghn if shared else copy.deepcopy(ghn)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def parse(file: BinaryIO, name: str) -> GHN:
    """Read a GHN from an open pickled file; `name` is what errors call it.

    The file holds the state dict of a GHN, alone or in a table beside its configuration, as ppuda and ghn3 write it. A
    missing configuration is inferred from the shapes of the tensors.

    Raises:
        CheckpointError: As `read`.
    """
    data = pickles.load(file, name)
    if not isinstance(data, dict):
        raise CheckpointError(f"{name} is not a GHN checkpoint: it holds no table of tensors; {ADVICE}")
    tensors = _check_tensors(data.get("state_dict", data), name)
    tensors = {f"gnn.0.{key}" if key.startswith(_IN_FIRST_LAYER) else key: value for key, value in tensors.items()}
    config = _config(data["config"], tensors, name) if "config" in data else _infer_config(tensors, name)
    for key in ("decoder.conv.0.weight", "decoder.conv.2.weight", "decoder.class_layer_predictor.1.weight"):
        if key in tensors and tensors[key].ndim == 2:  # ghn3's linear layers
            tensors[key] = tensors[key][:, :, None, None]
    epoch = data.get("epoch")
    metadata = {"epoch": str(epoch)} if isinstance(epoch, int) and 0 <= epoch < 2**63 else {}
    ghn = _empty({key: tuple(tensor.shape) for key, tensor in tensors.items()}, config, name)
    _fill(ghn, tensors, name, metadata)
    return ghn


def _config(data: Any, tensors: Mapping[str, Tensor], name: str) -> GHNConfig:
    """The configuration in a file; ghn3 adds sizes of the Graphormer, and says which encoder it is by a switch."""
    try:
        if isinstance(data, Mapping) and _has_graphormer(tensors):
            data = {**data, "hypernet": "graphormer", "cut": "centre"}
            data.pop("is_ghn2", None)
        elif isinstance(data, Mapping) and "is_ghn2" in data:
            data = {key: value for key, value in data.items() if key not in ("is_ghn2", "layers", "heads")}
        return GHNConfig.from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _has_graphormer(tensors: Mapping[str, Tensor]) -> bool:
    return "gnn.0.attn.to_qkv.weight" in tensors


def _infer_config(tensors: Mapping[str, Tensor], name: str) -> GHNConfig:
    """The configuration that the shapes of the tensors tell, as ghn3 infers it; `weight_norm` is taken to be on."""
    shapes = {key: (*tensor.shape, 0, 0)[:2] for key, tensor in tensors.items()}
    try:
        hid = shapes["embed.weight"][1]
        side = math.isqrt(shapes["decoder.fc.0.weight"][0] // max(1, 4 * hid))
        channels = math.isqrt(shapes["decoder.conv.2.weight"][0])
        config = {
            "max_shape": (channels, channels, side, side),
            "num_classes": shapes["decoder.class_layer_predictor.1.weight"][0],
            "hypernet": "gatedgnn" if "gnn.gru.weight_ih" in shapes else "mlp",
            "weight_norm": True,
            "ve": "gnn.mlp_ve.fc.0.weight" in shapes,
            "layernorm": "ln.weight" in shapes,
            "hid": hid,
        }
        if _has_graphormer(tensors):
            heads = shapes["gnn.0.attn.proj_e.2.weight"][0]
            layers = sum(key.startswith("gnn.") and key.endswith(".ln1.weight") for key in shapes)
            config |= {"ve": True, "layers": layers, "heads": heads}
    except KeyError as error:
        raise CheckpointError(
            f"{name} is not a GHN checkpoint: it has no 'config', and no tensor {error} to infer it from; {ADVICE}"
        ) from error
    return _config(config, tensors, name)


@lru_cache(maxsize=2)
def _read_safetensors(path: str, *_: int) -> GHN:
    """The GHN in a safetensors file of that inode, size and time."""
    try:
        with TensorReader(path) as file:
            metadata = dict(file.metadata)
            config = _config(_json(metadata.pop(CONFIG_KEY, None), path), {}, path)
            specs = dict(file.specs)
            seen = _read_seen(file, path) if specs.pop(SEEN_KEY, None) else None
            ghn = _empty({key: spec.shape for key, spec in specs.items()}, config, path)
            tensors = {key: file.read(key) for key in specs}
    except TensorFileError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); {ADVICE}") from error
    expected = metadata.pop(HASH_KEY, None)
    metadata.pop(SEEN_KEY, None)
    _fill(ghn, _check_tensors(tensors, path), path, metadata, seen)
    if expected is not None and ghn.info is not None and ghn.info.hash != expected:
        raise CheckpointError(
            f"{path} is damaged: its content does not have the hash that it was written with; {ADVICE}"
        )
    return ghn


def _read_seen(file: TensorReader, name: str) -> Seen:
    """The table of surroundings in a file."""
    spec, networks = file.specs[SEEN_KEY], file.metadata.get(SEEN_KEY, "")
    is_number = networks.isdecimal() and len(networks) < 10
    if spec.dtype != "int64" or len(spec.shape) != 1 or spec.shape[0] > MAX_SEEN or not is_number:
        raise CheckpointError(f"{name}: tensor {SEEN_KEY} is not a table of surroundings; {ADVICE}")
    return Seen(np.unique(file.read(SEEN_KEY).numpy()), int(networks))


def write_safetensors(ghn: GHN, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a GHN as safetensors, all of it or nothing.

    Args:
        ghn: The GHN.
        path: File to write; its folder is created and an existing file replaced.
        metadata: Further facts to keep beside the configuration.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in ghn.state_dict().items()}
    facts = {"format": "pt", **(metadata or {})}
    facts[CONFIG_KEY] = json.dumps(ghn.config.to_dict())
    facts[HASH_KEY] = content_hash(ghn)
    if ghn.seen is not None:
        tensors[SEEN_KEY] = torch.from_numpy(ghn.seen.codes)
        facts[SEEN_KEY] = str(ghn.seen.networks)
    save_atomically(path, lambda temporary: write_file(temporary, tensors, facts))


def content_hash(ghn: GHN) -> str:
    """SHA-256 of a GHN's configuration, weights and table of surroundings, whatever file it came from."""
    digest = hashlib.sha256(json.dumps(ghn.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(ghn.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"\0{name}\0{tuple(values.shape)}\0".encode())
        digest.update(values.numpy().astype("<f4", copy=False).data)
    if ghn.seen is not None:
        digest.update(f"\0{SEEN_KEY}\0{ghn.seen.networks}\0".encode())
        digest.update(ghn.seen.codes.astype("<i8", copy=False).data)
    return digest.hexdigest()


def _check_tensors(tensors: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a state dict, if they are some and all of their values are finite numbers."""
    is_table = isinstance(tensors, Mapping) and all(isinstance(key, str) for key in tensors)
    if not is_table or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{name} is not a GHN checkpoint: its state dict is not a table of tensors; {ADVICE}")
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(f"{name}: tensor {key} is not a plain tensor with values")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name}: tensor {key} is {tensor.dtype}, not a floating-point type")
    return dict(tensors)


def _fill(
    ghn: GHN, tensors: Mapping[str, Tensor], name: str, metadata: Mapping[str, str], seen: Seen | None = None
) -> None:
    """Let an empty GHN own the tensors, whose values are checked; they are copied where type or layout is another."""
    for key, tensor in tensors.items():
        if not all(bool(part.isfinite().all()) for part in torch.split(tensor.flatten(), 2**22)):  # little memory
            raise CheckpointError(f"{name}: tensor {key} has NaN or infinite values; {ADVICE}")
    owned = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
    ghn.load_state_dict(owned, assign=True)
    ghn.seen = seen
    ghn.info = GHNInfo(name, content_hash(ghn), dict(metadata))
    ghn.eval()


def _empty(shapes: Mapping[str, tuple[int, ...]], config: GHNConfig, name: str) -> GHN:
    """A GHN of that configuration without values. CheckpointError if its tensors have other names or shapes."""
    with torch.device("meta"), DeferredRandom(seed=0):
        ghn = GHN(config)
    expected = {key: tuple(tensor.shape) for key, tensor in ghn.state_dict().items()}
    wrong = [f"{key} is missing" for key in expected if key not in shapes]
    wrong += [f"{key[:80]} is unknown" for key in shapes if key not in expected]
    both = [(key, shapes[key], shape) for key, shape in expected.items() if key in shapes]
    wrong += [f"{key} has shape {found} instead of {shape}" for key, found, shape in both if found != shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{name}: the tensors are not those of a GHN of its config: {', '.join(wrong[:3])}{more}; {ADVICE}"
        )
    return ghn


def _json(text: str | None, name: str) -> Any:
    if text is None:
        raise CheckpointError(
            f"{name} is a safetensors file without a GHN: its metadata have no {CONFIG_KEY!r}; {ADVICE}"
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: the metadata {CONFIG_KEY!r} are not JSON; {ADVICE}") from error
    if isinstance(found, dict) and "method" in found:  # a provenance
        raise CheckpointError(f"{name} holds the weights of a model, and not a GHN")
    return found
