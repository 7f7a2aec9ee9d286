"""The seeded GHN and the graphs of the reference outputs in tests/data/reference.

Those files are what ppuda at 4673a42 computes with the GHN that `seeded_state_dict` rebuilds.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_ghn.ghn import GHN, GHNConfig
from timm_ghn.graph import Graph, Node, Op, Role, Target

REFERENCE = Path(__file__).parent / "data" / "reference"
MODELS = ("resnet18", "mobilenet_v2", "resnet50", "convnext_base")
PPUDA_CONFIG = {
    "max_shape": (64, 64, 11, 11),
    "num_classes": 1000,
    "hypernet": "gatedgnn",
    "decoder": "conv",
    "weight_norm": True,
    "ve": True,
    "layernorm": True,
    "hid": 32,
}
# A tenth of the size of GHN-2, for tests that do not compare with the reference.
SMALL = GHNConfig(max_shape=(8, 8, 5, 5), num_classes=10, hid=8)


def seeded_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32: normal with scale 0.2 (two or more dimensions) or 0.05 (one), seeded by the name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    tensor = torch.from_numpy(noise * np.float32(0.2 if len(shape) > 1 else 0.05))
    return tensor + 1.0 if name == "ln.weight" else tensor


def seeded_ghn(config: GHNConfig | None = None) -> GHN:
    """A GHN, GHN-2 by default, with reproducible weights; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        ghn = GHN(config or GHNConfig())
    ghn.load_state_dict({name: seeded_tensor(name, tuple(t.shape)) for name, t in ghn.state_dict().items()})
    return ghn.eval()


def ghn3_config(hid: int = 64, layers: int = 3, heads: int = 8, num_classes: int = 1000) -> GHNConfig:
    """Hyperparameters of a GHN-3; the defaults are those of GHN-3-T (arXiv 2303.04143, table 1)."""
    shape = (hid, hid, 16, 16)
    return GHNConfig(shape, num_classes, "graphormer", hid=hid, layers=layers, heads=heads, cut="centre")


def seeded_ghn3(config: GHNConfig | None = None) -> GHN:
    """A GHN-3, of GHN-3-T's sizes by default, with the weights of the outputs in tests/data/reference/ghn3.json."""
    with torch.random.fork_rng(devices=[]):
        ghn = GHN(config or ghn3_config())
    state = {}
    for name, tensor in ghn.state_dict().items():
        shape = tuple(tensor.shape[:2]) if name.startswith("decoder.") else tuple(tensor.shape)
        seeded = seeded_tensor(_released_name(name), shape).view(tensor.shape)
        state[name] = seeded + 1.0 if name.endswith(("ln1.weight", "ln2.weight")) else seeded
    ghn.load_state_dict(state)
    return ghn.eval()


def _released_name(name: str) -> str:
    """The name of a tensor in the released files of GHN-3, which hold three tables outside of the first layer."""
    is_outside = name.startswith(("gnn.0.centrality_embed", "gnn.0.input_dist_embed"))
    return name.removeprefix("gnn.0.") if is_outside else name


def released_ghn3(ghn: GHN) -> dict[str, Tensor]:
    """The state dict of a GHN-3 as the released files hold it."""
    state = {_released_name(name): tensor.clone() for name, tensor in ghn.state_dict().items()}
    return {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in state.items()}


def ppuda_checkpoint(ghn: GHN, **changes: Any) -> dict[str, Any]:
    """What ppuda would save for a GHN, with the typo of its key for the optimizer."""
    config = {**ghn.config.to_dict(), "max_shape": ghn.config.max_shape}
    state_dict = {name: tensor.clone() for name, tensor in ghn.state_dict().items()}
    return {"state_dict": state_dict, "config": config, "epoch": 7, "optimzer": {}, **changes}


def reference(model: str) -> dict[str, Any]:
    """The reference outputs of a torchvision model."""
    data: dict[str, Any] = json.loads((REFERENCE / f"{model}.json").read_text())
    return data


def reference_graph(data: dict[str, Any]) -> Graph:
    """The graph of a reference file; its last two parameters are the classifier's."""
    class_weight, class_bias = [node["name"] for node in data["nodes"] if node["name"]][-2:]
    nodes = []
    for item in data["nodes"]:
        op, name = Op(item["op"]), item["name"]
        shape = tuple(item["shape"]) if item["shape"] else None
        targets: tuple[Target, ...] = ()
        if name in data["predicted"] and shape is not None:
            if op in (Op.BN, Op.LN):
                bias = f"{name.removesuffix('weight')}bias"
                targets = (Target(name, shape, Role.NORM_WEIGHT), Target(bias, shape, Role.NORM_BIAS))
            elif name in (class_weight, class_bias):
                targets = (Target(name, shape, Role.CLASS_WEIGHT if name == class_weight else Role.CLASS_BIAS),)
            else:
                targets = (Target(name, shape, Role.BIAS if op is Op.BIAS else Role.WEIGHT),)
        nodes.append(Node(op, shape, targets))
    return Graph(tuple(nodes), tuple((source, target) for source, target in data["edges"]))
