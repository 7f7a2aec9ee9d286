# mypy: disable-error-code="arg-type, attr-defined, misc, no-any-return, no-untyped-call"
"""The kinds of networks that a GHN is trained on: small relatives of timm's models, drawn from timm's own constructors.

Each family is a function that draws the arguments of a timm class (widths, depths, ratios, kernel sizes, stems) and
calls the class. None of them draws a model of timm's as it is: widths and depths are free numbers. (timm's annotations
are often narrower than what its classes take, so they are not checked here.)
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from timm import models
from timm.layers import BatchNormAct2d, GroupNormAct, create_conv2d
from timm.layers.mlp import GluMlp, Mlp
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import nn

T = TypeVar("T")


class Draw:
    """Draws from one seed, and what every network of a family is told.

    Args:
        seed: Decides all draws.
        size: Side of the input images in pixels.
        classes: Outputs of the classifier.
    """

    def __init__(self, seed: str, size: int, classes: int) -> None:
        self._random = random.Random(seed)
        self.real, self.number = self._random.uniform, self._random.randint
        self.size = size
        self.classes = classes

    def build(self, network: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """A network of a class of timm's, told its classes, its images' size, and no dropout, where it takes them."""
        told = {"num_classes": self.classes, "img_size": self.size, "drop_rate": 0.0, "drop_path_rate": 0.0}
        known = inspect.signature(network).parameters
        return network(*args, **{name: value for name, value in told.items() if name in known}, **kwargs)

    def pick(self, *options: T) -> T:
        """One of the options."""
        return self._random.choice(options)

    def flag(self, probability: float = 0.5) -> bool:
        """Whether something happens that has this probability."""
        return self._random.random() < probability

    def width(self, low: int, high: int, multiple: int = 8) -> int:
        """A number of channels, log-uniform in [low, high] and rounded to a multiple."""
        value = math.exp(self._random.uniform(math.log(low), math.log(high)))
        return max(multiple, round(value / multiple) * multiple)

    def widths(self, count: int, low: int, high: int, multiple: int = 8) -> tuple[int, ...]:
        """Numbers of channels of stages: the first in [low, high], each next one up to 2.2 times the one before."""
        widths = [self.width(low, high, multiple)]
        growth = self._random.uniform(1.4, 2.2)
        for _ in range(count - 1):
            grown = widths[-1] * growth * self._random.uniform(0.9, 1.1)
            widths.append(max(widths[-1], round(grown / multiple) * multiple))
        return tuple(widths)

    def scaled(self, bases: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
        """Numbers of channels of stages, or of heads: one of `bases` times each of the factors."""
        base = self.pick(*bases)
        return tuple(base * factor for factor in factors)

    def heads(self, low: int, high: int, *sizes: int) -> dict[str, int]:
        """How many attention heads there are, and the channels of all of them; a head has one of the sizes."""
        heads = self.number(low, high)
        return {"num_heads": heads, "embed_dim": heads * self.pick(*sizes)}

    def depths(self, count: int, most: int = 3) -> tuple[int, ...]:
        """Numbers of blocks of stages; in some networks the last but one stage is the longest, as in most of timm's."""
        depths = [self._random.randint(1, most) for _ in range(count)]
        if self.flag():
            depths = [self._random.randint(1, most)] * count
        if count > 2 and self.flag():
            depths[-2] = min(2 * most + 2, self._random.randint(2, 3) * depths[-2])
        return tuple(depths)


Family = Callable[[Draw], nn.Module]

# fmt: off


# --- convolutional networks -----------------------------------------------------------------------------------------


def _resnet(d: Draw) -> nn.Module:
    attention = d.pick(None, None, None, "se", "eca")
    options: dict[str, Any] = {"block_args": {"attn_layer": attention}} if attention else {}
    block = d.pick(models.resnet.BasicBlock, models.resnet.BasicBlock, models.resnet.Bottleneck)
    low, high = (16, 64) if block is models.resnet.BasicBlock else (12, 32)
    if block is models.resnet.Bottleneck and d.flag(0.3):
        options |= {"cardinality": d.pick(4, 8, 32), "base_width": d.pick(4, 8)}
    return d.build(
        models.resnet.ResNet, block, d.depths(4), stem_width=d.width(12, 64), stem_type=d.pick("", "", "deep"),
        avg_down=d.flag(0.3), channels=d.widths(4, low, high), act_layer=d.pick(nn.ReLU, nn.ReLU, nn.ReLU, nn.SiLU),
        **options,
    )


