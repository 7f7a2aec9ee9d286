"""Names of timm models by pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import timm

from timm_ghn.errors import TimmGhnError
from timm_ghn.text import did_you_mean

_WILDCARDS = frozenset("*?[")


class UnknownPatternError(TimmGhnError, ValueError):
    """No model of timm has a name of this pattern."""


def select_names(patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of `timm.list_models()` that match one of the patterns, each once, in the order of the patterns.

    Args:
        patterns: Names, or patterns with `*`, `?` and `[...]`; a pattern without wildcards is a whole name. None at
            all stands for every model.

    Raises:
        UnknownPatternError: If a pattern matches nothing; the message names close matches.
    """
    known: list[str] = timm.list_models()
    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        matches = fnmatch.filter(known, pattern)
        if not matches:
            raise UnknownPatternError(f"timm has no model {pattern!r}{_hint(pattern, known)}")
        found.update(dict.fromkeys(matches))
    return tuple(found)


def module_of(name: str) -> str:
    """The module of timm that builds a model, such as "resnet"."""
    entrypoint: str = timm.models.model_entrypoint(name).__module__
    return entrypoint.rpartition(".")[2]


def _hint(pattern: str, known: Sequence[str]) -> str:
    plain = "".join(letter for letter in pattern if letter not in _WILDCARDS)
    return did_you_mean(plain, known) or "; `*` stands for any letters, as in 'resnet*'"
