"""Specifications of small architectures, which say everything about them and are JSON-able."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from timm_ghn.errors import TrainingError

CONV_KINDS = ("basic", "bottleneck", "grouped", "inverted", "convnext", "vgg")
"""Kinds of stages made of convolutions alone."""
TOKEN_KINDS = ("attention", "mixer")
"""Kinds of stages that mix tokens."""
STEM_STRIDES = {
    "conv3": 1, "conv3s2": 2, "conv5": 1, "conv7s2": 2, "conv7s2_pool": 4, "patch2": 2, "patch4": 4, "patch8": 8,
    "deep": 2,
}  # fmt: skip
"""The stems, and by how much each makes an image smaller."""


@dataclass(frozen=True)
class StageSpec:
    """A run of equal blocks.

    Attributes:
        kind: Kind of block: a family other than `hybrid`; or "vit", the whole of timm's VisionTransformer.
        depth: Number of blocks.
        width: Channels of its output.
        stride: 1 or 2, applied where the stage begins.
        kernel: Side of the kernels, for kinds that have a free one.
        ratio: Width of the inside of a block relative to the outside (growth rate and bottleneck for `dense`).
        group: Channels a group, for grouped convolutions; 0 for none.
        se: Whether blocks have squeeze-and-excitation.
        norm: "bn" or "ln".
        act: Name of the activation.
        layer_scale: Initial layer scale of residual branches; None for none.
        pool: Whether a strided stage pools instead of striding a convolution (`vgg`, shortcuts of residual blocks).
    """

    kind: str
    depth: int
    width: int
    stride: int
    kernel: int = 3
    ratio: float = 4.0
    group: int = 0
    se: bool = False
    norm: str = "bn"
    act: str = "relu"
    layer_scale: float | None = None
    pool: bool = False


@dataclass(frozen=True)
class ArchitectureSpec:
    """Everything about a small image classifier.

    Attributes:
        family: What it was drawn as: the key that `FAMILY_WEIGHTS` weighs and that can be held out.
        stem: Kind of stem: one of conv3, conv3s2, conv5, conv7s2, conv7s2_pool, patch2, patch4, patch8, deep.
        stem_width: Channels of its output.
        stages: The body.
        pool: Pooling of the head: avg, max or catavgmax; token for the class token of a "vit".
        head: "linear", "norm" (normalization between pooling and classifier), "mlp" (and a hidden layer) or "conv"
            (a 1x1 convolution before pooling).
        head_width: Channels of that hidden layer or convolution.
        input_size: Side of the images in pixels.
    """

    family: str
    stem: str
    stem_width: int
    stages: tuple[StageSpec, ...]
    pool: str = "avg"
    head: str = "linear"
    head_width: int = 0
    input_size: int = 32

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ArchitectureSpec:
        """Read `to_dict`'s form.

        Raises:
            TrainingError: If the data is not of that form.
        """
        try:
            stages = tuple(StageSpec(**stage) for stage in data["stages"])
            return cls(**{**data, "stages": stages})
        except (KeyError, TypeError) as error:
            raise TrainingError(f"not an architecture specification: {error}") from error
