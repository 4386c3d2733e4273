"""Run commands on caches that a stranger has changed, each in a forked child under limits; judge what they do.

python -m tests.integration.cache.strangers FOLDER --first 0 --count 60   # pairs 0 to 59, a JSON line each
python -m tests.integration.cache.strangers FOLDER --first 17 --count 1 --show   # one pair, with its output

A pair is one or two changes of a sealed cache, and a command on it; its number decides both. The process
imports every command once and forks for each pair. FOLDER/world is the whole world of a pair:

    home/        the working directory: cache/ (changed), media/, mine/ (a cache of the user's own), out/
    outside/     files, a cache, a FIFO: nothing here or elsewhere in the world may be read, created or changed
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
import runpy
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cache.store import index_file
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space, read_info
from tests.integration.cache.stranger_places import PLACE_KINDS
from tests.integration.cache.stranger_tables import TABLE_KINDS, file_bytes, spec_forged
from tests.integration.cache.stranger_values import JSON_KINDS, OUTSIDE, Unchangeable, index_arrays
from tests.support.encode_jobs import draw, shoot

SEED = 11
DATA_BYTES = 1 << 30
"""What a command may allocate beyond what the process has when it is forked."""
CPU_S = 20
"""Processor time of one command."""
WALL_S = 90
"""Time of one command: it is only reached by one that waits, also on a busy machine."""
FILE_BYTES = 64 << 20
"""Largest file that a command may write: one that copies an endless file ends there."""
SECRET = "SECRET-OF-OUTSIDE"
"""What the files outside say: it may be in no output."""

ENCODERS = """encoders:
  tiny: {library: demo, activation: gelu, blocks: [0], pool_frame: 1, batch_size: 4,
         tower: {image_size: 28, patch_size: 14, width: 64, depth: 1, heads: 2}}
