"""Run commands on caches that a stranger has changed, each in a child under limits.

python -m tests.integration.strangers.run FOLDER --first 0 --count 60   # pairs 0 to 59, a JSON line each
python -m tests.integration.strangers.run FOLDER --first 17 --count 1 --show   # one pair, with its output

A pair is one or two changes of a sealed cache, and a command on it; its number decides both. The process
imports every command once and forks for each pair. FOLDER/world is the whole world of a pair:

    home/        the working directory: cache/ (changed), media/, mine/ (a cache of the user's own), out/
    outside/     files, a cache, a FIFO: nothing in the world may be read or changed
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cache.store.paths import CacheRoot
from tests.integration.strangers.commands import (
    COMMANDS,
    Command,
    call,
    list_again,
    served,
    words_of,
)
from tests.integration.strangers.judge import changed, judge, leaks, short_path, state
from tests.integration.strangers.places import PLACE_KINDS
from tests.integration.strangers.tables import TABLE_KINDS, file_bytes, spec_forged
from tests.integration.strangers.values import JSON_KINDS, OUTSIDE, Unchangeable, index_arrays
from tests.integration.strangers.world import World, build

SEED = 11
DATA_BYTES = 1 << 30
"""What a command may allocate beyond what the process has when it is forked."""
CPU_S = 20
"""Processor time of one command."""
WALL_S = 120
"""Time of one command, also on a busy machine."""
IDLE_S = 12
"""A command that does not compute for this time waits for something that does not come."""
FILE_BYTES = 64 << 20
"""Largest file that a command may write: one that copies an endless file ends there."""
HEAVY = ("train.training", "train.evaluate.evaluation", "train.report.page", "nanomolmo2.dataset")
"""Imported before the caches are built, so that it happens once."""


CONTENT_KINDS: dict[str, tuple[str, Callable[[Path, random.Random], str]]] = {
    **{f"json {name}": ("*.json", change) for name, change in JSON_KINDS.items()},
    **{f"table {name}": ("*.parquet", change) for name, change in TABLE_KINDS.items()},
    "forged": ("space.json", spec_forged),
    "index": ("*.bin", index_arrays),
    "index header": ("*.bin", JSON_KINDS["value"]),
    "bytes": ("*", file_bytes),
}
"""Kind of change -> the files it is about, and the change."""

KINDS = (*CONTENT_KINDS, *PLACE_KINDS)
_SHARES = {
    "link": 5,
    "special": 2,
    "extra": 3,
    "table cells": 4,
    "table columns": 2,
    "forged": 3,
    "json value": 2,
}
_WEIGHTS = [_SHARES.get(kind, 1) * (0.4 if kind == "table bomb" else 1) for kind in KINDS]


# ---- one pair


@dataclass(frozen=True)
class Pair:
    """What a number stands for."""

    number: int
    dice: random.Random
    command: Command
    kinds: tuple[str, ...]
    base: int


def pair_of(number: int) -> Pair:
    """Draw a pair. The first pairs go through all commands and all kinds of change."""
    dice = random.Random(f"{SEED}/{number}")
    if number < 2 * len(COMMANDS):
        command, first = COMMANDS[number % len(COMMANDS)], KINDS[number % len(KINDS)]
    else:
        command = dice.choices(COMMANDS, [command.share for command in COMMANDS])[0]
        first = dice.choices(KINDS, _WEIGHTS)[0]
    kinds = (first,)
    if dice.random() < 0.25:
        kinds = (first, dice.choices(KINDS, _WEIGHTS)[0])
    base = dice.choice([0, 0, 1, 2])
    if base == 1 and command.module in ("cache.convert", "train.evaluate", "train.report"):
        base = 0  # they need the fp16 space
    return Pair(number, dice, command, kinds, base)


def change(world: World, pair: Pair) -> list[str]:
    """Copy a cache to its place, and change it."""
    dice, said = pair.dice, []
    shutil.copytree(world.bases[pair.base], world.cache)
    shutil.copytree(world.top / "mine", world.home / "mine")
    if pair.command.module in ("train.evaluate", "train.report"):
        shutil.copytree(world.top / "trained", world.home / "out" / "trained")
    # With an index, few commands read the commits.
    if dice.random() < 0.5 and not pair.kinds[0].startswith("index"):
        for path in world.cache.glob("spaces/*/index"):
            shutil.rmtree(path)
    for kind in pair.kinds:
        for _ in range(8):
            with contextlib.suppress(Unchangeable):
                said.append(f"{kind}: {_change(world, kind, dice)}")
                break
    if "URL" in pair.command.words and "listing.json" not in "".join(said):
        list_again(CacheRoot(world.cache))
    return said


def _change(world: World, kind: str, dice: random.Random) -> str:
    if kind in PLACE_KINDS:
        return PLACE_KINDS[kind](world.cache, world.outside, dice)
    pattern, change = CONTENT_KINDS[kind]
    files = [
        path
        for path in sorted(world.cache.rglob(pattern))
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 22
    ]
    groups: dict[str, list[Path]] = {}
    for path in files:  # as often of each kind of file
        parts = path.relative_to(world.cache).parts
        groups.setdefault(
            f"{parts[0]} {path.name if path.suffix == '.json' else path.suffix}", []
        ).append(path)
    if not groups:
        raise Unchangeable
    path = dice.choice(groups[dice.choice(sorted(groups))])
    if any(above.is_symlink() for above in path.parents if above.is_relative_to(world.cache)):
        raise Unchangeable
    return f"{path.relative_to(world.cache)}: {change(path, dice)}"


def child(
    world: World, pair: Pair, words: Sequence[str], theirs: Sequence[Path], fds: tuple[int, ...]
) -> NoReturn:
    """Change a cache, say what was changed and how the world is; run the command under limits. Never return.

    Both in one child, because reading Parquet starts threads, which no other child may inherit.
    """
    code = 1
    tell, out, err = fds
    try:
        with os.fdopen(tell, "w") as file:
            said = change(world, pair)
            json.dump((said, state(world.world, *theirs)), file)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        faulthandler.enable(file=2)
        faulthandler.dump_traceback_later(IDLE_S - 2, file=2, repeat=False)
        _limit(resource.RLIMIT_DATA, _data_bytes() + DATA_BYTES)
        _limit(resource.RLIMIT_CPU, CPU_S)
        _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
        _limit(resource.RLIMIT_CORE, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with served(world.cache, words) as words:
            call(pair.command.module, words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _limit(kind: int, most: int) -> None:
    resource.setrlimit(kind, (most, most))


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmData:\s+(\d+) kB", status)[1])  # type: ignore[index]


def run_pair(world: World, pair: Pair, show: bool = False) -> dict[str, Any]:
    """Change a cache, run the command on it, and return what was wrong."""
    for name in ("cache", "mine", "out", "runs"):
        _clear(world.home / name)
    _clear(world.outside / "moved")
    (world.home / "out").mkdir()
    words = words_of(pair.command, [path.name for path in world.bases[pair.base].glob("spaces/*")])
    theirs = [world.home / name for name in ("out", "runs", "mine", "cache", ".local")]
    if "--features mine" not in " ".join(words):
        theirs.remove(world.home / "mine")
    if not pair.command.writes:
        theirs.remove(world.cache)
    out, err = os.memfd_create("out"), os.memfd_create("err")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(world, pair, words, theirs, (write, out, err))
    os.close(write)
    with os.fdopen(read) as file:
        said, before = json.loads(file.read())
    start = time.monotonic()
    code = _wait(pid, start)
    seconds = time.monotonic() - start
    texts = [_text(fd) for fd in (out, err)]
    wrong = judge(pair.command, code, *texts)
    lost = changed(before, state(world.world, *theirs))
    lost = [path for path in lost if Path(path) != world.home]
    if lost:
        wrong.append(f"outside: {', '.join(short_path(world, path) for path in lost[:5])}")
    wrong += leaks(world, pair.command, texts)
    if show:
        print(*texts, sep="\n---- stderr\n", file=sys.stderr)
    return {
        "pair": pair.number,
        "command": " ".join([pair.command.module, *words]),
        "kinds": pair.kinds,
        "changes": said,
        "base": pair.base,
        "code": code,
        "seconds": round(seconds, 2),
        "wrong": wrong,
        "error": texts[1][-1500:] if wrong else _last_line(texts[1])[:200],
    }


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _clear(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(os.fsencode(path))


def _text(fd: int) -> str:
    size = min(os.fstat(fd).st_size, 4 << 20)
    text = os.pread(fd, size, 0).decode("utf-8", "surrogateescape")
    os.close(fd)
    return text


def _wait(pid: int, start: float) -> int:
    """Return the exit code of a child; -9 after it was killed because it waited or took too long."""
    pause = 0.001
    worked, worked_at = "", start
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        if worked != (worked := " ".join(ticks)):
            worked_at = now
        if now - worked_at > IDLE_S or now - start > WALL_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


def _in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a child: threads that it starts would make later forks unsafe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            with os.fdopen(write, "w") as file:
                json.dump(work(), file)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError("a child failed; see above")
    return json.loads(text)


def warm_up(world: World) -> None:
    """Import what the commands import, so that children need not."""

    def modules() -> list[str]:
        with contextlib.redirect_stdout(sys.stderr):
            os.chdir(world.home)
            shutil.copytree(world.bases[0], world.cache)
            shutil.copytree(world.top / "trained", "out/trained")
            for command in COMMANDS:
                if command.module.startswith("train") or command.module == "nanomolmo2":
                    names = [path.name for path in world.bases[0].glob("spaces/*")]
                    words = words_of(command, names)
                    with contextlib.suppress(SystemExit), served(world.cache, words) as given:
                        call(command.module, given)
        return sorted(name for name in sys.modules if name != "__main__")

    for name in _in_child(modules):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _threads() -> int:
    """Return the number of our threads. That of jemalloc, which Arrow uses, knows of forks."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return len([name for name in names if not name.startswith("jemalloc")])


def main() -> None:
    """Run some pairs; print a JSON line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--command", default="")
    options = parser.parse_args()
    world = World(options.folder.absolute())
    shutil.rmtree(world.top / "world", ignore_errors=True)
    shutil.rmtree(world.top / "bases", ignore_errors=True)
    for name in ("mine", "trained", "bombs"):
        shutil.rmtree(world.top / name, ignore_errors=True)
    os.environ["HOME"] = str(world.home)
    os.environ["FUZZ_BOMBS"] = str(world.top / "bombs")
    OUTSIDE.append(world.outside)

    for name in HEAVY:
        importlib.import_module(name)

    def built() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            build(world)

    _in_child(built)
    os.chdir(world.home)
    warm_up(world)
    for number in range(options.first, options.first + options.count):
        pair = pair_of(number)
        if options.command in " ".join([pair.command.module, *pair.command.words]):
            assert _threads() <= 1, "a process that is forked while it has threads may hang"
            print(json.dumps(run_pair(world, pair, options.show)), flush=True)


if __name__ == "__main__":
    main()
