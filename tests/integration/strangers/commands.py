"""The commands of the fuzzer: their command lines, what they may change, and how they exit."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanomolmo2 as nm
from cache.errors import CacheError
from configs import command
from tests.integration.strangers.world import TINY, TRAIN


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
    _command("nanomolmo2 cache", share=4),
)
"""SPACE is replaced by the name of the first space; `nanomolmo2` stands for reading all in Python."""


def words_of(one: Command, spaces: Sequence[str]) -> list[str]:
    """Return the words of a command line for a cache with these spaces."""
    names = sorted(spaces)
    words = [names[0] if word == "SPACE" else word for word in one.words]
    needs_space = {"cache.convert", "cache.export", "cache.view", "train.run"}
    if len(names) > 1 and one.module in needs_space:
        words += ["--space", names[0]]
    return words


def call(module: str, words: Sequence[str]) -> None:
    """Run a command as `python -m` does, or read everything in Python."""
    if module == "nanomolmo2":
        command(lambda: _read_all(words[0]), errors=(CacheError,))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _read_all(where: str) -> int:
    names = [path.name for path in (Path(where) / "spaces").glob("*")]
    cache = nm.open(where, min(names) if len(names) > 1 else None)
    for name in cache.datasets:
        dataset = cache.dataset(name)
        for at in range(min(len(dataset), 20)):
            dataset[at]
    for name in sorted(map(str, Path("media").absolute().iterdir())):
        if name in cache:
            cache[name]
    return 0