def _resnetv2(d: Draw) -> nn.Module:
    groups = d.pick(4, 8, 16, 32)
    batch = {"norm_layer": BatchNormAct2d, "conv_layer": create_conv2d}
    norms = batch if d.flag() else {"norm_layer": partial(GroupNormAct, num_groups=groups)}
    return d.build(
        models.resnetv2.ResNetV2, list(d.depths(4)), channels=d.widths(4, 32, 96, 4 * groups),
        stem_chs=d.width(32, 64, 2 * groups), stem_type=d.pick("", "deep"), preact=d.flag(0.7), **norms,
    )


def _byob(d: Draw, blocks: Sequence[Any], **options: Any) -> nn.Module:
    return d.build(models.byobnet.ByobNet, models.byobnet.ByoModelCfg(blocks=tuple(blocks), **options))


def _byobnet(d: Draw) -> nn.Module:
    kind = d.pick("basic", "bottle", "dark", "edge", "rep")
    widths = d.widths(4, 24, 64)
    blocks = [
        models.byobnet.ByoBlockCfg(
            type=kind, d=depth, c=width, s=2 if index or kind == "rep" else 1,
            gs=d.pick(0, 0, 8) if kind == "bottle" else 0,
            br=1.0 if kind in ("basic", "rep") else d.pick(0.25, 0.5) if kind != "edge" else d.pick(1.0, 2.0),
        )
        for index, (depth, width) in enumerate(zip(d.depths(4), widths, strict=True))
    ]
    return _byob(
        d, blocks, stem_chs=d.width(24, 64),
        stem_type="rep" if kind == "rep" else d.pick("3x3", "7x7", "tiered", "quad2"),
        stem_pool="" if kind == "rep" else d.pick("maxpool", ""),
        act_layer=d.pick("relu", "relu", "silu", "leaky_relu"), attn_layer=d.pick(None, None, None, "se", "eca"),
        num_features=d.pick(0, 0, d.width(128, 640)),
    )


def _mobileone(d: Draw) -> nn.Module:
    stem = before = d.width(24, 48)
    branches = {"num_conv_branches": d.pick(1, 1, 2)}
    block = partial(models.byobnet.ByoBlockCfg, type="one", d=1)
    stages: list[Any] = []
    for depth, width in zip(d.depths(4), d.widths(4, 24, 48), strict=True):
        pointwise = block(c=width, gs=0, s=1, block_kwargs={"kernel_size": 1, **branches})
        stages.append([])
        for stride in (2, *(1,) * (depth - 1)):
            depthwise = block(c=before, gs=1, s=stride, block_kwargs=branches, attn_layer=d.pick(None, "se"))
            stages[-1] += [depthwise, pointwise]
            before = width
    return _byob(d, map(tuple, stages), stem_type="one", stem_chs=stem)


def _mobilevit(d: Draw) -> nn.Module:
    second = d.flag()
    widths = d.widths(5, 16, 32)
    inverted = {"gs": 1, "br": d.pick(2.0, 3.0, 4.0), "block_kwargs": {"bottle_in": True, "linear_out": True}}
    mixer = partial(models.byobnet.ByoBlockCfg, d=1, s=1)
    blocks: list[Any] = []
    for index, width in enumerate(widths):
        conv = models.byobnet.ByoBlockCfg(type="bottle", d=d.number(1, 2), c=width, s=2 if index else 1, **inverted)
        if index < 2:
            blocks.append(conv)
            continue
        details = {"transformer_depth": d.number(1, 3), "patch_size": d.pick(1, 2) if index == 2 else 1}
        if second:
            blocks.append((conv, mixer(type="mobilevit2", c=width, br=0.5, gs=1, block_kwargs=details)))
        else:
            details |= {"transformer_dim": width + d.pick(0, 16, 32), "num_heads": 4}
            blocks.append((conv, mixer(type="mobilevit", c=width, block_kwargs=details)))
    return _byob(
        d, blocks, stem_chs=widths[0], stem_pool="", downsample="", act_layer="silu",
        num_features=0 if second else d.width(128, 512),
    )


def _efficient_stages(d: Draw, first_stride: int, kinds: Sequence[str]) -> list[list[str]]:
    """Block strings of inverted residuals, as timm's EfficientNet builder reads them."""
    widths = d.widths(5, 12, 24, 4)
    gate = d.pick("", "", "_se0.25", "_se0.0625")
    kernels = d.pick((3,), (3, 5), (3, 5), (5, 7))
    ratio = d.pick(3, 4, 6, 6)
    stages = [[f"ds_r{d.number(1, 2)}_k3_s{first_stride}_e1_c{widths[0]}{gate if d.flag() else ''}"]]
    strides = (2, 2, d.pick(1, 2), 2)
    for width, stride in zip(widths[1:], strides, strict=True):
        kind, kernel = d.pick(*kinds), d.pick(*kernels)
        text = f"{kind}_r{d.number(1, 4)}_k{kernel}_s{stride}_e{ratio}_c{width}"
        stages.append([text + (gate if kind == "ir" and d.flag(0.8) else "")])
    return stages


