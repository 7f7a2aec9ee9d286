"""`timm-ghn cache`: look at the cache of initializations, verify it, make it smaller."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence, Sized
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ghn.errors import CommandError
from timm_ghn.text import format_size, table

if TYPE_CHECKING:
    from timm_ghn.storage.upkeep import EntryInfo, Pruned

HELP = "list, verify or remove cached initializations"
DAMAGED = 1
_SIZE_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}}
_SIZE_UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)}
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SHOWN_KEY = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments and the handlers."""
    commands = parser.add_subparsers(dest="cache_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("ls", help="what is there: size, last use, what made it")
    listing.add_argument("--json", action="store_true", help="print JSON, with whole keys and paths")
    listing.set_defaults(handler=_list)
    verify = commands.add_parser("verify", help="read and hash everything; exit status 1 if something is damaged")
    verify.set_defaults(handler=_verify)
    prune = commands.add_parser("prune", help="remove what was not used for longest, and what killed processes left")
    prune.add_argument("--max-size", type=_size, metavar="SIZE", help="what all entries may keep: 20GB, 500MiB")
    prune.add_argument("--older-than", type=_age, metavar="AGE", help="remove what was not used for so long: 30d, 12h")
    prune.set_defaults(handler=_prune)
    remove = commands.add_parser("rm", help="remove entries")
    remove.add_argument("keys", nargs="*", metavar="KEY", help="key as `ls` shows it, or its beginning")
    remove.add_argument("--all", action="store_true", help="remove all entries")
    remove.set_defaults(handler=_remove)
    for command in (prune, remove):
        command.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _list(args: argparse.Namespace) -> int:
    from timm_ghn.storage.upkeep import CacheFolder

    cache = CacheFolder.default()
    infos = cache.entries()
    if args.json:
        print(json.dumps([asdict(info) for info in infos], indent=2, default=str))
        return 0
    if infos:
        header = ("key", "size", "last use", "model", "method", "GHN", "L", "seed", "version")
        print("\n".join(table(header, [_row(info) for info in infos])), end="\n\n")
    total = sum(info.size for info in infos)
    print(f"{_count(infos, 'entry', 'entries')}, {format_size(total)}, in {cache.weights}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from timm_ghn.storage.upkeep import CacheFolder

    damaged = sound = 0
    for info in CacheFolder.default().verify():
        if info.problem:
            damaged += 1
            print(f"damaged: {info.path}: {info.problem}")
        else:
            sound += 1
    print(f"sound entries: {sound}, damaged entries: {damaged}")
    if damaged:
        print("A damaged entry is never used. `timm-ghn cache rm KEY` removes it.")
    return DAMAGED if damaged else 0


def _prune(args: argparse.Namespace) -> int:
    from timm_ghn.storage.upkeep import CacheFolder

    pruned = CacheFolder.default().prune(max_bytes=args.max_size, max_age=args.older_than, dry_run=args.dry_run)
    _print_removed(pruned, args.dry_run)
    return 0


def _remove(args: argparse.Namespace) -> int:
    from timm_ghn.storage.upkeep import CacheFolder

    if args.all == bool(args.keys):
        raise CommandError("rm takes keys, or --all")
    cache = CacheFolder.default()
    keys = [info.key for info in cache.entries()] if args.all else args.keys
    pruned = cache.remove(keys, dry_run=args.dry_run)
    _print_removed(pruned, args.dry_run)
    return DAMAGED if pruned.in_use else 0


def _print_removed(pruned: Pruned, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for info in pruned.removed:
        print(f"{verb} {info.key[:_SHOWN_KEY]}  {format_size(info.size):>8}  {info.made.get('model') or '?'}")
    for info in pruned.in_use:
        print(f"in use, or not removable: {info.key[:_SHOWN_KEY]}")
    entries, files = _count(pruned.removed, "entry", "entries"), _count(pruned.leftovers, "other file", "other files")
    print(f"{verb} {entries} and {files}, {format_size(pruned.freed)}; entries of {format_size(pruned.kept)} stay")


def _row(info: EntryInfo) -> Sequence[object]:
    key, size, used = info.key[:_SHOWN_KEY], format_size(info.size), format_age(time.time() - info.last_use)
    if not info.made:
        return key, size, used, f"({info.problem})", "", "", "", "", ""
    made = {name: "" if value is None else value for name, value in info.made.items()}
    layer = f"{made['start_layer']}/{made['num_layers']}" if made["start_layer"] != "" else ""
    return (
        key,
        size,
        used,
        made["model"],
        made["method"],
        Path(str(made["ghn"])).name,
        layer,
        made["seed"],
        made["version"],
    )


def _count(items: Sized, one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def format_age(seconds: float) -> str:
    """A duration in its largest whole unit."""
    for name, unit in reversed(_TIME_UNITS.items()):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return "now"


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?I?B?)", text.strip().upper())
    unit = found and next((unit for unit in (found[2], f"{found[2]}B") if unit in _SIZE_UNITS), None)
    if not found or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB, 20GB or 4GiB")
    return int(float(found[1]) * _SIZE_UNITS[unit])


def _age(text: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smhdw])", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 90m, 12h, 30d or 8w")
    return float(found[1]) * _TIME_UNITS[found[2]]
