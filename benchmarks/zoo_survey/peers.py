"""The other packages that predict the weights of a network, tried on models of timm.

    ppuda   github.com/facebookresearch/ppuda: GHN-2
    ghn3    github.com/SamsungSAILMontreal/ghn3: GHN-3; it needs ppuda as well

Both get a hypernetwork of the published size with random weights, since only graph and prediction are of interest, and
are told the model's input size. They print, change what they are given and can take minutes, so each model is to be
tried in a process of its own (`zoo_survey.pool`).
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from timm_ghn.errors import MissingDependencyError
from zoo_survey.names import module_of
from zoo_survey.records import Entry, Failure, PeerFacts, Stage


def ppuda_hypernetwork() -> nn.Module:
    """GHN-2 as published for ImageNet, of random weights."""
    from ppuda.ghn.nn import GHN

    network: nn.Module = GHN(
        max_shape=(64, 64, 11, 11), num_classes=1000, weight_norm=True, ve=True, layernorm=True, debug_level=0
    )
    return network.eval()


def ghn3_hypernetwork() -> nn.Module:
    """GHN-3-T/8, the smallest published one, of random weights."""
    from ghn3.nn import GHN3

    network: nn.Module = GHN3(
        max_shape=(64, 64, 16, 16), num_classes=1000, hid=64, heads=8, layers=3, weight_norm=True, ve=True,
        layernorm=True, debug_level=0,
    )  # fmt: skip
    return network.eval()


PEERS: Mapping[str, Callable[[], nn.Module]] = {"ppuda": ppuda_hypernetwork, "ghn3": ghn3_hypernetwork}


def check(peer: str) -> None:
    """Make sure that a peer can be imported.

    Raises:
        MissingDependencyError: If not.
    """
    try:
        importlib.import_module(f"{peer}.ghn.nn" if peer == "ppuda" else f"{peer}.nn")
    except ImportError as error:
        raise MissingDependencyError(
            f"{peer} cannot be imported ({error}); put a clone of its repository, and what it needs, on PYTHONPATH"
        ) from error


def examine_peer(name: str, peer: str) -> Entry:
    """What a peer does with a model: a success is a call that raises nothing."""
    start = time.perf_counter()
    facts, failure = None, None
    try:
        facts = _predict(name, PEERS[peer]())
    except Exception as error:  # noqa: BLE001 - whatever it raises is the result
        failure = Failure.of(_place(error), error)
    return Entry(Stage(peer), name, module_of(name), facts, failure, time.perf_counter() - start)


def _predict(name: str, hypernetwork: nn.Module) -> PeerFacts:
    import timm

    model = timm.create_model(name)
    model.expected_input_sz = tuple(model.pretrained_cfg["input_size"])
    before = {key: parameter.data_ptr() for key, parameter in model.named_parameters()}
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    start = time.perf_counter()
    model = hypernetwork(model)
    seconds = time.perf_counter() - start
    # Both put new tensors in the place of those that they predict, and None in that of those that they do not know.
    changed = [key for key, parameter in model.named_parameters() if parameter.data_ptr() != before.get(key)]
    return PeerFacts(seconds, sum(sizes.get(key, 0) for key in changed), sum(sizes.values()))


def _place(error: BaseException) -> str:
    """File and function in which an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else ""
