"""Compares the orthogonalization with LAPACK's QR on the weights of a network, tiled as predicted, plus noise.

    python benchmarks/speed/qr.py [--model convnext_base] [--start-layer L] [--block 256] [--repeats 5]

For each shape from layer L on, median CPU milliseconds of one thread (all in turn, so that other load on the machine
strikes all): the whole post-processing, which takes the block out first; `orthogonal_factor` and LAPACK's QR of the
weight plus noise; and `2 M N^2` operations as one matrix product. Then, for `orthogonal_factor`, the largest entry of
`Q^T Q - I`, and how far it and LAPACK's QR lie from QR in float64. Below, the whole post-processing over the pool of
threads, in wall seconds.
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
    WeightLayer,
    postprocess_many,
    postprocess_tensor,
    resolve_start_layer,
    selected_layers,
    weight_layers,
)
from timm_ghn.orthogonalization.orthogonal import orthogonal_factor
from timm_ghn.threads import Workers


def tiled(shape: torch.Size, side: int) -> Tensor:
    """Returns a weight that repeats one random block every so many channels, of the scale that a GHN gives it."""
    fan_in = torch.Size(shape[1:]).numel()
    block = torch.randn(side, min(side, shape[1]), *shape[2:]).mul_((2 / fan_in) ** 0.5)
    repeats = (-(-shape[0] // side), -(-shape[1] // side), *(1 for _ in shape[2:]))
    return block.repeat(repeats)[: shape[0], : shape[1]].contiguous()


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


def product(matrix: Tensor) -> Tensor:
    """As many operations as a factorization takes, in one matrix product."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return tall @ tall[: tall.shape[1]]


def postprocessed(weight: Tensor) -> Tensor:
    """Returns the weight as `ghn-orth` post-processes it."""
    return postprocess_tensor(weight, WeightLayer(1, "weight", ""), PostProcess())


def compare(weight: Tensor, noise: float, repeats: int) -> str:
    """Returns one row of the table."""
    matrix = (weight + noise * torch.randn(weight.shape)).flatten(1)
    runs = ((postprocessed, weight), (orthogonal_factor, matrix), (lapack, matrix), (product, matrix))
    ours, theirs = orthogonal_factor(matrix), lapack(matrix)
    times = [[cpu_seconds(function, given) for function, given in runs] for _ in range(repeats)]
    medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    tall = ours if ours.shape[0] >= ours.shape[1] else ours.mT
    gram = tall.double().mT @ tall.double()
    loss = float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())
    exact = lapack(matrix.double())
    errors = [float((factor - exact).abs().max()) for factor in (ours, theirs)]
    return " ".join(f"{value:8.1f}" for value in medians) + "".join(f" {value:9.1e}" for value in (loss, *errors))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_base")
    parser.add_argument("--start-layer", type=int)
    parser.add_argument("--noise", type=float, default=1e-5, help="standard deviation of the noise on the weights")
    parser.add_argument("--block", type=int, default=256, help="channels after which kernels repeat")
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
    columns = f"{'whole':>8} {'factor':>8} {'LAPACK':>8} {'product':>8} {'Q^TQ - I':>9} {'error':>9} {'LAPACK':>9}"
    print(f"{'shape':>20} {'layers':>6} {columns}")
    for shape, count in Counter(shapes).items():
        row = compare(tiled(shape, arguments.block), arguments.noise, arguments.repeats)
        print(f"{tuple(shape)!s:>20} {count:6d} {row}")

    torch.set_num_threads(num_threads)
    weights = [tiled(shape, arguments.block) for shape in shapes]
    times = []
    for _ in range(arguments.repeats):
        start, cpu = time.perf_counter(), time.process_time()
        with Workers() as workers:
            for _result in postprocess_many(zip(selected, weights, strict=True), PostProcess(), workers):
                pass
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, busy = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"\nall {len(selected)} layers on {num_threads} threads: {wall:.2f} s wall, {busy:.2f} s CPU, ", end="")
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
