"""A model that `timm.create_model` was asked for, built without the cost of random weights and initialized."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext

import torch
from torch import nn

from timm_ghn.deferred import DeferredRandom
from timm_ghn.errors import InitError
from timm_ghn.initialize.memo import Memo
from timm_ghn.initialize.model import initialize_
from timm_ghn.initialize.report import Report
from timm_ghn.request import Request
from timm_ghn.seeding import PrivateRandom
from timm_ghn.settings import Source

_logger = logging.getLogger(__name__)


def create(request: Request, memo: Memo | None = None) -> tuple[nn.Module, Report]:
    """Build a model with the weights that are asked for.

    Args:
        request: What is asked for.
        memo: What was read and predicted of other models.

    Returns:
        The model, and what its parameters got.

    Raises:
        TimmGhnError: If that is not possible.
    """
    if request.source is not None:
        from timm_ghn.hub.pull import create_from_hub

        model, report = create_from_hub(request)
    elif request.init.spec.source is Source.TIMM:
        seed = request.init.seed
        with nullcontext() if seed is None else PrivateRandom(seed):  # torch's global generator unless there is a seed
            model = request.build()
        report = initialize_(model, request.init)
    else:
        model, report = _initialized(request, memo)
    _logger.info("%s", report)
    return model, report


def _initialized(request: Request, memo: Memo | None) -> tuple[nn.Module, Report]:
    """Build a model whose random numbers are put off, and give it weights of an organization or computed ones."""
    init = request.init
    if torch.device(request.arguments.get("device") or torch.get_default_device()).type == "meta":
        raise InitError(
            f"init={init.method!r} needs memory for the weights, but the model is built on the meta device; "
            "build it on a real device, or call timm_ghn.to_graph for its graph alone"
        )
    deferred = DeferredRandom(init.seed or 0)
    with deferred:
        model = request.build()
    recipe = request.recipe()
    report = None
    if os.environ.get("TIMM_GHN_HUB_ORG") and recipe is not None:
        from timm_ghn.hub.pull import from_organization

        report = from_organization(request, model, deferred)
    if report is None:
        size = request.input_size(model)
        report = initialize_(model, init, input_size=size, deferred=deferred, recipe=recipe, memo=memo)
    return model, report
