"""A cache with invented images, videos and rows, for the tests of train.data.

    world = new_world(tmp_path)
    world.write(d=[ask("1", ["a"]), ask("2", ["video b"])])
    world.encode(["a"])
    world.encode_videos({"video b": 2.2})
    trees = world.trees(world.join("d"))

An image is a name, from which its key, its source and its stored row are computed. A video is a name that
starts with "video"; it has 12.5 frames a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache.format import codec
from cache.format.frame_sampling import sample_times, time_view
from cache.format.spec import FeatureSpec
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, write_samples
from cache.store.space import Space, find_space
from cache.store.writer import ShardWriter
from model.language.model import load_tokenizer
from tests.support.trained_runs import spec as small_spec
from tests.support.trained_runs import turns
from train.data.join import join
from train.data.loader import FeatureLoader
from train.data.message_trees import MessageTrees, build_message_trees
from train.data.placeholders import Placeholders
from train.data.sample_list import SampleList
from train.data.schedule import Schedule
from train.data.tokens import TokenStore
from train.data.usable import OverLong

SPEC: FeatureSpec = small_spec()
M = SPEC.tokens("image")
FRAME_RATE = 12.5


def key_of(image: str) -> str:
    """Return the key of an image or video."""
    return hashlib.sha256(image.encode()).hexdigest()


def frame_time(microseconds: int) -> float:
    """Return the time in seconds of the frame nearest to a time in microseconds."""
    return round(microseconds * FRAME_RATE / 1e6) / FRAME_RATE


def ref(name: str) -> MediaRef:
    """Return how a sample refers to an image or video."""
    if name.startswith("video"):
        return MediaRef(source=f"/{name}.mp4", kind="video")
    return MediaRef(source=f"/{name}.png")


def features(name: str, time_s: float | None = None) -> np.ndarray:
    """Return the (tokens, width) float16 features of an image, or of a video's frame at a time."""
    kind = "image" if time_s is None else "frame"
    rng = np.random.default_rng(int(key_of(f"{name}@{time_s}")[:8], 16))
    return rng.standard_normal((SPEC.tokens(kind), SPEC.width)).astype(np.float16)


def payload(name: str, time_s: float | None = None) -> bytes:
    """Return the stored row of those features."""
    return codec.pack(features(name, time_s).astype(np.float32), SPEC.codec).tobytes()


def ask(
    name: str, images: Sequence[str] = (), question: str = "what?", answer: str = "a", **more: Any
) -> Sample:
    """Return a sample of one question and its answer; `more` has other fields."""
    return Sample(
        id=name,
        dataset="",
        messages=turns(question, answer),
        media=tuple(map(ref, images)),
        **more,
    )


@dataclass(frozen=True)
class World:
    """A cache, with the folder for tokenised text and a tokenizer."""

    root: CacheRoot
    folder: Path
    tokenizer: Any

    def write(self, **datasets: Sequence[Sample]) -> None:
        """Write data sets, name=samples."""
        for name, samples in datasets.items():
            write_samples(self.root, name, [replace(s, dataset=name) for s in samples])

    def encode(self, images: Sequence[str]) -> None:
        """Store the features of images, four to a shard."""
        space = Space.create(self.root, SPEC, {}, shard_bytes=4 * SPEC.row_bytes("image"))
        for at in range(0, len(images), 4):
            shard = ShardWriter(space, "image", space.next_shard("image"))
            for image in images[at : at + 4]:
                shard.append(key_of(image), "full", payload(image))
            shard.commit()
            for image in images[at : at + 4]:
                self.record(image, key=key_of(image))

    def encode_videos(self, videos: Mapping[str, float], max_frames: int = 128) -> None:
        """Store the frames of videos, name -> duration in seconds."""
        space = Space.create(self.root, SPEC, {}, shard_bytes=4 * SPEC.row_bytes("image"))
        shard = ShardWriter(space, "frame", space.next_shard("frame"))
        for name, duration in videos.items():
            for asked in sample_times(duration, max_frames):
                if shard.full:
                    shard.commit()
                    shard = ShardWriter(space, "frame", space.next_shard("frame"))
                time_s = frame_time(asked)
                shard.append(key_of(name), time_view(asked), payload(name, time_s), time_s=time_s)
        shard.commit()
        for name, duration in videos.items():
            self.record(name, key=key_of(name), duration_s=duration)

    def record(self, name: str, **fields: Any) -> None:
        """Add a line to the ledger for an image or video."""
        media = ref(name)
        record = MediaRecord(**{"source": media.source, "kind": media.kind} | fields)
        append_media(self.root, [record], "test")

    def fail(self, name: str) -> None:
        """Record in the ledger that an image or video failed."""
        self.record(name, status="failed", stage="decode", error="truncated")

    @property
    def reader(self) -> FeatureReader:
        """A reader of the only space."""
        return FeatureReader(find_space(self.root, None))

    def join(self, *names: str, **options: Any) -> SampleList:
        """Select samples of data sets; by default all samples of `d` that have their features."""
        options = {"split": "train", "held_out": 0.0, "min_coverage": 0.0} | options
        datasets = options.pop("mix", dict.fromkeys(names or ("d",)))
        return join(self.root, self.reader, datasets, **options)

    def tokens(self, joined: SampleList) -> TokenStore:
        """Tokenise the data sets of a list."""
        return TokenStore.open(
            self.root, joined.names, self.tokenizer, folder=self.folder / "tokens"
        )

    def trees(
        self,
        joined: SampleList,
        max_tokens: int = 512,
        max_branches: int = 4,
        over_long: OverLong = "refuse",
    ) -> MessageTrees:
        """Group the samples of a list into trees."""
        return build_message_trees(
            joined,
            self.tokens(joined),
            max_tokens=max_tokens,
            max_branches=max_branches,
            placeholders=Placeholders.of(SPEC, self.tokenizer),
            over_long=over_long,
        )

    def load(self, schedule: Schedule, *, max_tokens: int = 512, **options: Any) -> FeatureLoader:
        """Load the micro-batches of a schedule."""
        return FeatureLoader(schedule, self.reader, max_tokens=max_tokens, **options)


def names_of(joined: SampleList) -> list[str]:
    """Return <data set>/<id> of every sample of a list."""
    return [joined.name_of(i) for i in range(joined.size)]


def mixed_samples(count: int, seed: int) -> list[Sample]:
    """Return samples with no, one and two images, which some of them share, and with different weights."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        images = [f"p{j}" for j in rng.integers(0, 6, rng.integers(0, 3))]
        sample = ask(
            f"{i}",
            images,
            "<image>" * len(images) + "q" * int(rng.integers(1, 9)),
            "a" * int(rng.integers(1, 9)),
            weight=float(rng.choice([0.5, 1.0, 2.0])),
        )
        talk = sample.messages + (turns("and?", "ok", weight=0.2) if i % 3 == 0 else ())
        samples.append(replace(sample, messages=talk))
    return samples


IMAGES = [f"p{i}" for i in range(6)]


def new_world(folder: Path) -> World:
    """Return an empty cache below `folder`."""
    return World(CacheRoot(folder / "cache"), folder, load_tokenizer("random:qwen3-tiny"))


def mixed_world(folder: Path) -> World:
    """Return a cache with two data sets of mixed samples, `d` and `e`."""
    world = new_world(folder)
    world.write(d=mixed_samples(60, 0), e=mixed_samples(30, 1))
    world.encode(IMAGES)
    return world
