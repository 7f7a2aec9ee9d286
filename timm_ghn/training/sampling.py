"""Random small architectures, on which a GHN is trained: drawn from a seeded generator, within bounds of cost."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from timm_ghn.errors import TrainingError
from timm_ghn.training.architectures import CONV_KINDS, STEM_STRIDES, TOKEN_KINDS, ArchitectureSpec, StageSpec
from timm_ghn.training.networks import build, count_macs

FAMILY_WEIGHTS: dict[str, float] = {
    "basic": 4.0,
    "bottleneck": 2.0,
    "grouped": 1.5,
    "inverted": 2.0,
    "convnext": 4.0,
    "vgg": 1.5,
    "dense": 1.0,
    "attention": 1.5,
    "mixer": 0.5,
    "pooling": 0.5,
    "hybrid": 2.0,
}
"""How often each family is drawn; a family is a kind of block, or `hybrid`: stages of different kinds."""

_STEMS = ("conv3", "conv3s2", "conv5", "conv7s2", "conv7s2_pool", "patch2", "patch4", "deep")


@dataclass(frozen=True)
class SamplerConfig:
    """What architectures are drawn.

    Attributes:
        families: Weights of the families; a family left out is never drawn.
        style: "any" draws stems, norms, activations, heads and the rest freely; "common" draws what the popular models
            of a family have, and varies depth, width and the number of stages (see `COMMON_FAMILIES`).
        input_size: Side of the images in pixels.
        min_macs: Fewest multiply-adds an image.
        max_macs: Most multiply-adds an image; common "attention" networks may have three times as many.
        max_outputs: Most elements in the outputs of convolutions and linear layers an image (small networks are bound
            by memory traffic).
        max_params: Most parameters.
        max_layers: Most convolutions and linear layers.
    """

    families: Mapping[str, float] = field(default_factory=lambda: dict(FAMILY_WEIGHTS))
    style: str = "any"
    input_size: int = 32
    min_macs: float = 0.8e6
    max_macs: float = 10e6
    max_outputs: float = 3.5e5
    max_params: float = 2.5e6
    max_layers: int = 100

    @property
    def all_families(self) -> tuple[str, ...]:
        """Every family that can be drawn in this style, those that are left out of training among them."""
        return tuple(FAMILY_WEIGHTS) if self.style == "any" else tuple(COMMON_FAMILIES)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.families) - set(FAMILY_WEIGHTS))
        if unknown:
            raise TrainingError(f"unknown families of architectures: {', '.join(unknown)}")
        if self.style not in ("any", "common"):
            raise TrainingError(f"style is '{self.style}', not 'any' or 'common'")
        if self.style == "common" and not self.families.keys() <= COMMON_FAMILIES.keys():
            raise TrainingError(f"families in the common style are {', '.join(COMMON_FAMILIES)}")
        if not any(weight > 0 for weight in self.families.values()):
            raise TrainingError("no family of architectures has a positive weight")


_MAX_DRAWS = 500
"""Draws after which a sampler gives up."""


def sample_architecture(rng: random.Random, config: SamplerConfig | None = None) -> ArchitectureSpec:
    """Draw an architecture whose cost is within the configuration's bounds.

    Args:
        rng: Generator that every draw comes from: the same state gives the same architecture.
        config: What is drawn.

    Raises:
        TrainingError: If no draw of many is within the bounds.
    """
    config = config or SamplerConfig()
    names = [name for name, weight in config.families.items() if weight > 0]
    family = rng.choices(names, [config.families[name] for name in names])[0]
    common = COMMON_FAMILIES[family] if config.style == "common" else None
    allowance = common.macs if common is not None else 1.0
    for _ in range(_MAX_DRAWS):
        spec = _draw_common(rng, family, common, config.input_size) if common else _draw(rng, family, config.input_size)
        with torch.device("meta"):
            model = build(spec, 100)
        if sum(parameter.numel() for parameter in model.parameters()) > config.max_params:
            continue
        if sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) > config.max_layers:
            continue
        macs, outputs = count_macs(model, spec.input_size)
        if config.min_macs <= macs <= allowance * config.max_macs and outputs <= config.max_outputs:
            return spec
    raise TrainingError(f"no '{family}' architecture has between {config.min_macs:g} and {config.max_macs:g} MACs")


@dataclass(frozen=True)
class _Common:
    """What the popular models of a family have.

    Attributes:
        stems: Stems to choose from.
        stages: Numbers of stages to choose from.
        style: The rest, as a stage with depth, width, stride and choices to fill in.
        ratios: Ratios to choose from.
        kernels: Sides of kernels to choose from.
        head: Kind of head.
        pools: Poolings to choose from.
        widths: Range of the stem's width.
        layer_scales: Initial layer scales to choose from.
        se: Probability of squeeze-and-excitation.
        pooled: Probability that strided stages pool.
        macs: Multiply-adds allowed, as a multiple of `SamplerConfig.max_macs`.
    """

    stems: tuple[str, ...]
    stages: tuple[int, ...]
    style: StageSpec
    ratios: tuple[float, ...] = (4.0,)
    kernels: tuple[int, ...] = (3,)
    head: str = "linear"
    pools: tuple[str, ...] = ("avg",)
    widths: tuple[int, int] = (12, 48)
    layer_scales: tuple[float | None, ...] = (None,)
    se: float = 0.0
    pooled: float = 0.0
    macs: float = 1.0


_MODERN = StageSpec("", 1, 8, 1, norm="ln", act="gelu")
_BASIC = _Common(
    stems=("conv3", "conv3s2", "conv7s2_pool", "conv7s2_pool", "deep"),
    stages=(3, 4),
    style=StageSpec("basic", 1, 8, 1),
    ratios=(1.0,),
    pooled=0.2,
)
COMMON_FAMILIES: dict[str, _Common] = {
    "basic": _BASIC,
    "bottleneck": replace(_BASIC, style=StageSpec("bottleneck", 1, 8, 1)),
    "inverted": _Common(
        stems=("conv3", "conv3s2"),
        stages=(3, 4),
        style=StageSpec("inverted", 1, 8, 1, act="silu"),
        ratios=(4.0, 6.0),
        kernels=(3, 5),
        se=0.5,
    ),
    "convnext": _Common(
        stems=("patch2", "patch2", "patch4"),
        stages=(2, 3, 4),
        style=replace(_MODERN, kind="convnext"),
        kernels=(7,),
        head="norm",
        layer_scales=(None, 1.0),
    ),
    "attention": _Common(
        stems=("patch4", "patch8"),
        stages=(1,),
        style=replace(_MODERN, kind="vit"),
        head="norm",
        pools=("token", "avg"),
        widths=(32, 192),
        macs=3.0,  # matrix products are faster than convolutions
    ),
}
"""The families that can be drawn in the common style."""


def _draw_common(rng: random.Random, family: str, common: _Common, input_size: int) -> ArchitectureSpec:
    stem = rng.choice(common.stems)
    stages = rng.choice(common.stages)
    side = input_size // STEM_STRIDES[stem]
    width = stem_width = _draw_width(rng, *common.widths)
    style = replace(
        common.style,
        ratio=rng.choice(common.ratios),
        kernel=rng.choice(common.kernels),
        # Nothing is drawn where there is no choice, so that a seed gives the architectures that it always gave.
        se=common.se > 0 and rng.random() < common.se,
        layer_scale=rng.choice(common.layer_scales) if len(common.layer_scales) > 1 else common.layer_scales[0],
        pool=rng.random() < common.pooled,
    )
    depths = [rng.randint(3, 9)] if stages == 1 else _draw_depths(rng, stages)
    specs = []
    for index, depth in enumerate(depths):
        stride = 2 if index > 0 and side > 2 else 1
        if index > 0:
            width = min(256, _round_width(rng, width * 2))
        side //= stride
        specs.append(_stage(rng, style, style.kind, depth, width, stride))
    return ArchitectureSpec(
        family, stem, stem_width, tuple(specs), rng.choice(common.pools), common.head, 0, input_size
    )


def _draw(rng: random.Random, family: str, input_size: int) -> ArchitectureSpec:
    tokens = family in (*TOKEN_KINDS, "pooling")
    modern = tokens or family == "convnext"
    stem = rng.choices(_STEMS, (1, 1, 1, 1, 1, 4, 4, 1) if modern else (4, 4, 1, 1, 2, 1, 1, 2))[0]
    side = input_size // STEM_STRIDES[stem]
    stages = rng.choice((1, 1, 2, 3)) if tokens else rng.choice((1, 2, 3, 3, 3, 4))
    width = _draw_width(rng, 12, 128 if side <= 8 or tokens else 64)
    stem_width = width if rng.random() < 0.7 else _draw_width(rng, 8, 64)
    shared = _draw_style(rng, family)
    depths = _draw_depths(rng, stages)
    specs: list[StageSpec] = []
    for index in range(stages):
        kind = _draw_kind(rng, family, index, stages, side)
        stride = 2 if index > 0 and side > 2 else 1
        if index == 0 and side >= 16 and (kind in TOKEN_KINDS or rng.random() < 0.15):
            stride = 2
        if index > 0:
            width = min(256, _round_width(rng, width * rng.choice((1.5, 2.0, 2.0, 2.0))))
        side //= stride
        if kind != shared.kind:
            shared = _draw_style(rng, kind)
        specs.append(_stage(rng, shared, kind, depths[index], width, stride))
    head = rng.choices(("linear", "norm", "mlp", "conv"), (1, 6, 1, 0) if modern else (7, 1, 1, 1))[0]
    head_width = _draw_width(rng, 32, 256) if head in ("mlp", "conv") else 0
    pool = rng.choices(("avg", "max", "catavgmax"), (10, 0.5, 0.5 if head == "linear" else 0))[0]
    return ArchitectureSpec(family, stem, stem_width, tuple(specs), pool, head, head_width, input_size)


def _draw_width(rng: random.Random, low: int, high: int) -> int:
    """Log-uniform, mostly one of the widths that the GHN's tables list."""
    return _round_width(rng, math.exp(rng.uniform(math.log(low), math.log(high + 8))))


