"""The graph hypernetwork: from a graph to the parameters of its network (GHN-2, arXiv 2110.13100)."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_ghn.errors import GraphError
from timm_ghn.ghn import decoder as decoders
from timm_ghn.ghn import layout
from timm_ghn.ghn.config import GHNConfig, GHNInfo
from timm_ghn.ghn.features import ShapeEncoder, shape_4d
from timm_ghn.ghn.gnn import MLP, GatedGNN
from timm_ghn.ghn.graphormer import Graphormer
from timm_ghn.ghn.seen import Seen
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Layout, Op, Role, Shape, Target
from timm_ghn.threads import Workers

CHUNK_BYTES, MIN_CHUNKS = 8 * 2**20, 4
"""Bounds of the blocks that are decoded at once: so many bytes, and one part in `MIN_CHUNKS`. A single node may exceed
both. Of larger chunks there are too few to keep all threads at work. With gradients, all blocks are decoded at once,
which makes the gradients cheaper."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted parameter, before it is tiled to its full size.

    Attributes:
        target: The parameter.
        block: What the GHN emitted for it, scaled: (k, c, h, w), (k, c) for class weights or (k,) for vectors.
        kernel: Shape, of the rank of `block`, that the block is tiled to before it is laid out as the parameter.
        signed: Whether the blocks that it is repeated as have `layout.signs`.
    """

    target: Target
    block: Tensor
    kernel: Shape
    signed: bool = False

    def materialize(self) -> Tensor:
        """The parameter, contiguous, of `target.shape`; elements that are not predicted are zero.

        The result shares the memory of the block where that is as large. Differentiable.
        """
        kernel = layout.tile(self.block, self.kernel)
        signs = self._signs()
        kernel = kernel if signs is None else kernel * signs.to(kernel)
        return layout.arrange(kernel, self.target.shape, self.target.layout).contiguous()

    @torch.no_grad()
    def write_(self, parameter: Tensor) -> None:
        """Write the prediction into an existing tensor, without a full-size temporary where its strides allow.

        Args:
            parameter: Tensor of `target.shape`, of any floating type and device. Elements that are not predicted
                are left as they are.

        Raises:
            GraphError: If the shape is another one.
        """
        if tuple(parameter.shape) != self.target.shape:
            raise GraphError(
                f"{self.target.name}: the graph says shape {self.target.shape}, the tensor to write has "
                f"{tuple(parameter.shape)}; capture the graph of this very model"
            )
        view = layout.kernel_view(parameter, self.kernel, self.target.layout)
        if view is None:
            values = self.materialize()
            if self.target.layout is Layout.TOKENS:
                parameter, values = (layout.token_rows(table, self.kernel) for table in (parameter, values))
            parameter.copy_(values)
            return
        block = self.block.to(parameter.device)
        layout.tile_(view, block[(None,) * (view.dim() - block.dim())])
        signs = self._signs()
        if signs is not None:
            view.mul_(signs.to(view))

    def _signs(self) -> Tensor | None:
        """Signs of the kernel, on the CPU; None if all are 1, as they are in the first row and column of blocks."""
        repeats = all(size > side for size, side in zip(self.kernel[:2], self.block.shape[:2], strict=True))
        return layout.signs(self.kernel, self.block.shape[:2]) if self.signed and repeats else None


_Group = tuple[Role, Shape]
"""What one call of a decoder emits, by role and size of block. All vectors but those of classes count as biases."""

_KERNELS = (Role.WEIGHT, Role.POS_ENC)
"""Roles of parameters that are cut from whole blocks."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A parameter to predict: its graph, its node among those of all graphs, and the shape that the node reads."""

    graph: int
    node: int
    target: Target
    shape: Shape


_Batch = list[tuple[_Group, Sequence[_Job]]]
"""Jobs that are decoded together, by group."""


