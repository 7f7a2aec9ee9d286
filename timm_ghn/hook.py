"""`timm.create_model` gains `init=` and the tags of the methods.

The function itself is changed, not the names that it is bound to: it gets code that hands calls to `dispatch`. So it
does not matter who imported it, under which name and when. A call that asks for no initialization goes to timm's own
code, with the arguments as they are.

This module imports neither timm nor torch: `import timm_ghn` has to be quick for the commands that need neither, and
`install_with_timm` runs while timm is being imported, perhaps by another module of this package.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from timm_ghn.initialize.memo import Memo
from timm_ghn.request import Request
from timm_ghn.settings import Init

if TYPE_CHECKING:
    from torch import nn

_logger = logging.getLogger(__name__)

_ORIGINAL = "__timm_ghn__"
"""Attribute of the changed function: a function that does what it did before."""

_memo = Memo(size=8)
"""What is known of the last four models or so: their outlines, and what a GHN predicted for them."""


def install() -> None:
    """Give `timm.create_model` the keyword `init=` and the tags of the methods. Calling it again changes nothing."""
    function = _create_model()
    if hasattr(function, _ORIGINAL):
        return
    if not isinstance(function, FunctionType) or function.__closure__:
        _logger.warning("timm.create_model was replaced by %r, and does not get init=", function)
        return
    original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    setattr(function, _ORIGINAL, original)
    signature = inspect.signature(original)
    init = inspect.Parameter("init", inspect.Parameter.KEYWORD_ONLY, default=None)
    *others, last = signature.parameters.values()
    function.__signature__ = signature.replace(parameters=[*others, init, last])  # type: ignore[attr-defined]
    function.__defaults__, function.__kwdefaults__ = None, {"init": None}
    function.__code__ = _hooked.__code__


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
    """Give timm its own `create_model` back, and forget what is known of models. Calling it again changes nothing."""
    _memo.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TimmFinder)]
    if "timm" not in sys.modules:
        return
    function: Any = _create_model()
    original = vars(function).pop(_ORIGINAL, None)
    if original is not None:
        del function.__signature__
        function.__code__ = original.__code__
        function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__


def is_installed() -> bool:
    """Whether `timm.create_model` knows `init=`."""
    return hasattr(_create_model(), _ORIGINAL)


def dispatch(args: tuple[Any, ...], kwargs: dict[str, Any], init: str | Mapping[str, Any] | Init | None) -> nn.Module:
    """Do what a call of `timm.create_model` asks for."""
    function = _create_model()
    original: Callable[..., nn.Module] = getattr(function, _ORIGINAL, function)
    try:
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
    except TypeError:
        return original(*args, **kwargs)  # which says what is wrong
    request = Request.parse(init=init, **{**bound.pop("kwargs", {}), **bound})
    if request is None:
        return original(*args, **kwargs)
    from timm_ghn.initialize.create import create

    return create(request, _memo)[0]


def _hooked(*args: Any, init: Any = None, **kwargs: Any) -> Any:
    """Its code runs in timm's module: everything that it needs is imported here."""
    from timm_ghn.hook import dispatch

    return dispatch(args, kwargs, init)


def _create_model() -> Callable[..., nn.Module]:
    """timm's function; below what other packages may have wrapped around it."""
    function: Callable[..., nn.Module] = inspect.unwrap(importlib.import_module("timm.models._factory").create_model)
    return function
