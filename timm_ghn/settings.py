"""What can be asked for with `init=`: the methods by name, and the settings of one initialization."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, get_args

from timm_ghn.errors import InitError
from timm_ghn.text import did_you_mean

if TYPE_CHECKING:
    from torch import nn

Rescale = Literal["auto", "off"]
"""Whether the scale of predictions is kept sane."""

Correlation = Literal["paper", "ppuda"]
"""What Eq. 1 correlates: the `K` channels (the paper), or the `max(K, D)` rows of the tall matrix (ppuda's code)."""

MAX_NOISE = 1e6
NOISE = 3e-5
"""The paper's beta (arXiv 2207.10049, section 4)."""


class Source(str, Enum):
    """Where the values of conv and fully-connected weights come from before post-processing."""

    GHN = "ghn"
    GAUSSIAN = "gaussian"
    TIMM = "timm"
    BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Method:
    """A way to initialize a network.

    Attributes:
        name: Name for `init=`.
        description: What it does, in a line.
        source: Where weights come from.
        orthogonal: Whether weights from layer L on are orthogonalized (and get noise, if they were predicted).
        start_layer: Default of L, 1-based; None for the rule of `default_start_layer`.
    """

    name: str
    description: str
    source: Source
    orthogonal: bool
    start_layer: int | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("ghn-orth", "predicted by a GHN, noise and orthogonalization from layer L on", Source.GHN, True),
        Method("ghn", "predicted by a GHN, without post-processing", Source.GHN, False),
        Method("orth", "orthogonal factors of Gaussian matrices from layer L on", Source.GAUSSIAN, True, 1),
        Method("rand", "timm's own random initialization", Source.TIMM, False),
        Method("lsuv", "orthonormal, outputs of variance 1 on a batch (Mishkin & Matas 2016)", Source.BASELINE, False),
        Method("fixup", "for residual networks without normalization (Zhang et al. 2019)", Source.BASELINE, False),
        Method(
            "covariance", "depthwise kernels of structured covariance (Trockman et al. 2022)", Source.BASELINE, False
        ),
        Method("mimetic", "attention as in trained transformers (Trockman & Kolter 2023)", Source.BASELINE, False),
    )
}
"""The methods that `init=` knows by name."""


def find_method(name: str) -> Method:
    """The method of that name; "ghn_orth" is the same as "ghn-orth".

    Raises:
        InitError: If there is none; the message lists all.
    """
    if not isinstance(name, str):
        raise InitError(f"method={name!r}: expected the name of a method: {', '.join(METHODS)}")
    method = METHODS.get(name.replace("_", "-").lower())
    if method is None:
        raise InitError(
            f"unknown initialization {name!r}{did_you_mean(name, METHODS) or '.'} Known are {', '.join(METHODS)}"
        )
    return method


def is_noise(value: object) -> bool:
    """Whether a value can be beta of Eq. 1 (arXiv 2207.10049): a number from 0 to 1e6."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_NOISE


def check_noise(noise: object) -> None:
    """Raise InitError unless `noise` is as `is_noise` says."""
    if not is_noise(noise):
        raise InitError(f"noise={noise!r}: expected a number from 0 to {MAX_NOISE:g}, beta of Eq. 1, such as {NOISE:g}")


def check_seed(seed: object) -> None:
    """Raise InitError unless `seed` is one that torch's generators take: an integer of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InitError(f"seed={seed!r}: expected an integer from -2**63 to 2**63 - 1")


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise InitError unless a setting has one of the values that its `Literal` type lists."""
    allowed = get_args(choices)
    if not isinstance(value, str) or value not in allowed:
        raise InitError(f"{name}={value!r}: expected {' or '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Init:
    """Settings of one initialization: everything but the model that decides what the weights will be.

    Attributes:
        method: A name of `METHODS`.
        ghn: Name, path or "hf-hub:organization/name" of a GHN, or a loaded one; None for the default.
        noise: The paper's beta; 0 adds none. None: what the GHN was trained with, or the paper's 3e-5.
        start_layer: L: the number (1-based) of the first layer to be post-processed, a fraction of the number of
            layers (a float in (0, 1]), or the name of a module. None: the method's default, which does not depend on
            whether the model has a classifier. (What a GHN predicts does: the classifier is part of the graph.)
        seed: Seed of all noise and of what keeps a random initialization. None stands for 0, but for "rand", which
            then draws from torch's global generator as timm does.
        correlation: Whose correlations scale the noise: the "paper"'s, between channels, or those of "ppuda"'s code.
        reading: How the graph is read, "default" or "ppuda" (see `timm_ghn.graph.Reading`).
        rescale: Whether the scale of predictions is kept sane: "auto" or "off" (see `timm_ghn.scale.rule`).
        fallback: What happens to layers in surroundings that the GHN was never trained in, where its file has a table
            of them: "auto" starts them as `orth` does, "off" predicts them as the paper does (`timm_ghn.ghn.seen`).
        frozen: What happens to parameters with `requires_grad=False`: "keep" leaves them as they are, which the report
            tells, "init" treats them as all others.
        cache: Whether results are looked up in the cache and kept there.

    Raises:
        InitError: If the method is unknown or a setting is out of range.
    """

    method: str = "ghn-orth"
    ghn: str | nn.Module | None = None
    noise: float | None = None
    start_layer: int | float | str | None = None
    seed: int | None = None
    correlation: Correlation = "paper"
    reading: Literal["default", "ppuda"] = "default"
    rescale: Rescale = "auto"
    fallback: Literal["auto", "off"] = "auto"
    frozen: Literal["keep", "init"] = "keep"
    cache: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", find_method(self.method).name)
        if self.seed is None and self.spec.source is not Source.TIMM:
            object.__setattr__(self, "seed", 0)
        if isinstance(self.ghn, os.PathLike):
            object.__setattr__(self, "ghn", os.fspath(self.ghn))
        elif not (self.ghn is None or isinstance(self.ghn, str) or callable(getattr(self.ghn, "predict", None))):
            raise InitError(f"ghn={self.ghn!r}: expected the name or path of a GHN, or what timm_ghn.load_ghn returned")
        if self.seed is not None:
            check_seed(self.seed)
        if self.noise is not None:
            check_noise(self.noise)
        check_choice("correlation", self.correlation, Correlation)
        check_choice("reading", self.reading, Literal["default", "ppuda"])
        check_choice("rescale", self.rescale, Rescale)
        check_choice("fallback", self.fallback, Literal["auto", "off"])
        check_choice("frozen", self.frozen, Literal["keep", "init"])
        if not isinstance(self.cache, bool):
            raise InitError(f"cache={self.cache!r}: expected True or False")

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Init, **changes: Any) -> Init:
        """Settings from a method's name, a mapping of settings, or settings.

        Raises:
            InitError: If the value is none of these or a setting is unknown.
        """
        try:
            if isinstance(value, Init):
                return replace(value, **changes)
            if isinstance(value, str):
                return cls(value, **changes)
            if isinstance(value, Mapping):
                return cls(**{**value, **changes})
        except TypeError as error:
            raise InitError(f"unknown setting of an initialization: {error}") from error
        raise InitError(f"init must be the name of a method or timm_ghn.Init(...), got {type(value).__name__}")

    @property
    def spec(self) -> Method:
        """The method that `method` names."""
        return METHODS[self.method]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible settings; a GHN in memory is left out."""
        ghn = self.ghn if isinstance(self.ghn, str) else None
        return {**asdict(replace(self, ghn=None)), "ghn": ghn}
