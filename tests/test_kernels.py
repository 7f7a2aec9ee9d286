"""What a GHN does to the kernels that it emits: `GHNConfig.kernels`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_orthogonalization import exact_factor
from torch import nn

import timm_ghn
from timm_ghn.errors import CheckpointError
from timm_ghn.ghn import GHN, GHNConfig, content_hash, read
from timm_ghn.ghn.checkpoint import write_safetensors
from timm_ghn.ghn.decoder import ConvDecoder, make_orthogonal
from timm_ghn.ghn.layout import Tiles, join, signs, tilings
from timm_ghn.graph import to_graph
from timm_ghn.orthogonalization.kronecker import orthogonalize_kronecker_
from timm_ghn.training.architectures import Bounds, Network, draw_architecture

SHAPES = [(2, 24, 3, 3, 3), (3, 64, 64, 1, 1), (1, 48, 1, 7, 7), (2, 16, 64, 1, 1), (2, 1, 8, 1, 1)]


@pytest.fixture(scope="module")
def member() -> Network:
    ghn = GHN(GHNConfig(max_shape=(8, 8, 3, 3), num_classes=200, hid=4))
    return Network(draw_architecture("test", 0, {"convnext": 1.0}, Bounds(max_macs=3e6)), ghn)


def _low_rank(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Blocks dominated by two directions."""
    count, rows, columns = shape[0], shape[1], math.prod(shape[2:])
    strong = torch.randn(count, rows, 2, generator=generator) @ torch.randn(count, 2, columns, generator=generator)
    return (strong + 0.2 * torch.randn(count, rows, columns, generator=generator)).view(shape)


def test_orthogonal_blocks_have_even_singular_values_and_unit_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [_low_rank(shape, generator) for shape in SHAPES]
    for before, after in zip(blocks, make_orthogonal(blocks), strict=True):
        assert after.shape == before.shape
        torch.testing.assert_close(after.square().flatten(1).mean(1), torch.ones(len(after)), rtol=1e-4, atol=1e-4)
        values = torch.linalg.svdvals(after.flatten(2))
        values_before = torch.linalg.svdvals(before.flatten(2))
        half = values.shape[1] // 2
        assert bool((values[:, 0] / values[:, half] < 2).all())
        if half > 1:
            assert bool((values_before[:, 0] / values_before[:, half] > 3).all())


def test_orthogonal_keeps_the_directions() -> None:
    """The polar factor of a matrix is U V^T: what is left of it beside X is symmetric and positive."""
    matrix = _low_rank((1, 8, 20), torch.Generator().manual_seed(1))
    even = make_orthogonal([matrix])[0]
    product = even[0] @ matrix[0].T
    torch.testing.assert_close(product, product.T, rtol=1e-3, atol=1e-3)
    assert float(torch.linalg.eigvalsh(product).min()) > 0


@settings(max_examples=25)
@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.floats(1e-3, 1e3))
def test_conditioning_ignores_scale_and_company(shapes: list[tuple[int, ...]], scale: float) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    blocks = [_low_rank(shape, generator) for shape in shapes]
    together = make_orthogonal([scale * block for block in blocks])
    for block, found in zip(blocks, together, strict=True):
        torch.testing.assert_close(found, make_orthogonal([block])[0], rtol=5e-3, atol=5e-3)


def test_gradients_are_those_of_the_function() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [_low_rank(shape, generator).double().requires_grad_() for shape in [(1, 3, 2, 2), (2, 4, 2, 1)]]
    assert torch.autograd.gradcheck(lambda *x: tuple(make_orthogonal(x)), blocks, atol=1e-4)


def test_zeros_stay_finite() -> None:
    assert bool(torch.isfinite(make_orthogonal([torch.zeros(1, 4, 4)])[0]).all())


def test_predicted_kernels_have_the_scale_of_he(member: Network) -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(16, 16, 11, 11), num_classes=200, hid=8, kernels="orthogonal")).eval()
    found = 0
    for prediction in ghn.predict(member.graph):
        kernel = prediction.block
        if prediction.target.role.value != "weight" or kernel.shape[0] != 16:
            continue
        fan_in = math.prod(prediction.kernel[1:])
        gain = 1.0 if prediction.kernel[1] == 1 else 2.0
        assert float(kernel.square().mean() * fan_in) == pytest.approx(gain, rel=1e-3)
        found += 1
    assert found > 3


