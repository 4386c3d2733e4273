"""Judge what a command did on a changed cache: its exit, its output, and what it touched."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tests.integration.strangers.commands import Command
from tests.integration.strangers.world import SECRET, World

State = dict[str, list[int]]


def state(top: Path, *left_out: Path) -> State:
    """Return what the system says of every file below a folder: any change of one changes its ctime."""
    found: State = {}
    pending = [top]
    while pending:
        folder = pending.pop()
        with os.scandir(os.fsencode(folder)) as entries:
            for entry in entries:
                path = Path(os.fsdecode(entry.path))
                if path in left_out:
                    continue
                stat = entry.stat(follow_symlinks=False)
                found[os.fsdecode(entry.path)] = [
                    *(stat.st_mode, stat.st_ino, stat.st_size),
                    *(stat.st_mtime_ns, stat.st_ctime_ns),
                ]
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
    return found


def changed(before: State, after: State) -> list[str]:
    """Return the paths that were created, changed or removed."""
    paths = sorted(before.keys() | after.keys())
    return [path for path in paths if before.get(path) != after.get(path)]


def short_path(world: World, path: str) -> str:
    """Return a path for a message."""
    return ascii(path.removeprefix(f"{world.world}/"))


def judge(command: Command, code: int, out: str, err: str) -> list[str]:
    """Return what a command did that it may not: its exit code, its last words, its characters."""
    wrong = []
    if code not in command.codes:
        wrong.append(f"exit {code}")
    if "Traceback (most recent" in err or "Fatal Python" in err or "Exception ignored" in err:
        wrong.append("traceback")
    lines = [line for line in err.split("\n") if line.startswith("error: ")]
    if code == 2 and len(lines) != 1:
        wrong.append(f"{len(lines)} lines of error")
    if any(len(line) > 4000 for line in lines):
        wrong.append(f"an error of {max(map(len, lines)):,} characters")
    for name, text in (("stdout", out), ("stderr", err)):
        found = sorted({c for c in text if forbidden(c)})
        if found:
            wrong.append(f"{name} has {''.join(found)!a}")
        if re.search(r"^FORGED", text, re.MULTILINE):
            wrong.append(f"{name} has a line that the data wrote")
    return wrong


_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def forbidden(character: str) -> bool:
    """Return whether a terminal may act on a character, or show others elsewhere because of it."""
    if character == "\n" or " " <= character <= "~":
        return False
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return True
    return unicodedata.bidirectional(character) in _BIDI or character in "\u200e\u200f\u061c"


def leaks(world: World, command: Command, texts: Sequence[str]) -> list[str]:
    """Return where what the files outside say is found: in the output, or in files that were written."""
    wrong = []
    if any(SECRET in text for text in texts):
        wrong.append("the output has the content of a file outside")
    folders = [
        world.home / "out",
        world.home / "mine",
        *([world.cache] if command.writes else []),
    ]
    for folder in folders:
        for path in folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else ():
            if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 24:
                continue
            data = path.read_bytes()
            if SECRET.encode() in data:
                wrong.append(f"{short_path(world, str(path))} has the content of a file outside")
            if path.suffix == ".html" and b"<script>FORGED" in data:
                wrong.append(f"{path.name} has a script that the data wrote")
    return wrong
