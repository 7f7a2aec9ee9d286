"""Random small architectures made of timm's blocks, on which a GHN is trained.

A specification says everything about an architecture and is JSON-able; `sample_architecture` draws one from a seeded
generator, `build` turns it into a module (under `torch.device("meta")` if that is the current device).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from timm.layers.classifier import ClassifierHead, NormMlpClassifierHead
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.squeeze_excite import SqueezeExcite
from timm.models import regnet, resnet
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.densenet import DenseBlock, DenseTransition
from timm.models.metaformer import MetaFormerBlock, Pooling
from timm.models.mlp_mixer import MixerBlock
from timm.models.vision_transformer import Block as AttentionBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_ghn.errors import TrainingError

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

_CONV_KINDS = ("basic", "bottleneck", "grouped", "inverted", "convnext", "vgg")
_TOKEN_KINDS = ("attention", "mixer")
_WIDTHS = tuple(range(8, 257, 8))
_STEMS = ("conv3", "conv3s2", "conv5", "conv7s2", "conv7s2_pool", "patch2", "patch4", "deep")
_STEM_STRIDES = {
    "conv3": 1, "conv3s2": 2, "conv5": 1, "conv7s2": 2, "conv7s2_pool": 4, "patch2": 2, "patch4": 4, "patch8": 8,
    "deep": 2,
}  # fmt: skip


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
    side = input_size // _STEM_STRIDES[stem]
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
    tokens = family in (*_TOKEN_KINDS, "pooling")
    modern = tokens or family == "convnext"
    stem = rng.choices(_STEMS, (1, 1, 1, 1, 1, 4, 4, 1) if modern else (4, 4, 1, 1, 2, 1, 1, 2))[0]
    side = input_size // _STEM_STRIDES[stem]
    stages = rng.choice((1, 1, 2, 3)) if tokens else rng.choice((1, 2, 3, 3, 3, 4))
    width = _draw_width(rng, 12, 128 if side <= 8 or tokens else 64)
    stem_width = width if rng.random() < 0.7 else _draw_width(rng, 8, 64)
    shared = _draw_style(rng, family)
    depths = _draw_depths(rng, stages)
    specs: list[StageSpec] = []
    for index in range(stages):
        kind = _draw_kind(rng, family, index, stages, side)
        stride = 2 if index > 0 and side > 2 else 1
        if index == 0 and side >= 16 and (kind in _TOKEN_KINDS or rng.random() < 0.15):
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
    return rng.choice((*_TOKEN_KINDS, *_CONV_KINDS[:2]) if late else (*_CONV_KINDS, "pooling"))


def _draw_style(rng: random.Random, kind: str) -> StageSpec:
    """What the stages of one kind share in an architecture, as a stage with depth, width and stride to fill in."""
    modern = kind in ("convnext", "pooling", *_TOKEN_KINDS)
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


# Modules ------------------------------------------------------------------------------------------------------------


class TokenStage(nn.Module):
    """Attention or mixer blocks over the positions of a feature map, with a learned position table."""

    def __init__(self, blocks: nn.Sequential, width: int, side: int, use_position: bool) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, side * side, width) * 0.02) if use_position else None
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """Blocks over (B, H * W, C), back to (B, C, H, W)."""
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        out: Tensor = self.blocks(x).transpose(1, 2)
        return out.reshape(*out.shape[:2], height, width)


class SampledNet(nn.Module):
    """Stem, stages, final norm and head."""

    def __init__(self, stem: nn.Module, stages: nn.Sequential, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stages = stages
        self.norm = norm
        self.head = head

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map."""
        out: Tensor = self.norm(self.stages(self.stem(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.forward_features(x))
        return out


def build(spec: ArchitectureSpec, num_classes: int) -> nn.Module:
    """Build the network of a specification; its batch norms use the statistics of the batch.

    Raises:
        TrainingError: If the specification names something that does not exist.
    """
    if spec.stem not in _STEM_STRIDES:
        raise TrainingError(f"unknown stem '{spec.stem}'")
    if spec.stages[0].kind == "vit":
        return _build_vit(spec, num_classes)
    stem = _build_stem(spec)
    side = spec.input_size // _STEM_STRIDES[spec.stem]
    width = spec.stem_width
    stages: list[nn.Module] = []
    for stage in spec.stages:
        builder = _STAGES.get(stage.kind)
        if builder is None:
            raise TrainingError(f"unknown kind of block '{stage.kind}'")
        side = side // stage.stride
        module, width = builder(stage, width, side)
        stages.append(module)
    last = spec.stages[-1]
    norm: nn.Module = nn.Identity()
    if last.kind == "dense":
        norm = BatchNormAct2d(width)
    elif last.kind in (*_TOKEN_KINDS, "pooling") and spec.head == "linear":
        norm = LayerNorm2d(width)
    model = SampledNet(stem, nn.Sequential(*stages), norm, _build_head(spec, width, num_classes))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def _build_vit(spec: ArchitectureSpec, num_classes: int) -> nn.Module:
    stage = spec.stages[0]
    return VisionTransformer(
        img_size=spec.input_size,
        patch_size=_STEM_STRIDES[spec.stem],
        num_classes=num_classes,
        global_pool=cast(Any, spec.pool),
        class_token=spec.pool == "token",
        embed_dim=stage.width,
        depth=stage.depth,
        num_heads=stage.width // (32 if stage.width % 32 == 0 else 16),
        mlp_ratio=stage.ratio,
        init_values=stage.layer_scale,
        act_layer=_act_layer(stage.act),
    )


def _norm_layer(name: str) -> type[nn.Module]:
    if name == "bn":
        return nn.BatchNorm2d
    if name == "ln":
        return cast("type[nn.Module]", LayerNorm2d)
    raise TrainingError(f"unknown norm '{name}'")


_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class _Gelu(nn.GELU):
    """GELU that takes the `inplace` argument that timm's blocks pass."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()


def _act_layer(name: str) -> type[nn.Module]:
    if name == "gelu":
        return _Gelu
    if name not in _ACTIVATIONS:
        raise TrainingError(f"unknown activation '{name}'")
    return _ACTIVATIONS[name]


def _build_stem(spec: ArchitectureSpec) -> nn.Module:
    first = spec.stages[0]
    norm, act = _norm_layer(first.norm), _act_layer(first.act)
    conv = partial(ConvNormAct, norm_layer=norm, act_layer=act)
    width = spec.stem_width
    if spec.stem.startswith("patch"):
        patch = _STEM_STRIDES[spec.stem]
        if first.kind in _TOKEN_KINDS:
            return nn.Conv2d(3, width, patch, patch)
        return nn.Sequential(nn.Conv2d(3, width, patch, patch), norm(width))
    if spec.stem == "deep":
        half = max(8, width // 2)
        return nn.Sequential(conv(3, half, 3, stride=2), conv(half, width, 3))
    if spec.stem == "conv7s2_pool":
        return nn.Sequential(conv(3, width, 7, stride=2), nn.MaxPool2d(3, 2, 1))
    kernel = int(spec.stem[4])
    return conv(3, width, kernel, stride=_STEM_STRIDES[spec.stem])


def _build_head(spec: ArchitectureSpec, width: int, num_classes: int) -> nn.Module:
    if spec.head == "linear":
        return ClassifierHead(width, num_classes, pool_type=spec.pool)
    if spec.head == "norm":
        return NormMlpClassifierHead(width, num_classes, pool_type=spec.pool)
    if spec.head == "mlp":
        return NormMlpClassifierHead(
            width, num_classes, hidden_size=spec.head_width, pool_type=spec.pool, act_layer="gelu"
        )
    if spec.head == "conv":
        last = ConvNormAct(width, spec.head_width, 1, act_layer=_act_layer(spec.stages[-1].act))
        return nn.Sequential(last, ClassifierHead(spec.head_width, num_classes, pool_type=spec.pool))
    raise TrainingError(f"unknown head '{spec.head}'")


def _shortcut(stage: StageSpec, in_width: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_width == stage.width:
        return None
    make = resnet.downsample_avg if stage.pool else resnet.downsample_conv
    return make(in_width, stage.width, kernel_size=1, stride=stride, norm_layer=_norm_layer(stage.norm))


def _residual_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    kind = resnet.BasicBlock if stage.kind == "basic" else resnet.Bottleneck
    blocks = []
    for index in range(stage.depth):
        stride = stage.stride if index == 0 else 1
        blocks.append(
            kind(
                width,
                stage.width // kind.expansion,
                stride,
                _shortcut(stage, width, stride),
                act_layer=_act_layer(stage.act),
                norm_layer=_norm_layer(stage.norm),
                attn_layer=SqueezeExcite if stage.se else None,
            )
        )
        width = stage.width
    return nn.Sequential(*blocks), width


def _grouped_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    blocks = []
    for index in range(stage.depth):
        blocks.append(
            regnet.Bottleneck(
                width,
                stage.width,
                stage.stride if index == 0 else 1,
                bottle_ratio=stage.ratio,
                group_size=math.gcd(stage.group, int(stage.width * stage.ratio)),
                se_ratio=0.25 if stage.se else 0.0,
                act_layer=_act_layer(stage.act),
                norm_layer=_norm_layer(stage.norm),
            )
        )
        width = stage.width
    return nn.Sequential(*blocks), width


def _inverted_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    blocks: list[nn.Module] = []
    for index in range(stage.depth):
        block: Callable[..., nn.Module] = DepthwiseSeparableConv
        if stage.ratio != 1:
            block = partial(InvertedResidual, exp_ratio=stage.ratio)
        blocks.append(
            block(
                width,
                stage.width,
                dw_kernel_size=stage.kernel,
                stride=stage.stride if index == 0 else 1,
                act_layer=_act_layer(stage.act),
                norm_layer=_norm_layer(stage.norm),
                se_layer=SqueezeExcite if stage.se else None,
            )
        )
        width = stage.width
    return nn.Sequential(*blocks), width


def _downsample(stage: StageSpec, width: int) -> list[nn.Module]:
    """Norm and strided convolution, as between ConvNeXt's stages; nothing if the shape stays."""
    if stage.stride == 1 and width == stage.width:
        return []
    return [LayerNorm2d(width), nn.Conv2d(width, stage.width, stage.stride, stage.stride)]


def _convnext_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    blocks = [
        ConvNeXtBlock(
            stage.width,
            kernel_size=stage.kernel,
            mlp_ratio=stage.ratio,
            conv_mlp=stage.pool,
            ls_init_value=stage.layer_scale,
            act_layer=stage.act,
        )
        for _ in range(stage.depth)
    ]
    return nn.Sequential(*_downsample(stage, width), *blocks), stage.width


def _pooling_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    blocks = [
        MetaFormerBlock(
            stage.width,
            token_mixer=Pooling,
            mlp_act=_act_layer(stage.act),
            mlp_bias=True,
            mlp_ratio=stage.ratio,
            layer_scale_init_value=stage.layer_scale,
        )
        for _ in range(stage.depth)
    ]
    return nn.Sequential(*_downsample(stage, width), *blocks), stage.width


def _token_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    blocks: list[nn.Module] = []
    for _ in range(stage.depth):
        if stage.kind == "attention":
            blocks.append(
                AttentionBlock(
                    stage.width,
                    num_heads=max(1, stage.width // 32),
                    mlp_ratio=stage.ratio,
                    qkv_bias=True,
                    init_values=stage.layer_scale,
                    act_layer=_act_layer(stage.act),
                    norm_layer=LayerNorm,
                )
                if stage.width % 32 == 0
                else AttentionBlock(stage.width, 2, stage.ratio, True, init_values=stage.layer_scale)
            )
        else:
            blocks.append(MixerBlock(stage.width, side * side, (0.5, stage.ratio), act_layer=_act_layer(stage.act)))
    tokens = TokenStage(nn.Sequential(*blocks), stage.width, side, use_position=stage.kind == "attention")
    return nn.Sequential(*_downsample(stage, width), tokens), stage.width


def _vgg_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = []
    for index in range(stage.depth):
        strided = stage.stride == 2 and index == 0 and not stage.pool
        layers.append(
            ConvNormAct(
                width,
                stage.width,
                stage.kernel,
                stride=2 if strided else 1,
                norm_layer=_norm_layer(stage.norm),
                act_layer=_act_layer(stage.act),
            )
        )
        width = stage.width
    if stage.stride == 2 and stage.pool:
        layers.insert(0, nn.MaxPool2d(2))
    return nn.Sequential(*layers), width


def _dense_stage(stage: StageSpec, width: int, side: int) -> tuple[nn.Module, int]:
    growth = max(8, stage.width // (4 * stage.depth) // 4 * 4)
    layers: list[nn.Module] = []
    if stage.stride == 2:
        layers.append(DenseTransition(width, max(8, width // 16 * 8)))
        width = max(8, width // 16 * 8)
    layers.append(DenseBlock(stage.depth, width, bn_size=int(stage.ratio), growth_rate=growth))
    return nn.Sequential(*layers), width + growth * stage.depth


_STAGES: dict[str, Callable[[StageSpec, int, int], tuple[nn.Module, int]]] = {
    "basic": _residual_stage,
    "bottleneck": _residual_stage,
    "grouped": _grouped_stage,
    "inverted": _inverted_stage,
    "convnext": _convnext_stage,
    "pooling": _pooling_stage,
    "attention": _token_stage,
    "mixer": _token_stage,
    "vgg": _vgg_stage,
    "dense": _dense_stage,
}


def count_macs(model: nn.Module, input_size: int) -> tuple[int, int]:
    """Multiply-adds of a meta model's convolutions and linear layers, and elements of their outputs, for one image."""
    macs = outputs = 0

    def add(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, outputs
        channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
        macs += output.numel() // channels * module.weight.numel()
        outputs += output.numel()

    handles = [
        module.register_forward_hook(add) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        model(torch.empty(1, 3, input_size, input_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return macs, outputs
