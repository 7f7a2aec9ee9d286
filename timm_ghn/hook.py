"""`timm.create_model` gains `init=` and the tag `ghn-orth`.

The function is bound in several of timm's modules; all of them are given the same wrapper, and get back what they had
on `uninstall`. A call that asks for no initialization goes to timm's function untouched.

This module imports neither timm nor torch: `import timm_ghn` has to be quick for the commands that need neither, and
`install_with_timm` runs while timm is being imported, perhaps by another module of this package.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from timm_ghn.errors import InitError
from timm_ghn.request import input_size_of, requested_settings, split_request
from timm_ghn.settings import Init, Source

if TYPE_CHECKING:
    from torch import nn

    from timm_ghn.initialize.report import Report

_logger = logging.getLogger(__name__)

_MODULES = ("timm", "timm.models", "timm.models._factory")
_DEPRECATED_MODULE = "timm.models.factory"
"""Warns when it is imported, so it is patched only if somebody else has."""

_original: dict[str, Callable[..., nn.Module]] = {}
_reports: WeakKeyDictionary[nn.Module, Report] = WeakKeyDictionary()


def install() -> None:
    """Give `timm.create_model` the keyword `init=` and the tags of the methods. Calling it again changes nothing."""
    original: Callable[..., nn.Module] = importlib.import_module("timm.models._factory").create_model
    if getattr(original, "__timm_ghn__", False):
        return
    wrapper = _wrap(original)
    names = (*_MODULES, *({_DEPRECATED_MODULE} & sys.modules.keys()))
    for name in names:
        module = importlib.import_module(name)
        if getattr(module, "create_model", None) is original:
            _original[name] = original
            vars(module)["create_model"] = wrapper


def install_with_timm() -> None:
    """`install` now if timm has been imported, else as soon as it is."""
    if "timm" in sys.modules:
        install()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder:
    """Finds timm as the other finders of `sys.meta_path` do, and calls `install` when its import is complete."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The specification of timm; None for any other module, which is left to the other finders."""
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    install()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def uninstall() -> None:
    """Give timm its own `create_model` back. Calling it again changes nothing."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TimmFinder)]
    while _original:
        name, original = _original.popitem()
        importlib.import_module(name).create_model = original  # type: ignore[attr-defined]


def is_installed() -> bool:
    """Whether `timm.create_model` knows `init=`."""
    return getattr(importlib.import_module("timm").create_model, "__timm_ghn__", False)


def report_of(model: nn.Module) -> Report | None:
    """What every parameter got when `timm.create_model(..., init=...)` made this model; None for other models."""
    return _reports.get(model)


def _wrap(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def create_model(
        model_name: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        *args: Any,
        init: str | Mapping[str, Any] | Init | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        name, config, tag = split_request(model_name, pretrained_cfg)
        if init is None and tag is None:
            return original(model_name, pretrained, pretrained_cfg, *args, **kwargs)
        if _is_hub_source(init):
            _check_alone(
                str(init), model_name, pretrained, tag, kwargs.get("checkpoint_path") or (args[1:2] and args[1])
            )
            return _from_hub(functools.partial(original, name, False, config, *args, **kwargs), str(init), name)
        settings = requested_settings(init, tag)
        if pretrained and tag is None:
            raise InitError(
                f"init={settings.method!r} and pretrained=True ask for different weights of {model_name!r}; leave one "
                f"out, or ask for the initialization as a tag: '{name.partition('.')[0]}.{settings.method}'"
            )
        if kwargs.get("checkpoint_path") or (len(args) > 1 and args[1]):
            raise InitError(f"init={settings.method!r} and checkpoint_path ask for different weights; leave one out")
        build = functools.partial(original, name, False, config, *args, **kwargs)
        arguments = [name, config, list(args), kwargs]
        return _initialized(build, settings, kwargs, _recipe(arguments))

    create_model.__timm_ghn__ = True  # type: ignore[attr-defined]
    return create_model


def _is_hub_source(init: object) -> bool:
    """Whether `init=` asks for ready-made weights of the Hub."""
    return isinstance(init, str) and init.startswith("hf-hub:")


def _check_alone(init: str, name: str, pretrained: bool, tag: str | None, checkpoint: object) -> None:
    """Raises InitError if something else asks for weights, too."""
    other = f"the tag {tag!r}" if tag else "pretrained=True" if pretrained else "checkpoint_path" if checkpoint else ""
    if other:
        raise InitError(f"init={init!r} and {other} ask for different weights of {name!r}; leave one out")


def _from_hub(build: Callable[[], nn.Module], source: str, name: str) -> nn.Module:
    """Build a model with ready-made weights of the Hub."""
    from timm_ghn.hub.pull import create_from_hub

    model, report = create_from_hub(build, source, name)
    _reports[model] = report
    _logger.info("%s", report)
    return model


def _recipe(arguments: list[Any]) -> dict[str, Any] | None:
    """What determines a model that timm builds; None where that is not plain data, or lies outside of timm."""
    if ":" in arguments[0]:
        return None
    try:
        return {"create_model": json.loads(json.dumps(arguments, default=_plain))}
    except TypeError:
        return None


def _plain(value: object) -> str:
    """JSON form of types and devices.

    Raises:
        TypeError: If the value is of another type.
    """
    import torch

    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def _initialized(
    build: Callable[[], nn.Module], settings: Init, kwargs: Mapping[str, Any], recipe: Mapping[str, Any] | None
) -> nn.Module:
    """Build a model without the cost of random weights, and initialize it."""
    import torch

    from timm_ghn.deferred import DeferredRandom
    from timm_ghn.initialize.model import initialize_

    if settings.spec.source is Source.TIMM:
        return build()
    if torch.device(kwargs.get("device") or torch.get_default_device()).type == "meta":
        raise InitError(
            f"init={settings.method!r} needs memory for the weights, but the model is built on the meta device; "
            "build it on a real device, or call timm_ghn.to_graph for its graph alone"
        )
    deferred = DeferredRandom(settings.seed)
    with deferred:
        model = build()
    report = None
    if recipe is not None and os.environ.get("TIMM_GHN_HUB_ORG"):
        from timm_ghn.hub.pull import from_organization

        report = from_organization(model, settings, recipe["create_model"], deferred)
    if report is None:
        report = initialize_(model, settings, input_size=input_size_of(model, kwargs), deferred=deferred, recipe=recipe)
    _reports[model] = report
    _logger.info("%s", report)
    return model
