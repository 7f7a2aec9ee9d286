"""What can be asked for with `init=`: the methods by name, and the settings of one initialization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from timm_ghn.errors import InitError
from timm_ghn.text import did_you_mean

if TYPE_CHECKING:
    from torch import nn

Rescale = Literal["auto", "off"]
"""Whether the scale of predictions is kept sane."""

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
    method = METHODS.get(name.replace("_", "-").lower())
    if method is None:
        raise InitError(
            f"unknown initialization {name!r}{did_you_mean(name, METHODS) or '.'} Known are {', '.join(METHODS)}"
        )
    return method


@dataclass(frozen=True)
class Init:
    """Settings of one initialization: everything but the model that decides what the weights will be.

    Attributes:
        method: A name of `METHODS`.
        ghn: Name, path or "hf-hub:organization/name" of a GHN, or a loaded one; None for the default.
        noise: The paper's beta; 0 adds none.
        start_layer: L: the number (1-based) of the first layer to be post-processed, a fraction of the number of
            layers (a float in (0, 1]), or the name of a module. None: the method's default.
        seed: Seed of all noise and of what keeps a random initialization.
        correlation: Whose correlations scale the noise: the "paper"'s, between channels, or those of "ppuda"'s code.
        reading: How the graph is read, "default" or "ppuda" (see `timm_ghn.graph.Reading`).
        rescale: Whether the scale of predictions is kept sane: "auto" or "off" (see `timm_ghn.scale.rule`).
        cache: Whether results are looked up in the cache and kept there.

    Raises:
        InitError: If the method is unknown or a setting is out of range.
    """

    method: str = "ghn-orth"
    ghn: str | nn.Module | None = None
    noise: float = NOISE
    start_layer: int | float | str | None = None
    seed: int = 0
    correlation: Literal["paper", "ppuda"] = "paper"
    reading: Literal["default", "ppuda"] = "default"
    rescale: Rescale = "auto"
    cache: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", find_method(self.method).name)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InitError(f"seed must be an integer, got {self.seed!r}")
        if not isinstance(self.noise, (int, float)) or not 0 <= self.noise < 1e6:
            raise InitError(f"noise (beta) must be a number that is not negative, got {self.noise!r}")
        if self.correlation not in ("paper", "ppuda"):
            raise InitError(f"correlation must be 'paper' or 'ppuda', got {self.correlation!r}")
        if self.reading not in ("default", "ppuda"):
            raise InitError(f"reading must be 'default' or 'ppuda', got {self.reading!r}")
        if self.rescale not in ("auto", "off"):
            raise InitError(f"rescale must be 'auto' or 'off', got {self.rescale!r}")

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
