"""The GHNs that are known by name: what each is, where its file is published, and whether it is on this disk.

Nothing here imports torch, so that `timm-ghn ghns` answers at once.
"""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

from timm_ghn.ghn.config import HUB_FILE
from timm_ghn.storage.paths import cache_directory

DEFAULT = "ghn2-imagenet"
BUNDLED = "bundled"
URL_VARIABLE = "TIMM_GHN_GHN_URL"
"""Environment variable that names a mirror of the ppuda repository's files."""
PPUDA = "https://raw.githubusercontent.com/facebookresearch/ppuda/4673a42507a9dcd0a5ae04e74599e8c92af689b9"
GHN3 = "SamsungSAILMontreal/ghn3"
"""Hub repository of the authors of GHN-3."""


@dataclass(frozen=True)
class NamedGHN:
    """A GHN that is known by name.

    Attributes:
        name: The name.
        description: What it is, in a line.
        trained_on: Data set.
        num_parameters: Number of its weights, 4 bytes each in the published file.
        license: SPDX name of its licence.
        accuracy: What its authors published, in percent; the networks were not trained unless it says so.
        file: Published file: a path in ppuda's repository, or in the Hub repository; None for the bundled GHN.
        git_blob_sha1: SHA-1 that git gives the content of a file of ppuda's; None elsewhere.
        repository: Hub repository; None for ppuda's files and the bundled GHN.
        revision: Branch, tag or commit of the Hub repository; None for its default branch.
    """

    name: str
    description: str
    trained_on: str
    num_parameters: int
    license: str = "mit"
    accuracy: str = ""
    file: str | None = None
    git_blob_sha1: str | None = None
    repository: str | None = None
    revision: str | None = None

    @property
    def full_name(self) -> str:
        """The name that `load_ghn` takes, with the revision."""
        return self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def path(self) -> Path:
        """File that the GHN is read from: in the cache, converted to safetensors, or inside of this package."""
        if self.file is None:
            return Path(str(importlib.resources.files("timm_ghn.ghn") / "bundled" / HUB_FILE))
        return cache_directory() / "ghns" / f"{self.full_name.replace('/', '-')}.safetensors"

    @property
    def manual_path(self) -> Path:
        """Where a user may put the published file by hand."""
        return self.path.with_name(Path(self.file or self.path).name)

    @property
    def url(self) -> str:
        """Where the published file is downloaded from."""
        if self.repository is not None:
            return f"hf-hub:{self.repository}{self.full_name.removeprefix(self.name)}/{self.file}"
        return f"{(os.environ.get(URL_VARIABLE) or PPUDA).rstrip('/')}/{self.file}"

    @property
    def on_disk(self) -> bool:
        """Whether the GHN can be loaded without the network."""
        return self.path.is_file() or self.manual_path.is_file() or self.hub_path is not None

    @property
    def hub_path(self) -> Path | None:
        """The published file in huggingface_hub's cache, if it is there."""
        if self.repository is None or self.file is None:
            return None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None


def _ppuda(name: str, description: str, size: int, top1: str, sha1: str) -> NamedGHN:
    data, file = ("CIFAR-10" if name.endswith("cifar10") else "ImageNet"), f"checkpoints/{name.replace('-', '_')}.pt"
    return NamedGHN(name, description, data, size, "mit", f"ResNet-50 {top1}", file, sha1)


def _ghn3(name: str, description: str, size: int, accuracy: str, file: str) -> NamedGHN:
    return NamedGHN(name, description, "ImageNet", size, "mit", accuracy, file, repository=GHN3)


_GHN2 = "GHN-2 of Knyazev et al. 2021, the one of the GHN-Orth paper"
_GHN1 = "GHN-1: no virtual edges, scaling or layer norm"
_MLP = "Baseline whose nodes do not see each other"
_ALL = (
    _ppuda(DEFAULT, _GHN2, 1_749_464, "5.3 (top-5)", "7b5d6733e9fdf0069bc6186cad3a0b1b54fda68d"),
    _ghn3("ghn3-t", "GHN-3-T/m8 of Knyazev et al. 2023", 6_906_632, "ResNet-50 10.4", "ghn3tm8.pt"),
    _ghn3("ghn3-s", "GHN-3-S/m8", 35_810_368, "", "ghn3sm8.pt"),
    _ghn3("ghn3-l", "GHN-3-L/m8", 214_668_960, "", "ghn3lm8.pt"),
    _ghn3("ghn3-xl", "GHN-3-XL/m16, the strongest", 654_365_184, "ResNet-50 20.0; 43.7 after 1 epoch", "ghn3xlm16.pt"),
    _ghn3("ghn2", "GHN-2 as the authors of GHN-3 use it", 1_749_464, "ResNet-50 1.1", "ghn2.pt"),
    _ppuda("ghn1-imagenet", _GHN1, 1_749_368, "6.9 (top-5)", "985ebeb350c4ae79e0553d88c07d986fa69c227b"),
    _ppuda("ghn2-cifar10", "GHN-2 for small images", 1_620_764, "58.6", "4f290e0fad1b73066eeabb50be52e0c377d0b15b"),
    _ppuda("ghn1-cifar10", "GHN-1 for small images", 1_620_668, "19.2", "0c97a283aefc0445dd357c08f1b36698149b8013"),
    _ppuda("mlp-cifar10", _MLP, 1_614_396, "17.7", "3a987c98b437fd2dfc603668a846f2b632ed28a3"),
    NamedGHN(BUNDLED, "Small GHN-2 that comes with timm-ghn", "Tiny-ImageNet, 32 x 32", 1_645_464, "apache-2.0"),
)
NAMED_GHNS: dict[str, NamedGHN] = {entry.name: entry for entry in _ALL}
"""The GHNs that `load_ghn` knows by name."""
