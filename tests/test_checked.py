"""Settings that are checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from timm_ghn.checked import Checked, setting
from timm_ghn.errors import TrainingError


@dataclass(frozen=True)
class Baking(Checked):
    error = TrainingError

    minutes: float = setting(30.0, "how long", 1)
    loaves: int | None = setting(None, "how many; None for all", 1)
    flour: Literal["rye", "wheat"] = setting("rye", "of what")
    seeds: dict[str, int] = setting(text="what is on top", made=dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0.5}, "minutes must be at least 1, got 0.5"),
        ({"minutes": math.nan}, "minutes must be at least 1, got nan"),
        ({"minutes": math.inf}, "minutes must be at least 1, got inf"),
        ({"loaves": 0}, "loaves must be at least 1, got 0"),
        ({"flour": "sand"}, "flour must be one of rye, wheat, got 'sand'"),
    ],
)
def test_values_out_of_range_are_named_with_their_bounds(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        Baking(**changes)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_defaults_and_bounds_themselves_are_in_range() -> None:
    assert Baking() == Baking(30.0, None, "rye", {})
    assert Baking(minutes=1, loaves=1, flour="wheat").minutes == 1
    assert Baking().seeds is not Baking().seeds
    assert fields(Baking)[0].metadata["text"] == "how long"