def _mobilenetv3(d: Draw) -> nn.Module:
    stages = _efficient_stages(d, d.pick(1, 2), ("ir",))
    stages = [[text + ("_nre" if index < 2 else "") for text in stage] for index, stage in enumerate(stages)]
    stages.append([f"cn_r1_k1_s1_c{d.width(144, 640)}"])
    return d.build(
        models.mobilenetv3.MobileNetV3, decode_arch_def(stages), num_features=d.width(256, 1024), stem_size=16,
        act_layer=d.pick(nn.Hardswish, nn.Hardswish, nn.ReLU),
        se_layer=partial(models.mobilenetv3.SqueezeExcite, gate_layer=d.pick("hard_sigmoid", "sigmoid")),
        round_chs_fn=round_channels,
    )


def _mobilenetv4(d: Draw) -> nn.Module:
    widths = d.widths(4, 16, 40)
    stages = [[d.pick(f"cn_r1_k3_s2_e1_c{widths[0]}", f"er_r1_k3_s2_e4_c{widths[0]}")]]
    for index, width in enumerate(widths[1:]):
        stage = [f"uir_r1_a{d.pick(0, 3, 5)}_k{d.pick(3, 5)}_s2_e{d.pick(3, 4, 6)}_c{width}"]
        for _ in range(d.number(1, 5)):
            kind = d.pick("ib", "extra", "next", "ffn", "mqa" if index else "ib")
            end = f"s1_e{d.pick(2, 3, 4)}_c{width}"
            texts = {
                "ib": f"uir_r1_a0_k{d.pick(3, 5)}_{end}", "extra": f"uir_r1_a3_k{d.pick(3, 5)}_{end}",
                "next": f"uir_r1_a{d.pick(3, 5)}_k0_{end}", "ffn": f"uir_r1_a0_k0_{end}",
                "mqa": f"mqa_r1_k3_h{d.pick(2, 4)}_s1_d{d.pick(16, 32)}_c{width}",
            }
            stage.append(texts[kind])
        stages.append(stage)
    stages.append([f"cn_r1_k1_s1_c{d.width(160, 640)}"])
    return d.build(
        models.mobilenetv3.MobileNetV3, decode_arch_def(stages), head_bias=False, head_norm=True,
        num_features=d.width(256, 1024), stem_size=d.width(16, 32), act_layer=d.pick(nn.ReLU, nn.GELU),
        round_chs_fn=round_channels, layer_scale_init_value=d.pick(None, 0.1),
    )


def _ghost_stages(d: Draw) -> list[Any]:
    """Kernel, inner width, width, gate and stride of blocks, as timm's GhostNets read them."""
    widths = d.widths(5, 16, 32, 4)
    stages: list[Any] = [[[3, widths[0], widths[0], 0, 1]]]
    for before, width in itertools.pairwise(widths):
        kernel, gate, ratio = d.pick(3, 5), d.pick(0, 0.25), d.pick(2, 3, 6)
        stages.append([[kernel, ratio * before, width, gate, 2]])
        stages.append([[kernel, ratio * width, width, d.pick(0, gate), 1] for _ in range(d.number(1, 3))])
    return stages


def _vgg(d: Draw) -> nn.Module:
    plan = zip(d.widths(5, 12, 32), d.depths(5, 2), strict=True)
    cfg = [layer for width, depth in plan for layer in ([width] * min(depth, 3) + ["M"])]
    # The first layer of timm's VGG head is a kernel of 7 x 7, over a map of 7 x 7 of ImageNet's images.
    return d.build(
        models.vgg.VGG, cfg, mlp_ratio=d.pick(1 / 64, 1 / 32, 1 / 16),
        norm_layer=d.pick(None, nn.BatchNorm2d, nn.BatchNorm2d),
    )


def _rdnet(d: Draw) -> nn.Module:
    stages = d.number(4, 6)
    down = (None, True, True, *(d.flag(0.3) for _ in range(stages - 3)))
    return d.build(
        models.rdnet.RDNet, growth_rates=[d.width(16, 64) for _ in range(stages)],
        num_blocks_list=[d.number(1, 3) for _ in range(stages)], is_downsample_block=down,
        block_type=[d.pick("Block", "BlockESE") for _ in range(stages)], num_init_features=d.width(24, 64),
        ls_init_value=d.pick(1e-6, 0.1, 1.0),
    )


def _hgnet(d: Draw) -> nn.Module:
    outs, mids = d.widths(4, 32, 64, 16), d.widths(4, 16, 32)
    ins = (d.width(16, 32), *outs[:-1])
    second = d.flag()
    stem = [16, ins[0]] if second else [16, 16, ins[0]]
    cfg: dict[str, Any] = {"stem_type": "v2" if second else "v1", "stem_chs": stem}
    for index in range(4):
        light = index > 1 and second
        row = [ins[index], mids[index], outs[index], d.number(1, 2), index > 0, light]
        cfg[f"stage{index + 1}"] = [*row, d.pick(3, 5) if light else 3, d.number(2, 4)]
    return d.build(models.hgnet.HighPerfGpuNet, cfg, head_hidden_size=d.width(128, 768), use_lab=d.flag(0.3))


