"""The commands of the fuzzer: their command lines, what they may change, and how they exit."""

from __future__ import annotations

import contextlib
import hashlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanomolmo2 as nm
from cache.errors import CacheError
from cache.format.checksums import sealed_json
from cache.remote.listing import is_table
from cache.store.paths import LISTING, CacheRoot
from configs import command
from tests.integration.strangers.world import TINY, TRAIN
from tests.support.remote_servers import WebServer


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


_REMOTE = ("--allow-private", "--mirror", "out/mirror")
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
    _command("encode.run --dataset photos=folder:media --codec fp16", *TINY, writes=True, share=8),
    _command("encode.run --dataset own=folder:more --codec fp16", *TINY, writes=True, share=4),
    _command(
        "encode.run --dataset photos=folder:media --codec fp16 --rehash --retry-failed",
        *(*TINY, "--format", "webdataset"),
        writes=True,
        share=2,
    ),
    _command("encode.run --dataset photos=folder:media --codec fp16 --plan", *TINY, share=2),
    _command("encode.run --check 3 --codec fp16", *TINY, codes=(0, 1, 2)),
    _command("train.run --inspect", *TRAIN, share=4),
    _command("train.run --max-steps 1 --run out/run", *TRAIN, share=2),
    _command(
        "train.evaluate --run out/trained/stage1 --features cache --device cpu --datasets talks --no-blind",
        share=2,
    ),
    _command("train.report --run out/trained/stage1 --features cache --device cpu", share=2),
    _command("nanomolmo2 cache SPACE", share=4),
    _command("cache.ls --features URL", *_REMOTE, share=3),
    _command("train.run --inspect --features URL", *_REMOTE, *TRAIN, share=3),
    _command("nanomolmo2 URL SPACE", share=3),
)
"""URL is replaced by that of the cache on a server of the loopback, SPACE by the name of the first space;
`nanomolmo2` stands for reading all in Python."""


def words_of(one: Command, spaces: Sequence[str]) -> list[str]:
    """Return the words of a command line for a cache with these spaces."""
    names = sorted(spaces)
    words = [names[0] if word == "SPACE" else word for word in one.words]
    needs_space = {"cache.convert", "cache.export", "cache.view", "train.run"}
    if len(names) > 1 and one.module in needs_space:
        words += ["--space", names[0]]
    return words


@contextlib.contextmanager
def served(folder: Path, words: Sequence[str]) -> Iterator[list[str]]:
    """Serve a cache if the command line needs that; yield the words with its URL."""
    if "URL" not in words:
        yield list(words)
        return

    def refuse(handler: Any, path: str) -> bool:
        """Answer 404 where our own server must not read."""
        file = folder / path.lstrip("/")
        fine = file.is_file() and not file.is_symlink() and file.stat().st_size < 64 << 20
        if not fine or not file.resolve().is_relative_to(folder):
            handler.answer(404, b"nothing here")
            return True
        return False

    server = WebServer(folder)
    server.acts["/"] = refuse
    with server:
        yield [server.url if word == "URL" else word for word in words]


def list_again(root: CacheRoot) -> None:
    """Write the listing.json that fits a changed cache, as its owner can."""
    files = {}
    for path in sorted(root.path.rglob("*")):
        name = path.relative_to(root.path).as_posix()
        if is_table(name) and path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if data:
                files[name] = [len(data), hashlib.sha256(data).hexdigest()]
    (root.path / LISTING).unlink(missing_ok=True)
    (root.path / LISTING).write_bytes(sealed_json({"format": 1, "files": files}))


def call(module: str, words: Sequence[str]) -> None:
    """Run a command as `python -m` does, or read everything in Python."""
    if module == "nanomolmo2":
        command(lambda: _read_all(*words), errors=(CacheError,))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _read_all(where: str, space: str) -> int:
    remote = where.startswith("http")
    cache = nm.open(where, space, mirror="out/mirror", allow_private=remote)
    for name in cache.datasets:
        dataset = cache.dataset(name)
        for at in range(min(len(dataset), 20)):
            dataset[at]
    for path in sorted(map(str, Path("media").absolute().iterdir())):
        if path in cache:
            cache[path]
    return 0
