"""Condensing recorded operations to the GHN's vocabulary.

Two passes over the operations. The first notes what a value is: derived from the input or from parameters alone,
squeezed to one number a channel, a matrix of similarities. The second makes a node of what the vocabulary has a word
for and joins the neighbours of everything else. Nothing here looks at the name of a layer or a model.

Choices where DeepNets-1M (what GHN-2 was trained on) has no direct counterpart:

==============================  =======================================================================
in the model                    in the graph
==============================  =======================================================================
group / instance norm           bn (both normalize the channels of images)
layer / RMS norm                ln
linear, matmul with a parameter conv, 1 x 1
grouped convolution             sep_conv; dil_conv if dilated in both directions
1-D, 3-D, transposed            conv of the closest 2-D kernel
attention of any spelling       msa, where similarities (or a softmax) are applied to values
product with a squeezed gate    cse; the squeeze itself is no node, as in DeepNets-1M's own blocks
mean over all positions         glob_avg, with or without kept dimensions
sum, difference, concatenation  sum, sum, concat; dropped when a single node feeds them
learned table added to tokens   pos_enc, without incoming edges, and a sum
recurrent layer                 conv, bias, conv, bias: input and hidden weights of every layer
==============================  =======================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from timm_ghn.errors import GraphError
from timm_ghn.graph.classifiers import BEHIND_LOGITS, mark_classifiers
from timm_ghn.graph.facts import (
    ADAPTIVE_AVG_POOLS,
    ADDED_PRODUCTS,
    CONVOLUTIONS,
    MULTIPLICATIONS,
    OVER_CONSTANTS,
    PRODUCTS,
    TRANSPOSED_CONVOLUTIONS,
    Facts,
    Origin,
    find_facts,
    flat,
    operands,
)
from timm_ghn.graph.graph import MAX_DISTANCE, Graph
from timm_ghn.graph.kernels import adaptive_window, canonical_kernel, pool_shape, token_grid
from timm_ghn.graph.nodes import Layout, Node, Op, Role, Shape, Target
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

_MAX_POOLS = {"max_pool1d", "max_pool2d", "max_pool3d"}
_AVG_POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
_SUMS = {"add", "sub", "addcmul", "index_add"}
_CONCATENATIONS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
# Position of the weight (the bias follows it), and the operator.
_NORMS = {
    "batch_norm": (3, Op.BN),
    "instance_norm": (3, Op.BN),
    "group_norm": (2, Op.BN),
    "layer_norm": (2, Op.LN),
    "rms_norm": (2, Op.LN),
}


def condense(
    trace: Trace,
    *,
    reading: Reading = Reading.DEFAULT,
    max_distance: int = MAX_DISTANCE,
    facts: Facts | None = None,
) -> Graph:
    """Build the graph of a recorded forward pass.

    Args:
        trace: Recorded operations.
        reading: How squeeze-excite blocks and global poolings are read.
        max_distance: Longest distance of a virtual edge, in hops.
        facts: What `find_facts` says of the operations, where that is known already.

    Raises:
        GraphError: If the output does not depend on the input, or no layer has parameters that a GHN can predict.
    """
    builder = _Builder(trace, facts or find_facts(trace), reading)
    for number, operation in enumerate(trace.operations):
        builder.add(number, operation)
    graph = builder.finish(max_distance)
    if not graph.targets:
        raise GraphError("no layer of this model has parameters that a GHN can predict")
    return graph


class _Builder:
    """Makes nodes and edges in the order of the operations."""

    def __init__(self, trace: Trace, facts: Facts, reading: Reading) -> None:
        self._trace = trace
        self._facts = facts
        self._reading = reading
        self._nodes: list[Node] = [Node(Op.INPUT)]
        self._sources: list[tuple[int, ...]] = [()]
        self._feeds: dict[int, tuple[int, ...]] = dict.fromkeys(trace.inputs, (0,))  # nodes that make a value
        self._taken: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._norms: dict[int, int] = {}  # node by the multiplication that applies the weight of a norm

    # Nodes

    def add(self, number: int, operation: Operation) -> None:
        """Add the nodes of one operation and tell what feeds its outputs."""
        sources = self._sources_of(operands(operation))
        fed = self._nodes_of(number, operation, sources)
        for output in operation.outputs:
            self._feeds[output.index] = fed

    def _nodes_of(self, number: int, operation: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        name = operation.name
        if number in self._facts.mixed:
            return sources
        if name in CONVOLUTIONS or name in TRANSPOSED_CONVOLUTIONS:
            return self._convolution(number, operation)
        if name == "linear":
            return self._linear(number, operation)
        if name in PRODUCTS or name in ADDED_PRODUCTS:
            return self._product(number, operation, sources)
        if name == "multi_head_attention_forward":
            return self._multi_head_attention(operation)
        if name in _RECURRENT:
            return self._recurrent(operation)
        if not sources:
            return ()
        if name in _NORMS:
            return self._norm(operation, sources)
        return self._plain(number, operation, sources)

    def _plain(self, number: int, operation: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        """Operations without parameters of their own."""
        name = operation.name
        if name == "scaled_dot_product_attention" or number in self._facts.attentions:
            self._explain(operation, _LEARNED_TOKEN)
            return (self._node(Node(Op.MSA), sources),)
        if number in self._facts.norms:
            return self._spelled_norm(number, operation, sources)
        if name in _MAX_POOLS or name in _AVG_POOLS:
            op = Op.MAX_POOL if name in _MAX_POOLS else Op.AVG_POOL
            return (self._node(Node(op, pool_shape(operation)), sources),)
        if self._is_global_average(number, operation):
            window = adaptive_window(operation) if self._reading is Reading.DEFAULT else None
            return (self._node(Node(Op.AVG_POOL, window) if window else Node(Op.GLOB_AVG), sources),)
        if name in MULTIPLICATIONS and self._is_gate(number, operation):
            return (self._node(Node(Op.CSE), sources),)
        if name in _CONCATENATIONS:
            self._explain(operation, _LEARNED_TOKEN)
            return self._join(Op.CONCAT, sources)
        if name in _SUMS:
            return self._sum(operation, sources)
        self._explain(operation, _REASONS.get(name, f"used by {name}, which the graph vocabulary has no word for"))
        return sources

    def _node(self, node: Node, sources: Sequence[int]) -> int:
        self._nodes.append(node)
        self._sources.append(tuple(sorted(set(sources))))
        return len(self._nodes) - 1

    def _join(self, op: Op, sources: tuple[int, ...]) -> tuple[int, ...]:
        return (self._node(Node(op), sources),) if len(sources) > 1 else sources

    def _sources_of(self, values: Sequence[Value]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(node for value in values for node in self._feeds.get(value.index, ())))

    # Layers

    def _convolution(self, number: int, operation: Operation) -> tuple[int, ...]:
        inputs, weight, bias = (operation.argument(i, key) for i, key in enumerate(("input", "weight", "bias")))
        transposed = operation.name in TRANSPOSED_CONVOLUTIONS
        groups = operation.argument(6, "groups", 1)
        dilation = operation.argument(7 if transposed else 5, "dilation", 1)
        dilated = min(flat(dilation)) > 1 if flat(dilation) else False
        op = Op.CONV if groups == 1 else Op.DIL_CONV if dilated else Op.SEP_CONV
        spatial = (TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS)[operation.name]
        return self._layer(number, op, inputs, weight, bias, spatial=spatial, transposed=transposed)

    def _linear(self, number: int, operation: Operation) -> tuple[int, ...]:
        inputs, weight, bias = (operation.argument(i, key) for i, key in enumerate(("input", "weight", "bias")))
        return self._layer(number, Op.CONV, inputs, weight, bias)

    def _layer(
        self, number: int, op: Op, inputs: Value, weight: Value, bias: Value | None,
        *, spatial: int = 0, transposed: bool = False,
    ) -> tuple[int, ...]:  # fmt: skip
        sources = self._sources_of([inputs])
        if number in self._facts.mixtures:
            sources = self._sources_of([inputs, weight])
            origins = self._facts.mixtures[number]
        else:
            origins = self._facts.of(weight).origin.values
        origin = self._facts.of(inputs).origin
        if not sources and (not origin.values or origin.obstacle):
            self._explain_values(origins, OVER_CONSTANTS)
            return ()
        swapped = transposed or (not spatial and self._facts.of(weight).origin.transposed)
        self._explain_values(self._facts.of(inputs).origin.values, _LEARNED_TOKEN)
        target = self._weight_target(origins, weight, spatial, swapped)
        if target is None:
            fed = sources
        else:
            shape, found = target
            fed = (self._node(Node(op, shape, self._claim(found)), sources),)
            self._explain_values(origins, _DERIVED)
        return self._bias(bias, fed) if isinstance(bias, Value) else fed

    def _product(self, number: int, operation: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        if number in self._facts.attentions:
            self._explain(operation, _LEARNED_TOKEN)
            return (self._node(Node(Op.MSA), sources),)
        operands = [value for value in operation.inputs if len(value.shape) >= 2][-2:]
        known = [self._facts.of(value) for value in operands]
        if len(operands) < 2 or all(fact.data for fact in known) or not any(fact.origin.values for fact in known):
            return sources
        if not any(fact.data for fact in known):
            return ()  # a weight that is derived from others, or learned queries
        second = known[0].data
        weight, inputs = (operands[1], operands[0]) if second else (operands[0], operands[1])
        origin = self._facts.of(weight).origin
        # x @ w reads w as (C, K), w @ x as (K, C).
        target = self._weight_target(origin.values, weight, 0, second != origin.transposed)
        fed = sources
        if target is not None:
            fed = (self._node(Node(Op.CONV, target[0], self._claim(target[1])), self._sources_of([inputs])),)
        if operation.name in ADDED_PRODUCTS:
            bias = operation.argument(0, "input")
            return self._bias(bias, fed) if isinstance(bias, Value) else fed
        return fed

    def _weight_target(
        self, origins: Sequence[int], operand: Value, spatial: int, swapped: bool
    ) -> tuple[Shape, tuple[Target, ...]] | None:
        """Shape that the GHN reads and the parameters that it predicts, for the operand of a layer."""
        shapes = [(index, self._shape(index)) for index in origins]
        kernels = [(index, shape) for index, shape in shapes if len([size for size in shape if size > 1]) > 1]
        kernels = kernels or [(index, shape) for index, shape in shapes if len(shape) > 1]
        if not kernels:
            return None
        largest = max(math.prod(shape) for _, shape in kernels)
        targets: list[Target] = []
        canonical: Shape | None = None
        for index, shape in kernels:
            if math.prod(shape) < largest:
                continue
            canonical, layout = canonical_kernel(shape, operand.shape, spatial, swapped)
            targets.append(Target(self._name(index), shape, Role.WEIGHT, layout))
        return (canonical, tuple(targets)) if canonical is not None else None

    def _bias(self, bias: Value, fed: tuple[int, ...]) -> tuple[int, ...]:
        names = [index for index in self._facts.of(bias).origin.values if len(self._shape(index)) >= 1]
        vectors = [index for index in names if math.prod(self._shape(index)) == max(self._shape(index))]
        if not vectors or self._facts.of(bias).data:
            return fed
        size = max(bias.shape) if bias.shape else 1
        targets = tuple(Target(self._name(index), self._shape(index), Role.BIAS) for index in vectors)
        return (self._node(Node(Op.BIAS, (size,), self._claim(targets)), fed),)

    def _norm(self, operation: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        position, op = _NORMS[operation.name]
        operands = (operation.argument(position, "weight"), operation.argument(position + 1, "bias"))
        targets = []
        for value, role in zip(operands, (Role.NORM_WEIGHT, Role.NORM_BIAS), strict=True):
            if isinstance(value, Value):
                for index in self._facts.of(value).origin.values:
                    if math.prod(self._shape(index)) == math.prod(value.shape):
                        targets.append(Target(self._name(index), self._shape(index), role))
        if not targets:
            return sources
        size = max(math.prod(target.shape) for target in targets)
        return (self._node(Node(op, (size,), self._claim(tuple(targets))), self._sources_of([operation.inputs[0]])),)

    def _spelled_norm(self, number: int, operation: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        """A norm that the model computes itself, at the multiplication by its weight."""
        origins = [index for value in operation.inputs for index in self._facts.of(value).origin.values]
        targets = tuple(Target(self._name(index), self._shape(index), Role.NORM_WEIGHT) for index in origins)
        size = math.prod(targets[0].shape)
        self._norms[number] = self._node(Node(self._facts.norms[number], (size,), self._claim(targets)), sources)
        return (self._norms[number],)

    def _spelled_norm_bias(self, node: int, bias: Value, sources: tuple[int, ...]) -> tuple[int, ...]:
        origins = self._facts.of(bias).origin.values
        targets = self._claim(tuple(Target(self._name(i), self._shape(i), Role.NORM_BIAS) for i in origins))
        self._nodes[node] = replace(self._nodes[node], targets=(*self._nodes[node].targets, *targets))
        return sources

    def _multi_head_attention(self, operation: Operation) -> tuple[int, ...]:
        query, key, value = (operation.argument(i, name) for i, name in enumerate(("query", "key", "value")))
        weights = [operation.argument(5, "in_proj_weight")] + [
            operation.kwargs.get(f"{letter}_proj_weight") for letter in "qkv"
        ]
        sources = self._sources_of([query, key, value])
        fed = self._chain(weights, operation.argument(6, "in_proj_bias"), sources)
        fed = (self._node(Node(Op.MSA), fed),)
        out_weight, out_bias = operation.argument(11, "out_proj_weight"), operation.argument(12, "out_proj_bias")
        return self._chain([out_weight], out_bias, fed)

    def _recurrent(self, operation: Operation) -> tuple[int, ...]:
        weights = [item for item in flat(operation.args) if isinstance(item, Value)]
        fed = self._sources_of(weights[:1])
        for value in weights[1:]:
            if self._facts.of(value).origin.values:
                fed = self._chain([value], None, fed) if len(value.shape) > 1 else self._bias(value, fed)
        return fed

    def _chain(self, weights: Sequence[Value | None], bias: Value | None, fed: tuple[int, ...]) -> tuple[int, ...]:
        """Linear layers that read the same input, side by side, and their common bias."""
        nodes: list[int] = []
        for weight in weights:
            target = isinstance(weight, Value) and self._weight_target(
                self._facts.of(weight).origin.values, weight, 0, False
            )
            if target:
                nodes.append(self._node(Node(Op.CONV, target[0], self._claim(target[1])), fed))
        made = tuple(nodes) or fed
        return self._bias(bias, made) if isinstance(bias, Value) else made

    def _sum(self, operation: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        data = [value for value in operation.inputs if self._facts.of(value).data]
        learned = [value for value in operation.inputs if self._facts.of(value).origin.values]
        if len(data) == 1 and len(learned) == 1 and operation.name in ("add", "index_add"):
            return self._add_learned(data[0], learned[0], sources)
        self._explain(operation, "added to an activation in a way that the graph vocabulary has no word for")
        return self._join(Op.SUM, sources)

    def _add_learned(self, data: Value, learned: Value, sources: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter added to an activation: the bias of the layer before, a table of positions, or neither."""
        extents = [size for size in learned.shape if size > 1]
        fact, origin = self._facts.of(data), self._facts.of(learned).origin
        if len(extents) <= 1:
            if fact.affine:
                return self._bias(learned, sources)
            if fact.scaled is not None and math.prod(learned.shape) == fact.channels:
                return self._spelled_norm_bias(self._norms[fact.scaled], learned, sources)
            self._explain_values(origin.values, "a vector added outside of a norm or a layer with weights")
            return sources
        table = self._table_target(origin, data, learned)
        if table is None or fact.similarity is not None or fact.squeezes:
            self._explain_values(origin.values, origin.obstacle or _TABLE)
            return sources
        shape, target = table
        position = self._node(Node(Op.POS_ENC, shape, self._claim((target,))), ())
        return (self._node(Node(Op.SUM), (*sources, position)),)

    def _table_target(self, origin: Origin, data: Value, learned: Value) -> tuple[Shape, Target] | None:
        """Shape (1, C, h, w) and parameter of a table of positions; None if it is not one."""
        tables = [index for index in origin.values if len([s for s in self._shape(index) if s > 1]) > 1]
        if origin.obstacle or len(tables) != 1:
            return None
        shape = self._shape(tables[0])
        if len(shape) == 4 and shape[0] == 1:
            channels = data.shape[-1] if len(data.shape) == 3 else self._facts.of(data).channels
            last = shape[-1] == channels != shape[1]
            canonical = (1, shape[3], shape[1], shape[2]) if last else shape
            layout = Layout.CHANNELS_LAST if last else Layout.PLAIN
            return canonical, Target(self._name(tables[0]), shape, Role.POS_ENC, layout)
        if len(shape) in (2, 3) and (len(shape) == 2 or shape[0] == 1) and shape[-1] == data.shape[-1]:
            height, width = token_grid(shape[-2], self._facts.of(data).grid)
            canonical = (1, shape[-1], height, width)
            return canonical, Target(self._name(tables[0]), shape, Role.POS_ENC, Layout.TOKENS)
        return None

    # Decisions

    def _is_global_average(self, number: int, operation: Operation) -> bool:
        name = operation.name
        if name in ADAPTIVE_AVG_POOLS:
            return self._reading is Reading.PPUDA or number not in self._facts.squeezes
        if name != "mean":
            return False
        if self._reading is Reading.PPUDA:
            return bool(operation.argument(2, "keepdim", False))
        made = self._facts.of(operation.outputs[0]).squeezes
        return number in made and number not in self._facts.squeezes

    def _is_gate(self, number: int, operation: Operation) -> bool:
        if self._reading is Reading.PPUDA:
            return any(self._facts.of(value).hard_gate == 1 for value in operation.inputs)
        return number in self._facts.gates

    # Parameters

    def _name(self, index: int) -> str:
        return self._trace.parameters[index][0]

    def _shape(self, index: int) -> Shape:
        return self._trace.parameter_shapes[self._name(index)]

    def _claim(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Those of the targets that no earlier node predicts."""
        free = tuple(target for target in targets if target.name not in self._taken)
        self._taken.update(target.name for target in free)
        return free

    def _explain(self, operation: Operation, reason: str) -> None:
        for value in operation.inputs:
            fact = self._facts.of(value)
            if not fact.data and any(self._facts.of(output).data for output in operation.outputs):
                self._explain_values(fact.origin.values, fact.origin.obstacle or reason)

    def _explain_values(self, values: Sequence[int], reason: str) -> None:
        for index in values:
            self._reasons.setdefault(self._name(index), reason)

    # Result

    def finish(self, max_distance: int) -> Graph:
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
        behind = BEHIND_LOGITS if self._reading is Reading.DEFAULT else BEHIND_LOGITS - {Op.GLOB_AVG}
        nodes = mark_classifiers([self._nodes[node] for node in kept], edges, self._class_counts(outputs), behind)
        predicted = {target.name for node in nodes for target in node.targets}
        return Graph(tuple(nodes), tuple(edges), max_distance, self._unused(predicted))

    def _ancestors(self, ends: set[int]) -> set[int]:
        found, pending = set(ends), list(ends)
        while pending:
            for source in self._sources[pending.pop()]:
                if source not in found:
                    found.add(source)
                    pending.append(source)
        return found

    def _class_counts(self, outputs: Sequence[int]) -> set[int]:
        shapes = {v.index: v.shape for operation in self._trace.operations for v in operation.outputs}
        return {shapes[index][-1] for index in outputs if len(shapes.get(index, ())) == 2}

    def _unused(self, predicted: set[str]) -> tuple[tuple[str, str], ...]:
        tied = {name: names[0] for names in self._trace.parameters.values() for name in names[1:]}
        read = {value.index for operation in self._trace.operations for value in operation.inputs}
        called = {name for index in read for name in self._trace.parameters.get(index, ())}
        rows = []
        for name in self._trace.parameter_shapes:
            if name in predicted:
                continue
            default = "not on a path from the input to the output" if name in called else _UNCALLED
            reason = self._reasons.get(name, default)
            rows.append((name, f"{TIED}{tied[name]}" if name in tied else reason))
        return tuple(rows)


_LEARNED_TOKEN = "a learned token or query"
_UNCALLED = "not read by the forward pass in evaluation mode"
_TABLE = "a table added to activations that is not one of positions, or one of several that make it up"
_DERIVED = "scales a weight of which it is a small part"
_SCALE = "multiplied elementwise (layer scale, gain or gate)"
_REASONS = {"mul": _SCALE, "div": _SCALE, "addcmul": _SCALE}
