"""Tables and figures of arXiv 2207.10049 from results on disk, or from timm models.

    python benchmarks/figures.py tables --results results              # tables 1 and 2 as Markdown
    python benchmarks/figures.py curves --results results              # figure 4: training and test curves
    python benchmarks/figures.py correlations                          # figure 2
    python benchmarks/figures.py graphs                                # figure 3
    python benchmarks/figures.py embeddings --count 200 --data data/tinyimagenet32                     # figure 5

Each figure is a PNG; the numbers behind it are written as JSON, beside it or to `--numbers`. For the figures of the
docs: `--out docs/NAME --numbers benchmarks/results/NAME`. Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from paired import sign_flip_p
from presets import PRESETS
from protocol import PaperConfig
from torch import Tensor, nn

import timm_ghn
from timm_ghn import drawing
from timm_ghn.cli.common import exit_status
from timm_ghn.errors import FineTuneError, MissingDependencyError
from timm_ghn.finetune import ResultStore, RunResult, Summary, differences, load_benchmark, summarize
from timm_ghn.ghn import GHN, default_ghn, load_ghn
from timm_ghn.graph import to_graph
from timm_ghn.orthogonalization import weight_layers
from timm_ghn.orthogonalization.noise import correlation_std
from timm_ghn.storage.atomic import write_atomically
from timm_ghn.training.architectures import Bounds, Network, draw_architecture
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import draw_classes, take_batch
from timm_ghn.training.objective import linear_accuracy

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, which stay apart for colour-blind readers."""
_PAIRS = 20_000
"""Pairs of channels whose correlations stand for the distribution in a layer."""


def pyplot() -> Any:
    """matplotlib.pyplot without a display.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install 'timm-ghn[plot]'") from error
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def write_figure(figure: Any, numbers: Any, args: argparse.Namespace) -> None:
    """Write a PNG and its numbers, and say where."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
    write(args.out.with_suffix(".png"), buffer.getvalue())
    write_numbers(numbers, args)
    pyplot().close(figure)


def write_numbers(numbers: Any, args: argparse.Namespace) -> None:
    """Write what a figure shows as JSON."""
    write((args.numbers or args.out).with_suffix(".json"), json.dumps(numbers, indent=1).encode())


def write(path: Path, content: bytes) -> None:
    """Write a file, and say so."""
    write_atomically(path, content)
    print(f"{path}: {len(content):,} bytes")


# --- tables ---------------------------------------------------------------------------------------------------------


def tested(store: ResultStore) -> tuple[Summary, ...]:
    """Summaries of the runs that were measured on test images.

    Raises:
        FineTuneError: If there are none.
    """
    found = summarize(result for result in store.all() if result.config.split == "test")
    if not found:
        raise FineTuneError(f"{store.folder} has no finished runs on test images: run benchmarks/finetune.py first")
    return found


