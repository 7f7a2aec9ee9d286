"""What the graphs of a GHN are made of: the vocabulary, and nodes with the parameters that they predict.

The vocabulary and its order are those of DeepNets-1M (Knyazev et al. 2021, arXiv 2110.13100, table 1): a node's
operator id is its position in `Op`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Op(str, Enum):
    """Operator of a node; the order of the members is the order of the GHN's embedding rows."""

    MAX_POOL = "max_pool"
    AVG_POOL = "avg_pool"
    SEP_CONV = "sep_conv"
    DIL_CONV = "dil_conv"
    CONV = "conv"
    MSA = "msa"
    CSE = "cse"
    SUM = "sum"
    CONCAT = "concat"
    INPUT = "input"
    BIAS = "bias"
    BN = "bn"
    LN = "ln"
    POS_ENC = "pos_enc"
    GLOB_AVG = "glob_avg"

    @property
    def row(self) -> int:
        """Row of the operator in the GHN's embedding table."""
        return _ROWS[self]


_ROWS = {op: row for row, op in enumerate(Op)}

CONVOLUTIONS = (Op.CONV, Op.SEP_CONV, Op.DIL_CONV)
"""Operators with kernels; a linear layer is a convolution with a kernel of 1."""


class Role(str, Enum):
    """What a parameter is to its node, which decides the decoder and the scaling that it gets."""

    WEIGHT = "weight"
    BIAS = "bias"
    NORM_WEIGHT = "norm_weight"
    NORM_BIAS = "norm_bias"
    POS_ENC = "pos_enc"
    CLASS_WEIGHT = "class_weight"
    CLASS_BIAS = "class_bias"


class Layout(str, Enum):
    """How a parameter stores the (K, C, kh, kw) kernel, or the (1, C, h, w) table, that a GHN predicts."""

    PLAIN = "plain"
    """Same order of elements: convolutions, linear weights (K, C), vectors."""
    TRANSPOSED = "transposed"
    """Input channels first: transposed convolutions (C, K / groups, ...), `x @ weight` with a (C, K) weight."""
    DEPTH = "depth"
    """A 3-D kernel (K, C, kd, kh, kw): the 2-D kernel repeated kd times and divided by kd."""
    MIXTURE = "mixture"
    """(experts, K * C * kh * kw) or (experts, K, C, kh, kw): every expert starts from the one kernel."""
    TOKENS = "tokens"
    """A table of tokens (1, prefix + h * w, C) or (h * w, C); the prefix tokens are not predicted."""
    CHANNELS_LAST = "channels_last"
    """A table (1, h, w, C)."""


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter of the model whose value a node predicts.

    Attributes:
        name: Qualified name in `model.named_parameters()`.
        shape: Shape of the parameter.
        role: What the parameter is to its node.
        layout: How the parameter stores what the GHN predicts.
    """

    name: str
    shape: Shape
    role: Role
    layout: Layout = Layout.PLAIN


@dataclass(frozen=True, slots=True)
class Node:
    """An operator of the graph.

    Attributes:
        op: Operator.
        shape: Shape that the GHN reads: the parameter's, as (K,), (K, C) or (K, C, kh, kw); (1, 1, kh, kw) for a
            pooling kernel; (1, C, h, w) for positional encodings; None for operators without one.
        targets: Parameters that the node predicts: one for weights and biases, weight and bias for a norm layer.
            Empty for operators without parameters and for repeated uses of a shared parameter.
    """

    op: Op
    shape: Shape | None = None
    targets: tuple[Target, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form."""
        targets = [
            {"name": t.name, "shape": list(t.shape), "role": t.role.value, "layout": t.layout.value}
            for t in self.targets
        ]
        return {"op": self.op.value, "shape": None if self.shape is None else list(self.shape), "targets": targets}
