"""Model cards: what a reader of a repository is told, all of it taken from what was computed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields

from huggingface_hub import ModelCardData

from timm_ghn.ghn import GHN
from timm_ghn.ghn.registry import NAMED_GHNS
from timm_ghn.hub.manifest import Manifest, settings_of
from timm_ghn.request import HUB_PREFIX
from timm_ghn.settings import METHODS, Init
from timm_ghn.text import format_size, markdown_table

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2207.10049"
_GHN_ORTH = """@article{knyazev2022pretraining,
  title={Pretraining a Neural Network before Knowing Its Architecture},
  author={Knyazev, Boris},
  journal={arXiv preprint arXiv:2207.10049},
  year={2022}
}
"""
_GHN_2 = """@inproceedings{knyazev2021parameter,
  title={Parameter Prediction for Unseen Deep Architectures},
  author={Knyazev, Boris and Drozdzal, Michal and Taylor, Graham W and Romero-Soriano, Adriana},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}
"""
_CITATIONS = f"```bibtex\n{_GHN_ORTH}{_GHN_2}```"


def model_card(manifest: Manifest, repository: str) -> str:
    """The README.md of a repository of initialized weights.

    Args:
        manifest: What is in the repository.
        repository: "organization/name".
    """
    method = str(manifest.provenance["method"])
    tags = ["timm", "timm-ghn", "initialization", "not-trained", "graph-hypernetwork", method]
    sections = [
        f"A starting point for training or fine-tuning `{manifest.report.model}` of "
        f"[timm](https://github.com/huggingface/pytorch-image-models), **not trained**: "
        f"{METHODS[method].description} ([Knyazev 2022]({PAPER})). "
        "Its predictions mean nothing before training.",
        _usage(manifest, repository),
        "\n".join(markdown_table(("", ""), _facts(manifest))),
        "## What the parameters got\n\n" + "\n".join(markdown_table(*manifest.report.summary())),
        _reproduction(manifest),
    ]
    return _card(repository, ModelCardData(library_name="timm", license=manifest.license, tags=tags), sections)


def _card(repository: str, data: ModelCardData, sections: Sequence[str]) -> str:
    """A card: its metadata and title, the sections that are not empty, and how to cite."""
    title = f"---\n{data.to_yaml()}\n---\n\n# {repository.partition('/')[2]}"
    licence = f"## Licence and citation\n\n{data.license}. If you use this repository, cite:\n\n{_CITATIONS}"
    return "\n\n".join(filter(None, [title, *sections, licence])) + "\n"


def _usage(manifest: Manifest, repository: str) -> str:
    source = HUB_PREFIX + repository
    text = "Plain timm is enough"
    load = (
        "import timm\n\n"
        f'model = timm.create_model("{source}", pretrained=True)\n'
        f'model = timm.create_model("{source}", pretrained=True, num_classes=10)  # another classifier'
    )
    if len(manifest.files) > 1:
        arguments = "".join(f", {key}={value!r}" for key, value in manifest.arguments.items())
        size = format_size(sum(record.size for record in manifest.files.values()))
        text = f"The weights ({size}) are split into {len(manifest.files)} files, which timm's own loader does not read"
        load = (
            "import timm\nfrom huggingface_hub import load_torch_model, snapshot_download\n\n"
            f'model = timm.create_model("{manifest.report.model}"{arguments})\n'
            f'load_torch_model(model, snapshot_download("{repository}"))'
        )
    return f"## Use\n\n{text}:\n\n```python\n{load}\n```"


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    found = manifest.provenance
    rows = [("method", f"`{found['method']}`, {METHODS[found['method']].description}"), ("paper", PAPER)]
    if found["ghn"] is not None:
        rows += [("GHN", f"`{found['ghn']}`"), ("hash of the GHN", f"`{found['ghn_hash']}`")]
    if found["start_layer"] is not None:
        rows += [("L", f"{found['start_layer']} of {found['num_layers']} layers"), ("beta", f"{found['noise']:g}")]
    rows.append(("seed", str(found["seed"])))
    if manifest.arguments:
        given = ", ".join(f"`{key}={value!r}`" for key, value in manifest.arguments.items())
        rows.append(("arguments of the model", given))
    rows += [
        ("parameters", f"{manifest.report.num_parameters:,}"),
        ("predicted by the GHN", f"{manifest.report.predicted_share:.2%} of them"),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.versions.items() if value)),
        *((f"SHA-256 of `{name}`", f"`{record.sha256}`") for name, record in sorted(manifest.files.items())),
    ]
    return rows


def _reproduction(manifest: Manifest) -> str:
    pins = " ".join(f"{name}=={manifest.versions[name].partition('+')[0]}" for name in ("timm-ghn", "timm", "torch"))
    lines = [f"pip install {pins}", reproduction_command(manifest)]
    lines += [
        f"sha256sum {manifest.report.model}/{name}  # {record.sha256}"
        for name, record in sorted(manifest.files.items())
    ]
    note = (
        "These commands make the files again: bit for bit with the same versions on a processor of the same kind "
        f"({manifest.versions['system']}, {manifest.versions['cpu'] or 'unknown'}), equal up to rounding elsewhere."
    )
    ghn = str(manifest.provenance["ghn"] or "")
    if ghn and ghn not in NAMED_GHNS and not ghn.startswith(HUB_PREFIX):
        note += f" The GHN was read from a file that is not part of this repository; its hash stands above (`{ghn}`)."
    return f"## Make it yourself\n\n{note}\n\n```sh\n" + "\n".join(lines) + "\n```"


def reproduction_command(manifest: Manifest) -> str:
    """The command that makes the files of weights, into a folder named like the model."""
    defaults = {entry.name: entry.default for entry in fields(Init) if entry.name != "method"}
    settings = settings_of(manifest.provenance)
    init = {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}
    arguments = [repr(manifest.report.model)] * 2 + [f"init={init!r}"]
    arguments += [] if len(manifest.files) == 1 else [f"max_shard_size={manifest.max_shard_size!r}"]
    arguments += [] if manifest.dtype == "float32" else [f"dtype=torch.{manifest.dtype}"]
    arguments += [f"{key}={value!r}" for key, value in manifest.arguments.items()]
    return shlex.join(["python", "-c", f"import torch, timm_ghn; timm_ghn.init_to_folder({', '.join(arguments)})"])


def ghn_card(ghn: GHN, repository: str, *, license: str, description: str, notes: str) -> str:
    """The README.md of a repository with a GHN.

    Args:
        ghn: The GHN, with `info`.
        repository: "organization/name".
        license: SPDX name of its licence.
        description: What it is, in a line.
        notes: Further text in Markdown, such as how it was trained.
    """
    source = HUB_PREFIX + repository
    facts: list[tuple[str, str]] = [(key, f"`{value}`") for key, value in ghn.config.to_dict().items()]
    facts.append(("parameters", f"{sum(p.numel() for p in ghn.parameters()):,}"))
    if ghn.info is not None:
        facts.append(("hash", f"`{ghn.info.hash}`"))
        told = sorted(ghn.info.metadata.items())
        facts += [(key, f"`{value}`") for key, value in told if key != "format" and len(value) <= 200]
    sections = [
        f"A graph hypernetwork: it reads the graph of a network and predicts its weights. {description}",
        "## Use\n\n```python\nimport timm, timm_ghn\n\n"
        f'init = timm_ghn.Init("ghn-orth", ghn="{source}")\n'
        'model = timm.create_model("convnext_base", init=init)\n```\n\n'
        f"On the command line: `timm-ghn init convnext_base --out DIR --ghn {source}`, for all commands: "
        f"`export TIMM_GHN={source}`.",
        "\n".join(markdown_table(("setting", "value"), facts)),
        notes,
    ]
    tags = ["timm-ghn", "graph-hypernetwork", "weight-prediction"]
    return _card(repository, ModelCardData(library_name="timm-ghn", license=license, tags=tags), sections)
