"""Orthogonalized updates."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_ghn.ghn import GHN, GHNConfig
from timm_ghn.ghn.layout import Tiles
from timm_ghn.training.optimizer import make_optimizer, orthogonal_update


@given(st.integers(1, 40), st.integers(1, 40), st.floats(-8, 8), st.integers(0, 99))
def test_updates_have_even_singular_values_whatever_the_scale(rows: int, columns: int, scale: float, seed: int) -> None:
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**scale
    update = orthogonal_update(gradient)
    found = torch.linalg.svdvals(update) / (0.6 * math.sqrt(max(rows, columns)))
    before = torch.linalg.svdvals(gradient)
    large = before > 0.02 * before.square().sum().sqrt()
    assert (found[large] > 0.6).all()
    assert (found < 1.3).all()
    # The singular vectors stay: the update is a polynomial of the gradient.
    assert (update * gradient).sum() > 0
    cross = gradient @ update.T
    assert torch.allclose(cross, cross.T, atol=1e-3 * float(cross.abs().max()))


def test_matrices_get_orthogonal_updates_and_all_others_adamw() -> None:
    torch.manual_seed(0)
    config = GHNConfig(max_shape=(8, 8, 3, 3), num_classes=4, hid=8)
    ours, plain = GHN(config), GHN(config)
    plain.load_state_dict(ours.state_dict())
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for first, second in zip(ours.parameters(), plain.parameters(), strict=True):
        first.grad = torch.randn_like(first)
        second.grad = first.grad.clone()
    make_optimizer(ours, lr=0.01, weight_decay=0.1).step()
    torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1).step()
    changed = {name for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True) if not p.equal(q)}
    assert {"decoder.fc.0.weight", "decoder.conv.2.weight", "gnn.gru.weight_hh", "decoder_1d.fc.0.weight"} <= changed
    assert not {"embed.weight", "shape_enc.embed_channel.weight", "bias_class.1.weight", "ln.weight"} & changed
    name = "decoder.conv.2.weight"
    matrix = (ours.get_parameter(name).detach() - 0.999 * before[name]).flatten(1) / -0.01
    assert torch.linalg.svdvals(matrix).max() < 1.3 * 0.6 * math.sqrt(max(matrix.shape))


def test_a_loss_falls() -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(8, 8, 3, 3), num_classes=4, hid=8))
    optimizer = make_optimizer(ghn, lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (ghn.decoder(torch.eye(8), Tiles(range(1), range(1), (8, 8, 3, 3))) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
