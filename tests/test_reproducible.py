"""The same inputs give the same bytes on machines of a kind, and the same values to rounding on others."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from ghn_reference import SMALL, seeded_ghn
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_ghn
from timm_ghn.errors import TensorFileError
from timm_ghn.ghn import write_safetensors
from timm_ghn.initialize.report import Status
from timm_ghn.storage.folder import save
from timm_ghn.storage.reader import TensorReader, bytes_of
from timm_ghn.storage.writer import write_file

MODEL = "test_vit"
PROGRAM = """
import hashlib, json, os, sys, warnings
import torch, timm, timm_ghn
from timm_ghn.storage.cache import WeightCache
from timm_ghn.storage.folder import save
model = timm.create_model(sys.argv[1], init=timm_ghn.Init("ghn-orth", ghn="bundled"))
folder = sys.argv[2]
save(model, folder)
files = [info.path for info in WeightCache.default().entries()]
files += [os.path.join(folder, name) for name in ("model.safetensors", "config.json")]
capability = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends.cpu, "get_cpu_capability") else ""
print(json.dumps([capability, [hashlib.sha256(open(path, "rb").read()).hexdigest() for path in files]]))
"""


def produce(folder: Path, **environment: str) -> tuple[str, list[str]]:
    """Hashes of a cache entry and of an exported model that another process makes, and its CPU capability."""
    variables = {**os.environ, "TIMM_GHN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, MODEL, str(folder / "model")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    capability, hashes = json.loads(done.stdout.splitlines()[-1])
    assert len(hashes) == 3
    return capability, hashes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("first")
    return folder, produce(folder, PYTHONHASHSEED="1", HF_HUB_OFFLINE="1")[1]


@pytest.mark.parametrize(
    "environment", [{"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2"}, {"PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "3"}]
)
def test_bytes_do_not_depend_on_process_threads_or_hash_seed(
    first: tuple[Path, list[str]], tmp_path: Path, environment: dict[str, str]
) -> None:
    assert produce(tmp_path, **environment)[1] == first[1]


PREDICTED, ORTHOGONALIZED = 1e-5, 5e-3
"""Tolerances, relative to the largest value of a tensor. Orthogonalized weights are those of nearly dependent columns
(condition numbers of 1e3 to 1e6), which magnifies the rounding of what is orthogonalized."""


def check_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Compare weights, those that are post-processed by a wider measure."""
    report = timm_ghn.report_of(timm.create_model(MODEL, init=timm_ghn.Init("ghn-orth", ghn="bundled")))
    assert report is not None
    status = {row.name: row.status for row in report.parameters}
    assert one.keys() == two.keys()
    worst = {PREDICTED: 0.0, ORTHOGONALIZED: 0.0}
    for name in one:
        a, b = one[name].double(), two[name].double()
        limit = ORTHOGONALIZED if status.get(name) is Status.PREDICTED_ORTHOGONALIZED else PREDICTED
        worst[limit] = max(worst[limit], float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)))
    print(f"largest differences: predicted {worst[PREDICTED]:.1e}, orthogonalized {worst[ORTHOGONALIZED]:.1e}")
    assert all(difference <= limit for limit, difference in worst.items())


CPUS = {
    "another MKL": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "MKL_CBWR": "COMPATIBLE"},
    "an old CPU": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


@pytest.mark.parametrize("name", CPUS)
def test_values_agree_to_rounding_on_other_cpus(first: tuple[Path, list[str]], tmp_path: Path, name: str) -> None:
    capability, _ = produce(tmp_path, **CPUS[name])
    if "ATEN_CPU_CAPABILITY" in CPUS[name] and capability:
        assert capability in ("DEFAULT", "NO AVX")
    check_equal(weights(first[0]), weights(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_values_agree_on_cuda() -> None:
    init = timm_ghn.Init("ghn-orth", ghn="bundled", cache=False)
    on_cpu, on_cuda = timm.create_model(MODEL, init=init), timm.create_model(MODEL, init=init, device="cuda")
    report = timm_ghn.report_of(on_cpu)
    assert report is not None
    names = [row.name for row in report.parameters if row.status is not Status.KEPT]
    assert len(names) > 20

    def generated(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Without what timm draws itself, which comes from the device's own generator."""
        found = {name: model.get_parameter(name).detach().cpu() for name in names}
        return {**found, "pos_embed": found["pos_embed"][:, on_cpu.num_prefix_tokens :]}

    check_equal(generated(on_cpu), generated(on_cuda))


# Files


def test_the_exported_file_is_the_same_again(tmp_path: Path) -> None:
    model = timm.create_model(MODEL, init=timm_ghn.Init("ghn-orth", ghn="bundled"))
    folders = [save(model, tmp_path / str(number)) for number in range(4)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_a_written_ghn_is_the_same_again(tmp_path: Path) -> None:
    for number in range(4):
        write_safetensors(seeded_ghn(SMALL), tmp_path / str(number), {"card": "text", "b": "1", "a": "2"})
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}) == 1


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
        lambda key: key != "__metadata__"
    ),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31)),
    max_size=6,
)


def made(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    values = torch.randint(0, 256, [*shape, 8], generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return (
        (values[..., 0] > 127)
        if dtype is torch.bool
        else values[..., : dtype.itemsize].contiguous().view(dtype)[..., 0]
    )


@settings(max_examples=40)
@given(
    TENSORS,
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
        max_size=3,
    ),
)
def test_files_agree_with_the_safetensors_package(
    tmp_path_factory: pytest.TempPathFactory,
    description: dict[str, tuple[torch.dtype, list[int], int]],
    metadata: dict[str, str],
) -> None:
    tensors = {name: made(*what) for name, what in description.items()}
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    write_file(path, tensors, metadata)
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == tensors.keys()
    path.write_bytes(safetensors.torch.save(tensors, metadata or None))
    with TensorReader(path) as file:
        assert file.metadata == metadata
        for name, tensor in tensors.items():
            for other in (theirs[name], file.read(name)):
                assert other.dtype == tensor.dtype
                assert other.shape == tensor.shape
                assert bytes(bytes_of(other.contiguous())) == bytes(bytes_of(tensor.contiguous()))


def test_float32_files_are_those_of_the_package(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a.weight": torch.zeros(2, 5), "c": torch.tensor(1.0)}
    write_file(tmp_path / "x", tensors, {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_types_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: a safetensors file holds no complex128"):
        write_file(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex128)}, {})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "missing"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    error, match = (FileNotFoundError, "x") if kind == "missing" else (TensorFileError, "not a regular file")
    with pytest.raises(error, match=match):
        TensorReader(path)


FORKING = """
import os, sys, timm, torch, timm_ghn
torch.set_num_threads(2)
torch.rand(1000, 1000) @ torch.rand(1000, 1000)
(torch.rand(10**6) + 1).isnan().any()
for method in ("orth", "ghn-orth", "lsuv", "mimetic"):
    child = os.fork()
    if child == 0:
        model = timm.create_model("vit_tiny_patch16_224", init=timm_ghn.Init("orth", cache=False), depth=1)
        settings = {"ghn": "bundled"} if method == "ghn-orth" else {}
        timm_ghn.init_model(model, method, input_size=224, **settings)
        timm_ghn.orthogonalize_(model)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, method
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_a_process_with_threads_do_not_hang() -> None:
    command = [sys.executable, "-c", FORKING]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