def test_training_and_inference_predict_the_same(member: Network) -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(16, 16, 11, 11), num_classes=200, hid=8, kernels="orthogonal"))
    together = ghn([member.graph])[0]
    for prediction in ghn.predict(member.graph):
        torch.testing.assert_close(
            prediction.materialize(), together[prediction.target.name].detach(), rtol=1e-3, atol=1e-4
        )


def test_cut_layers_have_the_gradients_of_the_whole_block() -> None:
    torch.manual_seed(0)
    decoder = ConvDecoder(GHNConfig(max_shape=(8, 8, 5, 5), num_classes=4, hid=8))
    x = torch.randn(2, 8)
    blocks = [(8, 4, 3, 3), (4, 8, 1, 1), (8, 8, 5, 5)]
    parts = decoder.cut(blocks)
    first = [Tiles(range(1), range(1), block) for block in blocks]
    sum(decoder(x, tiles, parts[tiles.block]).square().sum() for tiles in first).backward()  # type: ignore[union-attr]
    found = [parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None]
    decoder.zero_grad()
    whole = decoder(x, Tiles(range(1), range(1), (8, 8, 5, 5)))[:, 0, 0]
    sum(whole[:, :k, :c, :h, :w].square().sum() for k, c, h, w in blocks).backward()  # type: ignore[union-attr]
    expected = [parameter.grad for parameter in decoder.parameters() if parameter.grad is not None]
    assert len(found) == len(expected) > 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tiles_cover_a_kernel_once() -> None:
    numbers = torch.arange(20 * 11).view(1, 20, 11, 1, 1).float()
    found = tilings((20, 11, 1, 1), (8, 8, 3, 3))
    assert [tiles.block[:2] for tiles in found] == [(8, 8), (8, 3), (4, 8), (4, 3)]
    parts = []
    for tiles in found:
        k, c = tiles.block[:2]
        rows = [[numbers[:, 8 * a : 8 * a + k, 8 * b : 8 * b + c] for b in tiles.columns] for a in tiles.rows]
        parts.append(torch.stack([torch.stack(row, 1) for row in rows], 1))
    assert torch.equal(join(parts, found), numbers)
    (whole,) = tilings((8, 8, 3, 3), (8, 8, 3, 3))
    assert whole.is_first


