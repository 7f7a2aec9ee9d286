"""Settings of a fine-tuning run; the defaults are the paper's (arXiv 2207.10049, section 4)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

import timm
from torch import Tensor, nn

from timm_ghn.checked import Checked, setting
from timm_ghn.errors import FineTuneError
from timm_ghn.ghn import content_hash, default_ghn, load_ghn
from timm_ghn.initialize.in_memory import init_model
from timm_ghn.seeding import derived_seed, seeded
from timm_ghn.settings import Init, Rescale, Source

PRETRAINED = "pretrained"
"""Initialization by timm's pretrained weights."""
VALIDATION_IMAGES = 5000
"""Training images that are held out for tuning, at most; as many as in ppuda."""


@dataclass(frozen=True)
class FineTuneConfig(Checked):
    """Everything but the data and the seed that decides the numbers of a run.

    The defaults are the paper's protocol; what the paper leaves open follows its reference code (ppuda at 4673a42):
    a cosine over epochs, gradients clipped to a norm of 5, crops from a black border of 4 pixels. Images are normalized
    by the statistics of the training set; with ImageNet's where they are enlarged, and for pretrained weights.

    Raises:
        FineTuneError: If a value is out of range.
        InitError: If there is no such initialization.
    """

    error = FineTuneError

    model: str = setting(MISSING, "name of a timm model")
    init: str = setting("ghn-orth", "a method of `timm_ghn.METHODS`, or 'pretrained' for timm's weights")
    model_kwargs: Mapping[str, Any] = setting(text="further arguments of `timm.create_model`", made=dict)
    ghn: str | None = setting(None, "GHN by name or path; None for the default")
    noise: float | None = setting(None, "beta; None for the method's default")
    start_layer: int | float | str | None = setting(None, "L; None for the method's default")
    rescale: Rescale = setting("auto", "as of `Init`")
    image_size: int = setting(32, "side of the network's input in pixels", 8)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD with momentum, or AdamW")
    lr: float = setting(0.01, "learning rate at the start of the cosine", 1e-12)
    weight_decay: float = setting(0.01, "weight decay", 0)
    momentum: float = setting(0.9, "momentum of SGD", 0)
    epochs: int = setting(300, "passes over the training images", 1)
    batch_size: int = setting(96, "images a step; the last of an epoch has fewer", 2)
    clip: float = setting(5.0, "largest norm of the gradient", 1e-9)
    smoothing: float = setting(0.0, "label smoothing", 0)
    padding: int = setting(4, "pixels of black border that random crops are taken from", 0)
    flip: bool = setting(True, "whether half of the images are mirrored")
    labels_per_class: int | None = setting(100, "the first so many images of every class are trained on; None: all", 1)
    split: Literal["test", "validation"] = setting(
        "test", "what accuracy is measured on: the test set, or the images that are held out for tuning"
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "of the forward and backward pass; 'bfloat16' is autocast"
    )
    # Running averages need about a hundred steps to follow the weights: a short run says more about them than about
    # the network.
    settle: bool = setting(False, "whether batch norms are measured with statistics taken anew over training images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != PRETRAINED:
            Init(self.init)

    @property
    def starts_from(self) -> str:
        """Name of the start in tables."""
        return self.init

    def create_model(self, num_classes: int) -> nn.Module:
        """The timm model, with the weights that timm gives it.

        Raises:
            FineTuneError: If it cannot be created.
        """
        if not timm.is_model(self.model.partition(".")[0]) and ":" not in self.model:
            raise FineTuneError(f"timm has no model {self.model!r}")
        pretrained = self.init == PRETRAINED
        try:
            model: nn.Module = timm.create_model(
                self.model, pretrained=pretrained, num_classes=num_classes, **self.model_kwargs
            )
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise FineTuneError(f"{self.model} cannot be created: {' '.join(str(error).split())}") from error
        return model

    def initialization(self, seed: int) -> Init | None:
        """What gives the model other weights than timm's; None if it keeps those."""
        if self.init == PRETRAINED or Init(self.init).spec.source is Source.TIMM:
            return None
        chosen = {"ghn": self.ghn, "noise": self.noise, "start_layer": self.start_layer}
        settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return Init(self.init, seed=seed, rescale=self.rescale, cache=False, **settings)

    def build(self, num_classes: int, seed: int, images: Tensor | None = None) -> nn.Module:
        """The network before its first step: `create_model`'s, initialized. The global random state stays.

        Args:
            num_classes: Classes of the new classifier.
            seed: Seed of whatever is drawn.
            images: Normalized training images (B, 3, H, W) for initializations that look at data.

        Raises:
            FineTuneError: If the model cannot be created.
            InitError, CaptureError, GraphError: As `init_model`.
        """
        with seeded(derived_seed("fine-tuning network", seed)):
            model = self.create_model(num_classes)
        init = self.initialization(seed)
        if init is not None:
            size = (int(self.model_kwargs.get("in_chans", 3)), self.image_size, self.image_size)
            init_model(model, init, input_size=size, example_input=images)
        return model

    def weights_digest(self) -> str:
        """Hash of the GHN that the weights come from, which the settings name without its content; empty without one.

        Raises:
            CheckpointError, UnknownGhnError, DownloadError: If the GHN cannot be loaded.
        """
        init = self.initialization(0)
        if init is None or init.spec.source is not Source.GHN:
            return ""
        return content_hash(load_ghn(self.ghn, shared=True) if self.ghn is not None else default_ghn(shared=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible settings."""
        return {**asdict(self), "model_kwargs": dict(self.model_kwargs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FineTuneConfig:
        """Settings from `to_dict`.

        Raises:
            FineTuneError: If a setting is unknown or missing.
        """
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(name for name in set(values) - known if values[name] != _FORMER.get(name, ...))
        if unknown or "model" not in values:
            raise FineTuneError(f"unknown or missing settings of a run: {', '.join(unknown) or 'model'}")
        return cls(**{name: values[name] for name in known & set(values)})

    def key(self, seed: int, data: str, weights: str = "") -> str:
        """Name of a run: model, initialization, seed, and a digest of everything that decides its numbers.

        Args:
            seed: Seed of the run.
            data: Digest of the images.
            weights: What `weights_digest` gives.
        """
        settings = {**_FORMER, **self.to_dict(), "seed": seed, "data": data, "weights": weights}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        model, init = (re.sub(r"[^\w.-]", "-", text) for text in (self.model, self.starts_from.partition(":")[0]))
        return f"{model}-{init}-s{seed}-{digest}"


_FORMER = {"stem": "original", "init_file": None, "normalization": "auto"}
"""Settings of earlier versions; they are still part of the names of runs, so that finished runs are found again."""


def learning_rate(config: FineTuneConfig, epoch: int) -> float:
    """Learning rate of an epoch, from 0: a cosine that would end at 0 after the last one."""
    return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