# --- convolutional networks in the style of transformers ------------------------------------------------------------


def _scale(d: Draw) -> float | None:
    """What a learned scale of residual branches starts at; timm's mostly start tiny, training networks seldom."""
    return d.pick(None, 1e-6, 0.1, 1.0)


def _metaformer(d: Draw) -> nn.Module:
    conv, attention, pooling = models.metaformer.SepConv, models.metaformer.Attention, models.metaformer.Pooling
    flat, maps = models.metaformer.LayerNormNoBias, models.metaformer.LayerNorm2dNoBias
    kind = d.pick("PoolFormer", "ConvFormer", "CAFormer", "PoolFormerV2")
    dims = d.widths(4, 24, 64, 32 if kind == "CAFormer" else 8)
    options: dict[str, Any] = {"depths": d.depths(4), "dims": dims, "use_mlp_head": d.flag()}
    if kind == "PoolFormer":
        options |= {"token_mixers": pooling, "mlp_act": nn.GELU, "mlp_bias": True, "downsample_norm": None}
        options |= {"norm_layers": models.metaformer.GroupNorm1, "res_scale_init_values": None}
        options |= {"layer_scale_init_values": _scale(d)}
    elif kind == "ConvFormer":
        options |= {"token_mixers": conv, "norm_layers": maps}
    elif kind == "CAFormer":
        options |= {"token_mixers": [conv, conv, attention, attention], "norm_layers": [maps, maps, flat, flat]}
    else:
        options |= {"token_mixers": pooling, "norm_layers": models.metaformer.GroupNorm1NoBias}
    return d.build(models.metaformer.MetaFormer, **options)


def _fastvit(d: Draw) -> nn.Module:
    layers, attention = d.depths(4), d.flag(0.3)
    position = partial(models.fastvit.RepConditionalPosEnc, spatial_shape=(7, 7))
    return d.build(
        models.fastvit.FastVit, layers=layers,
        token_mixers=("repmixer",) * 3 + ("attention" if attention else "repmixer",),
        embed_dims=d.scaled((32,) if attention else (16, 24, 32, 40, 48), (1, 2, 4, 8)),
        mlp_ratios=(d.pick(2, 3, 4),) * 4, layer_scale_init_value=d.pick(1e-5, 0.1, 1.0),
        pos_embs=(None, None, None, position if attention else None),
    )


# --- transformers and mixers ----------------------------------------------------------------------------------------


_POOLS = ("token", "avg", "avg")
"""Of networks whose class tokens read the images through small scales, most average the other tokens: a class token
that sees next to nothing teaches nothing. For the same reason, no scale of a plain transformer begins at 1e-5."""


