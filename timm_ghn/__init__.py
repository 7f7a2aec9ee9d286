"""Better starting points for timm models: weights predicted by a graph hypernetwork, then orthogonalized (GHN-orth).

Importing this package gives `timm.create_model` the keyword `init=`:

    import timm, timm_ghn
    model = timm.create_model("convnext_base", init="ghn-orth")

Method: Knyazev 2022, "Pretraining a Neural Network before Knowing Its Architecture", arXiv 2207.10049.
"""

from timm_ghn._version import __version__
from timm_ghn.ghn import list_ghns, load_ghn
from timm_ghn.graph import Graph, to_graph
from timm_ghn.hook import install, report_of, uninstall
from timm_ghn.initialize import init_model
from timm_ghn.methods import METHODS, Init
from timm_ghn.postprocess import orthogonalize_
from timm_ghn.provenance import provenance
from timm_ghn.report import Report
from timm_ghn.stream import init_to_folder

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
    "report_of",
    "to_graph",
    "uninstall",
]

install()
