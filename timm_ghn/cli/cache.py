"""`timm-ghn cache`: look at the cache of initializations, verify it, make it smaller."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict
from pathlib import Path

from timm_ghn.errors import CommandError
from timm_ghn.storage.upkeep import CacheFolder, EntryInfo, Pruned
from timm_ghn.text import format_size, table

HELP = "list, verify or remove cached initializations"
DAMAGED = 1
_SIZE_UNITS = {"": 1, "b": 1}
_SIZE_UNITS |= {f"{letter}{end}": 1000**power for power, letter in enumerate("kmgt", 1) for end in ("", "b")}
_SIZE_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
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
    prune.add_argument("--max-size", type=parse_size, metavar="SIZE", help="what all entries may keep: 20GB, 500MiB")
    prune.add_argument(
        "--older-than", type=parse_age, metavar="AGE", help="remove what was not used for so long: 30d, 12h"
    )
    prune.set_defaults(handler=_prune)
    remove = commands.add_parser("rm", help="remove entries")
    remove.add_argument("keys", nargs="*", metavar="KEY", help="key as `ls` shows it, or its beginning")
    remove.add_argument("--all", action="store_true", help="remove all entries")
    remove.set_defaults(handler=_remove)
    for command in (prune, remove):
        command.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _list(args: argparse.Namespace) -> int:
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
    from timm_ghn.storage.cache import WeightCache

    sound = damaged = 0
    for info in WeightCache.default().verify():
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
    _print_removed(
        CacheFolder.default().prune(max_bytes=args.max_size, max_age=args.older_than, dry_run=args.dry_run),
        args.dry_run,
    )
    return 0


def _remove(args: argparse.Namespace) -> int:
    if args.all == bool(args.keys):
        raise CommandError("rm takes keys, or --all")
    cache = CacheFolder.default()
    keys = [info.key for info in cache.entries()] if args.all else args.keys
    pruned = cache.remove(keys, dry_run=args.dry_run)
    _print_removed(pruned, args.dry_run)
    return DAMAGED if pruned.failed else 0


def _print_removed(pruned: Pruned, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for info in pruned.removed:
        print(f"{verb} {info.key[:_SHOWN_KEY]}  {format_size(info.size):>8}  {info.made.get('model') or '?'}")
    entries, files = _count(pruned.removed, "entry", "entries"), _count(pruned.leftovers, "other file", "other files")
    print(f"{verb} {entries} and {files}, {format_size(pruned.freed)}; entries of {format_size(pruned.kept)} stay")


def _row(info: EntryInfo) -> Sequence[object]:
    key, size, used = info.key[:_SHOWN_KEY], format_size(info.size), format_age(time.time() - info.last_use)
    if not info.made:
        return key, size, used, f"({info.problem})", *[""] * 5
    made = defaultdict(str, {name: value for name, value in info.made.items() if value is not None})
    layer = f"{made['start_layer']}/{made['num_layers']}" if made["start_layer"] else ""
    ghn = Path(str(made["ghn"])).name
    return key, size, used, made["model"], made["method"], ghn, layer, made["seed"], made["version"]


def _count(items: Sized, one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def format_age(seconds: float) -> str:
    """A duration in its largest whole unit."""
    for name, unit in reversed(_TIME_UNITS.items()):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return "now"


def parse_size(text: str) -> int:
    """Bytes, from text such as "20GB" or "4GiB"."""
    return int(_quantity(text, _SIZE_UNITS, "size; write 500MB, 20GB or 4GiB"))


def parse_age(text: str) -> float:
    """Seconds, from text such as "90m" or "30d"."""
    return _quantity(text, _TIME_UNITS, "age; write 90m, 12h, 30d or 8w")


def _quantity(text: str, units: Mapping[str, int], what: str) -> float:
    """A number and a unit, in the smallest unit."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
    return float(found[1]) * units[found[2]]