@pytest.mark.parametrize("kernels", ["raw", "orthogonal"])
def test_blocks_of_a_large_kernel_differ_by_their_place(kernels: str) -> None:
    torch.manual_seed(0)
    plain = GHN(GHNConfig(max_shape=(8, 8, 3, 3), num_classes=4, hid=8, kernels=kernels))
    tiled = GHN(replace(plain.config, tiles=3))
    tiled.load_state_dict({**tiled.state_dict(), **plain.state_dict()})
    assert tiled.config.largest_kernel == (24, 24, 3, 3)
    network = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 30, 3), nn.Flatten(), nn.Linear(30 * 16, 4))
    graph = to_graph(network, input_size=(3, 8, 8))
    before, after = plain([graph])[0], tiled([graph])[0]
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(before[name][:8, :8], after[name][:8, :8])  # as in a small kernel
        assert torch.equal(before[name][8:16], before[name][:8])
        assert not torch.allclose(after[name][8:16], after[name][:8], atol=1e-3)
    assert torch.equal(after["2.weight"][24:], after["2.weight"][:6])  # beyond three blocks it repeats
    assert not torch.allclose(after["2.weight"][:, 8:16], after["2.weight"][:, :8], atol=1e-3)
    for prediction in tiled.predict(graph):
        torch.testing.assert_close(
            prediction.materialize(), after[prediction.target.name].detach(), rtol=1e-3, atol=1e-4
        )
    sum(tensor.square().sum() for tensor in after.values() if tensor.ndim == 2).backward()  # type: ignore[union-attr]
    gradient = tiled.get_parameter("decoder.in_codes.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12, 16, 24])
def test_signs_make_kernels_of_equal_blocks_invertible(count: int) -> None:
    found = signs((8 * count, 8 * count, 1, 1), (8, 8))
    assert found.shape == (8 * count, 8 * count, 1, 1)
    assert bool((found[:8] == 1).all() and (found[:, :8] == 1).all())
    block = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    values = torch.linalg.svdvals(block.repeat(count, count) * found[..., 0, 0])
    assert values.min() > 0.99  # of the block: 1
    assert values.max() < 1.01 * 2 ** ((count - 1).bit_length() / 2)  # equal for powers of 2


def test_kernels_with_signs_repeat_a_whole_number_of_times_where_they_can() -> None:
    plain = GHNConfig(tiles=4)
    signed = replace(plain, signs=True)
    for size, found in {
        48: 48,
        200: 200,
        256: 256,
        384: 192,
        576: 192,
        768: 256,
        1152: 192,
        320: 256,
        640: 256,
    }.items():
        assert signed.emitted((size, 64, 3, 3)) == (found, 64, 3, 3)
        assert signed.emitted((64, size, 16, 1)) == (64, found, 11, 1)
        assert plain.emitted((size, size, 1, 1)) == (min(size, 256), min(size, 256), 1, 1)


@pytest.mark.parametrize("side", [384, 576, 768])
def test_wide_kernels_with_signs_are_kronecker_products(side: int) -> None:
    torch.manual_seed(0)
    ghn = GHN(GHNConfig(max_shape=(64, 64, 1, 1), num_classes=4, hid=8, kernels="orthogonal", tiles=4, signs=True))
    network = nn.Sequential(nn.Conv2d(3, side, 1), nn.Conv2d(side, side, 1))
    found = ghn([to_graph(network, input_size=(3, 8, 8))])[0]["1.weight"].detach().flatten(1)
    before = found.clone()
    assert orthogonalize_kronecker_(found, 0.0, "w")
    torch.testing.assert_close(found.double(), exact_factor(before.double()), rtol=0, atol=1e-4)


def test_a_ghn_with_signs_multiplies_its_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = GHN(GHNConfig(max_shape=(8, 8, 3, 3), num_classes=4, hid=8, kernels="orthogonal", tiles=2))
    signed = GHN(replace(plain.config, signs=True))
    signed.load_state_dict(plain.state_dict())
    network = nn.Sequential(
        nn.Conv2d(3, 20, 3),
        nn.Conv2d(20, 30, 3),
        nn.Conv2d(30, 30, 3, groups=30),
        nn.Conv2d(30, 32, 1),
        nn.Conv2d(32, 64, 1),
    )
    graph = to_graph(network, input_size=(3, 8, 8))
    before, after = plain([graph])[0], signed([graph])[0]
    assert torch.equal(after["1.weight"], before["1.weight"] * signs((30, 20, 3, 3), (8, 8)))
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    block = before["4.weight"][:16, :16, 0, 0] * torch.kron(hadamard, torch.ones(8, 8))
    rows = torch.stack([torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])] * 2)
    assert torch.equal(after["4.weight"][..., 0, 0], torch.kron(rows, block))
    for name in before.keys() - {"1.weight", "3.weight", "4.weight"}:  # few input channels, and biases
        assert torch.equal(after[name], before[name])
    write_safetensors(signed, tmp_path / "ghn.safetensors")
    again = read(tmp_path / "ghn.safetensors")
    assert again.config.signs
    assert content_hash(again) == content_hash(signed) != content_hash(plain)
    assert "signs" not in plain.config.to_dict()
    for _ in range(2):  # the second time from the cache
        model = copy.deepcopy(network)
        timm_ghn.init_model(model, "ghn", ghn=signed, input_size=(3, 8, 8), rescale="off")
        torch.testing.assert_close(model.get_parameter("1.weight"), after["1.weight"], rtol=1e-4, atol=1e-5)


def test_tiles_survive_a_file(tmp_path: Path) -> None:
    ghn = GHN(GHNConfig(max_shape=(8, 8, 3, 3), num_classes=4, hid=8, tiles=4))
    write_safetensors(ghn, tmp_path / "ghn.safetensors")
    again = read(tmp_path / "ghn.safetensors")
    assert again.config.tiles == 4
    assert content_hash(again) == content_hash(ghn)
    assert "tiles" not in GHNConfig().to_dict()
    with pytest.raises(CheckpointError, match="tiles"):
        GHNConfig(tiles=0)


def test_the_setting_survives_a_file_and_leaves_old_hashes_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings_ = {"max_shape": (8, 8, 3, 3), "num_classes": 4, "hid": 8}
    raw, even = GHN(GHNConfig(**settings_)), GHN(GHNConfig(**settings_, kernels="orthogonal"))  # type: ignore[arg-type]
    even.load_state_dict(raw.state_dict())
    assert "kernels" not in raw.config.to_dict()
    assert content_hash(raw) != content_hash(even)
    write_safetensors(even, tmp_path / "even.safetensors", {})
    assert read(tmp_path / "even.safetensors").config == even.config


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(CheckpointError, match="kernels is 'round', not one of raw, orthogonal"):
        GHNConfig(kernels="round")
