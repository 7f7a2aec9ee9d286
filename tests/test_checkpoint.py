"""Reading and writing GHNs, and refusing everything else with a sentence that says what to do."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ghn_reference import PPUDA_CONFIG, SMALL, ppuda_checkpoint, seeded_ghn

from timm_ghn.errors import CheckpointError, TensorFileError
from timm_ghn.ghn import (
    GHN,
    GHNConfig,
    content_hash,
    read,
    write_safetensors,
)
from timm_ghn.storage.reader import TensorReader


@pytest.fixture(scope="module")
def ghn() -> GHN:
    return seeded_ghn(SMALL)


def save(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def equal(a: GHN, b: GHN) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return a.config == b.config and all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


# Formats


def test_a_ppuda_file_is_read_whatever_its_extension(ghn: GHN, tmp_path: Path) -> None:
    loaded = read(save(tmp_path / "ghn.safetensors", ppuda_checkpoint(ghn)))
    assert equal(loaded, ghn)
    assert loaded.info is not None
    assert loaded.info.metadata == {"epoch": "7"}
    assert loaded.info.hash == content_hash(ghn)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_file_of_torch_before_1_6_is_read(ghn: GHN, tmp_path: Path) -> None:
    torch.save(ppuda_checkpoint(ghn), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert equal(read(tmp_path / "old.pt"), ghn)


def test_safetensors_keep_weights_config_hash_and_metadata(ghn: GHN, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "ghn.pt"
    write_safetensors(ghn, path, {"card": "trained on nothing"})
    loaded = read(path)
    assert equal(loaded, ghn)
    assert loaded.info is not None
    assert loaded.info.metadata["card"] == "trained on nothing"
    assert loaded.info.hash == content_hash(ghn)
    assert os.listdir(path.parent) == ["ghn.pt"]


def test_a_ghn_that_was_read_can_be_copied_and_pickled(ghn: GHN, tmp_path: Path) -> None:
    write_safetensors(ghn, tmp_path / "ghn.safetensors", {"step": "7"})
    found = read(tmp_path / "ghn.safetensors")
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.info == found.info
        assert content_hash(other) == content_hash(found)


def test_every_caller_gets_a_ghn_of_its_own_and_changed_files_are_read_again(ghn: GHN, tmp_path: Path) -> None:
    write_safetensors(ghn, tmp_path / "a")
    first = read(tmp_path / "a")
    with torch.no_grad():
        next(first.parameters()).add_(1)
    first.info = None
    second = read(tmp_path / "a")
    assert equal(second, ghn)
    assert second.info is not None
    assert not second.training
    write_safetensors(first, tmp_path / "a")
    assert equal(read(tmp_path / "a"), first)


def test_the_published_config_round_trips() -> None:
    config = GHNConfig.from_dict(PPUDA_CONFIG)
    assert config == GHNConfig()
    assert GHNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"ve": False, "layernorm": False, "weight_norm": False},
        {"hypernet": "mlp"},
    ],
)
def test_other_kinds_of_ghn_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    ghn = seeded_ghn(GHNConfig.from_dict({**SMALL.to_dict(), **changes}))
    write_safetensors(ghn, tmp_path / "ghn.safetensors")
    assert equal(read(save(tmp_path / "ghn.pt", ppuda_checkpoint(ghn))), ghn)
    assert equal(read(tmp_path / "ghn.safetensors"), ghn)


def test_reading_leaves_the_generator_and_ignores_the_default_device(ghn: GHN, tmp_path: Path) -> None:
    path = save(tmp_path / "ghn.pt", ppuda_checkpoint(ghn))
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        loaded = read(path)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_hash_is_of_config_and_weights_alone(ghn: GHN) -> None:
    other = seeded_ghn(SMALL)
    assert content_hash(other) == content_hash(ghn)
    with torch.no_grad():
        other.embed.weight[0, 0] += 1
    assert content_hash(other) != content_hash(ghn)
    rescaled = seeded_ghn(GHNConfig.from_dict({**SMALL.to_dict(), "weight_norm": False}))
    assert content_hash(rescaled) != content_hash(ghn)


def test_a_failed_write_leaves_the_old_file(ghn: GHN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ghn.safetensors"
    write_safetensors(ghn, path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(seeded_ghn(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["ghn.safetensors"]


# Files that are refused


def rebuilt(ghn: GHN, change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, Any]:
    data = ppuda_checkpoint(ghn)
    change(data["state_dict"])
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln.weight"), "ln.weight is missing"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra is unknown"),
        (lambda s: s.update({"ln.weight": torch.zeros(9)}), r"ln.weight has shape \(9,\) instead of \(8,\)"),
        (lambda s: s["ln.weight"].fill_(float("nan")), "ln.weight has NaN"),
        (lambda s: s["ln.bias"].fill_(float("inf")), "ln.bias has NaN or infinite"),
        (lambda s: s.update({"ln.weight": torch.ones(8, dtype=torch.int64)}), "ln.weight is torch.int64"),
        (lambda s: s.update({"ln.weight": torch.zeros(1).expand(2**40)}), "ln.weight has shape"),
        (lambda s: s.update({"ln.weight": "text"}), "not a table of tensors"),
    ],
)
def test_wrong_tensors_are_refused(
    ghn: GHN, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    path = save(tmp_path / "ghn.pt", rebuilt(ghn, change))
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hid": 30}, "hid is 30, not a multiple of 4"),
        ({"hid": 2**40}, "hid is .*, not between 1 and 1024"),
        ({"hid": True}, "hid is True, not a whole number"),
        ({"max_shape": (64, 64, 11)}, "not four sizes"),
        ({"max_shape": (64, 64, 11, 12)}, "not square"),
        ({"max_shape": (64, 10**9, 11, 11)}, r"max_shape\[1\] is 1000000000"),
        ({"max_shape": (1024, 1024, 64, 64), "hid": 1024}, "the decoder would have"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": "10"}, "num_classes is '10', not a whole number"),
        ({"hypernet": "transformer"}, "hypernet is 'transformer', not one of gatedgnn, graphormer, mlp"),
        ({"decoder": ["conv"]}, "decoder is"),
        ({"decoder": "mlp"}, "decoder is 'mlp', not one of conv"),
        ({"ve": 1}, "ve is 1, not true or false"),
        ({"noise": -1}, r"noise is -1, not a number from 0 to 1e\+06"),
        ({"noise": True}, "noise is True, not a number"),
        ({"noise": float("nan")}, "noise is nan, not a number"),
        ({"heads": 8}, "layers and heads need hypernet 'graphormer'"),
        ({"colour": 8}, "unknown settings colour"),
    ],
)
def test_wrong_configs_are_refused(ghn: GHN, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    data = ppuda_checkpoint(ghn)
    data["config"].update(config)
    with pytest.raises(CheckpointError, match=rf"ghn.pt: GHN config: .*{message}"):
        read(save(tmp_path / "ghn.pt", data))


def test_configs_that_are_missing_or_short_are_refused(ghn: GHN, tmp_path: Path) -> None:
    data = ppuda_checkpoint(ghn)
    del data["config"]["weight_norm"]
    with pytest.raises(CheckpointError, match="missing settings weight_norm"):
        read(save(tmp_path / "short.pt", data))
    with pytest.raises(CheckpointError, match="expected a table of settings, not list"):
        read(save(tmp_path / "list.pt", {**data, "config": [1]}))
    with pytest.raises(CheckpointError, match=r"no 'config', and no tensor 'embed.weight' to infer it from"):
        read(save(tmp_path / "none.pt", {"a": torch.zeros(2)}))


class Payload:
    """Pickles to a call of os.system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo executed > executed.txt",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused(ghn: GHN, tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = {**ppuda_checkpoint(ghn), "extra": Payload()}
    torch.save(data, tmp_path / "ghn.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="pickled code or objects, which are never run"):
        read(tmp_path / "ghn.pt")
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
def test_truncated_files_are_refused(ghn: GHN, tmp_path: Path, kind: str, part: float) -> None:
    path = tmp_path / "ghn"
    if kind == "pt":
        save(path, ppuda_checkpoint(ghn))
    else:
        write_safetensors(ghn, path)
    content = path.read_bytes()
    path.write_bytes(content[: max(9, int(len(content) * part))])
    with pytest.raises(CheckpointError, match=r"ghn is truncated or damaged.*get the file again"):
        read(path)


def test_a_flipped_bit_is_noticed(ghn: GHN, tmp_path: Path) -> None:
    path = tmp_path / "ghn.safetensors"
    write_safetensors(ghn, path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: its content does not have the hash"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello, this is not a checkpoint", b"\x80\x02", b"\0" * 64])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ghn.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a GHN checkpoint|truncated or damaged"):
        read(tmp_path / "ghn.pt")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)


