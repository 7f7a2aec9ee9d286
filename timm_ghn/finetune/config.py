"""Settings of a fine-tuning run; the defaults are the paper's (arXiv 2207.10049, section 4)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from timm_ghn.errors import FineTuneError
from timm_ghn.settings import Init, Rescale

OptimizerName = Literal["sgd", "adamw"]
Stem = Literal["auto", "adjusted", "original"]
Normalization = Literal["auto", "data", "imagenet"]
Precision = Literal["float32", "bfloat16"]
Split = Literal["test", "validation"]

PRETRAINED = "pretrained"
"""Initialization by timm's pretrained weights."""
VALIDATION_IMAGES = 5000
"""Training images that are held out for tuning, at most; as many as in ppuda."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Everything but the data and the seed that decides the numbers of a run.

    The defaults are the paper's protocol; what the paper leaves open follows its reference code (ppuda at 4673a42):
    a cosine over epochs, gradients clipped to a norm of 5, crops from a black border of 4 pixels.

    Attributes:
        model: Name of a timm model.
        init: A method of `timm_ghn.METHODS`, or "pretrained" for timm's weights.
        model_kwargs: Further arguments of `timm.create_model`.
        init_file: A file of weights to start from instead, such as `timm-ghn init` writes.
        ghn: GHN by name or path; None for the default.
        noise: beta; None for the method's default.
        start_layer: L; None for the method's default.
        rescale: As of `Init`.
        image_size: Side of the network's input in pixels.
        stem: Whether the first layers are adjusted to small images (`adjust_stem`); "auto" up to 64 pixels.
        normalization: Statistics of the training "data", or of "imagenet"; "auto" as ppuda: the data's at their own
            size, ImageNet's for images that are enlarged, and for pretrained weights.
        optimizer: "sgd" (with momentum) or "adamw".
        lr: Learning rate at the start of the cosine.
        weight_decay: Weight decay.
        momentum: Of SGD.
        epochs: Passes over the training images.
        batch_size: Images a step; the last of an epoch has fewer.
        clip: Largest norm of the gradient.
        smoothing: Label smoothing.
        padding: Pixels of black border that random crops are taken from.
        flip: Whether half of the images are mirrored.
        labels_per_class: The first so many images of every class are trained on; None for all.
        split: What accuracy is measured on: the "test" set, or the "validation" images that are held out for tuning.
        precision: Of the forward and backward pass; "bfloat16" is autocast.
        settle: Whether batch norms are measured with statistics taken anew over training images. Their running averages
            need about a hundred steps to follow the weights, so that a short run says more about them than about
            the network.

    Raises:
        FineTuneError: If a value is out of range.
        InitError: If there is no such initialization.
    """

    model: str
    init: str = "ghn-orth"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    init_file: str | None = None
    ghn: str | None = None
    noise: float | None = None
    start_layer: int | float | str | None = None
    rescale: Rescale = "auto"
    image_size: int = 32
    stem: Stem = "auto"
    normalization: Normalization = "auto"
    optimizer: OptimizerName = "sgd"
    lr: float = 0.01
    weight_decay: float = 0.01
    momentum: float = 0.9
    epochs: int = 300
    batch_size: int = 96
    clip: float = 5.0
    smoothing: float = 0.0
    padding: int = 4
    flip: bool = True
    labels_per_class: int | None = 100
    split: Split = "test"
    precision: Precision = "float32"
    settle: bool = False

    def __post_init__(self) -> None:
        if self.init != PRETRAINED:
            Init(self.init)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise FineTuneError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise FineTuneError(f"{name} must be at least {low}, got {value!r}")
        if not self.lr > 0:
            raise FineTuneError(f"lr must be greater than 0, got {self.lr!r}")

    @property
    def adjusts_stem(self) -> bool:
        """Whether the first layers are adjusted to small images."""
        return self.stem == "adjusted" or (self.stem == "auto" and self.image_size <= 64)

    @property
    def starts_from(self) -> str:
        """Name of the start in tables."""
        return f"file:{self.init_file}" if self.init_file else self.init

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible settings."""
        return {**asdict(self), "model_kwargs": dict(self.model_kwargs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FineTuneConfig:
        """Settings from `to_dict`.

        Raises:
            FineTuneError: If a setting is unknown or missing.
        """
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown or "model" not in values:
            raise FineTuneError(f"unknown or missing settings of a run: {', '.join(unknown) or 'model'}")
        return cls(**values)

    def key(self, seed: int, data: str, weights: str = "") -> str:
        """Name of a run: model, initialization, seed, and a digest of everything that decides its numbers.

        Args:
            seed: Seed of the run.
            data: Digest of the images.
            weights: Digest of the GHN or file that the weights come from.
        """
        text = json.dumps({**self.to_dict(), "seed": seed, "data": data, "weights": weights}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        init = "file" if self.init_file else self.init
        return f"{re.sub(_SPECIAL, '-', self.model)}-{re.sub(_SPECIAL, '-', init)}-s{seed}-{digest}"


_CHOICES: dict[str, tuple[str, ...]] = {
    "stem": get_args(Stem),
    "normalization": get_args(Normalization),
    "optimizer": get_args(OptimizerName),
    "precision": get_args(Precision),
    "rescale": get_args(Rescale),
    "split": get_args(Split),
}
_LEAST: dict[str, float] = {
    "image_size": 8, "weight_decay": 0, "momentum": 0, "epochs": 1, "batch_size": 2, "clip": 1e-9, "smoothing": 0,
    "padding": 0, "labels_per_class": 1,
}  # fmt: skip
_SPECIAL = r"[^\w.-]"
"""Letters that the name of a file should not have."""


def learning_rate(config: FineTuneConfig, epoch: int) -> float:
    """Learning rate of an epoch, from 0: a cosine that would end at 0 after the last one."""
    return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
