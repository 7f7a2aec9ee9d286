"""Models that are written without being held: the values, the memory, and what is left after a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import load_torch_model
from safetensors.torch import load_file
from torch import Tensor, nn

import timm_ghn
from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.initialize import to_folder
from timm_ghn.initialize.memory import LazyMemory
from timm_ghn.initialize.report import Status
from timm_ghn.initialize.to_folder import init_to_folder
from timm_ghn.seeding import seeded
from timm_ghn.storage.folder import ExportError, save
from timm_ghn.storage.writer import WeightFiles

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _single_threaded() -> Iterator[None]:
    """The cores are shared, and results do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the tensors of small models count as large."""
    monkeypatch.setattr(to_folder, "LazyMemory", lambda: LazyMemory(min_bytes=4096))


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    for name in names:
        assert (first / name).stat().st_size == (second / name).stat().st_size
        if name.endswith(".safetensors"):
            one, other = load_file(first / name), load_file(second / name)
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                assert tensor.dtype == other[key].dtype
                assert torch.equal(tensor, other[key]), key


def check(directory: Path, name: str, init: timm_ghn.Init, **kwargs: Any) -> timm_ghn.Report:
    """The files of the streamed model are those of the model in memory."""
    report = init_to_folder(name, directory / "streamed", init, **kwargs)
    model = timm.create_model(name, init=init, **kwargs)
    shaping = {key: value for key, value in kwargs.items() if key != "dtype"}
    save(model, directory / "saved", model_args=None if hasattr(model, "_model_args") else shaping)
    assert_same_files(directory / "streamed", directory / "saved")
    expected = timm_ghn.report_of(model)
    assert expected is not None
    assert (report.parameters, report.provenance) == (expected.parameters, expected.provenance)
    return report


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_vit", {"num_classes": 3, "in_chans": 2, "img_size": 96}),
        ("test_resnet", {"dtype": torch.bfloat16}),
        ("test_convnext", {"dtype": torch.float16}),
        ("test_nfnet", {}),
        ("test_efficientnet", {"num_classes": 0}),
        ("test_byobnet", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("swin_tiny_patch4_window7_224", {"num_classes": 10}),
        ("mobilenetv3_small_050", {}),
        ("convit_tiny", {}),
        ("tf_efficientnet_cc_b0_4e", {}),
        ("poolformer_s12", {"dtype": torch.bfloat16}),
        ("xcit_nano_12_p16_224", {}),
    ],
)
@pytest.mark.usefixtures("small_pages")
def test_the_values_are_those_of_the_model_in_memory(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, name, timm_ghn.Init("ghn-orth", ghn="bundled", seed=3, cache=False), **kwargs)


@pytest.mark.parametrize("method", ["ghn", "orth"])
@pytest.mark.usefixtures("small_pages")
def test_other_methods(method: str, tmp_path: Path) -> None:
    init = timm_ghn.Init(method, ghn="bundled" if method == "ghn" else None, cache=False)
    check(tmp_path, "test_vit", init)
    check(tmp_path / "again", "coat_tiny", init)  # the one family of timm with tied parameters


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "convit_tiny", "coat_lite_tiny"])
@pytest.mark.usefixtures("small_pages")
def test_timms_own_random_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    report = init_to_folder(name, tmp_path, timm_ghn.Init("rand", seed=5))
    with seeded(5):
        model = timm.create_model(name)
    written = load_file(tmp_path / "model.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.equal(written[key], tensor), key
    assert report.share(Status.KEPT) == 1


def test_a_tag_names_the_method(tmp_path: Path) -> None:
    report = init_to_folder("test_vit.orth", tmp_path, "orth")
    assert report.provenance["method"] == "orth"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert timm_ghn.provenance(loaded) == report.provenance


def test_baselines(tmp_path: Path) -> None:
    for name, method in (("test_resnet", "lsuv"), ("test_vit", "mimetic")):
        check(tmp_path / method, name, timm_ghn.Init(method, seed=2))


def test_several_files(tmp_path: Path) -> None:
    init = timm_ghn.Init("orth", cache=False)
    init_to_folder("test_vit", tmp_path, init, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    loaded = timm.create_model(f"local-dir:{tmp_path}")
    load_torch_model(loaded, tmp_path, strict=True)
    expected = timm.create_model("test_vit", init=init).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = WeightFiles.write, []

    def fail(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 9:
            raise error
        real(*args)

    monkeypatch.setattr(WeightFiles, "write", fail)
    with pytest.raises(ExportError if isinstance(error, OSError) else KeyboardInterrupt):
        init_to_folder("test_vit", tmp_path / "new", "orth")
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path: Path) -> None:
    for argument in ({"pretrained": True}, {"checkpoint_path": "x.pt"}):
        with pytest.raises(InitError, match="different weights"):
            init_to_folder("test_vit", tmp_path, "orth", **argument)
    with pytest.raises(InitError, match="device"):
        init_to_folder("test_vit", tmp_path, "orth", device="meta")
    with pytest.raises(ExportError, match="cannot describe"):
        init_to_folder("test_resnet", tmp_path, "orth", features_only=True)
    assert not list(tmp_path.iterdir())
    init_to_folder("test_resnet", tmp_path, "orth")
    with pytest.raises(ExportError, match="already"):
        init_to_folder("test_resnet", tmp_path, "orth")


def test_the_generator_and_the_default_device_do_not_matter(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        init_to_folder("test_resnet", tmp_path / "a", "orth")
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    init_to_folder("test_resnet", tmp_path / "b", "orth")
    assert_same_files(tmp_path / "a", tmp_path / "b")


def resident() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_when_it_is_written_and_given_back() -> None:
    memory = LazyMemory()
    before = resident()
    with memory:
        layer = nn.Parameter(torch.empty(8192, 8192))
    assert resident() - before < 16 * 1024
    view: Tensor = layer.data.T
    with torch.no_grad():
        view.fill_(1)
    assert resident() - before > 240 * 1024
    memory.release(layer)
    assert resident() - before < 16 * 1024
    assert layer.flatten()[-1] == 0


def test_memory_of_other_tensors() -> None:
    memory = LazyMemory(min_bytes=64)
    with memory:
        assert torch.empty(3, 50, dtype=torch.float16).dtype is torch.float16
        assert torch.zeros((40, 2)).sum() == 0
        assert torch.empty(size=(40, 2), requires_grad=True).requires_grad
        assert torch.empty(40, device="meta").is_meta
        out = torch.ones(40)
        assert torch.zeros(40, out=out) is out
        channels_last = torch.empty(2, 3, 4, 4, memory_format=torch.channels_last)
        assert channels_last.is_contiguous(memory_format=torch.channels_last)
    small, foreign = torch.ones(4), torch.frombuffer(bytearray(64), dtype=torch.float32)
    memory.release(small)
    assert small.untyped_storage().nbytes() == 0
    memory.release(foreign)  # not torch's own: stays


def test_models_are_built_without_memory() -> None:
    """The tensors of a large model take addresses alone."""
    before = resident() if sys.platform == "linux" else 0
    with DeferredRandom(0), LazyMemory():
        model = timm.create_model("vit_giant_patch14_224")
    assert sum(p.numel() for p in model.parameters()) > 1e9
    if sys.platform == "linux":
        assert resident() - before < 100 * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_a_billion_parameters(tmp_path: Path) -> None:
    arguments = ("vit_giant_patch14_224", "bfloat16", "ghn-orth", "bundled", str(tmp_path / "m"))
    code = f"import json, large_models; print(json.dumps(large_models.write(*{arguments!r})))"
    output = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    row = json.loads(output.stdout.splitlines()[-1])
    largest = 4 * row["largest_parameter"]
    assert row["parameters"] > 1e9
    assert row["peak_bytes"] < 8 * largest + 300e6
    loaded = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, dtype=torch.bfloat16)
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
