"""The hyperparameters of a GHN, as ppuda's checkpoints store them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from timm_ghn.errors import CheckpointError
from timm_ghn.settings import MAX_NOISE, is_noise

CHOICES: Mapping[str, tuple[str, ...]] = {
    "hypernet": ("gatedgnn", "graphormer", "mlp"),
    "decoder": ("conv",),
    "kernels": ("raw", "orthogonal"),
    "cut": ("corner", "centre"),
}
HUB_FILE = "ghn.safetensors"
"""What a GHN's file is called in a repository of the Hub, and in this package."""

_REQUIRED = {"max_shape", "num_classes", "weight_norm", "ve", "layernorm"}
_NOT_PPUDA = {"kernels", "tiles", "signs", "layers", "heads", "cut", "start_layer", "noise"}

MAX_SHAPE = (1024, 1024, 64, 64)
MAX_SIZES: Mapping[str, int] = {"num_classes": 100_000, "hid": 1024, "tiles": 256}
MAX_LAYERS = 256
MAX_PARAMETERS = 2**30
"""Sizes beyond which a configuration is taken for damaged rather than allocated (2^30 float32 are 4 GiB)."""


@dataclass(frozen=True)
class GHNConfig:
    """Hyperparameters of a GHN; the defaults are those of GHN-2 for ImageNet.

    Attributes:
        max_shape: Largest block that the decoder emits: (out channels, in channels, height, width).
        num_classes: Classes of the data set that the GHN was trained on.
        hypernet: What encodes nodes: "gatedgnn" (GHN-1 and GHN-2), "graphormer" (GHN-3), or "mlp", in which nodes do
            not see each other.
        decoder: What turns features into kernels: "conv", as in all GHNs that are published.
        weight_norm: Whether predicted tensors are scaled by their fan-in (arXiv 2110.13100, section 4.2).
        ve: Whether virtual edges carry messages (arXiv 2110.13100, section 4.1).
        layernorm: Whether the final node features are normalized.
        hid: Size of a node's features.
        kernels: What happens to an emitted block before it is scaled: "raw" leaves it as it is (ppuda).
            "orthogonal" makes its singular values nearly equal, and its root mean square 1, so that every kernel has
            the scale of He's initialization.
        tiles: How many blocks a side make up a larger kernel before it repeats them, each from a learned code of its
            place; 1 repeats a single one (ppuda).
        signs: Whether the blocks of a kernel are multiplied with the entries of Hadamard matrices by their places. A
            kernel of blocks that are alike has full rank then.
        layers: Layers of the Graphormer; 0 without one.
        heads: Attention heads of the Graphormer; 0 without one.
        cut: Which part of an emitted block a smaller kernel is: its "corner" (GHN-1 and GHN-2), or its "centre"
            (GHN-3). With "centre", kernels larger than a block are interpolated instead of repeated in space.
        start_layer: The first layer (L, from 1) whose kernel was orthogonalized while the GHN was trained, which is
            then the default of `ghn-orth`; None for a GHN that was trained without.
        noise: The noise (beta of arXiv 2207.10049, Eq. 1) that its kernels got while it was trained, which is then the
            default of `ghn-orth`; None for the paper's.

    Raises:
        CheckpointError: If a value is of the wrong type or out of bounds.
    """

    max_shape: tuple[int, int, int, int] = (64, 64, 11, 11)
    num_classes: int = 1000
    hypernet: str = "gatedgnn"
    decoder: str = "conv"
    weight_norm: bool = True
    ve: bool = True
    layernorm: bool = True
    hid: int = 32
    kernels: str = "raw"
    tiles: int = 1
    signs: bool = False
    layers: int = 0
    heads: int = 0
    cut: str = "corner"
    start_layer: int | None = None
    noise: float | None = None

    def __post_init__(self) -> None:
        shape, with_layers = self.max_shape, self.hypernet == "graphormer"
        _require(isinstance(shape, tuple) and len(shape) == 4, f"max_shape is {_show(shape)}, not four sizes")
        sizes = {f"max_shape[{index}]": (shape[index], limit) for index, limit in enumerate(MAX_SHAPE)}
        names = (*MAX_SIZES, "layers", "heads") if with_layers else MAX_SIZES
        sizes |= {name: (getattr(self, name), MAX_SIZES.get(name, MAX_LAYERS)) for name in names}
        for name, (value, limit) in sizes.items():
            is_number = isinstance(value, int) and not isinstance(value, bool)
            _require(is_number, f"{name} is {_show(value)}, not a whole number")
            _require(1 <= value <= limit, f"{name} is {_show(value)}, not between 1 and {limit}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            is_known = isinstance(value, str) and value in choices
            _require(is_known, f"{name} is {_show(value)}, not one of {', '.join(choices)}")
        for name in ("weight_norm", "ve", "layernorm", "signs"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"{name} is {_show(value)}, not true or false")
        start = self.start_layer
        is_layer = isinstance(start, int) and not isinstance(start, bool) and start >= 1
        _require(start is None or is_layer, f"start_layer is {_show(start)}, not a number from 1")
        is_beta = self.noise is None or is_noise(self.noise)
        _require(is_beta, f"noise is {_show(self.noise)}, not a number from 0 to {MAX_NOISE:g}")
        _require(shape[2] == shape[3], f"max_shape {shape} is not square")
        _require(self.hid % 4 == 0, f"hid is {self.hid}, not a multiple of 4")
        if with_layers:
            _require(self.hid % self.heads == 0, f"hid is {self.hid}, not a multiple of {self.heads} heads")
        else:
            _require(not self.layers and not self.heads, "layers and heads need hypernet 'graphormer'")
        count = 4 * self.hid * self.hid * shape[2] * shape[3] + 8 * self.hid * (4 * self.hid + shape[0] * shape[1])
        limits = f"more than the {MAX_PARAMETERS:,} that this version reads"
        _require(count <= MAX_PARAMETERS, f"the decoder would have about {count:,} parameters, {limits}")

    @property
    def largest_kernel(self) -> tuple[int, int, int, int]:
        """The most that is emitted of a kernel."""
        out_channels, in_channels, height, width = self.max_shape
        return self.tiles * out_channels, self.tiles * in_channels, height, width

    def emitted(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """What is emitted of a kernel of this size, (K, C, h, w); the kernel repeats it where it is larger.

        With signs, it is repeated a whole number of times where more than half of the blocks a side allow that, so that
        the kernel is a Kronecker product.
        """
        found = [min(size, largest) for size, largest in zip(kernel, self.largest_kernel, strict=True)]
        for dimension, side in enumerate(self.max_shape[:2]):
            sizes = [count * side for count in range(self.tiles, self.tiles // 2, -1)]
            if self.signs and kernel[dimension] > sizes[0]:
                found[dimension] = next((size for size in sizes if kernel[dimension] % size == 0), sizes[0])
        return tuple(found)

    @property
    def kind(self) -> str:
        """Which published kind of GHN this is, and whether a GHN-3 knows orthogonalized kernels from its training."""
        if self.hypernet == "graphormer":
            return "GHN-3" if self.start_layer is None else "GHN-3, trained for orthogonalized kernels"
        return "MLP" if self.hypernet == "mlp" else "GHN-2" if self.ve else "GHN-1"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GHNConfig:
        """Build a configuration from JSON or from the `config` entry of a ppuda checkpoint.

        Settings that ppuda writes into every checkpoint must be there: its defaults are not those of GHN-2.

        Raises:
            CheckpointError: If a key is missing or unknown, or a value is of the wrong type or out of bounds.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"GHN config: expected a table of settings, not {type(data).__name__}")
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(_show(key).strip("'") for key in data if key not in known)[:3]
        if unknown:
            raise CheckpointError(f"GHN config: unknown settings {', '.join(unknown)}")
        missing = sorted(_REQUIRED - set(data))
        if missing:
            raise CheckpointError(f"GHN config: missing settings {', '.join(missing)}")
        values = dict(data)
        if isinstance(values["max_shape"], list):
            values["max_shape"] = tuple(values["max_shape"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back. What ppuda does not know is left out where it is unused."""
        unused = {name for name in _NOT_PPUDA if getattr(self, name) == getattr(GHNConfig, name)}
        data = {name: value for name, value in asdict(self).items() if name not in unused}
        return {**data, "max_shape": list(self.max_shape)}


@dataclass(frozen=True)
class GHNInfo:
    """Where a GHN came from.

    Attributes:
        name: Registered name, path or Hub repository that it was loaded from.
        hash: SHA-256 of its configuration and weights (`content_hash`) when it was loaded.
        metadata: Further facts from its file, for example the training epoch.
    """

    name: str
    hash: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(f"GHN config: {message}")


def _show(value: object) -> str:
    """A value of a file for a message, which it must not flood, whatever it is."""
    if isinstance(value, str) and value.isidentifier() and len(value) <= 40:
        return repr(value)
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"