def header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 90 * 2**20) + b'{"a": 1}',
        header({"ln.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"ln.weight": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
        header({"ln.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 4]}}) + b"\0" * 4,
    ],
)
def test_headers_that_lie_about_sizes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ghn.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(tmp_path / "ghn.safetensors")


def test_safetensors_without_a_config_are_refused(ghn: GHN, tmp_path: Path) -> None:
    safetensors.torch.save_file(dict(ghn.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="without a GHN: its metadata have no 'timm_ghn'"):
        read(tmp_path / "model.safetensors")
    safetensors.torch.save_file(dict(ghn.state_dict()), tmp_path / "model.safetensors", {"timm_ghn": "[" * 10_000})
    with pytest.raises(CheckpointError, match="are not JSON"):
        read(tmp_path / "model.safetensors")


def test_compressed_archives_are_refused(ghn: GHN, tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.pt", ppuda_checkpoint(ghn))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="refused: it would unpack to"):
        read(tmp_path / "bomb.pt")


# Pickles that mean more than they seem


def bare(program: bytes) -> bytes:
    """A file as torch before 1.6 wrote it, whose content is this pickle."""
    first = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in first) + b"\x80\x02" + program + pickle.dumps([], 2)


DOUBLED = b")" + b"q\x01h\x01\x86" * 60


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}" + DOUBLED + b"K\x01s.", "refused: .*a table with other keys than texts and numbers"),  # hashing: years
        (b"}(" + DOUBLED + b"K\x01u.", "refused: .*a table with other keys"),
        (b"}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "refused: .*a table with other keys"),  # hashing: a crash
        (b"N" * 400_000 + b".", "refused: .*more operations than any GHN needs"),
        (b")2\x86.", "refused: .*operation DUP"),
        (b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.", "refused: .*__builtin__.bytearray"),
        (b"ccollections\nOrderedDict\n]\x85R.", "refused: .*a call"),
        (b"ctorch\nFloatStorage\nK\x05\x85R.", "refused: .*a call"),
        (b"X\x01\0\0\0xQ.", "refused: .*a reference to something else"),
        (DOUBLED + b".", "it holds no table of tensors"),
        (b"}.", "no 'config', and no tensor 'embed.weight'"),
        (b"s.", "truncated or damaged"),
        (b"h\x07.", "truncated or damaged"),
    ],
)
def test_hostile_pickles_are_refused_before_they_are_run(tmp_path: Path, program: bytes, message: str) -> None:
    (tmp_path / "ghn.pt").write_bytes(bare(program))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "ghn.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hid": 10**500}, "hid is .*not between"),
        ({"hid": "x" * 10**6}, "not a whole number"),
        ({"noise": 10**5000}, "noise is .*not a number"),
        ({"noise": "x" * 10**6}, "noise is .*not a number"),
        ({"hypernet": [["deep"] * 100] * 100}, "hypernet is"),
        ({"x" * 10**6: 1}, "unknown settings"),
    ],
)
def test_messages_are_short_whatever_the_file_says(
    ghn: GHN, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    data = ppuda_checkpoint(ghn)
    data["config"].update(config)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(save(tmp_path / "ghn.pt", data))
    assert len(str(caught.value)) < 600


def test_a_huge_epoch_is_left_out(ghn: GHN, tmp_path: Path) -> None:
    loaded = read(save(tmp_path / "ghn.pt", {**ppuda_checkpoint(ghn), "epoch": 10**500}))
    assert loaded.info is not None
    assert loaded.info.metadata == {}


def repacked(source: Path, target: Path, change: Callable[[str, bytes], bytes], again: str = "") -> Path:
    """An archive with other content and right checksums; `again` names a record that is written twice."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
            if again and name.endswith(again):
                new.writestr(name.upper(), b"another")
    return target


def test_tensors_that_are_longer_than_their_data_are_refused(ghn: GHN, tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.pt", ppuda_checkpoint(ghn))

    def shorten(name: str, data: bytes) -> bytes:
        return data[:-4] if name.endswith("data/0") else data

    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(repacked(plain, tmp_path / "short.pt", shorten))
    assert equal(read(repacked(plain, tmp_path / "same.pt", lambda name, data: data)), ghn)


def test_records_of_the_same_name_are_refused(ghn: GHN, tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.pt", ppuda_checkpoint(ghn))
    with pytest.raises(CheckpointError, match="two of its records have the same name"):
        read(repacked(plain, tmp_path / "twice.pt", lambda name, data: data, again="data.pkl"))


def test_keys_and_tensors_that_are_none_are_refused(ghn: GHN, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a table of tensors"):
        read(save(tmp_path / "ghn.pt", rebuilt(ghn, lambda s: s.update({3: torch.zeros(2)}))))
    meta = rebuilt(ghn, lambda s: s.update({"ln.weight": torch.zeros(8, device="meta")}))
    with pytest.raises(CheckpointError, match=r"refused|not a plain tensor"):
        read(save(tmp_path / "meta.pt", meta))


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is not a file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
            "b does not begin where",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "a does not begin where"),
        ({"a": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}, 8, "promises others"),
        (
            {"a": {"dtype": "F32", "shape": [2**62] * 1000, "data_offsets": [0, 8]}},
            8,
            "a shape or an offset is impossible",
        ),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "a shape or an offset is impossible"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, 4, "damaged: 'F99'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "code": "x"}}, 4, "its header is damaged"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 8, "bytes, and its header promises"),
        ({"__metadata__": {"a": 1}}, 0, "the metadata are not texts"),
    ],
)
def test_lying_headers_say_how_they_lie(tmp_path: Path, entries: dict[str, Any], data: int, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(header(entries) + b"\0" * data)
    with pytest.raises(TensorFileError, match=message):
        TensorReader(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, '{"a": 1, "a": 2}', "9" * 10_000, '"\\ud800"', "[]", "nul"]
)
def test_headers_that_are_no_table_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(TensorFileError, match="its header is"):
        TensorReader(tmp_path / "x.safetensors")
