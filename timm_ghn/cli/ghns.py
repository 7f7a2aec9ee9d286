"""`timm-ghn ghns`: list the GHNs that are known by name, verify one, and push one to the Hub."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import math
from typing import TYPE_CHECKING

from timm_ghn.cli.push import add_push_arguments, print_results, push_options
from timm_ghn.errors import CheckpointError, CommandError
from timm_ghn.text import did_you_mean, format_size, table

if TYPE_CHECKING:
    from timm_ghn.ghn import GHN

HELP = "list the GHNs that are known by name, verify one, or push one to the Hub"
READ_DIFFERENTLY = ("squeezenet1_0", "squeezenet1_1")
"""Networks for which ghn3 moves the pooling in front of the classifier, because of their class; not to be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handlers."""
    parser.set_defaults(handler=run)
    commands = parser.add_subparsers(dest="ghns_command", metavar="")
    push = commands.add_parser("push", help="push a GHN to the Hugging Face Hub")
    push.add_argument("ghn", metavar="NAME", help="name or path of a GHN")
    push.add_argument("repository", metavar="ORG/NAME", help="repository to push to; created if need be")
    push.add_argument("--license", help="licence of the GHN; needed for those that have no name")
    push.add_argument("--description", help="what it is, in a line")
    add_push_arguments(push)
    push.set_defaults(handler=run_push)
    verify = commands.add_parser("verify", help="compare what a GHN predicts with what its authors published")
    verify.add_argument("ghn", metavar="NAME", help="ghn2, ghn3-t or ghn3-xl")
    verify.add_argument("--models", nargs="+", metavar="MODEL", help="networks of torchvision (default: all published)")
    verify.set_defaults(handler=run_verify)


def run(args: argparse.Namespace) -> int:
    """Print a table of them."""
    from timm_ghn.ghn import list_ghns
    from timm_ghn.storage.paths import cache_directory

    header = ("name", "on disk", "size", "licence", "trained on", "published accuracy, %", "what it is")
    rows = [
        (
            entry.name,
            "yes" if entry.on_disk else "no",
            format_size(4 * entry.num_parameters),
            entry.license,
            entry.trained_on,
            entry.accuracy,
            entry.description,
        )
        for entry in list_ghns()
    ]
    print("\n".join(table(header, rows)))
    print("Accuracies are the authors', of predicted weights without training unless an epoch is named.")
    print(f"Files are kept in {cache_directory() / 'ghns'}.")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Compare norms of predicted parameters with published ones; 1 if one is wrong."""
    from timm_ghn.ghn import load_ghn

    norms = published_norms(args.ghn)
    unknown = [name for name in args.models or () if name not in norms]
    if unknown:
        raise CommandError(f"no norm is published for {unknown[0]}{did_you_mean(unknown[0], norms)}")
    ghn, right = load_ghn(args.ghn, shared=True), []
    for network in args.models or [name for name in norms if name not in READ_DIFFERENTLY]:
        found, text = predicted_norm(ghn, network), "not all of it is predicted"
        if found is not None:
            right.append(is_right(found, norms[network]))
            text = f"{found:.4f}  {'right' if right[-1] else 'WRONG'}"
        print(f"{network:24s} published {norms[network]:10.4f}  found {text}", flush=True)
    print(f"{sum(right)} of {len(right)} norms are right")
    return 0 if all(right) else 1


def is_right(found: float, published: float) -> bool:
    """Whether a norm agrees with the published one, by ghn3's own tolerance, and four digits for the largest norms."""
    return math.isclose(found, published, rel_tol=1e-4, abs_tol=1e-2)


def published_norms(name: str) -> dict[str, float]:
    """Published norms by network, for a GHN of that name.

    The authors of GHN-3 publish the Euclidean norm of all parameters of 74 networks after a prediction, for three of
    their files (github.com/SamsungSAILMontreal/ghn3 at b3289ac, ghn3_results.json).

    Raises:
        CheckpointError: If there are none.
    """
    text = (importlib.resources.files("timm_ghn.ghn") / "published_norms.json").read_text(encoding="utf-8")
    norms: dict[str, dict[str, float]] = json.loads(text)
    if not any(name in row for row in norms.values()):
        known = ", ".join(sorted({column for row in norms.values() for column in row}))
        raise CheckpointError(f"no norms are published for GHN {name}; there are some for {known}")
    return {network: row[name] for network, row in norms.items() if name in row}


def predicted_norm(ghn: GHN, network: str) -> float | None:
    """Norm of all parameters that a GHN predicts for a network of torchvision; None if not all are predicted."""
    import torch
    from torchvision import models

    from timm_ghn.graph import to_graph
    from timm_ghn.trace.skeleton import build_on_meta

    arguments = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}  # else a warning, and scipy
    model = build_on_meta(lambda: models.get_model(network, weights=None, **arguments))
    graph = to_graph(model)
    if {name for name, _ in model.named_parameters()} != {target.name for target in graph.targets}:
        return None
    tensors = (prediction.materialize() for prediction in ghn.predict(graph))
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


def run_push(args: argparse.Namespace) -> int:
    """Push a GHN."""
    from timm_ghn.hub.push import push_ghn

    result = push_ghn(
        args.ghn, args.repository, options=push_options(args), license=args.license, description=args.description
    )
    print_results([result])
    return 0
