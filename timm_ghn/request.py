"""What a call asks for: a timm model, and where its weights come from. All contradictions are found here.

Neither torch nor timm is imported here, so that `import timm_ghn` stays quick.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from timm_ghn.errors import InitError
from timm_ghn.settings import METHODS, Init

if TYPE_CHECKING:
    from torch import nn

HUB_PREFIX = "hf-hub:"
_PLACEMENT = ("device", "dtype")


@dataclass(frozen=True)
class Request:
    """A timm model that is asked for, and where its weights come from.

    A tag that names a method ("resnet50.ghn-orth", or `pretrained_cfg="ghn-orth"`) is the same as `init=`. It does not
    need `pretrained=True`: timm's own tags name trained weights and the layout that belongs to them, so that without
    `pretrained=True` the layout is left; the tag of a method names nothing but an initialization.

    Attributes:
        name: timm's name of the model, without the tag of a method.
        init: Settings of the initialization.
        source: Ready-made weights to take instead, as "hf-hub:organization/name[@revision]"; or None.
        arguments: Further arguments of `timm.create_model`, by name.
    """

    name: str
    init: Init = field(default_factory=Init)
    source: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        model_name: str,
        init: str | Mapping[str, Any] | Init | None = None,
        *,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        checkpoint_path: Any = None,
        **arguments: Any,
    ) -> Request | None:
        """Read a call of `timm.create_model`.

        Args:
            model_name: Name, whose tag may name a method.
            init: A method by name, all settings, or ready-made weights as "hf-hub:organization/name".
            pretrained: As of `timm.create_model`; allowed beside a tag that names a method, where it changes nothing.
            pretrained_cfg: As of `timm.create_model`, or the name of a method.
            checkpoint_path: As of `timm.create_model`.
            **arguments: Further arguments of `timm.create_model`.

        Returns:
            The request; None if the call asks for no initialization, so that it is timm's alone.

        Raises:
            InitError: If the call asks for different weights at once, or a setting is wrong.
        """
        name, tag = split_method(model_name)
        if isinstance(pretrained_cfg, str) and is_method(pretrained_cfg):
            name, tag, pretrained_cfg = model_name, pretrained_cfg, None
        if init is None and tag is None:
            return None
        source = init if isinstance(init, str) and init.startswith(HUB_PREFIX) else None
        settings = Init() if source else Init.of(init if init is not None else tag or "")
        asked = f"init={source or settings.method!r}"
        if tag is not None and (source or Init.of(tag).method != settings.method):
            raise InitError(f"{asked} and the tag {tag!r} ask for different weights of {name!r}; leave one out")
        if checkpoint_path:
            raise InitError(f"{asked} and checkpoint_path ask for different weights of {name!r}; leave one out")
        if pretrained and tag is None:
            tagged = f"{name.partition('.')[0]}.{settings.method}"
            hint = "" if source else f", or write the initialization as a tag: {tagged!r}"
            raise InitError(f"{asked} and pretrained=True ask for different weights of {name!r}; leave one out{hint}")
        if pretrained_cfg is not None:
            arguments["pretrained_cfg"] = pretrained_cfg
        return cls(name, settings, source, {key: value for key, value in arguments.items() if value is not None})

    def build(self) -> nn.Module:
        """The model with timm's own initialization."""
        model: nn.Module = importlib.import_module("timm").create_model(self.name, **self.arguments)
        return model

    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        from timm_ghn.trace.skeleton import build_on_meta

        arguments = {key: value for key, value in self.arguments.items() if key != "device"}
        return build_on_meta(replace(self, arguments=arguments).build)

    def input_size(self, model: nn.Module) -> tuple[int, int, int] | None:
        """(channels, height, width) where the caller chose the image size; None leaves it to the model."""
        from timm_ghn.trace.inputs import timm_config

        size = self.arguments.get("img_size")
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return self.arguments.get("in_chans") or timm_config(model).get("input_size", (3,))[0], height, width

    def plain_arguments(self) -> dict[str, Any]:
        """What the model is built from, JSON-compatible, without type and device.

        Raises:
            InitError: If an argument is not plain data, and so nobody else could build the model from a description.
        """
        given = {key: value for key, value in self.arguments.items() if key not in _PLACEMENT}
        try:
            plain: dict[str, Any] = json.loads(json.dumps(given, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InitError(f"{self.name}: an argument of the model is not plain data: {error}") from error
        return plain

    def recipe(self) -> dict[str, Any] | None:
        """What determines the model, JSON-compatible; None where it lies outside of timm, or is not plain data."""
        if ":" in self.name:
            return None
        try:
            arguments = self.plain_arguments()
        except InitError:
            return None
        placement = {key: str(self.arguments[key]) for key in _PLACEMENT if key in self.arguments}
        return {"name": self.name, "arguments": arguments, **placement}


def split_method(model_name: str) -> tuple[str, str | None]:
    """A model's name without a tag that names a method ("resnet50.ghn-orth"), and that tag if there is one."""
    name, _, tag = str(model_name).partition(".")
    return (name, tag) if ":" not in name and is_method(tag) else (model_name, None)


def is_method(tag: str) -> bool:
    """Whether a tag names a method: "ghn-orth", "ghn_orth", "lsuv", ..."""
    return tag.replace("_", "-").lower() in METHODS
