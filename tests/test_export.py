from __future__ import annotations

import inspect
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub import load_torch_model
from safetensors import safe_open
from torch import nn

import timm_ghn
from timm_ghn.storage import folder as export
from timm_ghn.storage.folder import ExportError, check_destination, save
from timm_ghn.storage.writer import WeightFiles

FILES = {"config.json", "model.safetensors"}

records_arguments = pytest.mark.skipif(
    not hasattr(timm.create_model("test_resnet"), "_model_args"), reason="timm does not record a model's arguments yet"
)
knows_dtype = pytest.mark.skipif(
    "dtype" not in inspect.signature(timm.models.ResNet).parameters, reason="timm's models take no dtype yet"
)


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


def load(directory: Path, **kwargs: Any) -> nn.Module:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **kwargs).eval()


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    expected = b.state_dict()
    assert a.state_dict().keys() == expected.keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_round_trip(model: nn.Module, tmp_path: Path) -> None:
    assert save(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    assert_same_state(load(tmp_path / "new" / "folder"), model)


def test_provenance_is_in_both_files(model: nn.Module, tmp_path: Path, seeded_checkpoint: Path) -> None:
    timm_ghn.init_model(model, "ghn-orth", ghn=str(seeded_checkpoint), seed=3)
    save(model, tmp_path)
    facts = timm_ghn.provenance(model)
    assert facts is not None
    assert facts["seed"] == 3
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["timm_ghn"]) == facts
    assert timm_ghn.provenance(load(tmp_path)) == facts
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "ghn_orth"


def test_a_model_without_provenance(model: nn.Module, tmp_path: Path) -> None:
    save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@records_arguments
def test_arguments_of_the_model_survive(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3, in_chans=2, img_size=96, global_pool="avg")
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert_same_state(loaded, model)
    assert loaded(torch.zeros(1, 2, 96, 96)).shape == (1, 3)


def test_tied_and_overlapping_weights(model: nn.Module, tmp_path: Path) -> None:
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    first = next(conv for conv in convs if sum(other.weight.shape == conv.weight.shape for other in convs) > 1)
    second = next(conv for conv in convs if conv is not first and conv.weight.shape == first.weight.shape)
    second.weight = first.weight
    model.fc.weight.data = torch.randn(10, model.fc.in_features)[5:]  # a part of a larger storage
    save(model, tmp_path)
    loaded = load(tmp_path)  # strict: every name has to be there
    assert_same_state(loaded, model)


@knows_dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype, model: nn.Module, tmp_path: Path) -> None:
    save(model.to(dtype), tmp_path)
    assert_same_state(load(tmp_path, dtype=dtype), model)
    for name, tensor in load(tmp_path).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name].to(tensor.dtype))


def test_overwriting_has_to_be_asked_for(model: nn.Module, tmp_path: Path) -> None:
    save(model, tmp_path)
    with torch.no_grad():
        model.fc.bias.fill_(7)
    with pytest.raises(ExportError, match=r"holds model.safetensors and config.json already"):
        save(model, tmp_path)
    assert not (load(tmp_path).fc.bias == 7).any()
    save(model, tmp_path, overwrite=True)
    assert (load(tmp_path).fc.bias == 7).all()


@pytest.mark.parametrize("failing", [(WeightFiles, "write"), (os, "fsync"), (timm.models._hub, "save_config_for_hf")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_nothing(
    failing: tuple[Any, str], error: BaseException, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(*failing)

    def fail(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise error

    monkeypatch.setattr(*failing, fail)
    is_full = isinstance(error, OSError)
    with pytest.raises(ExportError if is_full else KeyboardInterrupt, match="No space left" if is_full else None):
        save(model, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_noticed_before(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the weights take 1000000.0 TB, and [\d.]+ [GT]B are free"):
        check_destination(tmp_path / "new", num_bytes=10**18)


@pytest.mark.parametrize("number", [1, 2])
def test_a_failure_of_a_rename_leaves_nothing(
    number: int, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = os.replace

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ExportError, match="Input/output error"):
        save(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_the_model_that_was_there(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightFiles, "write", fail)
    with pytest.raises(ExportError):
        save(model, tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_way(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ExportError, match="not a folder"):
            save(model, target)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ExportError, match="no permission"):
        check_destination(tmp_path / "new")


def test_files_have_the_usual_permissions(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    save(model, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@records_arguments
def test_models_that_timm_cannot_build_again(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a model of timm's registry"):
        save(torchvision.models.squeezenet1_0(), tmp_path)
    with pytest.raises(ExportError, match="cannot describe test_resnet"):
        save(timm.create_model("test_resnet", features_only=True), tmp_path)
    with pytest.raises(ExportError, match="norm_layer"):
        save(timm.create_model("test_vit", norm_layer=partial(nn.LayerNorm, eps=1e-3)), tmp_path)
    with torch.device("meta"):
        skeleton = timm.create_model("test_resnet")
    with pytest.raises(ExportError, match="meta device"):
        save(skeleton, tmp_path)
    assert not list(tmp_path.iterdir())


def test_coat_whose_encoders_share_weights(tmp_path: Path) -> None:
    """The one family of timm with tied parameters."""
    model = timm.create_model("coat_tiny", init="orth")
    names = dict(model.named_parameters(remove_duplicate=False))
    assert len(names) > len(list(model.parameters()))
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert_same_state(loaded, model)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_several_files(model: nn.Module, tmp_path: Path) -> None:
    save(model, tmp_path, max_shard_size="500KB")
    files = {path.name for path in tmp_path.iterdir()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files == {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}
    assert len(files) > 4
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    loaded = timm.create_model(f"local-dir:{tmp_path}")
    load_torch_model(loaded, tmp_path, strict=True)
    assert_same_state(loaded, model)


def test_overwriting_leaves_no_files_of_the_model_before(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save(model, tmp_path, max_shard_size="500KB")
    with pytest.raises(ExportError, match=r"model.safetensors.index.json"):
        save(model, tmp_path)
    save(model, tmp_path, overwrite=True, max_shard_size="1MB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors.index.json", *shards}
    save(model, tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert_same_state(load(tmp_path), model)


def test_a_size_that_is_none(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="max_shard_size='much'"):
        save(model, tmp_path, max_shard_size="much")
