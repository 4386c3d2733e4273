"""The world of the fuzzer: caches to change, the user's own files, and files outside that nobody may touch.

world = World(folder)
build(world)                     # FOLDER/world, and FOLDER/bases with the caches that pairs copy
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cache.store import index_file
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space, read_info
from tests.support.encode_jobs import draw, shoot

SECRET = "SECRET-OF-OUTSIDE"
"""What the files outside say: it may be in no output."""

ENCODERS = """encoders:
  tiny: {library: demo, activation: gelu, blocks: [0], pool_frame: 1, batch_size: 4,
         tower: {image_size: 28, patch_size: 14, width: 64, depth: 1, heads: 2}}
"""
TINY = (
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
TRAIN = ("--llm", "random:qwen3-tiny", "--device", "cpu", "--hardware", "cpu", "--held-out", "0.3")
TRAIN += ("--min-coverage", "0.1", "--max-sequence-length", "512", "--max-tokens", "512")


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
    _train()
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
    _run("encode.run", "--dataset", f"{name}=folder:{folder}", *words, *TINY)


def _train() -> None:
    _run("train.run", "--max-steps", "1", *TRAIN)
    _run("train.run", "--inspect", *TRAIN)


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
