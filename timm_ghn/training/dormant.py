"""Hidden units of a decoder that no node activates any more: they learn nothing, and begin anew.

A unit behind a ReLU that is 0 for every node has no gradient. In a run of 9,000 updates the decoder of vectors (of
norms and biases) lost half of its units in this way. For one node in six all units were 0, in networks with layer norms
for more than half of the nodes: all of these got one and the same vector, and could not learn another. Dormant units
that begin anew (Sokar et al. 2023, arXiv 2302.12902) change next to nothing at first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from timm_ghn.ghn.model import GHN
from timm_ghn.graph.graph import Graph
from timm_ghn.training.optimizer import Muon

_RARE = 0.02
"""Share of the nodes; a unit that no more of them activate is dormant."""


@torch.no_grad()
def revive(ghn: GHN, average: GHN, optimizer: Muon, graphs: Sequence[Graph], seed: int) -> int:
    """Let the dormant hidden units of the decoder of vectors begin anew, each active for half of the nodes.

    Their outputs begin at zero, so that predictions stay nearly the same.

    Args:
        ghn: GHN in training; changed in place.
        average: Its running average; its units become the same.
        optimizer: Its moments of these units are forgotten.
        graphs: Graphs whose nodes tell which units are dormant.
        seed: Seed of the new units.

    Returns:
        How many units began anew.
    """
    first, last = ghn.decoder_1d.linear(0), ghn.decoder_1d.linear(1)
    emits = torch.tensor([bool(node.targets) for graph in graphs for node in graph.nodes])
    features = ghn.embed_nodes(graphs)[emits]
    sums = first(features)
    active = (sums > 0).float().mean(0)
    dormant = (active <= _RARE).nonzero()[:, 0]
    if not len(dormant):
        return 0
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(dormant), features.shape[1], generator=generator).to(features)
    weight *= sums.std() / (features @ weight.T).std(0)[:, None]
    for trained in (ghn, average):
        inner, outer = trained.decoder_1d.linear(0), trained.decoder_1d.linear(1)
        inner.weight[dormant] = weight
        inner.bias[dormant] = -(features @ weight.T).median(0).values
        outer.weight[:, dormant] = 0
    for parameter, part in ((first.weight, dormant), (first.bias, dormant), (last.weight, (slice(None), dormant))):
        for value in optimizer.state[parameter].values():
            if value.ndim:  # not the number of steps
                value[part] = 0
    return len(dormant)
