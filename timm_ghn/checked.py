"""Settings of runs, of training and of fine-tuning: each has its meaning and its bound beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from timm_ghn.errors import TimmGhnError


def setting(
    default: Any = None, text: str = "", least: float | None = None, *, made: Callable[[], Any] | None = None
) -> Any:
    """A field of `Checked`.

    Args:
        default: Its default.
        text: What the setting means; also the help of a command's option.
        least: The smallest number that it can be; None for no bound.
        made: Makes the default, if that can be changed in place.
    """
    metadata = {"text": text, "least": least}
    return field(default=default, metadata=metadata) if made is None else field(default_factory=made, metadata=metadata)


@dataclass(frozen=True)
class Checked:
    """Base of frozen settings.

    A number has to be finite and not below its bound, a setting whose type is a `Literal` one of its choices; None is
    always allowed where it is the default.

    Raises:
        TimmGhnError: The class's `error`, if a value is out of range.
    """

    error: ClassVar[type[TimmGhnError]]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value, least = getattr(self, entry.name), entry.metadata.get("least")
            choices = get_args(hints[entry.name]) if get_origin(hints[entry.name]) is Literal else (value,)
            if value not in choices:
                raise self.error(f"{entry.name} must be one of {', '.join(choices)}, got {value!r}")
            if value is not None and least is not None and not (math.isfinite(value) and value >= least):
                raise self.error(f"{entry.name} must be at least {least:g}, got {value!r}")
