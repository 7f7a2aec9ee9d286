"""Compares `orthogonal_factor` with LAPACK's QR on the weights of a network, tiled as predicted, plus noise.

    python benchmarks/speed/qr.py [--model convnext_base] [--start-layer L] [--repeats 5]

For each shape from layer L on: median CPU seconds of one thread (both methods in turn, so that other load on the
machine strikes both), their ratio, the largest entry of `Q^T Q - I`, and how far both lie from QR in float64. Below,
the whole post-processing over the pool of threads, in wall seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable

import timm
import torch
from torch import Tensor

from timm_ghn.orthogonalization import (
    PostProcess,
    postprocess_many,
    resolve_start_layer,
    selected_layers,
    weight_layers,
)
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor


def tiled(shape: torch.Size, noise: float = 0.0) -> Tensor:
    """Returns a weight that repeats one random block every 64 channels, of the scale that a GHN gives it."""
    fan_in = torch.Size(shape[1:]).numel()
    block = torch.randn(64, min(64, shape[1]), *shape[2:]).mul_((2 / fan_in) ** 0.5)
    repeats = (-(-shape[0] // 64), -(-shape[1] // 64), *(1 for _ in shape[2:]))
    weight = block.repeat(repeats)[: shape[0], : shape[1]].contiguous()
    return weight + noise * torch.randn(shape)


def lapack(matrix: Tensor) -> Tensor:
    """Returns `Q sign(diag R)` by `torch.linalg.qr` alone."""
    wide = matrix.shape[0] < matrix.shape[1]
    factor, triangle = torch.linalg.qr(matrix.mT if wide else matrix)
    factor = factor * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(factor.dtype)
    return factor.mT if wide else factor


def cpu_seconds(function: Callable[[Tensor], Tensor], matrix: Tensor) -> float:
    """Returns the time that the calling thread computes."""
    start = time.thread_time()
    function(matrix)
    return time.thread_time() - start


def compare(matrix: Tensor, repeats: int) -> str:
    """Returns one row of the table."""
    ours, theirs = orthogonal_factor(matrix), lapack(matrix)
    times = [(cpu_seconds(orthogonal_factor, matrix), cpu_seconds(lapack, matrix)) for _ in range(repeats)]
    our_time, their_time = (statistics.median(column) for column in zip(*times, strict=True))
    tall = ours if ours.shape[0] >= ours.shape[1] else ours.mT
    gram = tall.double().mT @ tall.double()
    loss = float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())
    exact = lapack(matrix.double())
    errors = [float((factor - exact).abs().max()) for factor in (ours, theirs)]
    return (
        f"{our_time:8.4f} {their_time:8.4f} {their_time / our_time:6.2f} {loss:9.1e} {errors[0]:9.1e} {errors[1]:9.1e}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_base")
    parser.add_argument("--start-layer", type=int)
    parser.add_argument("--noise", type=float, default=1e-5, help="standard deviation of the noise on the weights")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = timm.create_model(arguments.model)
    layers = weight_layers(model)
    selected = selected_layers(layers, resolve_start_layer(layers, arguments.start_layer))
    shapes = [model.get_parameter(layer.parameter).shape for layer in selected]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'shape':>20} {'layers':>6} {'ours':>8} {'LAPACK':>8} {'ratio':>6} {'Q^TQ - I':>9} {'error':>9} {'LAPACK':>9}"
    )
    for shape, count in Counter(shapes).items():
        print(f"{tuple(shape)!s:>20} {count:6d} {compare(tiled(shape, arguments.noise).flatten(1), arguments.repeats)}")

    torch.set_num_threads(num_threads)
    weights = [tiled(shape) for shape in shapes]
    times = []
    for _ in range(arguments.repeats):
        start, cpu = time.perf_counter(), time.process_time()
        for _result in postprocess_many(zip(selected, weights, strict=True), PostProcess()):
            pass
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, busy = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"\nall {len(selected)} layers on {num_threads} threads: {wall:.2f} s wall, {busy:.2f} s CPU, ", end="")
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
