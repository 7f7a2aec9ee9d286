"""The networks of specifications, made of timm's blocks; on the meta device if that is the current device."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from timm_ghn.training.architectures import STEM_STRIDES, TOKEN_KINDS, ArchitectureSpec, StageSpec


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
    if spec.stem not in STEM_STRIDES:
        raise TrainingError(f"unknown stem '{spec.stem}'")
    if spec.stages[0].kind == "vit":
        return _build_vit(spec, num_classes)
    stem = _build_stem(spec)
    side = spec.input_size // STEM_STRIDES[spec.stem]
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
    elif last.kind in (*TOKEN_KINDS, "pooling") and spec.head == "linear":
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
        patch_size=STEM_STRIDES[spec.stem],
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
        patch = STEM_STRIDES[spec.stem]
        if first.kind in TOKEN_KINDS:
            return nn.Conv2d(3, width, patch, patch)
        return nn.Sequential(nn.Conv2d(3, width, patch, patch), norm(width))
    if spec.stem == "deep":
        half = max(8, width // 2)
        return nn.Sequential(conv(3, half, 3, stride=2), conv(half, width, 3))
    if spec.stem == "conv7s2_pool":
        return nn.Sequential(conv(3, width, 7, stride=2), nn.MaxPool2d(3, 2, 1))
    kernel = int(spec.stem[4])
    return conv(3, width, kernel, stride=STEM_STRIDES[spec.stem])


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
