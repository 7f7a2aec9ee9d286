"""Pushing GHNs to the Hub: safetensors with their configuration and a card."""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from pathlib import Path

from timm_ghn.errors import PushError
from timm_ghn.ghn import checkpoint
from timm_ghn.ghn.catalogue import BUNDLED, PPUDA, NamedGHN
from timm_ghn.ghn.config import HUB_FILE
from timm_ghn.ghn.model import GHN
from timm_ghn.ghn.registry import find_named, load_ghn
from timm_ghn.hub.card import CARD, ghn_card
from timm_ghn.hub.push import Outcome, Pushed, PushOptions, destination, find_repository, upload
from timm_ghn.storage.folder import CONFIG_FILE


def push_ghn(
    source: str | GHN,
    repository: str,
    *,
    options: PushOptions | None = None,
    license: str | None = None,
    description: str | None = None,
) -> Pushed:
    """Push a GHN to the Hub, where `ghn="hf-hub:organization/name"` finds it.

    Args:
        source: Name or path of a GHN, or a loaded one.
        repository: "organization/name"; it is created if need be.
        options: How it is pushed.
        license: SPDX name of its licence; known for the GHNs that have names.
        description: What it is, in a line.

    Raises:
        PushError: If the Hub cannot be reached or refuses, or the licence of a GHN without a name is not given.
        TimmGhnError: If the GHN cannot be loaded.
    """
    options = options or PushOptions()
    ghn = load_ghn(source)
    name = ghn.info.name if ghn.info else "in memory"
    entry = find_named(source) if isinstance(source, str) else None
    license = license or (entry.license if entry is not None else None)
    if license is None:
        raise PushError(f"{name}: say which licence it has, for example license='apache-2.0' (--license)")
    if entry is not None:
        description = description or f"{entry.description}; trained on {entry.trained_on}."
    target = destination(repository, options)
    remote = find_repository(target, options, mark=HUB_FILE)
    if options.dry_run:
        size = sum(tensor.numel() * tensor.element_size() for tensor in ghn.state_dict().values())
        known = "replaces what is there" if remote is not None and HUB_FILE in remote.files else "new"
        return Pushed(name, repository, Outcome.PLANNED, f"{size / 1e6:,.1f} MB, {known}")
    with tempfile.TemporaryDirectory(prefix="timm-ghn-") as folder:
        root = Path(folder)
        checkpoint.write_safetensors(ghn, root / HUB_FILE, dict(ghn.info.metadata) if ghn.info else None)
        facts = {"model_type": "timm-ghn", "hash": checkpoint.content_hash(ghn), "ghn": ghn.config.to_dict()}
        (root / CONFIG_FILE).write_bytes(f"{json.dumps(facts, indent=2)}\n".encode())
        card = ghn_card(ghn, repository, license=license, description=description or "", notes=_notes(entry))
        (root / CARD).write_bytes(card.encode())
        return upload(name, root, target, remote, options, f"GHN {name}")


def _notes(entry: NamedGHN | None) -> str:
    """Text about the origin of a GHN that has a name; empty for another one."""
    if entry is None:
        return ""
    if entry.name != BUNDLED:
        home = PPUDA if entry.repository is None else f"https://huggingface.co/{entry.repository}"
        return f"Converted from its authors' checkpoint ({home}, {entry.file}); the weights are theirs, unchanged."
    card = importlib.resources.files("timm_ghn.ghn") / "bundled" / "card.md"
    return card.read_text(encoding="utf-8").partition("\n")[2].strip()
