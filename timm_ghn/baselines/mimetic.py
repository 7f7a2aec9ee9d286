"""Mimetic initialization of self-attention (Trockman & Kolter 2023, arXiv 2305.09828).

In trained transformers `W_q W_k^T` has a positive diagonal and `W_v W_proj` a negative one. Both products are drawn as
a random matrix plus a multiple of the identity and factored by an SVD:

    W_q W_k^T  = 0.7 Z + 0.7 I    of rank d / heads, for each head
    W_v W_proj = 0.4 Z - 0.4 I    Z_ij ~ N(0, 1 / d)

in the paper's notation, where a row vector is multiplied from the left. PyTorch's weights are the transposes.

Applies to `nn.MultiheadAttention` with one width, and to modules with a number of heads that own one linear layer of
shape (3 d, d) and one of shape (d, d), as timm's attention in ViT, DeiT, Swin. Biases and all else are left alone; the
paper's sinusoidal position embeddings are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_ghn.baselines.setting import Computation, Setting, names_of
from timm_ghn.seeding import derived_seed

QUERY_KEY = (0.7, 0.7)
"""alpha and beta of `W_q W_k^T`."""
VALUE_PROJECTION = (0.4, 0.4)
"""alpha and beta of `W_v W_proj`; the identity is subtracted."""


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The weights of a self-attention.

    Attributes:
        heads: Number of heads.
        stacked: Query, key and value weights, one below the other, (3 d, d).
        projection: Output weight, (d, d).
        names: Their qualified names.
    """

    heads: int
    stacked: Tensor
    projection: Tensor
    names: tuple[str, str]


def find_attention(model: nn.Module) -> Iterator[AttentionWeights]:
    """All self-attention modules of a model, by types and shapes."""
    names = names_of(model)
    for module in model.modules():
        heads = getattr(module, "num_heads", None)
        if not isinstance(heads, int):
            continue
        weights: list[Tensor] = [child.weight for child in module.children() if isinstance(child, nn.Linear)]
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weights.append(module.in_proj_weight)
        square = [weight for weight in weights if weight.shape[0] == weight.shape[1]]
        triple = [weight for weight in weights if weight.shape[0] == 3 * weight.shape[1]]
        if len(square) != 1 or len(triple) != 1 or square[0].shape[1] != triple[0].shape[1]:
            continue
        found = (id(triple[0]), id(square[0]))
        if names.keys() >= set(found):  # tied weights belong to the first module
            yield AttentionWeights(heads, triple[0], square[0], (names.pop(found[0]), names.pop(found[1])))


def factors(width: int, rank: int, alpha: float, beta: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two factors of `alpha Z + beta I`, or of its best approximation of a rank.

    Returns:
        float64 (d, rank) and (rank, d).
    """
    noise = torch.randn(width, width, dtype=torch.float64, generator=generator) / width**0.5
    left, values, right = torch.linalg.svd(alpha * noise + beta * torch.eye(width, dtype=torch.float64))
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def mimetic(setting: Setting) -> Computation:
    """Weights of all self-attention.

    Raises:
        InitError: If there is none.
    """
    found = list(find_attention(setting.model))
    return setting.computation(
        (name for attention in found for name in attention.names),
        lambda: (pair for index, attention in enumerate(found) for pair in _weights(attention, index, setting.seed)),
        "it has no self-attention with stacked query, key and value weights",
    )


@torch.no_grad()
def _weights(attention: AttentionWeights, index: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The stacked and the output weight of one self-attention, float64."""
    width, heads = attention.projection.shape[0], attention.heads
    generator = torch.Generator().manual_seed(derived_seed("mimetic", seed, index, width))
    pairs = [factors(width, width // heads, *QUERY_KEY, generator) for _ in range(heads)]
    alpha, beta = VALUE_PROJECTION
    value, projection = factors(width, width, alpha, -beta, generator)
    query = torch.cat([first.T for first, _ in pairs])
    key = torch.cat([second for _, second in pairs])
    yield attention.names[0], torch.cat([query, key, value.T])
    yield attention.names[1], projection.T
