"""What a call of `timm.create_model` asks for: a model, and an initialization by `init=` or by a tag."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from timm_ghn.errors import InitError
from timm_ghn.settings import METHODS, Init

if TYPE_CHECKING:
    from torch import nn


def builder_of(
    model_name: str, init: str | Mapping[str, Any] | Init, *, pretrained_cfg: Any = None, **kwargs: Any
) -> tuple[Callable[[], nn.Module], Init]:
    """What builds a model with timm's own initialization, and the settings of the one that was asked for.

    Args:
        model_name: Name, whose tag may name a method.
        init: A method by name, or all settings.
        pretrained_cfg: As of `timm.create_model`.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        InitError: If name, settings and arguments ask for different weights.
    """
    name, config, tag = split_request(model_name, pretrained_cfg)
    settings = requested_settings(init, tag)
    for argument in ("pretrained", "checkpoint_path"):
        if kwargs.get(argument):
            raise InitError(f"init={settings.method!r} and {argument} ask for different weights; leave one out")
    original = importlib.import_module("timm.models._factory").create_model
    return functools.partial(original, name, pretrained_cfg=config, **kwargs), settings


def split_request(model_name: str, pretrained_cfg: Any) -> tuple[str, Any, str | None]:
    """Model name, configuration and method if one of the two asks for a method by a tag."""
    if isinstance(pretrained_cfg, str) and _is_method(pretrained_cfg):
        return model_name, None, pretrained_cfg
    name, _, tag = model_name.partition(".")
    if ":" not in model_name and _is_method(tag):
        return name, pretrained_cfg, tag
    return model_name, pretrained_cfg, None


def _is_method(tag: str) -> bool:
    return tag.replace("_", "-").lower() in METHODS


def requested_settings(init: str | Mapping[str, Any] | Init | None, tag: str | None) -> Init:
    """Settings of the initialization that was asked for by `init=`, by a tag, or by both.

    Raises:
        InitError: If the two disagree.
    """
    settings = Init.of(init if init is not None else tag or "")
    if tag is not None and Init.of(tag).method != settings.method:
        raise InitError(f"the tag {tag!r} and init={settings.method!r} ask for different weights; leave one out")
    return settings


def input_size_of(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(channels, height, width) where the caller chose the image size; None leaves it to the model."""
    size = kwargs.get("img_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    channels = kwargs.get("in_chans") or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3,))[0]
    return channels, height, width