def _patch(d: Draw) -> int:
    return max(4, d.size // d.pick(4, 8, 8))


def _swin(d: Draw) -> nn.Module:
    heads, stages = d.number(1, 3), d.number(2, 4)
    options: dict[str, Any] = {
        "patch_size": d.pick(2, 4) if d.size == 32 else 4, "embed_dim": heads * d.pick(24, 32),
        "depths": d.depths(stages, 2), "num_heads": tuple(heads * 2**index for index in range(stages)),
        "window_size": d.pick(2, 4, 4, 7),
    }
    kind = d.pick(models.swin_transformer.SwinTransformer, models.swin_transformer_v2.SwinTransformerV2)
    return d.build(kind, **options)


def _maxxvit(d: Draw) -> nn.Module:
    kind = d.pick(("C", "C", "T", "T"), ("C", "C", "T", "T"), ("M", "M", "M", "M"), (("C", "T"),) * 4)
    block = d.pick("mbconv", "mbconv", "convnext")
    return d.build(models.maxxvit.MaxxVit, models.maxxvit.MaxxVitCfg(
        embed_dim=(32, 64, 128, d.pick(128, 256)), depths=d.depths(4, 1), block_type=kind, stem_width=32,
        stem_bias=d.flag(),
        conv_cfg=models.maxxvit.MaxxVitConvCfg(
            block_type=block, expand_output=d.flag(), stride_mode=d.pick("dw", "pool"),
            init_values=d.pick(1e-6, 0.1, 1.0), act_layer=d.pick("gelu", "silu"),
        ),
        transformer_cfg=models.maxxvit.MaxxVitTransformerCfg(
            window_size=1 if d.size < 64 else 2, rel_pos_type=d.pick("bias", "bias_tf", "mlp"),
            init_values=d.pick(None, 0.1, 1e-6),
        ),
        head_hidden_size=d.pick(None, d.width(64, 256)),
    ))


def _mixer(d: Draw) -> nn.Module:
    options: dict[str, Any] = {"patch_size": _patch(d), "num_blocks": d.number(3, 12), "embed_dim": d.width(64, 384)}
    kind = d.pick("Mixer", "ResMLP", "gMLP")
    if kind == "ResMLP":
        options |= {"mlp_ratio": d.pick(3, 4), "norm_layer": models.mlp_mixer.Affine}
        options |= {"block_layer": partial(models.mlp_mixer.ResBlock, init_values=d.pick(0.1, 1e-4))}
    elif kind == "gMLP":
        options |= {"mlp_ratio": d.pick(4, 6), "block_layer": models.mlp_mixer.SpatialGatingBlock}
        options |= {"mlp_layer": models.mlp_mixer.GatedMlp}
    else:
        options |= {"mlp_ratio": (d.pick(0.5, 0.5, 1.0), d.pick(3.0, 4.0)), "mlp_layer": d.pick(Mlp, Mlp, GluMlp)}
    return d.build(models.mlp_mixer.MlpMixer, **options)


FAMILIES: dict[str, tuple[float, Family]] = {
    "resnet": (6, _resnet), "resnetv2": (2, _resnetv2), "byobnet": (3, _byobnet), "mobileone": (1, _mobileone),
    "mobilevit": (2, _mobilevit), "mobilenetv3": (3, _mobilenetv3), "mobilenetv4": (2, _mobilenetv4), "vgg": (2, _vgg),
    "rdnet": (1, _rdnet), "hgnet": (1, _hgnet), "metaformer": (3, _metaformer), "fastvit": (1, _fastvit),
    "swin": (3, _swin), "maxxvit": (2, _maxxvit), "mixer": (10, _mixer),
    # Convolutional networks.
    "nfnet": (2, lambda d: d.build(models.nfnet.NormFreeNet, models.nfnet.NfCfg(
        depths=d.depths(4, 2), channels=d.widths(4, 48, 128, 16), stem_type=d.pick("3x3", "7x7_pool", "deep_quad"),
        stem_chs=d.width(24, 64), group_size=d.pick(None, 8, 16), attn_layer=d.pick(None, "se", "eca"), attn_kwargs={},
        bottle_ratio=d.pick(0.25, 0.5), num_features=d.pick(0, d.width(192, 640)),
        act_layer=d.pick("relu", "silu", "gelu"), reg=d.flag(0.3), skipinit=d.flag(0.2),
    ))),
    "res2net": (1, lambda d: d.build(
        models.resnet.ResNet, models.res2net.Bottle2neck, d.depths(4), base_width=d.pick(14, 26, 48),
        channels=d.widths(4, 16, 48), block_args={"scale": d.pick(3, 4, 6)},
    )),
    "regnet": (3, lambda d: d.build(models.regnet.RegNet, models.regnet.RegNetCfg(
        depth=d.number(8, 18), w0=d.width(16, 48), wa=d.real(18, 40), wm=d.real(2.0, 2.6),
        group_size=d.pick(8, 8, 16, 24), bottle_ratio=d.pick(1.0, 1.0, 1.0, 0.5), se_ratio=d.pick(0.0, 0.0, 0.25),
        act_layer=d.pick("relu", "relu", "silu"),
    ))),
    "dpn": (1, lambda d: d.build(
        models.dpn.DPN, k_sec=d.depths(4), inc_sec=d.widths(4, 8, 16), groups=(groups := d.pick(4, 8, 16)),
        k_r=groups * d.pick(2, 4), small=d.flag(), num_init_features=d.width(16, 48), b=d.flag(0.3),
    )),
    "dla": (1, lambda d: d.build(
        models.dla.DLA, [1, 1, *(d.number(1, 2) for _ in range(3)), 1], list(d.widths(6, 8, 16)),
        shortcut_root=d.flag(), **d.pick(
            {"block": models.dla.DlaBasic}, {"block": models.dla.DlaBottleneck},
            {"block": models.dla.DlaBottle2neck, "base_width": 32},
        ),
    )),
    "cspnet": (2, lambda d: d.build(models.cspnet.CspNet, models.cspnet.CspModelCfg(
        stem=models.cspnet.CspStemCfg(out_chs=d.width(16, 32), kernel_size=3, stride=d.pick(1, 2), pool=""),
        stages=models.cspnet.CspStagesCfg(
            depth=d.depths(4, 2), out_chs=d.widths(4, 24, 56, 16), bottle_ratio=0.5, cross_linear=d.flag(),
            **d.pick(
                {"stage_type": "csp", "block_type": "bottle", "expand_ratio": 2.0, "block_ratio": 1.0},
                {"stage_type": "cs3", "block_type": "bottle", "expand_ratio": 1.0, "block_ratio": 0.5},
                {"stage_type": "dark", "block_type": "dark", "expand_ratio": 1.0, "block_ratio": 1.0},
            ),
        ), act_layer=d.pick("leaky_relu", "silu"),
    ))),
    "vovnet": (1, lambda d: d.build(models.vovnet.VovNet, {
        "stem_chs": [d.width(16, 32), 32, d.width(16, 48)], "stage_conv_chs": list(d.widths(4, 16, 32)),
        "stage_out_chs": list(d.widths(4, 32, 64)), "layer_per_block": d.number(2, 4),
        "block_per_stage": [1, 1, d.number(1, 2), 1], "residual": d.flag(), "depthwise": d.flag(0.3),
        "attn": d.pick("", "ese"),
    })),
    "convnext": (6, lambda d: d.build(
        models.convnext.ConvNeXt, depths=d.depths(4), dims=d.widths(4, 24, 64), kernel_sizes=d.pick(7, 7, 7, 5, 3, 9),
        use_grn=(grn := d.flag(0.4)), ls_init_value=None if grn else _scale(d), patch_size=d.pick(2, 4, 4),
        stem_type=d.pick("patch", "patch", "overlap", "overlap_tiered"), conv_mlp=d.flag(),
        act_layer=d.pick("gelu", "gelu", "silu"),
    )),
    "inception_next": (2, lambda d: d.build(
        models.inception_next.MetaNeXt, depths=d.depths(4), dims=d.widths(4, 24, 64), ls_init_value=_scale(d),
        token_mixers=partial(
            models.inception_next.InceptionDWConv2d, band_kernel_size=d.pick(7, 9, 11),
            branch_ratio=d.pick(0.125, 0.25),
        ), mlp_ratios=d.pick((4, 4, 4, 3), (3, 3, 3, 3)),
    )),
    "shvit": (1, lambda d: d.build(
        models.shvit.SHViT, embed_dim=(dims := d.widths(3, 64, 128)), depth=d.depths(3),
        partial_dim=tuple(max(8, round(0.21 * dim)) for dim in dims), types=d.pick(("s", "s", "s"), ("i", "s", "s")),
    )),
    "efficientvit": (2, lambda d: d.build(
        models.efficientvit_mit.EfficientVit, widths=d.widths(5, 8, 16, 8), depths=(1, *d.depths(4, 2)),
        head_dim=d.pick(8, 16), head_widths=(d.width(256, 768), d.width(256, 768)),
    )),
    "efficientvit_msra": (1, lambda d: d.build(
        models.efficientvit_msra.EfficientVitMsra, num_heads=(heads := d.pick(2, 4),) * 3,
        embed_dim=d.widths(3, 48, 96, 16 * heads), depth=d.depths(3, 2), window_size=(7, 7, 7),
        kernels=d.pick((5, 5, 5, 5), (7, 5, 3, 3)),
    )),
    "resnest": (1, lambda d: d.build(
        models.resnet.ResNet, models.resnest.ResNestBottleneck, d.depths(4, 2), stem_type=d.pick("", "deep"),
        avg_down=True, stem_width=d.width(16, 32), channels=d.widths(4, 16, 40),
        block_args={"radix": d.pick(1, 2), "avd": True, "avd_first": d.flag()},
    )),
    "sknet": (1, lambda d: d.build(
        models.resnet.ResNet, d.pick(models.sknet.SelectiveKernelBasic, models.sknet.SelectiveKernelBottleneck),
        d.depths(4, 2), channels=d.widths(4, 16, 40),
        block_args={"sk_kwargs": {"rd_ratio": d.pick(1 / 8, 1 / 16), "split_input": d.flag()}}, zero_init_last=False,
    )),
    "efficientnet": (5, lambda d: d.build(
        models.efficientnet.EfficientNet,
        decode_arch_def(_efficient_stages(d, d.pick(1, 1, 2), d.pick(("ir",), ("ir",), ("er", "ir"), ("cn", "ir")))),
        num_features=d.pick(0, d.width(192, 768), d.width(512, 1280)), stem_size=d.width(12, 32),
        act_layer=d.pick(nn.SiLU, nn.SiLU, nn.ReLU6, nn.ReLU), round_chs_fn=round_channels,
    )),
    "ghostnet": (2, lambda d: d.build(
        models.ghostnet.GhostNet, _ghost_stages(d), width=d.pick(0.5, 0.75, 1.0),
        version=d.pick("v1", "v1", "v2"),
    )),
    "rexnet": (1, lambda d: d.build(
        models.rexnet.RexNet, initial_chs=d.width(8, 16, 4), final_chs=d.width(48, 140, 4),
        depth_mult=d.pick(0.34, 0.5, 0.67, 1.0), se_ratio=d.pick(0, 1 / 12), ch_div=d.pick(1, 4),
    )),
    "densenet": (2, lambda d: d.build(
        models.densenet.DenseNet, growth_rate=d.width(8, 32, 4), block_config=tuple(d.number(2, 8) for _ in range(4)),
        bn_size=d.pick(2, 4, 4), stem_type=d.pick("", "", "deep"),
    )),
    "fasternet": (1, lambda d: d.build(
        models.fasternet.FasterNet, embed_dim=d.width(24, 64), depths=d.depths(4), mlp_ratio=d.pick(2.0, 3.0),
        feature_dim=d.width(256, 1024), act_layer=d.pick(nn.ReLU, nn.GELU),
    )),
    "starnet": (1, lambda d: d.build(
        models.starnet.StarNet, base_dim=d.width(12, 32), depths=list(d.depths(4)), mlp_ratio=d.pick(3, 4),
    )),
    "convmixer": (1, lambda d: d.build(
        models.convmixer.ConvMixer, d.width(64, 256), d.number(4, 12), kernel_size=d.pick(3, 5, 7, 9),
        patch_size=d.pick(4, 7), act_layer=d.pick(nn.GELU, nn.ReLU),
    )),
    "repvit": (1, lambda d: d.build(
        models.repvit.RepVit, embed_dim=d.widths(4, 24, 48), depth=d.depths(4), distillation=d.flag(0.3),
        legacy=d.flag(0.3),
    )),
    "mambaout": (2, lambda d: d.build(
        models.mambaout.MambaOut, depths=d.depths(4), dims=d.widths(4, 24, 64), conv_ratio=d.pick(1.0, 1.0, 1.25, 1.5),
        expansion_ratio=d.pick(2.0, 8 / 3), kernel_size=d.pick(3, 5, 7, 7), stem_mid_norm=d.flag(),
        ls_init_value=_scale(d) if d.flag(0.4) else None, downsample=d.pick("conv", "conv_nf"),
    )),
    "edgenext": (1, lambda d: d.build(
        models.edgenext.EdgeNeXt, dims=d.widths(4, 24, 48), depths=tuple(depth + 1 for depth in d.depths(4, 2)),
        global_block_counts=(0, 1, 1, 1), heads=(4, 4, 4, 4) if d.flag() else (8, 8, 8, 8),
        use_pos_emb=(False, d.flag(), False, False), ls_init_value=d.pick(1e-6, 0.1, 1.0), conv_bias=d.flag(0.8),
        stem_type=d.pick("patch", "overlap"),
    )),
    "focalnet": (1, lambda d: d.build(
        models.focalnet.FocalNet, embed_dim=d.width(24, 64), depths=d.depths(4), focal_levels=(d.number(2, 3),) * 4,
        use_overlap_down=d.flag(0.3), use_post_norm=d.flag(0.3), layerscale_value=_scale(d),
    )),
    "swiftformer": (1, lambda d: d.build(
        models.swiftformer.SwiftFormer, layers=list(d.depths(4)), embed_dims=list(d.widths(4, 24, 48)),
        layer_scale_init_value=d.pick(1e-5, 0.1, 1.0),
    )),
    "efficientformer": (1, lambda d: d.build(
        models.efficientformer_v2.EfficientFormerV2, tuple(depth + 1 for depth in d.depths(4, 2)),
        embed_dims=d.widths(4, 24, 40), layer_scale_init_value=d.pick(1e-5, 0.1, 1.0), num_vit=d.number(0, 2),
        distillation=d.flag(),
    )),
    "repghost": (1, lambda d: d.build(
        models.repghost.RepGhostNet, _ghost_stages(d), width=d.pick(0.5, 0.75, 1.0),
    )),
    "lcnetv2": (1, lambda d: d.build(
        models.lcnetv2.LCNetV2, scale=d.width(16, 48) / 64, depths=d.depths(4),
        head_hidden_size=d.pick(None, d.width(256, 1024)),
    )),
    "iformer": (1, lambda d: d.build(
        models.iformer.IFormer, dims=d.scaled((16, 32), (1, 2, 4, 8)),
        depths=(d.number(1, 2), d.number(1, 2), d.number(3, 9), d.number(2, 5)), attn_groups=(0, 0, d.number(1, 2), 1),
        conv_ratio=d.pick(3, 4), ffn_ratio=d.pick(2, 3),
    )),
    "coat": (1, lambda d: d.build(
        models.coat.CoaT, patch_size=4, embed_dims=d.widths(4, 24, 56), serial_depths=d.depths(4, 1),
        mlp_ratios=d.pick((8, 8, 4, 4), (4, 4, 4, 4)), global_pool=d.pick(*_POOLS),
    )),
    # Transformers.
    "vit": (80, lambda d: d.build(
        models.vision_transformer.VisionTransformer,
        patch_size=_patch(d), depth=d.number(3, 12),
        mlp_ratio=d.pick(2.0, 3.0, 4.0, 4.0), qkv_bias=d.flag(0.8), qk_norm=d.flag(0.15),
        init_values=d.pick(None, None, None, 0.1), reg_tokens=d.pick(0, 0, 0, 4), act_layer=d.pick(None, None, nn.SiLU),
        mlp_layer=d.pick(Mlp, Mlp, Mlp, GluMlp), **d.heads(2, 8, 24, 32, 48, 64), **d.pick(
            {}, {},  # with a class token
            {"global_pool": "avg", "class_token": False},
            {"global_pool": "avg", "class_token": False, "fc_norm": False},
        ),
    )),
    "eva": (12, lambda d: d.build(
        models.eva.Eva, patch_size=_patch(d), depth=d.number(3, 10), qkv_fused=d.flag(), swiglu_mlp=d.flag(),
        scale_mlp=d.flag(0.3), mlp_ratio=d.pick(8 / 3, 4.0), use_rot_pos_emb=d.flag(0.7),
        init_values=d.pick(None, 0.1), **d.heads(2, 8, 32, 64),
    )),
    "cait": (5, lambda d: d.build(
        models.cait.Cait, patch_size=_patch(d), depth=d.number(3, 10), init_values=d.pick(1e-5, 0.1, 1.0),
        **d.heads(2, 5, 32, 48), global_pool=d.pick(*_POOLS),
    )),
    "xcit": (2, lambda d: d.build(
        models.xcit.Xcit, patch_size=d.pick(8, 16) if d.size == 64 else 8, depth=d.number(3, 8),
        eta=d.pick(1.0, 0.1, 1e-5), tokens_norm=d.flag(), **d.heads(2, 5, 24, 32, 48), global_pool=d.pick(*_POOLS),
    )),
    "pit": (5, lambda d: d.build(
        models.pit.PoolingVisionTransformer, patch_size=d.pick(8, 16), stride=4, stem_type="overlap",
        base_dims=d.scaled((16, 24, 32), (1, 1, 1)), depth=d.depths(3), heads=d.pick((1, 2, 4), (2, 4, 8)),
    )),
    "levit": (1, lambda d: d.build(
        models.levit.Levit, embed_dim=d.widths(stages := d.number(2, 3), 64, 128, 32), key_dim=16,
        depth=d.depths(stages), num_heads=tuple(d.number(2, 4) + index for index in range(stages)),
        stem_type=d.pick("s8", "s16"), use_conv=d.flag(0.3),
    )),
    "pvt": (1, lambda d: d.build(
        models.pvt_v2.PyramidVisionTransformerV2, depths=d.depths(4, 2),
        num_heads=(heads := d.pick((1, 2, 4, 8), (1, 2, 5, 8))), embed_dims=d.scaled((16, 24, 32), heads),
        mlp_ratios=d.pick((8.0, 8.0, 4.0, 4.0), (4.0, 4.0, 4.0, 4.0)), linear=d.flag(),
    )),
    "twins": (1, lambda d: d.build(
        models.twins.Twins, embed_dims=d.scaled((16, 24, 32), (1, 2, 4, 8)), num_heads=(1, 2, 4, 8),
        depths=d.depths(4, 2), sr_ratios=(8, 4, 2, 1), wss=d.pick((7, 7, 7, 7), None),
    )),
    "davit": (1, lambda d: d.build(
        models.davit.DaVit, depths=d.depths(stages := d.number(3, 4), 1),
        num_heads=(heads := d.scaled((1, 1, 2), (1, 2, 4, 8)[:stages])),
        embed_dims=d.scaled((24, 32) if heads[0] == 1 else (16,), heads), window_size=d.pick(2, 4),
        named_blocks=d.flag(), cpe_act=d.flag(0.3),
    )),
    "tiny_vit": (1, lambda d: d.build(
        models.tiny_vit.TinyVit, num_heads=(heads := d.scaled((2, 3), (1, 2, 3, 4))),
        embed_dims=tuple(16 * head for head in heads), depths=d.depths(4, 2),
        window_sizes=d.pick((2, 2, 2, 1), (4, 4, 2, 2), (4, 4, 4, 4)),
    )),
    "visformer": (1, lambda d: d.build(
        models.visformer.Visformer, patch_size=16, init_channels=d.pick(16, 32),
        embed_dim=(width := d.width(96, 224, 32)), num_heads=width // 32, depth=d.depths(3),
        attn_stage=d.pick("011", "111"), spatial_conv=d.pick("100", "111"), group=8, norm_layer=nn.BatchNorm2d,
    )),
}
"""Families by name: how often one is drawn relative to the others, and how."""
