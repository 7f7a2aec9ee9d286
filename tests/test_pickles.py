"""Files of joblib and of ghn3's training: all compressions, and those that must be refused."""

from __future__ import annotations

import argparse
import collections
import gzip
import os
import pickle
import sys
import zlib
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from ghn_reference import SMALL, ghn3_config, released_ghn3, seeded_ghn, seeded_ghn3

from timm_ghn.errors import CheckpointError
from timm_ghn.ghn import GHN, GHNConfig, content_hash, pickles, read

TINY = ghn3_config(16, 2, 4, num_classes=10)
COMPRESSIONS = [0, *((kind, 3) for kind in ("zlib", "gzip", "bz2", "xz", "lzma", "lz4"))]


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn3(TINY)


# Files that are read


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_every_compression_of_joblib_is_read(ghn: GHN, tmp_path: Path, compress: Any) -> None:
    joblib.dump(released_ghn3(ghn), tmp_path / "ghn3.pt", compress=compress)
    found = read(tmp_path / "ghn3.pt")
    assert found.config == TINY
    assert content_hash(found) == content_hash(ghn)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_state_dicts_of_modules_are_read_in_every_protocol(ghn: GHN, tmp_path: Path, protocol: int) -> None:
    joblib.dump(ghn.state_dict(), tmp_path / "ghn3.pt", protocol=protocol)  # an OrderedDict with attributes
    assert content_hash(read(tmp_path / "ghn3.pt")) == content_hash(ghn)


def test_sizes_of_a_ghn2_are_inferred(tmp_path: Path) -> None:
    for config in (GHNConfig(), SMALL, GHNConfig((8, 8, 5, 5), 10, ve=False, layernorm=False, hid=8)):
        joblib.dump(seeded_ghn(config).state_dict(), tmp_path / "ghn2.pt")
        assert read(tmp_path / "ghn2.pt").config == config


def test_a_checkpoint_of_ghn3s_training_is_read(ghn: GHN, tmp_path: Path) -> None:
    """With linear layers, the tables in the first layer, an optimizer, and the arguments of the command."""
    state = {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in ghn.state_dict().items()}
    optimizer = torch.optim.AdamW(list(state.values()))
    for tensor in state.values():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    config = {
        "max_shape": (16, 16, 16, 16), "num_classes": 10, "hypernet": "gatedgnn", "decoder": "conv", "layers": 2,
        "weight_norm": True, "ve": True, "layernorm": True, "hid": 16, "heads": 4, "is_ghn2": False,
    }  # fmt: skip
    args = argparse.Namespace(name="ghn3", lr=4e-4, lr_steps=[200, 250], ckpt=None, amp=True, max_shape=(16, 16))
    checkpoint = {"state_dict": ghn.state_dict() | state, "optimizer": optimizer.state_dict(), "epoch": 3, "step": 9}
    torch.save({**checkpoint, "config": config, "args": args}, tmp_path / "ghn3.pt")
    found = read(tmp_path / "ghn3.pt")
    assert found.config == TINY
    assert found.info is not None
    assert found.info.metadata == {"epoch": "3"}
    torch.save(released_ghn3(ghn), tmp_path / "alone.pt")
    assert content_hash(read(tmp_path / "alone.pt")) == content_hash(ghn)


# Files that are refused


class Payload:
    """Pickles to a call of os.system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo executed > executed.txt",)


class Nested:
    """Pickles to the call with which joblib loads a tensor's data, with other data."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("nested", [False, True])
def test_code_is_refused(
    ghn: GHN, tmp_path: Path, compress: Any, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = Nested(b"".join(pickle.dumps(Payload(), 2) for _ in range(5))) if nested else Payload()
    joblib.dump({**released_ghn3(ghn), "extra": hostile}, tmp_path / "ghn3.pt", compress=compress)
    with pytest.raises(CheckpointError, match="pickled code or objects, which are never run") as caught:
        read(tmp_path / "ghn3.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": argparse.Namespace}, "argparse.Namespace"),
        ([1, 2], "it holds no table of tensors"),
        ({"a": bytearray(b"x")}, "builtins.bytearray"),
        ({(1, 2): 3}, "a table with other keys"),
        (collections.Counter("ab"), "collections.Counter"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    joblib.dump(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_files_are_refused(ghn: GHN, tmp_path: Path, compress: Any, part: float) -> None:
    joblib.dump(released_ghn3(ghn), tmp_path / "ghn3.pt", compress=compress)
    content = (tmp_path / "ghn3.pt").read_bytes()
    (tmp_path / "ghn3.pt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match="truncated or damaged; get the file again"):
        read(tmp_path / "ghn3.pt")


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "bomb.pt").write_bytes(pack(pickle.dumps({"a": "x" * 50_000_000}, 4)))
    with pytest.raises(CheckpointError, match=r"refused: it would unpack to more than [\d,]+ bytes"):
        read(tmp_path / "bomb.pt")


def test_a_file_that_promises_terabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x04}\x8e" + (2**42).to_bytes(8, "little") + b"x")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(tmp_path / "x.pt")


def test_lz4_without_its_package_names_it(ghn: GHN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joblib.dump(released_ghn3(ghn), tmp_path / "ghn3.pt", compress="lz4")
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with pytest.raises(CheckpointError, match="compressed with lz4, which needs a package: pip install lz4"):
        read(tmp_path / "ghn3.pt")


def test_a_file_larger_than_any_ghn_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "huge.pt", "wb") as file:
        file.write(b"\x80\x04")
        file.truncate(pickles.MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="bytes are more than any GHN has"):
        read(tmp_path / "huge.pt")