def table_1(summaries: Sequence[Summary]) -> str:
    """Accuracy of every initialization (rows) and architecture (columns), in percent, with pairs by seed."""
    models = list(dict.fromkeys(row.config.model for row in summaries))
    inits = list(dict.fromkeys(row.config.starts_from for row in summaries))
    best: dict[tuple[str, str], Summary] = {}
    for row in summaries:
        place = (row.config.starts_from, row.config.model)
        if place in best:
            raise FineTuneError(
                f"{place[1]} from {place[0]} has results with different settings; keep one experiment a folder"
            )
        best[place] = row
    lines = [f"| init | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for init in inits:
        cells = [_cell(best.get((init, model)), best.get(("rand", model))) for model in models]
        lines.append(f"| {init} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Summary | None, reference: Summary | None) -> str:
    if row is None:
        return "-"
    text = f"{100 * row.mean:.1f} ± {100 * row.std:.1f} (n = {len(row.accuracies)})"
    if reference is not None and reference is not row and (gains := differences(row, reference)):
        text += f", {100 * statistics.fmean(gains):+.1f} to rand (p = {sign_flip_p(gains):.3g})"
    return text


def table_2(summaries: Sequence[Summary]) -> str:
    """Hyperparameters of every row of table 1, beside the paper's for GHN-orth."""
    header = ("model", "init", "optimizer", "epochs", "batch", "lr", "weight decay", "size", "beta", "L", "source")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    configs = [(row.config, "these runs") for row in summaries]
    configs += [(preset.config, "the paper, GHN-orth") for preset in PRESETS.values()]
    for config, source in configs:
        beta = "default" if config.noise is None else f"{config.noise:g}"
        start = "default" if config.start_layer is None else config.start_layer
        cells = (config.model, config.starts_from, config.optimizer, config.epochs, config.batch_size, f"{config.lr:g}")
        rest = (f"{config.weight_decay:g}", config.image_size, beta, start, source)
        lines.append(f"| {' | '.join(map(str, (*cells, *rest)))} |")
    return "\n".join(lines)


# --- figure 4: curves -----------------------------------------------------------------------------------------------


def curves(results: Sequence[RunResult]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Means and deviations over seeds, by model and initialization.

    Returns:
        By model and initialization: "epoch", "train_loss", "test_epoch", "accuracy" and "accuracy_std".

    Raises:
        FineTuneError: If a model has results of one initialization with different settings.
    """
    groups: dict[tuple[str, str], list[RunResult]] = defaultdict(list)
    for result in results:
        runs = groups[result.config.model, result.config.starts_from]
        if runs and (runs[0].config, runs[0].data) != (result.config, result.data):
            raise FineTuneError(
                f"{result.config.model} from {result.config.starts_from} has results with different settings; keep one "
                "experiment a folder"
            )
        runs.append(result)
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(dict)
    for (model, init), runs in groups.items():
        shortest = min(len(run.curve) for run in runs)
        points = [[run.curve[index] for run in runs] for index in range(shortest)]
        measured = [row for row in points if all(point.accuracy is not None for point in row)]
        accuracy = torch.tensor([[point.accuracy or 0.0 for point in row] for row in measured], dtype=torch.float64)
        found[model][init] = {
            "epoch": [float(row[0].epoch) for row in points],
            "train_loss": [sum(point.train_loss for point in row) / len(row) for row in points],
            "test_epoch": [float(row[0].epoch) for row in measured],
            "accuracy": accuracy.mean(1).tolist(),
            "accuracy_std": (accuracy.std(1) if accuracy.shape[1] > 1 else torch.zeros(len(accuracy))).tolist(),
        }
    return dict(found)


def draw_curves(data: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> Any:
    """A column for each model: training loss above, test accuracy below; bands are one standard deviation."""
    plt = pyplot()
    figure, axes = plt.subplots(
        2, len(data), figsize=(3.6 * len(data) + 1.2, 5.2), sharex="col", squeeze=False, layout="constrained"
    )
    inits = list(dict.fromkeys(init for lines in data.values() for init in lines))
    for column, (model, lines) in enumerate(data.items()):
        for init, line in lines.items():
            color = COLORS[inits.index(init) % len(COLORS)]
            axes[0][column].plot(line["epoch"], line["train_loss"], color=color, label=init, linewidth=1.3)
            accuracy = 100 * torch.tensor(line["accuracy"])
            spread = 100 * torch.tensor(line["accuracy_std"])
            marker = "o" if len(accuracy) < 15 else None
            axes[1][column].plot(line["test_epoch"], accuracy, color=color, marker=marker, markersize=3, linewidth=1.3)
            band = (accuracy - spread, accuracy + spread)
            axes[1][column].fill_between(line["test_epoch"], *band, color=color, alpha=0.15, linewidth=0)
        axes[0][column].set_title(model)
        axes[1][column].set_xlabel("epoch")
        axes[1][column].xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("training loss (nats)")
    axes[1][0].set_ylabel("test accuracy (%)")
    common_legend(figure, axes[0])
    return figure


def common_legend(figure: Any, axes: Iterable[Any]) -> None:
    """One legend below all axes, of every label once: some may be missing in each."""
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )


# --- figure 2: correlations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCorrelations:
    """Pearson correlations between the channels of a layer.

    Attributes:
        number: Number of the layer, from 1.
        parameter: Name of its weight.
        kind: One of those that `kind_of` tells apart.
        std: Standard deviation of all entries of the matrix of correlations, sigma of Eq. 1.
        quantiles: 5, 25, 50, 75 and 95 % of the correlations of sampled pairs of different channels.
    """

    number: int
    parameter: str
    kind: str
    std: float
    quantiles: tuple[float, ...]


def channel_correlations(model: nn.Module) -> list[LayerCorrelations]:
    """Correlations in every layer but the classifier; no matrix of all pairs is formed."""
    found = []
    for layer in weight_layers(model):
        matrix = model.get_parameter(layer.parameter).detach().float().cpu().flatten(1)
        if layer.is_classifier or matrix.shape[0] < 2 or matrix.shape[1] < 2:
            continue
        values = sampled_correlations(matrix, _PAIRS, layer.number)
        quantiles = torch.quantile(values, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
        kind, std = kind_of(model.get_parameter(layer.parameter).shape), correlation_std(matrix)
        found.append(LayerCorrelations(layer.number, layer.parameter, kind, std, tuple(quantiles.tolist())))
    return found


def kind_of(shape: Sequence[int]) -> str:
    """The kind of a layer by the shape (K, C / groups, ...) of its weight; a fully-connected layer is one of 1 x 1."""
    if max(shape[2:], default=1) == 1:
        return "widening 1 x 1" if shape[0] > shape[1] else "1 x 1"
    return "depthwise" if shape[1] == 1 else "spatial"


def sampled_correlations(matrix: Tensor, count: int, seed: int) -> Tensor:
    """Correlations of random pairs of different rows.

    Args:
        matrix: (K, D), K at least 2.
        count: Number of pairs.
        seed: Decides which.

    Returns:
        (count,), 0 for rows without variance.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = matrix - matrix.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    first = torch.randint(len(rows), (count,), generator=generator)
    second = (first + torch.randint(1, len(rows), (count,), generator=generator)) % len(rows)
    parts = zip(first.split(1000), second.split(1000), strict=True)
    return torch.cat([(rows[a] * rows[b]).sum(1) for a, b in parts])


def draw_correlations(data: Mapping[str, Mapping[str, Sequence[LayerCorrelations]]]) -> Any:
    """A row for each kind of layer of a model, a column for each initialization, and the deviations at the end.

    Kinds have rows of their own, because their correlations differ: those of a depthwise convolution, which has few
    numbers a channel, spread ten times as far as those of a layer of 1 x 1.
    """
    plt = pyplot()
    rows = [(model, kind) for model, inits in data.items()
            for kind in dict.fromkeys(layer.kind for layers in inits.values() for layer in layers)]  # fmt: skip
    columns = max(len(inits) for inits in data.values()) + 1
    size = (2.4 * columns + 0.6, 1.7 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, (model, kind) in zip(axes, rows, strict=True):
        chosen = {init: [layer for layer in layers if layer.kind == kind] for init, layers in data[model].items()}
        extent = 1.05 * max(abs(value) for layers in chosen.values() for layer in layers for value in layer.quantiles)
        for column, (init, layers) in enumerate(chosen.items()):
            axis, color = row[column], COLORS[column % len(COLORS)]
            numbers = [layer.number for layer in layers]
            low, lower, middle, upper, high = zip(*(layer.quantiles for layer in layers), strict=True)
            axis.fill_between(numbers, low, high, color=color, alpha=0.18, linewidth=0, label="5 to 95 %")
            axis.fill_between(numbers, lower, upper, color=color, alpha=0.4, linewidth=0, label="25 to 75 %")
            axis.plot(numbers, middle, color=color, linewidth=1, label="median")
            axis.set_ylim(-extent, extent)
            axis.set_title(f"{init}\n{model}, {kind}", fontsize=8)
            row[-1].plot(numbers, [layer.std for layer in layers], color=color, label=init, linewidth=1.2)
        row[0].set_ylabel("correlation")
        row[-1].set_title(f"standard deviation\n{model}, {kind}", fontsize=8)
        row[-1].set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    axes[0][0].legend(frameon=False, fontsize=7, loc="upper left")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
    return figure


# --- figure 5: embeddings -------------------------------------------------------------------------------------------


@torch.no_grad()
def graph_embedding(ghn: GHN, graph: timm_ghn.Graph) -> Tensor:
    """Mean of the embeddings of a graph's nodes, (hid,)."""
    return ghn.embed_nodes(graph).mean(0)


def principal_components(points: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Project onto the directions of largest variance.

    Args:
        points: (N, D).
        count: Number of directions.

    Returns:
        Coordinates (N, count), and the share of the variance along each, (count,).
    """
    points = points.double()
    centered = points - points.mean(0)
    left, values, right = torch.linalg.svd(centered, full_matrices=False)
    signs = torch.sign(right[torch.arange(count), right[:count].abs().argmax(1)])
    return left[:, :count] * values[:count] * signs, values[:count].square() / values.square().sum()


def draw_embeddings(rows: Sequence[Mapping[str, Any]], shares: Sequence[float], label: str) -> Any:
    """Points of sampled architectures coloured by accuracy (or family), and named ones marked."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    sampled = [row for row in rows if row["name"] is None]
    if all(row["accuracy"] is not None for row in sampled):
        values = [100 * row["accuracy"] for row in sampled]
        places = ([row["x"] for row in sampled], [row["y"] for row in sampled])
        dots = axis.scatter(*places, c=values, cmap="viridis", s=18, linewidths=0)
        figure.colorbar(dots, ax=axis, label=label)
    else:
        for index, family in enumerate(sorted({row["family"] for row in sampled})):
            chosen = [row for row in sampled if row["family"] == family]
            color = COLORS[index % len(COLORS)]
            places = ([row["x"] for row in chosen], [row["y"] for row in chosen])
            marker = ("o", "v", "P")[index // len(COLORS) % 3]
            axis.scatter(*places, s=24, linewidths=0, color=color, marker=marker, label=family)
    for index, row in enumerate(row for row in rows if row["name"] is not None):
        marker, size = (("*", 170), ("D", 80), ("^", 100), ("s", 80))[index % 4]
        places = (row["x"], row["y"])
        axis.scatter(*places, s=size, marker=marker, color="white", edgecolors="black", label=row["name"])
    axis.set_xlabel(f"first component ({100 * shares[0]:.0f} % of the variance)")
    axis.set_ylabel(f"second component ({100 * shares[1]:.0f} %)")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def embeddings(args: argparse.Namespace) -> None:
    """Embed sampled architectures and named models, and measure the sampled ones if there are images."""
    ghn = load_ghn(args.ghn) if args.ghn else default_ghn()
    shares_of = TrainConfig().families
    drawn = [draw_architecture(f"figure {args.seed}", index, shares_of, Bounds()) for index in range(args.count)]
    networks = [Network(architecture, ghn) for architecture in drawn]
    points = [graph_embedding(ghn, network.graph) for network in networks]
    accuracies: list[float | None] = [None] * len(networks)
    if args.data is not None:
        images = load_benchmark(str(args.data)).test
        ways = min(20, len(images.classes))
        generator = torch.Generator().manual_seed(args.seed)
        index = draw_classes(images.labels, 2 * args.shots * ways, ways, generator)
        batch = take_batch(images, index, "cpu")
        with torch.no_grad():
            accuracies = [
                linear_accuracy(network(ghn([network.graph])[0], batch.images)[1], batch.labels) for network in networks
            ]
    for name in args.models:
        with torch.device("meta"):
            points.append(graph_embedding(ghn, to_graph(timm.create_model(name))))
    places, shares = principal_components(torch.stack(points))
    rows = [
        {"name": None, "family": architecture.family, "accuracy": accuracy, "x": float(x), "y": float(y)}
        for architecture, accuracy, (x, y) in zip(drawn, accuracies, places[: len(drawn)], strict=True)
    ]
    for name, (x, y) in zip(args.models, places[len(drawn) :], strict=True):
        rows.append({"name": name, "family": None, "accuracy": None, "x": float(x), "y": float(y)})
    label = f"linear classifier (%), {args.shots} labels a class"
    numbers = {"ghn": ghn.info.name if ghn.info else None, "shares": shares.tolist(), "accuracy": label, "points": rows}
    write_figure(draw_embeddings(rows, shares.tolist(), label), numbers, args)


# --- the command ----------------------------------------------------------------------------------------------------


def tables(args: argparse.Namespace) -> None:
    """Print tables 1 and 2."""
    found = tested(ResultStore(args.results, PaperConfig))
    text = f"{table_1(found)}\n\n{table_2(found)}\n"
    print(text)
    if args.out is not None:
        write(args.out.with_suffix(".md"), text.encode())


def plot_curves(args: argparse.Namespace) -> None:
    """Figure 4."""
    store = ResultStore(args.results, PaperConfig)
    tested(store)
    data = curves([result for result in store.all() if result.config.split == "test" and not result.diverged])
    if not data:
        raise FineTuneError(f"all runs in {args.results} diverged: there is nothing to draw")
    write_figure(draw_curves(data), data, args)


def plot_correlations(args: argparse.Namespace) -> None:
    """Figure 2."""
    data: dict[str, dict[str, list[LayerCorrelations]]] = {}
    for name in args.models:
        data[name] = {}
        for init in args.inits:
            if init == "pretrained":
                model = timm.create_model(name, pretrained=True)
            else:
                settings = {"ghn": args.ghn} if args.ghn and init.startswith("ghn") else {}
                model = timm.create_model(name, init=timm_ghn.Init(init, **settings))
            data[name][init] = channel_correlations(model)
    numbers = {m: {i: [vars(layer) for layer in layers] for i, layers in row.items()} for m, row in data.items()}
    write_figure(draw_correlations(data), numbers, args)


def plot_graphs(args: argparse.Namespace) -> None:
    """Figure 3."""
    graphs = []
    for name in args.models:
        with torch.device("meta"):
            graphs.append(to_graph(timm.create_model(name)))
    path = args.out.with_suffix(".png")
    drawing.save(graphs, path, titles=list(args.models))
    print(f"{path}: {path.stat().st_size:,} bytes")
    counts = [{"model": n, "operators": dict(g.operators)} for n, g in zip(args.models, graphs, strict=True)]
    write_numbers(counts, args)


def make_parser() -> argparse.ArgumentParser:
    """All commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, handler: Callable[[argparse.Namespace], None], out: str | None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=(handler.__doc__ or "").strip())
        command.add_argument("--out", type=Path, default=out and Path(out), help="file without suffix")
        command.add_argument("--numbers", type=Path, help="file for the numbers, without suffix (default: as --out)")
        command.set_defaults(handler=handler)
        return command

    models = ["resnet50", "convnext_base"]
    for name, handler, out in (("tables", tables, None), ("curves", plot_curves, "curves")):
        add(name, handler, out).add_argument("--results", type=Path, default=Path("results"))
    command = add("correlations", plot_correlations, "correlations")
    command.add_argument("--models", nargs="+", default=models)
    command.add_argument("--inits", nargs="+", default=["rand", "ghn", "ghn-orth"], help="methods, or 'pretrained'")
    command.add_argument("--ghn", help="GHN by name or path")
    add("graphs", plot_graphs, "graphs").add_argument("--models", nargs="+", default=models)
    command = add("embeddings", embeddings, "embeddings")
    command.add_argument("--models", nargs="*", default=models, help="timm models to mark")
    command.add_argument("--count", type=int, default=100, help="sampled architectures")
    command.add_argument("--data", type=Path, help="prefix of shards to measure on; without it colours are kinds")
    command.add_argument("--shots", type=int, default=20, help="labels a class of the linear classifier")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--ghn", help="GHN by name or path")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 2 after an error."""
    args = make_parser().parse_args(argv)
    return exit_status("figures.py", lambda: args.handler(args))


if __name__ == "__main__":
    sys.exit(main())
