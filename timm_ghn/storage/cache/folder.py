"""Where things lie in the folder of a cache, and what a recipe holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from timm_ghn.errors import CacheError

_MAX_RECIPE_BYTES = 4096


@dataclass(frozen=True)
class CacheFolder:
    """The folder of a cache.

    Attributes:
        root: The folder; it need not exist.
    """

    root: Path

    @property
    def weights(self) -> Path:
        """Folder of the entries and their locks."""
        return self.root / "weights"

    @property
    def recipes(self) -> Path:
        """Folder of the recipes."""
        return self.root / "recipes"

    def path(self, key: str) -> Path:
        """File of an entry."""
        return self.weights / f"{key}.safetensors"

    def lock_path(self, key: str) -> Path:
        """Lock file of an entry."""
        return self.weights / f".{key}.lock"

    def recipe_path(self, recipe: str) -> Path:
        """File of a recipe."""
        return self.recipes / f"{recipe}.json"


def read_recipe(path: Path) -> str:
    """The key in a recipe's file.

    Raises:
        CacheError: If it is not what was written, or was written for another recipe.
        OSError, ValueError, KeyError, TypeError: If it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a regular file")
    with path.open("rb") as file:
        data = json.loads(file.read(_MAX_RECIPE_BYTES))
    key, digest = data["key"], data["sha256"]
    if not isinstance(key, str) or not key.isalnum() or digest != recipe_digest(path.stem, key):
        raise CacheError("its content does not match its hash")
    return key


def recipe_digest(recipe: str, key: str) -> str:
    """Hash of a recipe's file: of its name and of the key in it."""
    return hashlib.sha256(f"{recipe} {key}".encode()).hexdigest()
