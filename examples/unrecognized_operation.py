"""An operation that is not recognized: what the report says, and what to do about it.

    python examples/unrecognized_operation.py

The graph of a network is made of the torch functions that it calls. A layer that computes with its weight in a way of
its own (below: a filter of the spectrum, and a product with a sum) calls none that convolves or multiplies matrices, so
the weight keeps the values that it had; the rest is predicted as usual. `what_is_kept` lists such weights with reasons.

If the operation is a linear layer in disguise, spell it as one: `Recognized` calls a convolution with the same
parameter, which is then predicted. If it is not, as the filter, its own initialization is the best that there is, and
nothing has to be done.
"""

import torch
from torch import Tensor, nn

import timm_ghn
from timm_ghn.initialize.report import Report, Status


class Mixer(nn.Module):
    """Mixes channels by a weight (K, C): `sum_c w[k, c] x[c]` written as a product and a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K, H, W)."""
        return (x.unsqueeze(1) * self.weight[:, :, None, None]).sum(2)


class Recognized(Mixer):
    """The same numbers by a function that the graph has a word for."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K, H, W)."""
        return nn.functional.conv2d(x, self.weight[:, :, None, None])


class SpectralFilter(nn.Module):
    """Multiplies the spectrum of each channel by a learned filter: no layer of the vocabulary."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(channels, size, size // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=x.shape[-2:])


def network(mixer: type[Mixer]) -> nn.Sequential:
    """A small network for images of 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4),
        nn.BatchNorm2d(32),
        SpectralFilter(32, 8),
        mixer(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def what_is_kept(report: Report) -> list[str]:
    """Parameters that were not predicted, and why."""
    return [f"{row.name} {tuple(row.shape)}: {row.reason}" for row in report.parameters if row.status is Status.KEPT]


def main() -> None:
    """Initialize the network twice: as it is, and with the mixer spelled as a convolution."""
    torch.manual_seed(0)
    for mixer in (Mixer, Recognized):
        report = timm_ghn.init_model(network(mixer), "ghn", input_size=(3, 32, 32))
        print(f"{mixer.__name__}: {report.predicted_share:.1%} predicted; kept:")
        print("\n".join(f"    {line}" for line in what_is_kept(report)))

    first, second = network(Mixer), network(Recognized)
    second.load_state_dict(first.state_dict())  # the names are the same, so weights can be exchanged
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        difference = (first.eval()(images) - second.eval()(images)).abs().max()
    print(f"both spellings compute the same: largest difference {difference:.0e}")


if __name__ == "__main__":
    main()
