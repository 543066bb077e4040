#!/usr/bin/env python3
"""Holds the tree to its structure: no room includes one above it, and no file of the product is over 600 lines.

Rooms are folders; docs/design.md draws them. A file of a room may include its own room and those below, in the order of ROOMS.
Called by scripts/lint; prints each offence and ends with 1 if there is one.
"""
import re
import subprocess
import sys

ROOMS = {
    "core": ["core", "core/backup", "core/memory", "core/sleep", "core/control"],
    # At the top the ways in: torch_memory_saver's functions and dormouse.h, and the hooks.
    "shim": ["shim/process", "shim/presets", "shim/torch", "shim/rules", "shim/abi", "shim/hooks", "shim"],
    "config": ["config"],
    "cli": ["cli"],
}
# From the bottom up: who may include whom.
HOUSES = {
    "config": {"config"},
    "core": {"config", "core"},
    "cli": {"config", "core", "cli"},
    "shim": {"config", "core", "shim"},
}
MOST_LINES = 600
INCLUDE = re.compile(r'^\s*#include "((?:core|config|cli|shim)/[^"]+)"', re.MULTILINE)


def room_of(path):
    return path.rpartition("/")[0]


def offences(path, text):
    house = path.partition("/")[0]
    lines = text.count("\n")
    if lines > MOST_LINES:
        yield f"{path}: {lines} lines; {MOST_LINES} are the most"
    for included in INCLUDE.findall(text):
        other = included.partition("/")[0]
        if house in HOUSES and other not in HOUSES[house]:
            yield f"{path} includes {included}: {house} may include {', '.join(sorted(HOUSES[house]))}"
        elif house == other and house in ROOMS:
            order = ROOMS[house]
            if order.index(room_of(included)) > order.index(room_of(path)):
                yield f"{path} includes {included}, a room above its own"


def main():
    patterns = [f"{house}/*.{ending}" for house in ("config", "core", "shim", "cli") for ending in ("cc", "h", "py")]
    listed = subprocess.run(["git", "ls-files", *patterns], capture_output=True, text=True, check=True).stdout.split()
    found = []
    for path in listed:
        with open(path, encoding="utf-8") as file:
            found += offences(path, file.read())
    print("\n".join(found) if found else f"{len(listed)} files in their rooms")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
