"""Better starting points for timm models: weights predicted by a graph hypernetwork, then orthogonalized (GHN-orth).

Importing this package gives `timm.create_model` the keyword `init=`:

    import timm, timm_ghn
    model = timm.create_model("convnext_base", init="ghn-orth")

Method: Knyazev 2022, "Pretraining a Neural Network before Knowing Its Architecture", arXiv 2207.10049.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_ghn import errors as errors
from timm_ghn._version import __version__
from timm_ghn.hook import install, install_with_timm, uninstall
from timm_ghn.settings import METHODS, Init

if TYPE_CHECKING:
    from timm_ghn.ghn import list_ghns, load_ghn
    from timm_ghn.graph import Graph, to_graph
    from timm_ghn.hub.push import push, push_ghn
    from timm_ghn.initialize.in_memory import init_model
    from timm_ghn.initialize.provenance import provenance, report_of
    from timm_ghn.initialize.report import Report
    from timm_ghn.initialize.to_folder import init_to_folder
    from timm_ghn.orthogonalization import orthogonalize_

__all__ = [
    "METHODS",
    "Graph",
    "Init",
    "Report",
    "__version__",
    "init_model",
    "init_to_folder",
    "install",
    "list_ghns",
    "load_ghn",
    "orthogonalize_",
    "provenance",
    "push",
    "push_ghn",
    "report_of",
    "to_graph",
    "uninstall",
]

_LAZY = {
    "Graph": "timm_ghn.graph",
    "Report": "timm_ghn.initialize.report",
    "init_model": "timm_ghn.initialize.in_memory",
    "init_to_folder": "timm_ghn.initialize.to_folder",
    "list_ghns": "timm_ghn.ghn",
    "load_ghn": "timm_ghn.ghn",
    "orthogonalize_": "timm_ghn.orthogonalization",
    "provenance": "timm_ghn.initialize.provenance",
    "push": "timm_ghn.hub.push",
    "push_ghn": "timm_ghn.hub.push",
    "report_of": "timm_ghn.initialize.provenance",
    "to_graph": "timm_ghn.graph",
}
"""Modules that import torch, timm or the client of the Hub: imported when one of these names is used (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_with_timm()
