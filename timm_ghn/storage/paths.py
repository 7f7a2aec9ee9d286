"""Where timm-ghn keeps files, and the hash of one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CACHE_VARIABLE = "TIMM_GHN_CACHE"
"""Environment variable that names the cache directory."""


def cache_directory() -> Path:
    """Directory of downloaded GHNs and cached initializations; it need not exist.

    Read from the environment at each call: `TIMM_GHN_CACHE`, else `timm_ghn` inside of `HF_HOME`, else inside of
    huggingface_hub's default home.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        from huggingface_hub import constants

        home = constants.HF_HOME
    return Path(os.path.expandvars(home)).expanduser() / "timm_ghn"


def closest_existing(path: Path) -> Path:
    """The path itself if there is something, else the closest of the folders above it that exists."""
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network; read from the environment at each call."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def git_blob_sha1(data: bytes) -> str:
    """The hash under which git stores a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