class GHN(nn.Module):
    """A graph hypernetwork: GHN-1 and GHN-2 with the names and shapes of ppuda's state dicts, and GHN-3.

    Args:
        config: Hyperparameters.

    Attributes:
        config: Hyperparameters.
        info: Where the weights came from; None for one that was not loaded.
        seen: The surroundings of layers that it was trained in; None where that is not known.
    """

    def __init__(self, config: GHNConfig) -> None:
        super().__init__()
        self.config = config
        self.info: GHNInfo | None = None
        self.seen: Seen | None = None
        hid = config.hid
        if config.layernorm:
            self.ln = nn.LayerNorm(hid)
        self.embed = nn.Embedding(len(Op), hid)
        self.shape_enc = ShapeEncoder(hid, config.num_classes, config.max_shape[3])
        self.gnn = _make_encoder(config)
        self.decoder = decoders.ConvDecoder(config)
        channels = max(config.max_shape[:2])
        # A norm weight, then a norm bias or any other bias, which further layers turn into one of the classes.
        self.decoder_1d = MLP(hid, (2 * hid, 2 * channels), last_activation=False)
        self.bias_class = nn.Sequential(nn.ReLU(), nn.Linear(channels, config.num_classes))

    def embed_nodes(self, graphs: Graph | Sequence[Graph]) -> Tensor:
        """Features (N, hid) of the nodes of one or more graphs, one graph after the other.

        Raises:
            GraphError: If there is no graph, or the shape of a node has no dimensions or more than four.
        """
        batch = [graphs] if isinstance(graphs, Graph) else list(graphs)
        if not batch:
            raise GraphError("no graph to embed")
        nodes = [node for graph in batch for node in graph.nodes]
        operators = torch.tensor([node.op.row for node in nodes], device=self.embed.weight.device)
        x = self.embed(operators) + self.shape_enc(nodes)
        x = self.gnn(x) if isinstance(self.gnn, MLP) else self.gnn(x, batch)
        x = self.ln(x) if self.config.layernorm else x
        return cast(Tensor, x)

    @torch.no_grad()
    def predict(self, graph: Graph, workers: Workers | None = None) -> Iterator[Prediction]:
        """Predict the parameters of one network, without gradients.

        Args:
            graph: The network's graph.
            workers: Threads that decode a little ahead; the calling thread decodes by default.

        Yields:
            One prediction for each target of the graph, large parameters first, but those of equal size of block
            after each other. Blocks are decoded as they are asked for, a quarter of them or about 8 MiB at a time.

        Raises:
            GraphError: If a target does not fit what its node predicts; raised before the first prediction.
        """
        for _, prediction in self._predictions([graph], workers):
            yield prediction

    def forward(self, graphs: Sequence[Graph]) -> list[dict[str, Tensor]]:
        """Predict the parameters of several networks at once, with gradients.

        Args:
            graphs: Graphs of the networks.

        Returns:
            For each graph, full-size tensors by name of parameter, for `torch.func.functional_call`. Rows of a
            table of tokens that are not predicted are zero.

        Raises:
            GraphError: If a target does not fit what its node predicts.
        """
        outputs: list[dict[str, Tensor]] = [{} for _ in graphs]
        for index, prediction in self._predictions(graphs):
            outputs[index][prediction.target.name] = prediction.materialize()
        return outputs

    def _predictions(self, graphs: Sequence[Graph], workers: Workers | None = None) -> Iterator[tuple[int, Prediction]]:
        """Predictions for all targets of all graphs, with the index of their graph."""
        batches = self._batches(self._groups(graphs))
        features = self.embed_nodes(graphs)
        tasks = (partial(self._decode_batch, batch, features) for batch in batches)
        results = (task() for task in tasks) if workers is None else workers.in_order(tasks, workers.count)
        return itertools.chain.from_iterable(results)

    def _batches(self, groups: Mapping[_Group, Sequence[_Job]]) -> list[_Batch]:
        """Jobs of one or more groups that are decoded together, which takes fewer operations."""
        total = sum(len(jobs) * self._bytes(group) for group, jobs in groups.items())
        limit = sys.maxsize if torch.is_grad_enabled() else min(CHUNK_BYTES, total // MIN_CHUNKS + 1)
        batches: list[_Batch] = []
        taken = 0
        for group, jobs in groups.items():
            each = self._bytes(group)
            size = max(1, limit // each)
            for chunk in (jobs[start : start + size] for start in range(0, len(jobs), size)):
                if not batches or taken + len(chunk) * each > limit:
                    batches.append([])
                    taken = 0
                batches[-1].append((group, chunk))
                taken += len(chunk) * each
        return batches

    def _decode_batch(self, batch: _Batch, features: Tensor) -> list[tuple[int, Prediction]]:
        """Predictions of a batch, with the index of their graph."""
        return [
            (job.graph, self._finish(job, block))
            for ((role, _), jobs), blocks in zip(batch, self._emit(batch, features), strict=True)
            for job, block in zip(jobs, self._normalize(role, jobs, blocks).unbind(), strict=True)
        ]

    def _emit(self, batch: _Batch, features: Tensor) -> list[Tensor]:
        """Blocks (n, ...) of some groups for the nodes of their jobs, not yet scaled by fan-in."""
        limits = self.config.max_shape
        tilings = {(role, block): layout.tilings(block, limits) for (role, block), _ in batch if role in _KERNELS}
        parts = self.decoder.cut(tiles.block for parts_of in tilings.values() for tiles in parts_of)
        emitted: list[list[Tensor]] = []
        for group, jobs in batch:
            x = features[torch.tensor([job.node for job in jobs], device=features.device)]
            if group in tilings:
                emitted.append([self.decoder(x, tiles, parts[tiles.block]) for tiles in tilings[group]])
            else:
                emitted.append([self._decode(group, x)])
        if self.config.kernels == "orthogonal":
            kernels = [index for index, ((role, _), _) in enumerate(batch) if role is Role.WEIGHT]
            blocks = [block.flatten(0, 2) for index in kernels for block in emitted[index]]
            conditioned = iter(decoders.make_orthogonal(blocks))
            for index in kernels:
                emitted[index] = [next(conditioned).view_as(block) for block in emitted[index]]
        return [
            layout.join(found, tilings[group]) if group in tilings else found[0]
            for (group, _), found in zip(batch, emitted, strict=True)
        ]

    def _groups(self, graphs: Sequence[Graph]) -> dict[_Group, list[_Job]]:
        """All targets, grouped by what a decoder emits at once.

        Large parameters come first: those who post-process them then end at about the same time.
        """
        jobs = []
        offset = 0
        for index, graph in enumerate(graphs):
            for position, node in enumerate(graph.nodes):
                for target in node.targets:
                    jobs.append(_Job(index, offset + position, target, _kernel_shape(target, node.shape)))
            offset += len(graph)
        groups: dict[_Group, list[_Job]] = {}
        for job in sorted(jobs, key=lambda job: math.prod(job.target.shape), reverse=True):
            groups.setdefault(self._group(job), []).append(job)
        return groups

    def _group(self, job: _Job) -> _Group:
        role = job.target.role
        if role in _KERNELS:
            return role, self.config.emitted(shape_4d(job.shape))
        if role is Role.CLASS_WEIGHT:
            return role, (self.config.num_classes, min(job.shape[1], self.config.largest_kernel[1]))
        return Role.CLASS_BIAS if role is Role.CLASS_BIAS else Role.BIAS, ()

    def _bytes(self, group: _Group) -> int:
        """Memory that a node of a group needs: its block, or the hidden features of the decoder."""
        _, block = group
        places = math.prod(block[2:]) * 8 * self.config.hid
        return 4 * max(math.prod(block), places, 2 * max(self.config.max_shape[:2]), self.config.num_classes)

    def _decode(self, group: _Group, x: Tensor) -> Tensor:
        """What is no kernel (n, ...) of a group for node features (n, hid), neither scaled nor cut to its target."""
        role, block = group
        if role is Role.CLASS_WEIGHT:
            return self.decoder.class_weights(x, block[1])
        vectors: Tensor = self.decoder_1d(x).view(len(x), 2, -1)
        return cast(Tensor, self.bias_class(vectors[:, 1])) if role is Role.CLASS_BIAS else vectors

    def _normalize(self, role: Role, jobs: Sequence[_Job], blocks: Tensor) -> Tensor:
        """Scale the blocks of some jobs of one group, as `weight_norm` says: all at once, in few operations."""
        if not self.config.weight_norm:
            return blocks
        if role is Role.BIAS:  # two vectors of each node: a norm weight, and any other
            return torch.stack([2 * torch.sigmoid(blocks[:, 0] / 2), torch.tanh(blocks[:, 1] / 5)], dim=1)
        if role is Role.CLASS_BIAS:
            return torch.tanh(blocks / 5)
        factors = [self._scale(job) for job in jobs]
        return blocks * blocks.new_tensor(factors).view(-1, *(1,) * (blocks.ndim - 1))

    def _scale(self, job: _Job) -> float:
        if self.config.cut == "centre" and job.target.layout is Layout.TOKENS:  # ghn3 scales no table of tokens
            return 1.0
        return decoders.kernel_scale(job.shape, job.target.role is Role.POS_ENC)

    def _finish(self, job: _Job, block: Tensor) -> Prediction:
        """Cut a block to what its target needs."""
        target, shape = job.target, job.shape
        if target.role in (*_KERNELS, Role.CLASS_WEIGHT):
            kernel = shape[:2] if target.role is Role.CLASS_WEIGHT else shape_4d(shape)
            if self.config.cut == "centre" and kernel[2:] != block.shape[2:]:
                block = F.interpolate(block, kernel[2:], mode="bilinear")
            block = block[: kernel[0]] if kernel[0] < len(block) else block
            block = block / target.shape[2] if target.layout is Layout.DEPTH else block
            return Prediction(target, block, kernel, self.config.signs and target.role is Role.WEIGHT)
        if target.role is not Role.CLASS_BIAS:
            block = block[0 if target.role is Role.NORM_WEIGHT else 1]
        return Prediction(target, block[: shape[0]], shape)


def _make_encoder(config: GHNConfig) -> GatedGNN | Graphormer | MLP:
    """What mixes the features of the nodes."""
    if config.hypernet == "graphormer":
        return Graphormer(config.hid, config.layers, config.heads)
    return GatedGNN(config.hid, config.ve) if config.hypernet == "gatedgnn" else MLP(config.hid, (config.hid,) * 2)


def _kernel_shape(target: Target, shape: Shape | None) -> Shape:
    """Shape of the tensor that a node predicts for a target, checked against the target.

    Raises:
        GraphError: If the node has no shape, one of the wrong rank, or one that does not fit the target's.
    """
    is_vector = target.role in (Role.BIAS, Role.NORM_WEIGHT, Role.NORM_BIAS, Role.CLASS_BIAS)
    if shape is None or (not is_vector and len(shape) < 2):
        raise GraphError(f"{target.name}: a {target.role.value} cannot be predicted by a node of shape {shape}")
    if is_vector:
        shape = (math.prod(target.shape),)  # a bias may be put together from several parameters
    kernel = shape if is_vector else shape_4d(shape)
    if 0 in shape or not layout.is_consistent(kernel, target.shape, target.layout):
        raise GraphError(
            f"{target.name}: shape {target.shape} cannot hold a {shape} prediction in layout {target.layout.value}"
        )
    return shape
