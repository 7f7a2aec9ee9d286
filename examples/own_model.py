"""A network of your own: what is predicted, and what happens to layers that a GHN has no word for.

    python examples/own_model.py

`init_model` works on any module in memory. Convolutions, linear and normalization layers are predicted, also inside
of modules that timm has never heard of; the learned query and the gain below keep the values that they had, and the
report says why. So does the classifier, unless it has as many classes as the GHN was trained on.
"""

import torch
from torch import Tensor, nn

import timm_ghn


class GatedBlock(nn.Module):
    """A convolution with a gain: the gain multiplies, which is no node of the graph."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return x + self.gain * torch.relu(self.norm(self.conv(x)))


class QueryPooling(nn.Module):
    """Pools with the attention of one learned query."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, channels))
        self.key_value = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        key, value = self.key_value(x.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        query = self.query.expand(x.shape[0], -1, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value).squeeze(1)


def main() -> None:
    """Initialize it and print what every parameter got."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4), GatedBlock(32), GatedBlock(32), QueryPooling(32), nn.Linear(32, 10)
    )
    report = timm_ghn.init_model(model, "ghn-orth", input_size=(3, 64, 64), start_layer=2)
    print(report.table(parameters=True))
    print()
    print(f"{report.predicted_share:.1%} of {report.num_parameters:,} parameters were predicted")

    weight = model[1].conv.weight.detach().flatten(1)
    error = (weight @ weight.T - torch.eye(32)).abs().max()
    print(f"rows of the first block's kernel are orthonormal to {error:.0e}")


if __name__ == "__main__":
    main()