def _round_width(rng: random.Random, width: float) -> int:
    step = 4 if rng.random() < 0.1 else 8 if width < 96 else 16
    return max(8, int(width // step) * step)


def _draw_depths(rng: random.Random, stages: int) -> list[int]:
    base = rng.choice((1, 1, 2, 2, 2, 3, 3, 4, 6)) if stages > 1 else rng.randint(2, 10)
    depths = [max(1, base + rng.choice((-1, 0, 0, 0, 1))) for _ in range(stages)]
    if stages > 2 and rng.random() < 0.3:
        depths[-2] *= 2  # most of a modern network is its last but one stage
    return depths


def _draw_kind(rng: random.Random, family: str, index: int, stages: int, side: int) -> str:
    if family != "hybrid":
        return family
    late = index == stages - 1 and side <= 16
    return rng.choice((*TOKEN_KINDS, *CONV_KINDS[:2]) if late else (*CONV_KINDS, "pooling"))


def _draw_style(rng: random.Random, kind: str) -> StageSpec:
    """What the stages of one kind share in an architecture, as a stage with depth, width and stride to fill in."""
    modern = kind in ("convnext", "pooling", *TOKEN_KINDS)
    return StageSpec(
        kind=kind,
        depth=1,
        width=8,
        stride=1,
        kernel=_draw_kernel(rng, kind),
        ratio=rng.choice(_RATIOS.get(kind, (1.0,))),
        group=rng.choice((4, 8, 8, 16)) if kind == "grouped" else 0,
        se=kind in ("basic", "bottleneck", "grouped", "inverted") and rng.random() < 0.25,
        norm="ln" if modern or rng.random() < 0.04 else "bn",
        act=rng.choice(("gelu", "gelu", "gelu", "silu", "relu") if modern else ("relu",) * 5 + ("silu", "gelu")),
        layer_scale=rng.choice((None, 0.1, 1.0)) if modern and kind != "mixer" else None,
        pool=rng.random() < (0.7 if kind == "vgg" else 0.3),
    )


_RATIOS: dict[str, tuple[float, ...]] = {
    "grouped": (0.5, 1.0, 1.0),
    "inverted": (1.0, 2.0, 3.0, 4.0, 6.0),
    "convnext": (2.0, 3.0, 4.0, 4.0, 4.0),
    "attention": (2.0, 3.0, 4.0, 4.0),
    "mixer": (2.0, 4.0),
    "pooling": (2.0, 4.0),
    "dense": (2.0, 4.0),
}


def _draw_kernel(rng: random.Random, kind: str) -> int:
    if kind == "convnext":
        return rng.choice((3, 5, 7, 7, 7, 7, 9, 11))
    if kind == "inverted":
        return rng.choice((3, 3, 3, 5, 5, 7))
    if kind == "vgg":
        return rng.choice((1, 3, 3, 3, 3, 3, 5, 7))
    return 3


def _stage(rng: random.Random, style: StageSpec, kind: str, depth: int, width: int, stride: int) -> StageSpec:
    if kind == "bottleneck":
        width = max(32, width // 4 * 4)
    elif kind == "grouped":
        width = max(16, width // 16 * 16)
    elif kind in ("attention", "vit"):
        width = max(32, width // 16 * 16)
    elif kind == "mixer":
        width = max(16, width // 8 * 8)
    elif kind == "dense":
        depth = depth * 2
    return StageSpec(**{**asdict(style), "kind": kind, "depth": depth, "width": width, "stride": stride})
