"""Where timm-ghn keeps files, how it writes them (never half of one), and the hash of one."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
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


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network; read from the environment at each call."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing, also when the writer dies.

    Args:
        path: File to write; its folder is created.
        data: The whole content.

    Raises:
        OSError: If the folder or the file cannot be written. An existing file is then left as it was.
    """
    save_atomically(path, lambda temporary: temporary.write_bytes(data))


def save_atomically(path: str | os.PathLike[str], save: Callable[[Path], object], *, durable: bool = True) -> None:
    """Have a file written under another name in the same folder, which then replaces `path` in one step.

    Args:
        path: File to write; its folder is created.
        save: Writes the whole content to a path at which there is nothing.
        durable: Whether to wait until the content is on the disk. Without it, a file may be there without its content
            after a power failure, though not after a crash of the program.

    Raises:
        OSError: If the folder or the file cannot be written. An existing file is then left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        save(temporary)
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
