"""Condensing recorded operations to the GHN's vocabulary.

The analyses (`timm_ghn.graph.analyses`) come first: which values depend on the input, which are squeezed to one number
a channel, which are attention. Then one pass over the operations makes a node of each that the vocabulary has a word
for, and joins the neighbours of all others. Nothing here looks at the name of a layer or a model.

The choices where DeepNets-1M (what GHN-2 was trained on) has no direct counterpart are listed in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import replace
from enum import Enum

from timm_ghn.errors import GraphError
from timm_ghn.graph.analyses import Analyses, analyse
from timm_ghn.graph.extents import UNKNOWN
from timm_ghn.graph.graph import Graph
from timm_ghn.graph.nodes import Node, Op, Role, Target
from timm_ghn.graph.origins import OVER_CONSTANTS
from timm_ghn.graph.targets import (
    Found,
    adaptive_window,
    bias_targets,
    norm_targets,
    pool_shape,
    table_target,
    weight_targets,
)
from timm_ghn.trace.operations import LAYERS, Kind, factors, flat, is_matrix, kind_of, operands, row_of, weight_and_bias
from timm_ghn.trace.records import Operation, Trace, Value


class Reading(str, Enum):
    """Which of two readings of a network is built.

    They differ in three rules, all of them accidents of ppuda's autograd walk. `PPUDA` calls a product cse only where
    it follows a hard sigmoid or hard swish by exactly one other operation, calls a mean glob_avg only if it keeps its
    dimensions, and takes a convolution whose maps are averaged to logits for no classifier. `DEFAULT` gives
    squeeze-excite blocks, global poolings and classifiers the nodes and decoders that they had in the networks that
    GHN-2 was trained on, however they are spelled.
    """

    DEFAULT = "default"
    PPUDA = "ppuda"


TIED = "tied to "
"""What the reason for a parameter that shares its values with a predicted one begins with; the other's name follows."""

_LEARNED_TOKEN = "a learned token or query"
_UNUSED = "not on a path from the input to the output"
_UNCALLED = "not read by the forward pass in evaluation mode"
_TABLE = "a table added to activations that is not one of positions, or one of several that make it up"
_DERIVED = "scales a weight of which it is a small part"
_SPREAD = "a vector that is spread to a matrix, as a scale on its diagonal"
_SCALE = "multiplied elementwise (layer scale, gain or gate)"
_ADDED = "added to an activation in a way that the graph vocabulary has no word for"
_ADDED_VECTOR = "a vector added outside of a norm or a layer with weights"
_POOLS = {Kind.MAX_POOL: Op.MAX_POOL, Kind.AVG_POOL: Op.AVG_POOL}
_BEHIND_LOGITS = frozenset({Op.BIAS, Op.SUM, Op.CONCAT, Op.GLOB_AVG})
"""What may be computed from logits before they are returned."""


def condense(
    trace: Trace,
    *,
    reading: Reading = Reading.DEFAULT,
    analyses: Analyses | None = None,
) -> Graph:
    """Build the graph of a recorded forward pass.

    Args:
        trace: Recorded operations.
        reading: How squeeze-excite blocks and global poolings are read.
        analyses: Those of the trace, where they exist already.

    Raises:
        GraphError: If the output does not depend on the input, or no layer has parameters that a GHN can predict.
    """
    builder = _Builder(analyses or analyse(trace), reading)
    for operation in trace.operations:
        builder.add(operation)
    graph = builder.finish()
    if not graph.targets:
        raise GraphError("no layer of this model has parameters that a GHN can predict")
    return graph


_Nodes = tuple[int, ...]
"""Numbers of the nodes that feed a value."""


