"""Files that are written one tensor at a time are those that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_ghn.errors import TensorFileError
from timm_ghn.storage.header import TensorSpec, specs_of
from timm_ghn.storage.writer import WeightFiles, split

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64,
]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4)
PROPERTY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tensor_of(dtype: torch.dtype, shape: list[int]) -> Tensor:
    return torch.randint(0, 2, shape).to(dtype) if dtype is torch.bool else (torch.randn(shape) * 50).to(dtype)


@PROPERTY
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=8), st.randoms())
def test_files_are_those_of_safetensors(tmp_path: Path, described: dict[str, tuple], order: object) -> None:
    tensors = {name: tensor_of(*description) for name, description in described.items()}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.unlink(missing_ok=True)
    file = WeightFiles({ours: specs_of(tensors)}, {"format": "pt"})
    for name in sorted(tensors, key=lambda _: order.random()):  # type: ignore[attr-defined]
        file.write(name, tensors[name])
    save_file(tensors, theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()


def test_any_strides(tmp_path: Path) -> None:
    tensors = {"t": torch.randn(5, 7).T, "part": torch.randn(9, 9)[2:5, ::2], "wide": torch.randn(1, 3).expand(4, 3)}
    file = WeightFiles({tmp_path / "file": specs_of(tensors)}, {})
    for name, tensor in tensors.items():
        file.write(name, tensor)
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = WeightFiles({tmp_path / "file": {"a": TensorSpec("float32", (3,))}}, {})
    for wrong in (torch.zeros(4), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="the file has room for"):
            file.write("a", wrong)
    with pytest.raises(FileExistsError):
        WeightFiles({tmp_path / "file": {}}, {})
    with pytest.raises(TensorFileError, match="q: a safetensors file holds no complex128"):
        specs_of({"q": torch.zeros(3, dtype=torch.complex128)})


@PROPERTY
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 100))
def test_no_file_exceeds_the_size_unless_one_tensor_does(sizes: list[int], limit: int) -> None:
    specs = {f"t{number}": TensorSpec("uint8", (size,)) for number, size in enumerate(sizes)}
    shards = split(specs, limit)
    files = shards.filename_to_tensors
    assert sorted(name for names in files.values() for name in names) == sorted(specs)
    for names in files.values():
        assert len([n for n in names if specs[n].num_bytes]) <= 1 or sum(specs[n].num_bytes for n in names) <= limit
    if not shards.is_sharded:
        assert list(files) == ["model.safetensors"]


def test_a_tensor_that_is_not_written_is_noticed(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("float32", (3,)), "b": TensorSpec("float32", ())}
    files = WeightFiles({tmp_path / "file": specs}, {})
    files.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="1 tensors were not written, b"):
        files.check_complete()
    files.write("b", torch.tensor(2.0))
    files.check_complete()
