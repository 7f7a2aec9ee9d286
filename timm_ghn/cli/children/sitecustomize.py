"""Lets a script under `timm-ghn run`, and Python processes that it starts, know `init=`.

`run` puts this folder on PYTHONPATH, and Python imports a module of this name when it starts. Importing timm_ghn takes
no time worth mentioning; it changes timm when, and if, timm is imported.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = Path(__file__).resolve()

try:
    import timm_ghn
except ImportError:  # the parent found it in a folder that this process does not look into
    sys.path.append(str(_HERE.parents[3]))
    import timm_ghn  # noqa: F401

if _verbosity := int(os.environ.get("TIMM_GHN_VERBOSITY", 0)):
    from timm_ghn.cli.common import logging_to_stderr

    _logging = logging_to_stderr(_verbosity)
    _logging.__enter__()

# The module of this name that this one hides.
_spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry).resolve() != _HERE.parent])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))