"""
_TINY = (
    "--encoder",
    "tiny",
    "--random-weights",
    "--device",
    "cpu",
    "--workers",
    "0",
    "--threads",
    "1",
)
_TRAIN = ("--llm", "random:qwen3-tiny", "--device", "cpu", "--hardware", "cpu", "--held-out", "0.3")
_TRAIN += ("--min-coverage", "0.1", "--max-sequence-length", "512", "--max-tokens", "512")


HEAVY = ("train.run", "train.evaluate.__main__", "train.report.__main__", "nanomolmo2.dataset")
"""Imported before the caches are built, so that it happens once."""


@dataclass(frozen=True)
class Command:
    """A command line, and what it may change."""

    module: str
    words: tuple[str, ...]
    writes: bool = False
    """Whether it may change the cache."""
    codes: tuple[int, ...] = (0, 2)
    share: int = 4
    """How often it is drawn."""


def _command(line: str, *more: str, **options: Any) -> Command:
    module, *words = line.split()
    return Command(module, (*words, *more), **options)


COMMANDS = (
    _command("cache.ls"),
    _command("cache.ls --failures"),
    _command("cache.ls --notes --json", share=1),
    _command("cache.ls --json", share=1),
    _command("cache.verify", codes=(0, 1, 2)),
    _command("cache.verify --deep", codes=(0, 1, 2)),
    _command("cache.verify --json --deep --no-hash", codes=(0, 1, 2), share=1),
    _command("cache.verify --deep --repair", writes=True, codes=(0, 1, 2), share=6),
    _command("cache.verify --repair", writes=True, codes=(0, 1, 2)),
    _command("cache.gc"),
    _command("cache.gc --delete", writes=True, share=6),
    _command("cache.gc --unreferenced --damaged --delete", writes=True, share=6),
    _command("cache.gc --drop-space SPACE --delete", writes=True, share=3),
    _command("cache.gc --drop-space SPACE", share=1),
    _command("cache.merge --source cache --features mine", codes=(0, 1, 2), share=6),
    _command(
        "cache.merge --source cache --features mine --samples theirs", codes=(0, 1, 2), share=2
    ),
    _command("cache.merge --source cache --features out/new", codes=(0, 1, 2)),
    _command("cache.merge --source mine --features cache", writes=True, codes=(0, 1, 2), share=6),
    _command("cache.convert --codec int8", writes=True, codes=(0, 1, 2), share=6),
    _command("cache.convert --pool 2 --format webdataset", writes=True, codes=(0, 1, 2), share=2),
    _command("cache.export --to safetensors --out out/st --unpack"),
    _command("cache.export --to webdataset --out out/tars --dataset talks", share=6),
    _command("cache.export --to safetensors --out out/st --dataset photos", share=2),
    _command("cache.share", writes=True),
    _command("cache.view --out out/view.html", share=6),
    _command("encode.run --dataset photos=folder:media --codec fp16", *_TINY, writes=True, share=8),
    _command("encode.run --dataset own=folder:more --codec fp16", *_TINY, writes=True, share=4),
    _command(
        "encode.run --dataset photos=folder:media --codec fp16 --rehash --retry-failed",
        *(*_TINY, "--format", "webdataset"),
        writes=True,
        share=2,
    ),
    _command("encode.run --dataset photos=folder:media --codec fp16 --plan", *_TINY, share=2),
    _command("encode.run --check 3 --codec fp16", *_TINY, codes=(0, 1, 2)),
    _command("train.run --inspect", *_TRAIN, share=4),
    _command("train.run --max-steps 1 --run out/run", *_TRAIN, share=2),
    _command(
        "train.evaluate --run out/trained/stage1 --features cache --device cpu --datasets talks --no-blind",
        share=2,
    ),
    _command("train.report --run out/trained/stage1 --features cache --device cpu", share=2),
    _command("nanomolmo2 cache", share=4),
)
"""SPACE is replaced by the name of the first space; `nanomolmo2` stands for reading all in Python."""

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


@dataclass(frozen=True)
class World:
    """The folders of the pairs."""

    top: Path

    @property
    def world(self) -> Path:
        return self.top / "world" / "a" / "b"

    @property
    def home(self) -> Path:
        return self.world / "home"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def outside(self) -> Path:
        return self.world / "outside"

    @property
    def bases(self) -> list[Path]:
        return sorted((self.top / "bases").iterdir())


# ---- the caches that are changed


def build(world: World) -> None:
    """Make the world, and the caches that the pairs copy. Run in a child, since it starts threads."""
    (world.home / "out").mkdir(parents=True)
    os.chdir(world.home)
    Path("nanomolmo2.yaml").write_text(ENCODERS)
    paths = draw(Path("media"), 5)
    shoot(Path("media"), [3])
    Path("media/broken.png").write_bytes(b"no image")
    shutil.copytree("media", "more")
    draw(Path("more"), 2, first=50)
    _encode("fp16", "media")
    encoded = CacheRoot(Path("cache"))
    info = read_info(encoded.space(encoded.space_names()[0]))
    # Again, in shards of two rows, with an index file for however few commits.
    shutil.rmtree("cache/spaces")
    index_file.WORTH_COMMITS = 1
    made = Space.create(encoded, info.spec, info.load, shard_bytes=2 * info.spec.row_bytes("image"))
    _encode("fp16", "media")
    index_file.save_index(made.paths, made.info)
    write_samples(encoded, "talks", [_talk(paths[i].absolute(), i) for i in range(5)])
    _train("runs")
    shutil.copytree("cache", world.top / "bases" / "0")
    _run("cache.convert", "--codec", "int8", "--format", "webdataset")
    for name in encoded.space_names():
        if "-int8-" in name:
            space = Space.open(encoded.space(name))
            index_file.save_index(space.paths, space.info)
    _litter(Path("cache"))
    _run("cache.share")
    shutil.copytree("cache", world.top / "bases" / "2")
    one = world.top / "bases" / "1"
    shutil.copytree("cache", one)
    for name in encoded.space_names():
        if "-fp16-" in name:
            shutil.rmtree(one / "spaces" / name)
    shutil.rmtree("cache")
    _encode("fp16", "more", "own")
    Path("cache").rename(world.top / "mine")
    Path("runs/default").rename(world.top / "trained")
    shutil.rmtree("runs")
    _make_outside(world)


def _encode(codec: str, folder: str, name: str = "photos") -> None:
    words = ("--codec", codec, "--commit-every-s", "0")
    _run("encode.run", "--dataset", f"{name}=folder:{folder}", *words, *_TINY)


def _train(run: str) -> None:
    _run("train.run", "--max-steps", "1", *_TRAIN)
    _run("train.run", "--inspect", *_TRAIN)


def _talk(path: Path, number: int) -> Sample:
    turns = [
        ("user", f"<image>What is {number}?"),
        ("assistant", "a picture"),
        ("user", "And?"),
        ("assistant", "no"),
    ]
    return Sample(
        id=str(number),
        dataset="talks",
        messages=tuple(Message(role=role, content=text) for role, text in turns),
        media=(MediaRef(source=str(path)),),
        task="talk",
    )


def _litter(cache: Path) -> None:
    """Leave what crashes and repairs leave behind."""
    for name in ("damaged/samples/photos", "damaged/media", "garbage/old"):
        (cache / name).mkdir(parents=True)
        (cache / name / "part-00000.parquet").write_bytes(b"old")
    for space in sorted((cache / "spaces").iterdir()):
        (space / "commits" / "image-00000000.parquet.0123abcd.partial").write_bytes(b"x")
        (space / "features" / "image" / "c" / "77").mkdir(parents=True)
        (cache / "locks" / space.name).mkdir(exist_ok=True)
        (cache / "locks" / space.name / "worker-7.lock").write_bytes(b"")


def _make_outside(world: World) -> None:
    outside = world.outside
    shutil.copytree(world.top / "bases" / "2", outside / "cache")
    said = Message(role="assistant", content=SECRET)
    for name in ("photos", "talks"):
        sample = Sample(id="s", dataset=name, messages=(Message(role="user", content=SECRET), said))
        write_samples(CacheRoot(outside / "cache"), name, [sample])
    for name in (
        "secret.txt",
        "folder/a.txt",
        "folder/b/c.txt",
        "folder/part-00000.parquet",
        "folder/0",
    ):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text(f"{SECRET}\n" * 3)
    (outside / "folder" / "driver.lock").write_text(json.dumps({"holder": SECRET, "token": SECRET}))
    os.mkfifo(outside / "fifo")
    draw(outside, 1, first=99)
    next(outside.glob("*.png")).rename(outside / "private.png")


def _run(module: str, *words: str) -> None:
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (0, None):
            raise RuntimeError(f"{module} {words}: exit {end.code}") from None


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
    if dice.random() < 0.5 and not pair.kinds[0].startswith(
        "index"
    ):  # else few commands would read the commits
        for path in world.cache.glob("spaces/*/index"):
            shutil.rmtree(path)
    for kind in pair.kinds:
        for _ in range(8):
            with contextlib.suppress(Unchangeable):
                said.append(f"{kind}: {_change(world, kind, dice)}")
                break
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


def words_of(world: World, pair: Pair) -> list[str]:
    """Return the words of the command line."""
    names = sorted(path.name for path in world.bases[pair.base].glob("spaces/*"))
    words = [names[0] if word == "SPACE" else word for word in pair.command.words]
    needs_space = {"cache.convert", "cache.export", "cache.view", "train.run"}
    if len(names) > 1 and pair.command.module in needs_space:
        words += ["--space", names[0]]
    return words


def call(module: str, words: Sequence[str]) -> None:
    """Run a command as `python -m` does, or read everything in Python."""
    if module == "nanomolmo2":
        from configs import command

        command(lambda: _read_all(words[0]), errors=_errors())
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _errors() -> tuple[type[Exception], ...]:
    from cache.errors import CacheError

    return (CacheError,)


def _read_all(where: str) -> int:
    import nanomolmo2 as nm

    names = [path.name for path in (Path(where) / "spaces").glob("*")]
    cache = nm.open(where, sorted(names)[0] if len(names) > 1 else None)
    for name in cache.datasets:
        dataset = cache.dataset(name)
        for at in range(min(len(dataset), 20)):
            dataset[at]
    for name in sorted(map(str, Path("media").absolute().iterdir())):
        if name in cache:
            cache[name]
    return 0


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
        faulthandler.dump_traceback_later(WALL_S - 10, file=2)
        _limit(resource.RLIMIT_DATA, _data_bytes() + DATA_BYTES)
        _limit(resource.RLIMIT_CPU, CPU_S)
        _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
        _limit(resource.RLIMIT_CORE, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
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


def run_pair(world: World, pair: Pair, show: bool = False) -> dict[str, Any]:
    """Change a cache, run the command on it, and return what was wrong."""
    for name in ("cache", "mine", "out", "runs"):
        _clear(world.home / name)
    _clear(world.outside / "moved")
    (world.home / "out").mkdir()
    words = words_of(world, pair)
    theirs = [world.home / name for name in ("out", "runs", "mine", "cache")]
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
    wrong = judge(pair, code, *texts)
    lost = changed(before, state(world.world, *theirs))
    lost = [path for path in lost if Path(path) != world.home]
    if lost:
        wrong.append(f"outside: {', '.join(short_path(world, path) for path in lost[:5])}")
    wrong += leaks(world, pair, texts)
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


def short_path(world: World, path: str) -> str:
    """Return a path for a message."""
    return ascii(path.removeprefix(f"{world.world}/"))


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
    """Return the exit code of a child; -9 after it was killed because it took too long."""
    pause = 0.001
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - start > WALL_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


def judge(pair: Pair, code: int, out: str, err: str) -> list[str]:
    """Return what a command did that it may not: its exit code, its last words, its characters."""
    wrong = []
    if code not in pair.command.codes:
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


def leaks(world: World, pair: Pair, texts: Sequence[str]) -> list[str]:
    """Return where what the files outside say is found: in the output, or in files that were written."""
    wrong = []
    if any(SECRET in text for text in texts):
        wrong.append("the output has the content of a file outside")
    folders = [
        world.home / "out",
        world.home / "mine",
        *([world.cache] if pair.command.writes else []),
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
                    with contextlib.suppress(SystemExit):
                        call(command.module, command.words)
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
