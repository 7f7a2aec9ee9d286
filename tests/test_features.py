"""Models that return features, several tensors or a dictionary, and models that read other things than one image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo import MODULES, on_meta, smallest_model

import timm_ghn
from timm_ghn.errors import CaptureError
from timm_ghn.graph import Graph, Layout, Op, Role, to_graph

SMALL = 1_000_000
"""Number of parameters up to which a model is initialized too."""


@pytest.fixture(autouse=True)
def _seeded_default(seeded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_GHN", str(seeded_checkpoint))


def check_graph(model: nn.Module, graph: Graph) -> None:
    """Nearly everything is predicted, nothing as a classifier, and the rest is explained."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    predicted = {target.name for target in graph.targets}
    assert predicted | {name for name, _ in graph.unused} == sizes.keys()
    assert sum(sizes[name] for name in predicted) > 0.9 * sum(sizes.values())
    assert not {Role.CLASS_WEIGHT, Role.CLASS_BIAS} & {target.role for target in graph.targets}


def check_features(module: str) -> None:
    name = smallest_model(module)
    try:
        model = on_meta(name, features_only=True)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        pytest.skip(f"timm has no features_only for {name}: {error}")
    check_graph(model, to_graph(model))
    if sum(parameter.numel() for parameter in model.parameters()) > SMALL:
        return
    first, second = (timm.create_model(name, features_only=True, init="ghn-orth") for _ in range(2))
    report = timm_ghn.report_of(first)
    assert report is not None
    assert report.predicted_share > 0.9
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in first.parameters())


@pytest.mark.parametrize("module", MODULES[::5])
def test_features_only(module: str) -> None:
    check_features(module)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_features_only_of_every_module(module: str) -> None:
    check_features(module)


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "getter", "fx"])
def test_every_kind_of_feature_extractor_has_the_same_layers(kind: str) -> None:
    graph = to_graph(on_meta("test_resnet", features_only=True, feature_cls=kind))
    whole = to_graph(on_meta("test_resnet"))
    assert graph.operators["conv"] == whole.operators["conv"] - 1  # the classifier
    assert graph.operators["bn"] == whole.operators["bn"]


class Several(nn.Module):
    """Returns what `forward_intermediates` does, in a container of one's choice."""

    def __init__(self, model: nn.Module, container: type) -> None:
        super().__init__()
        self.model, self.container = model, container

    def forward(self, x: Tensor) -> Any:
        last, intermediates = self.model.forward_intermediates(x)  # type: ignore[operator]
        if issubclass(self.container, Mapping):
            return {"last": last, "levels": tuple(intermediates)}
        return self.container([last, *intermediates])


@pytest.mark.parametrize("container", [tuple, list, dict])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_models_that_return_several_tensors(name: str, container: type) -> None:
    model = Several(on_meta(name), container)
    graph = to_graph(model)
    head = {target.name for target in to_graph(model.model).targets if target.role is Role.CLASS_WEIGHT}
    predicted = {target.name.removeprefix("model.") for target in graph.targets}
    assert predicted >= {target.name for target in to_graph(model.model).targets if target.role is Role.WEIGHT}
    assert not predicted & head


class TwoHeads(nn.Module):
    """Returns the logits of two classifiers, as in deep supervision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.early, self.late = nn.Linear(8, 1000), nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.late(self.body(x).mean((2, 3))), self.early(x.mean((2, 3)))


def test_deep_supervision() -> None:
    graph = to_graph(TwoHeads(), input_size=(3, 32, 32))
    classifiers = [target.name for target in graph.targets if target.role is Role.CLASS_WEIGHT]
    assert sorted(classifiers) == ["early.weight", "late.weight"]
    assert not graph.unused


def naflex_inputs(side: int = 4) -> Iterator[Any]:
    """What a NaFlexViT reads: patches with their positions, in the three ways that forward takes."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patches = torch.randn(1, side * side, 16 * 16 * 3)
    positions = torch.stack([rows.flatten(), columns.flatten()], dim=1)[None]
    valid = torch.ones(1, side * side, dtype=torch.bool)
    named = {"patch_coord": positions, "patch_valid": valid}
    yield (patches, positions, valid)
    yield {"x": patches, **named}
    yield ({"patches": patches, **named},)


@pytest.mark.parametrize("settings", [{}, {"pos_embed": "factorized"}, {"global_pool": "map"}], ids=str)
def test_naflex_reads_images_patches_and_dictionaries(settings: dict[str, str]) -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2, **settings)
    image = to_graph(model, input_size=(3, 224, 224))
    for example in naflex_inputs():
        graph = to_graph(model, example_input=example)
        # Tables that are looked up or drawn from by position are no tables of the grid of tokens.
        expected = {t.name for t in image.targets if t.role is not Role.POS_ENC or not settings}
        assert {target.name for target in graph.targets} >= expected
        assert graph.operators[Op.MSA.value] == image.operators[Op.MSA.value]


def test_naflex_is_initialized_from_patches() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2).eval()
    for example in naflex_inputs():
        report = timm_ghn.init_model(model, "ghn-orth", example_input=example, cache=False)
        assert report.predicted_share > 0.95
        args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
        with torch.no_grad():
            assert torch.isfinite(model(*args, **kwargs)).all()


def test_positions_without_values_cannot_be_read() -> None:
    model = on_meta("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2)
    patches, positions, valid = next(naflex_inputs())
    with pytest.raises(CaptureError, match=r"module 'embeds' in item"):
        to_graph(model, example_input=(patches, positions.to("meta"), valid))


def test_tables_of_naflex_store_channels_last() -> None:
    graph = to_graph(on_meta("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2))
    node = next(node for node in graph.nodes if node.op is Op.POS_ENC)
    assert node.shape == (1, 64, 16, 16)
    assert [(t.shape, t.layout) for t in node.targets] == [((1, 16, 16, 64), Layout.CHANNELS_LAST)]
