"""A cache with made-up pictures and rows, for the tests of the trainer's data side.

A picture is a name; its key, its source and its stored row all follow from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache.layout import CacheRoot
from cache.reader import FeatureReader, find_space
from cache.spec import FeatureSpec
from cache.tables import (
    MediaRecord,
    MediaRef,
    Message,
    Sample,
    append_media,
    write_samples,
)
from cache.writer import ShardWriter, Space
from model.language import load_tokenizer
from tests.small_world import spec as small_spec
from train.data import (
    Join,
    TokenStore,
    Trees,
    grow_trees,
    join,
)

SPEC: FeatureSpec = small_spec()
M = SPEC.tokens("picture")


def key_of(picture: str) -> str:
    return hashlib.sha256(picture.encode()).hexdigest()


def payload(picture: str) -> bytes:
    """The stored row of a picture: bytes that nobody else has."""
    rng = np.random.default_rng(int(key_of(picture)[:8], 16))
    return rng.integers(0, 256, SPEC.row_bytes("picture"), dtype=np.uint8).tobytes()


def ask(
    name: str, pictures: Sequence[str] = (), question: str = "what?", answer: str = "a", **more: Any
) -> Sample:
    return Sample(
        id=name,
        dataset="",
        messages=(
            Message(role="user", content=question),
            Message(role="assistant", content=answer),
        ),
        media=tuple(MediaRef(source=f"/{p}.png") for p in pictures),
        **more,
    )


@dataclass(frozen=True)
class World:
    """A cache with its tokenizer."""

    root: CacheRoot
    folder: Path
    tokenizer: Any

    def write(self, **datasets: Sequence[Sample]) -> None:
        for name, samples in datasets.items():
            write_samples(self.root, name, [replace(s, dataset=name) for s in samples])

    def encode(self, pictures: Sequence[str]) -> None:
        """Give pictures their rows, two shards a call."""
        space = Space.create(self.root, SPEC, {}, shard_bytes=4 * SPEC.row_bytes("picture"))
        for at in range(0, len(pictures), 4):
            shard = ShardWriter(space, "picture", space.next_shard("picture"))
            for picture in pictures[at : at + 4]:
                shard.append(key_of(picture), "full", payload(picture))
            shard.commit()
        records = [MediaRecord(source=f"/{p}.png", key=key_of(p)) for p in pictures]
        append_media(self.root, records, "test")

    def fail(self, pictures: Sequence[str]) -> None:
        records = [
            MediaRecord(source=f"/{p}.png", status="failed", stage="decode", error="truncated")
            for p in pictures
        ]
        append_media(self.root, records, "test")

    @property
    def reader(self) -> FeatureReader:
        return FeatureReader(find_space(self.root, None))

    def join(self, *names: str, **options: Any) -> Join:
        options = {"split": "train", "held_out": 0.0, "min_coverage": 0.0} | options
        datasets = options.pop("mix", dict.fromkeys(names or ("d",)))
        return join(self.root, self.reader, datasets, **options)

    def tokens(self, joined: Join) -> TokenStore:
        return TokenStore.open(
            self.root, joined.names, self.tokenizer, folder=self.folder / "tokens"
        )

    def trees(self, joined: Join, max_tokens: int = 512, max_branches: int = 4) -> Trees:
        return grow_trees(
            joined,
            self.tokens(joined),
            max_tokens=max_tokens,
            max_branches=max_branches,
            picture_tokens=M,
        )


def names_of(joined: Join) -> list[str]:
    return [joined.name_of(i) for i in range(joined.size)]


def mixed_samples(count: int, seed: int) -> list[Sample]:
    """Text, one picture, several pictures; shared and not; weights of every kind."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        pictures = [f"p{j}" for j in rng.integers(0, 6, rng.integers(0, 3))]
        sample = ask(
            f"{i}",
            pictures,
            "<image>" * len(pictures) + "q" * int(rng.integers(1, 9)),
            "a" * int(rng.integers(1, 9)),
            weight=float(rng.choice([0.5, 1.0, 2.0])),
        )
        more = (
            Message(role="user", content="and?"),
            Message(role="assistant", content="ok", weight=0.2),
        )
        samples.append(replace(sample, messages=sample.messages + more) if i % 3 == 0 else sample)
    return samples


PICTURES = [f"p{i}" for i in range(6)]


def new_world(folder: Path) -> World:
    return World(CacheRoot(folder / "cache"), folder, load_tokenizer("random:qwen3-tiny"))


def mixed_world(folder: Path) -> World:
    world = new_world(folder)
    world.write(d=mixed_samples(60, 0), e=mixed_samples(30, 1))
    world.encode(PICTURES)
    return world
