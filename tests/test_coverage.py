"""`timm-ghn coverage`: how much of a model is predicted."""

from __future__ import annotations

import json

import pytest
import timm

from timm_ghn.cli import main
from timm_ghn.cli.common import select_names
from timm_ghn.cli.coverage import coverage_of
from timm_ghn.errors import CommandError
from timm_ghn.graph import to_graph


def test_a_model_that_is_predicted_as_a_whole() -> None:
    model = timm.create_model("test_resnet")
    found = coverage_of("test_resnet")
    assert found.predicted == found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.nodes == len(to_graph(model))
    assert (found.start_layer, found.layers, found.kept) == (12, 16, {})
    assert found.orthogonalized == 276_480


def test_what_is_kept_has_a_reason_and_a_size() -> None:
    found = coverage_of("levit_128s")
    tables = [p.numel() for name, p in timm.create_model("levit_128s").named_parameters() if "attention_bias" in name]
    assert found.kept == {"a table looked up by index, as of relative positions": sum(tables)}
    assert found.predicted + sum(tables) == found.parameters


def test_patterns_select_names_once_and_in_order() -> None:
    assert select_names(["resnet50", "resnet?8", "resnet18"]) == ("resnet50", "resnet18")
    assert select_names([]) == tuple(timm.list_models())


def test_an_unknown_pattern_names_close_ones() -> None:
    with pytest.raises(CommandError, match=r"no model 'resnt50'; did you mean 'resnet50'"):
        select_names(["resnet18", "resnt50"])
    with pytest.raises(CommandError, match=r"no model 'zzzz\*'; `\*` stands for"):
        select_names(["zzzz*"])


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "test_vit", "test_resnet"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["model", "parameters", "nodes", "predicted"]
    assert [row.split()[0] for row in rows] == ["test_vit", "test_resnet"]
    assert rows[1].split()[1:4] == ["469,688", "42", "100.00%"]


def test_the_command_prints_json_and_names_failures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("no such block")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_vit", broken)
    assert main(["coverage", "test_resnet", "test_vit", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["models"][0]["name"] == "test_resnet"
    assert found["models"][0]["parameters"] == found["models"][0]["predicted"]
    assert found["failures"] == {"test_vit": "KeyError: 'no such block'"}
