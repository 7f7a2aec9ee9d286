"""Norms of predicted parameters against what ghn3's authors published."""

from __future__ import annotations

import json
import math

import pytest
from ghn_reference import REFERENCE, SMALL, seeded_ghn, seeded_ghn3

from timm_ghn.cli import main
from timm_ghn.cli.ghns import READ_DIFFERENTLY, is_right, predicted_norm, published_norms
from timm_ghn.errors import CheckpointError
from timm_ghn.ghn import load_ghn, write_safetensors
from timm_ghn.ghn.registry import NAMED_GHNS

ON_DISK = {name: NAMED_GHNS[name].path for name in ("ghn2", "ghn3-t", "ghn3-xl")}
"""Read before the tests get a cache of their own."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DISK)
def test_the_published_file_predicts_what_was_published(name: str) -> None:
    if not ON_DISK[name].is_file():
        pytest.skip(f"GHN {name} is not on this disk; `timm-ghn ghns verify {name}` downloads it")
    ghn, norms = load_ghn(ON_DISK[name], shared=True), published_norms(name)
    found = {network: predicted_norm(ghn, network) for network in norms if network not in READ_DIFFERENTLY}
    compared = {network: norm for network, norm in found.items() if norm is not None}
    assert len(compared) > 40
    assert {network: norm for network, norm in compared.items() if not is_right(norm, norms[network])} == {}


def test_the_norm_is_that_of_all_parameters() -> None:
    """The norms of single parameters are those that ghn3 itself computes with the seeded GHN."""
    expected = json.loads((REFERENCE / "ghn3.json").read_text())
    for name in ("resnet18", "mobilenet_v2"):
        norm = math.hypot(*(row[0] for row in expected[name]["predicted"].values()))
        assert predicted_norm(seeded_ghn3(), name) == pytest.approx(norm, rel=1e-5)


def test_networks_that_are_not_predicted_as_a_whole_are_not_compared() -> None:
    assert predicted_norm(seeded_ghn(SMALL), "convnext_tiny") is None
    assert predicted_norm(seeded_ghn(SMALL), "vit_b_32") is None


def test_the_tolerance_is_that_of_ghn3s_own_check() -> None:
    assert is_right(50.009, 50.0)
    assert not is_right(50.011, 50.0)
    assert is_right(500.049, 500.0)
    assert not is_right(500.051, 500.0)


def test_published_norms_are_known_for_three_files() -> None:
    assert {name: len(published_norms(name)) for name in ON_DISK} == {"ghn2": 74, "ghn3-t": 74, "ghn3-xl": 74}
    assert published_norms("ghn3-xl")["resnet50"] == 108.453
    with pytest.raises(CheckpointError, match=r"no norms are published for GHN bundled; .* ghn2, ghn3-t, ghn3-xl"):
        published_norms("bundled")


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(seeded_ghn3(), NAMED_GHNS["ghn3-t"].path)  # another GHN in the place of the published one
    assert main(["ghns", "verify", "ghn3-t", "--models", "resnet18", "vit_b_32"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("resnet18")
    assert out[0].endswith("WRONG")
    assert out[1].endswith("not all of it is predicted")
    assert out[2] == "0 of 1 norms are right"
    assert main(["ghns", "verify", "ghn3-t", "--models", "resnet180"]) == 2
    assert "no norm is published for resnet180; did you mean" in capsys.readouterr().err
