"""Imported by the server that the examining processes are forked from: what they share, and a first run of everything.

The first call of many functions of torch is slow, and so is the first import of timm; a process that inherits both
measures the model. Only ever imported in such processes, since it settles the number of threads.
"""

from __future__ import annotations

import os
import warnings

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
warnings.simplefilter("ignore")

import torch  # noqa: E402

from zoo_survey.examine import examine  # noqa: E402

torch.set_num_threads(1)
for _name in ("test_vit2", "test_resnet"):
    examine(_name)