class _Builder:
    """Makes nodes and edges in the order of the operations."""

    def __init__(self, analyses: Analyses, reading: Reading) -> None:
        self._trace = analyses.trace
        self._known = analyses
        self._origins = analyses.origins
        self._reading = reading
        self._nodes: list[Node] = [Node(Op.INPUT)]
        self._sources: list[_Nodes] = [()]
        self._feeds: dict[int, _Nodes] = dict.fromkeys(self._trace.inputs, (0,))  # by number of the value
        self._taken: set[str] = set()
        self._reasons: dict[int, str] = {}  # why a parameter is not predicted, by number of its value
        self._norms: dict[int, int] = {}  # nodes of spelled-out norms, by number of the value with their weight

    # Nodes

    def add(self, operation: Operation) -> None:
        """Add the nodes of one operation and note what feeds its outputs."""
        sources = self._sources_of(*operands(operation))
        fed = self._nodes_of(operation, sources)
        for output in operation.outputs:
            self._feeds[output.index] = fed

    def _nodes_of(self, operation: Operation, sources: _Nodes) -> _Nodes:
        kind = kind_of(operation)
        if operation.outputs[0].index in self._known.mixtures.mixed:
            return sources
        if kind in LAYERS:
            return self._layer(operation)
        if kind is Kind.MULTI_HEAD_ATTENTION:
            return self._multi_head_attention(operation)
        if kind is Kind.RECURRENT:
            return self._recurrent(operation)
        if not sources:
            return ()
        if kind is Kind.ATTENTION or operation.outputs[0].index in self._known.attention:
            self._explain(operation, _LEARNED_TOKEN)
            return self._node(Node(Op.MSA), sources)
        if kind is Kind.PRODUCT:
            return self._product(operation, sources)
        if kind is Kind.NORM:
            return self._norm(operation, sources)
        return self._plain(kind, operation, sources)

    def _plain(self, kind: Kind, operation: Operation, sources: _Nodes) -> _Nodes:
        """Operations without parameters of their own."""
        output = operation.outputs[0].index
        norm = self._known.norms.get(output)
        if norm is not None and norm.weighted == output:
            return self._spelled_norm(operation, norm.op, sources)
        if kind in _POOLS:
            return self._node(Node(_POOLS[kind], pool_shape(operation)), sources)
        if self._is_global_average(kind, operation):
            window = adaptive_window(operation) if self._reading is Reading.DEFAULT else None
            return self._node(Node(Op.AVG_POOL, window) if window else Node(Op.GLOB_AVG), sources)
        if output in (self._known.gates.products if self._reading is Reading.DEFAULT else self._known.hard_gates):
            return self._node(Node(Op.CSE), sources)
        if kind is Kind.CONCATENATION:
            self._explain(operation, _LEARNED_TOKEN)
            return self._join(Op.CONCAT, sources)
        if kind in (Kind.SUM, Kind.SCALED_SUM, Kind.OTHER_SUM):
            return self._sum(operation, sources)
        is_scale = kind in (Kind.MULTIPLICATION, Kind.DIVISION)
        no_word = f"used by {operation.name}, which the graph vocabulary has no word for"
        self._explain(operation, _SCALE if is_scale else no_word)
        return sources

    def _node(self, node: Node, sources: _Nodes) -> _Nodes:
        self._nodes.append(node)
        self._sources.append(tuple(sorted(set(sources))))
        return (len(self._nodes) - 1,)

    def _join(self, op: Op, sources: _Nodes) -> _Nodes:
        return self._node(Node(op), sources) if len(sources) > 1 else sources

    def _sources_of(self, *values: Value) -> _Nodes:
        return tuple(dict.fromkeys(node for value in values for node in self._feeds.get(value.index, ())))

    # Layers

    def _layer(self, operation: Operation) -> _Nodes:
        """A convolution or linear layer."""
        row, inputs = row_of(operation), operation.argument(0, "input")
        weight, bias = weight_and_bias(operation)
        if weight is None:
            return self._sources_of(inputs)
        origin, experts = self._origins.of(weight), self._known.mixtures.experts.get(weight.index)
        sources = self._sources_of(inputs) if experts is None else self._sources_of(inputs, weight)
        values = origin.values if experts is None else experts
        over = self._origins.of(inputs)
        if not sources and (not over.values or over.obstacle):
            self._note(values, OVER_CONSTANTS)
            return ()
        self._note(over.values, _LEARNED_TOKEN)
        if origin.is_spread:
            self._note(values, _SPREAD)
            return self._bias(bias, sources)
        is_swapped = row.is_transposed or (not row.rank and origin.is_transposed)
        found = weight_targets(self._trace, values, weight, rank=row.rank, is_swapped=is_swapped)
        fed = self._weight(found, sources, _convolution(operation) if row.rank else Op.CONV)
        if found is not None:
            self._note(values, _DERIVED)
        return self._bias(bias, fed)

    def _product(self, operation: Operation, sources: _Nodes) -> _Nodes:
        """A matrix product that is no attention: a layer if one of two factors is made from parameters."""
        pair = factors(operation)
        data = [self._origins.is_data(value) for value in pair]
        if len(pair) < 2 or all(data) or not any(self._origins.of(value).values for value in pair):
            return sources
        inputs, weight = pair if data[0] else pair[::-1]
        origin = self._origins.of(weight)
        if origin.is_spread:
            self._note(origin.values, _SPREAD)
            return self._sources_of(inputs)
        # x @ w reads w as (C, K), w @ x as (K, C).
        found = weight_targets(self._trace, origin.values, weight, is_swapped=data[0] != origin.is_transposed)
        fed = self._weight(found, self._sources_of(inputs)) if found is not None else sources
        return self._bias(operation.argument(0, "input"), fed) if row_of(operation).is_added_to else fed

    def _weight(self, found: Found | None, sources: _Nodes, op: Op = Op.CONV) -> _Nodes:
        return sources if found is None else self._node(Node(op, found[0], self._claim(found[1])), sources)

    def _bias(self, bias: object, fed: _Nodes) -> _Nodes:
        if not isinstance(bias, Value):
            return fed
        found = bias_targets(self._trace, self._origins.of(bias).values, bias)
        return self._weight(found, fed, Op.BIAS)

    def _norm(self, operation: Operation, sources: _Nodes) -> _Nodes:
        targets: tuple[Target, ...] = ()
        for value, role in zip(weight_and_bias(operation), (Role.NORM_WEIGHT, Role.NORM_BIAS), strict=True):
            if value is not None:
                values = self._origins.of(value).values
                targets += norm_targets(self._trace, values, role, math.prod(value.shape))
        if not targets:
            return sources
        size = max(math.prod(target.shape) for target in targets)
        op = Op.LN if row_of(operation).is_per_position else Op.BN
        return self._node(Node(op, (size,), self._claim(targets)), self._sources_of(operation.inputs[0]))

    def _spelled_norm(self, operation: Operation, op: Op, sources: _Nodes) -> _Nodes:
        """A norm that the model computes itself, at the multiplication by its weight."""
        values = [index for value in operation.inputs for index in self._origins.of(value).values]
        targets = norm_targets(self._trace, values, Role.NORM_WEIGHT)
        fed = self._node(Node(op, (math.prod(targets[0].shape),), self._claim(targets)), sources)
        self._norms[operation.outputs[0].index] = fed[0]
        return fed

    def _multi_head_attention(self, operation: Operation) -> _Nodes:
        query, key, value = (operation.argument(i, name) for i, name in enumerate(("query", "key", "value")))
        weights = [operation.argument(5, "in_proj_weight")] + [
            operation.kwargs.get(f"{letter}_proj_weight") for letter in "qkv"
        ]
        fed = self._side_by_side(weights, operation.argument(6, "in_proj_bias"), self._sources_of(query, key, value))
        fed = self._node(Node(Op.MSA), fed)
        out_weight, out_bias = operation.argument(11, "out_proj_weight"), operation.argument(12, "out_proj_bias")
        return self._side_by_side([out_weight], out_bias, fed)

    def _recurrent(self, operation: Operation) -> _Nodes:
        values = [item for item in flat(operation.args) if isinstance(item, Value)]
        fed = self._sources_of(*values[:1])
        for value in values[1:]:
            if self._origins.of(value).values:
                fed = self._side_by_side([value], None, fed) if len(value.shape) > 1 else self._bias(value, fed)
        return fed

    def _side_by_side(self, weights: Sequence[Value | None], bias: Value | None, fed: _Nodes) -> _Nodes:
        """Linear layers that read the same input, and their common bias."""
        values = [weight for weight in weights if isinstance(weight, Value)]
        found = [weight_targets(self._trace, self._origins.of(value).values, value) for value in values]
        made = tuple(node for item in found if item is not None for node in self._weight(item, fed))
        return self._bias(bias, made or fed)

    # Sums

    def _sum(self, operation: Operation, sources: _Nodes) -> _Nodes:
        data = [value for value in operation.inputs if self._origins.is_data(value)]
        learned = [value for value in operation.inputs if self._origins.of(value).values]
        if len(data) == 1 and len(learned) == 1 and operation.name in ("add", "index_add"):
            return self._add_learned(data[0], learned[0], sources)
        self._explain(operation, _ADDED)
        return self._join(Op.SUM, sources)

    def _add_learned(self, data: Value, learned: Value, sources: _Nodes) -> _Nodes:
        """A parameter added to an activation: the bias of the layer before, a table of positions, or neither."""
        origin, extent = self._origins.of(learned), self._known.extents.get(data.index, UNKNOWN)
        if not is_matrix(learned.shape):
            if data.index in self._known.unbiased:
                return self._bias(learned, sources)
            norm = self._known.norms.get(data.index)
            node = None if norm is None or norm.weighted is None else self._norms[norm.weighted]
            if node is not None and math.prod(learned.shape) == extent.channels:
                targets = self._claim(norm_targets(self._trace, origin.values, Role.NORM_BIAS))
                self._nodes[node] = replace(self._nodes[node], targets=(*self._nodes[node].targets, *targets))
                return sources
            self._note(origin.values, _ADDED_VECTOR)
            return sources
        match = self._known.matches.get(data.index)
        is_similarity = match is not None and match.similarity is not None
        found = (
            None
            if origin.obstacle or is_similarity or data.index in self._known.squeezes
            else table_target(self._trace, origin.values, data, extent.channels, extent.grid)
        )
        if found is None:
            self._note(origin.values, origin.obstacle or _TABLE)
            return sources
        return self._node(Node(Op.SUM), (*sources, *self._weight(found, (), Op.POS_ENC)))

    # Decisions

    def _is_global_average(self, kind: Kind, operation: Operation) -> bool:
        output = operation.outputs[0].index
        if kind is Kind.ADAPTIVE_AVG_POOL:
            return self._reading is Reading.PPUDA or output not in self._known.gates.squeezes
        if kind is not Kind.MEAN:
            return False
        if self._reading is Reading.PPUDA:
            return bool(operation.argument(2, "keepdim", False))
        return output in self._known.squeezes.get(output, ()) and output not in self._known.gates.squeezes

    # Parameters

    def _claim(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Those of the targets that no earlier node predicts."""
        free = tuple(target for target in targets if target.name not in self._taken)
        self._taken.update(target.name for target in free)
        return free

    def _explain(self, operation: Operation, reason: str) -> None:
        """Note why the parameters that enter an operation on activations are not predicted."""
        if any(self._origins.is_data(output) for output in operation.outputs):
            for value in operation.inputs:
                origin = self._origins.of(value)
                self._note(origin.values, origin.obstacle or reason)

    def _note(self, values: Sequence[int], reason: str) -> None:
        for index in values:
            self._reasons.setdefault(index, reason)

    # Result

    def finish(self) -> Graph:
        """The graph of all nodes that lead to an output.

        Raises:
            GraphError: If the output does not depend on the input.
        """
        outputs = self._trace.outputs[:1] if self._reading is Reading.PPUDA else self._trace.outputs
        ends = {node for index in outputs for node in self._feeds.get(index, ())}
        if not ends:
            raise GraphError("the output of this model does not depend on its input")
        kept = sorted(self._ancestors(ends) | {0})
        number = {node: position for position, node in enumerate(kept)}
        edges = sorted((number[source], number[node]) for node in kept for source in self._sources[node])
        behind = _BEHIND_LOGITS if self._reading is Reading.DEFAULT else _BEHIND_LOGITS - {Op.GLOB_AVG}
        nodes = _mark_classifiers([self._nodes[node] for node in kept], edges, self._class_counts(outputs), behind)
        predicted = {target.name for node in nodes for target in node.targets}
        return Graph(tuple(nodes), tuple(edges), unused=self._unused(predicted))

    def _ancestors(self, ends: set[int]) -> set[int]:
        found, pending = set(ends), list(ends)
        while pending:
            new = set(self._sources[pending.pop()]) - found
            found |= new
            pending.extend(new)
        return found

    def _class_counts(self, outputs: Sequence[int]) -> set[int]:
        shapes = {v.index: v.shape for operation in self._trace.operations for v in operation.outputs}
        return {shapes[index][-1] for index in outputs if len(shapes.get(index, ())) == 2}

    def _unused(self, predicted: set[str]) -> tuple[tuple[str, str], ...]:
        """Names of the parameters that no node predicts, each with the reason."""
        names = self._trace.parameters
        read = {value.index for operation in self._trace.operations for value in operation.inputs}
        reasons = dict.fromkeys(self._trace.parameter_shapes, _UNCALLED)
        for index, (first, *tied) in names.items():
            default = _UNUSED if index in read else _UNCALLED
            reasons[first] = self._reasons.get(index, default)
            reasons.update(dict.fromkeys(tied, f"{TIED}{first}"))
        return tuple((name, reason) for name, reason in reasons.items() if name not in predicted)


def _convolution(operation: Operation) -> Op:
    """The operator of a convolution, by its groups and its dilation in both directions."""
    if operation.argument(6, "groups", 1) == 1:
        return Op.CONV
    dilation = flat(operation.argument(7 if row_of(operation).is_transposed else 5, "dilation", 1))
    return Op.DIL_CONV if min(dilation, default=1) > 1 else Op.SEP_CONV


def _mark_classifiers(
    nodes: Sequence[Node], edges: Sequence[tuple[int, int]], counts: set[int], behind: Set[Op]
) -> list[Node]:
    """Give classifier roles to the linear layers that make the logits.

    These are weights with one row a class behind which there are only biases, and sums, concatenations and means of
    logits alone.
    """
    successors: list[list[int]] = [[] for _ in nodes]
    predecessors: list[list[int]] = [[] for _ in nodes]
    for source, target in edges:
        successors[source].append(target)
        predecessors[target].append(source)
    heads: list[bool] = []  # what is made of such weights alone, unlike the sum behind a residual branch
    for node, sources in zip(nodes, predecessors, strict=True):
        if node.op is Op.CONV and node.shape and math.prod(node.shape) == math.prod(node.shape[:2]):
            heads.append(node.shape[0] in counts)
        else:
            heads.append(node.op in behind and bool(sources) and all(heads[source] for source in sources))
    marked = list(nodes)
    last = [True] * len(nodes)
    for index in reversed(range(len(nodes))):
        last[index] = all(last[n] and heads[n] and nodes[n].op is not Op.CONV for n in successors[index])
        if last[index] and heads[index] and nodes[index].op is Op.CONV:
            marked[index] = _with_role(nodes[index], Role.CLASS_WEIGHT)
            for follower in successors[index]:
                if nodes[follower].op is Op.BIAS:
                    marked[follower] = _with_role(nodes[follower], Role.CLASS_BIAS)
    return marked


def _with_role(node: Node, role: Role) -> Node:
    return replace(node, targets=tuple(replace(target, role=role) for target in node.targets))
