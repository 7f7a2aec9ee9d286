"""Models of which each process holds a part become what they are in one process, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn import functional as F

import timm_ghn
from timm_ghn.errors import InitError

if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("FSDP2 is part of torch from 2.6 on", allow_module_level=True)
from sharding import Case, initialize_and_refuse, initialize_cases, shard, start_group, whole_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

GIANT = {"depth": 2, "embed_dim": 96, "num_heads": 4, "img_size": 28, "num_classes": 10}  # with SwiGLU and layer scale
SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "img_size": 56, "num_classes": 3}
METHODS = {name: {"method": name, "seed": 3, "cache": False} for name in timm_ghn.METHODS}

TWO = {
    "giant": Case("vit_giant_patch14_reg4_dinov2", "fsdp", METHODS["ghn-orth"], GIANT),
    "giant orth": Case("vit_giant_patch14_reg4_dinov2", "fsdp", METHODS["orth"], GIANT),
    "running statistics": Case("test_resnet", "fsdp", METHODS["ghn-orth"], {"num_classes": 5}),
    "tables in buffers": Case("swin_tiny_patch4_window7_224", "fsdp", METHODS["ghn"], SWIN),
    "tensor parallel": Case("test_vit", "tp", METHODS["ghn-orth"]),
    "drawn by timm": Case("test_resnet", "fsdp", METHODS["rand"]),
    "a baseline": Case("test_resnet", "fsdp", METHODS["lsuv"]),
    "held": Case("test_resnet", "fsdp", METHODS["ghn-orth"], {"num_classes": 5}, is_held=True),
    "held, tensor parallel": Case("test_vit", "tp", METHODS["ghn-orth"], is_held=True),
    "post-processed": Case("test_resnet", "fsdp", {"method": "post-processing alone"}, is_held=True),
}
FOUR = {
    "both": Case("test_vit", "fsdp tp", METHODS["ghn-orth"]),
    "held, both": Case("test_vit", "fsdp tp", METHODS["orth"], is_held=True),
    "copies of parts": Case("test_convnext", "hsdp", METHODS["ghn"], {"num_classes": 3}),
    "fewer rows than ranks": Case("test_resnet", "fsdp", METHODS["ghn-orth"], {"num_classes": 2}, is_held=True),
}


def with_ghn(case: Case, ghn: Path) -> Case:
    init = {**case.init, "ghn": str(ghn)} if case.init["method"].startswith("ghn") else case.init
    return Case(case.model, case.layout, init, case.arguments, case.is_held)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, seeded_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("two")
    cases = {name: with_ghn(case, seeded_checkpoint) for name, case in TWO.items()}
    start_group(2, initialize_and_refuse, folder, cases, str(seeded_checkpoint))
    return folder


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory, seeded_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("four")
    start_group(4, initialize_cases, folder, {name: with_ghn(case, seeded_checkpoint) for name, case in FOUR.items()})
    return folder


def check(case: Case, ghn: Path, file: Path) -> None:
    case, result = with_ghn(case, ghn), torch.load(file)
    assert "error" not in result, result["error"]
    expected = case.expected()
    tensors = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    assert result["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(result["tensors"][name], tensor), name
    if "report" not in result:
        return
    report = timm_ghn.report_of(expected)
    assert report is not None
    found = timm_ghn.Report.from_dict(result["report"])
    assert (found.model, found.parameters, found.provenance) == (report.model, report.parameters, report.provenance)
    assert result["provenance"] == timm_ghn.provenance(expected)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_hold_the_model_of_one(name: str, of_two: Path, seeded_checkpoint: Path) -> None:
    check(TWO[name], seeded_checkpoint, of_two / name)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_hold_the_model_of_one(name: str, of_four: Path, seeded_checkpoint: Path) -> None:
    check(FOUR[name], seeded_checkpoint, of_four / name)


def test_what_cannot_be_done_changes_nothing(of_two: Path) -> None:
    refusals = torch.load(of_two / "refusals")
    assert {kind for kind, _, _ in refusals.values()} == {"InitError"}
    assert all(same for _, _, same in refusals.values())
    messages = {name: message for name, (_, message, _) in refusals.items()}
    assert "give build=" in messages["a baseline without build"]
    assert "build has to build the model that was sharded" in messages["another model"]
    assert "head.weight is (1000, 64) in the model and (3, 64) in what build() returns" in messages["other classes"]
    assert "needs a seed=" in messages["no seed"]
    assert "start_layer='nowhere'" in messages["no such layer"]
    assert "model.to_empty(device=...)" in messages["no memory"]
    assert "fully_shard" in messages["flattened"]


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
    ids=["DataParallel", "DistributedDataParallel", "compile", "compile within", "compile outside"],
)
def test_wrappers_are_looked_through(wrap: Any, group_of_one: None) -> None:
    plain, inner = (timm.create_model("test_resnet", init=timm_ghn.Init("rand", seed=1)) for _ in range(2))
    wrapper = wrap(inner)
    report = timm_ghn.init_model(wrapper, "orth")
    assert report.parameters == timm_ghn.init_model(plain, "orth").parameters
    assert report == timm_ghn.report_of(wrapper) == timm_ghn.report_of(inner)
    assert timm_ghn.provenance(wrapper) == timm_ghn.provenance(plain)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(inner.state_dict()[name], tensor), name


def checkpointed(model: nn.Module) -> None:
    blocks = type(model.blocks[0])
    checkpoint_wrapper.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, blocks))


def compiled(model: nn.Module) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")


def compiled_in_place(model: nn.Module) -> None:
    for block in model.blocks:
        block.compile(backend="eager")


@pytest.mark.parametrize("change", [checkpointed, compiled, compiled_in_place], ids=lambda change: change.__name__)
@pytest.mark.parametrize("is_held", [False, True], ids=["built", "held"])
def test_blocks_that_torch_changed_before(
    change: Any, is_held: bool, group_of_one: None, seeded_checkpoint: Path
) -> None:
    case = with_ghn(Case("test_vit", "fsdp", METHODS["ghn-orth"], {"num_classes": 10}, is_held), seeded_checkpoint)
    if is_held:
        model = case.held()
    else:
        with torch.device("meta"):
            model = case.build()
    change(model)
    shard(model, "fsdp")
    if is_held:
        timm_ghn.init_model(torch.compile(model, backend="eager"), case.init)
    else:
        model.to_empty(device="cpu")
        timm_ghn.init_model(model, case.init, build=case.build)
    found = [*whole_tensors(model).values()]
    expected = case.expected().state_dict()
    assert len(found) == len(expected)
    for tensor, (name, value) in zip(found, expected.items(), strict=True):
        assert torch.equal(tensor, value), name


class Tied(nn.Sequential):
    """A network, two of whose layers share a weight."""

    def __init__(self) -> None:
        layers = [nn.Linear(8, 8) for _ in range(2)]
        layers[1].weight = layers[0].weight
        super().__init__(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers, nn.Linear(8, 10))


def test_tied_parameters_of_a_sharded_model(group_of_one: None, seeded_checkpoint: Path) -> None:
    with torch.device("meta"):
        model = Tied()
    shard(model, "fsdp")
    model.to_empty(device="cpu")
    plain = Tied()
    for each in (model, plain):
        timm_ghn.init_model(each, "ghn", ghn=str(seeded_checkpoint), input_size=16, build=Tied)
    expected = dict(plain.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name].full_tensor(), parameter), name


def test_memory_without_values_is_filled_by_what_build_returns(seeded_checkpoint: Path) -> None:
    init = timm_ghn.Init("ghn-orth", ghn=str(seeded_checkpoint), cache=False)
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=7)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    timm_ghn.init_model(model, init, build=lambda: timm.create_model("test_resnet", num_classes=7))
    expected = timm.create_model("test_resnet", num_classes=7, init=init)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_frozen_parameters_get_what_build_returns() -> None:
    model = timm.create_model("test_resnet")
    model.conv1.requires_grad_(False)

    def build() -> nn.Module:
        built = timm.create_model("test_resnet")
        nn.init.constant_(built.conv1[0].weight, 2.0)
        return built

    report = timm_ghn.init_model(model, "orth", build=build)
    assert {row.reason for row in report.parameters if row.name.startswith("conv1.")} >= {
        "frozen: requires_grad is False"
    }
    assert bool((model.conv1[0].weight == 2).all())


class Odd(nn.Module):
    """A network, one of whose layers has a weight of an unusual type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.odd = nn.Linear(8, 8, bias=False)
        weight = torch.arange(64).view(8, 8).to(dtype)
        self.odd.weight = nn.Parameter(weight, requires_grad=dtype.is_floating_point or dtype.is_complex)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).mean((2, 3))
        weight = self.odd.weight.real if self.odd.weight.is_complex() else self.odd.weight
        return self.fc(self.norm(features + F.linear(features, weight.to(features.dtype))))


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["ghn-orth", "ghn", "orth", "lsuv"])
@pytest.mark.parametrize("frozen", ["keep", "init"])
def test_parameters_of_unusual_types_are_kept(
    dtype: torch.dtype, method: str, frozen: str, seeded_checkpoint: Path
) -> None:
    model = Odd(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"ghn": str(seeded_checkpoint)} if method.startswith("ghn") else {}
    report = timm_ghn.init_model(model, method, input_size=16, frozen=frozen, **settings)
    row = next(row for row in report.parameters if row.name == "odd.weight")
    assert (row.status.value, row.reason) == ("kept", f"of type {str(dtype).removeprefix('torch.')}")
    assert torch.equal(bits(model.odd.weight), bits(before["odd.weight"]))
    assert not torch.equal(model.conv.weight, before["conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_models_of_unusual_types_are_refused_before_they_change(dtype: torch.dtype, seeded_checkpoint: Path) -> None:
    model = timm.create_model("test_resnet").to(dtype)
    before = {name: bits(parameter).clone() for name, parameter in model.named_parameters()}
    for method in ("ghn-orth", "ghn", "orth", "lsuv", "mimetic"):
        settings = {"ghn": str(seeded_checkpoint)} if method.startswith("ghn") else {}
        with pytest.raises(InitError, match=r"conv1.0.weight \(of type "):
            timm_ghn.init_model(model, method, **settings)
    assert all(torch.equal(bits(parameter), before[name]) for name, parameter in model.named_parameters())


def test_a_layer_that_cannot_run_in_its_type_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8))
    model[3].to(torch.float8_e4m3fn)
    before = copy.deepcopy(model)
    with pytest.raises(InitError, match="module '3'"):
        timm_ghn.init_model(model, "lsuv", input_size=16)
    for (name, parameter), expected in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(bits(parameter), bits(expected)), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.uint8)
