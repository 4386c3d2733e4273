"""Caches of invented rows at real sizes, JPEG files, and the trainer's loader over them.

world = World.make(folder, spec, "image", count=192)
with world.loader(tokenizer, window=16384, pin=False) as loader: ...

The row of item `number` is that of picture `number % DIFFERENT`, as `jpeg` draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.format import codec
from cache.format.frame_sampling import FULL, MAX_FRAMES, sample_times, time_view
from cache.format.spec import FeatureSpec
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space, find_space
from cache.store.writer import ShardWriter
from model.media.images import decode_image
from model.vision.encoder import VisionEncoder
from train.data.join import join
from train.data.loader import FeatureLoader
from train.data.message_trees import MessageTrees, build_message_trees
from train.data.placeholders import Placeholders
from train.data.schedule import TrainingSchedule
from train.data.tokens import TokenStore

QUESTION = "What can be seen here, and where is it?"
ANSWER = "A thing that nobody has named yet, beside another one, a little to the left of it."
DIFFERENT = 6
"""Different rows and files. No code under test looks into them."""
Said = Sequence[tuple[str, str]]
"""Questions and answers about one media item, a sample each."""


def one_question(_: int) -> Said:
    """Return what is said about a media item unless a world says something else."""
    return [(QUESTION, ANSWER)]


def key_of(number: int) -> str:
    """Return the key of a media item."""
    return hashlib.sha256(f"media {number}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class World:
    """A cache whose samples have one image or one video each; several samples may have the same."""

    root: CacheRoot
    folder: Path
    array: str
    """`image` or `frame`."""

    @staticmethod
    def make(
        folder: Path,
        spec: FeatureSpec,
        array: str,
        count: int,
        frames: int = 1,
        *,
        rows: Sequence[npt.NDArray[np.uint8]] | None = None,
        said: Callable[[int], Said] = one_question,
    ) -> World:
        """Write `count` media items of `frames` rows each.

        Args:
            folder: where.
            spec: of the rows.
            array: `image` or `frame`.
            count: media items.
            frames: rows of each.
            rows: DIFFERENT packed rows; None: noise.
            said: number of a media item -> its samples.
        """
        root = CacheRoot(folder / "cache")
        space = Space.create(root, spec, {"library": "none"})
        rows = rows or noise(spec, array)
        is_video = array == "frame"
        duration = (frames - 1) / 2  # two frames a second
        times = sample_times(duration, frames) if is_video else (0,)
        shard = ShardWriter(space, array, space.next_shard(array))
        records, samples = [], []
        for number in range(count):
            for i, at in enumerate(times):
                if shard.full:
                    shard.commit()
                    shard = ShardWriter(space, array, space.next_shard(array))
                more = {"time_s": at / 1e6} if is_video else {}
                view = time_view(at) if is_video else FULL
                shard.append(key_of(number), view, rows[(number + i) % DIFFERENT], **more)
            records.append(record_of(number, is_video, duration))
            samples += samples_of(number, records[-1], said(number))
        shard.commit()
        space.grow(array)
        append_media(root, records, "test")
        write_samples(root, "d", samples)
        return World(root=root, folder=folder, array=array)

    def trees(
        self, tokenizer: Any, window: int, max_branches: int = 1, max_frames: int = MAX_FRAMES
    ) -> tuple[MessageTrees, FeatureReader]:
        """Return the samples in trees of at most `max_branches`, and the space's reader."""
        reader = FeatureReader(find_space(self.root, None))
        samples = join(
            self.root,
            reader,
            {"d": None},
            split="train",
            held_out=0.0,
            min_coverage=1.0,
            max_frames=max_frames,
        )
        trees = build_message_trees(
            samples,
            TokenStore.open(self.root, samples.names, tokenizer, folder=self.folder / "tokens"),
            max_tokens=window,
            max_branches=max_branches,
            placeholders=Placeholders.of(reader.spec, tokenizer),
            over_long="refuse",
        )
        return trees, reader

    def schedule(
        self, tokenizer: Any, window: int, ranks: int = 1
    ) -> tuple[TrainingSchedule, FeatureReader]:
        """Return a schedule, each of whose steps fills one micro-batch a rank, and the space's reader."""
        trees, reader = self.trees(tokenizer, window)
        tokens = TrainingSchedule(trees, 1, seed=0).step(0).slices[0].tokens
        count = min(ranks * (window // tokens), len(trees.samples.weight))
        return TrainingSchedule(trees, count, seed=0), reader

    def loader(self, tokenizer: Any, window: int, pin: bool) -> FeatureLoader:
        """Return the trainer's loader, without an end."""
        schedule, reader = self.schedule(tokenizer, window)
        return FeatureLoader(schedule, reader, max_tokens=window, threads=4, pin=pin)


def record_of(number: int, is_video: bool, duration: float) -> MediaRecord:
    """Return the line of the ledger for a media item."""
    if is_video:
        source = f"/media/{number}.mp4"
        return MediaRecord(source=source, key=key_of(number), kind="video", duration_s=duration)
    return MediaRecord(source=f"/media/{number}.jpg", key=key_of(number), width=640, height=480)


def noise(spec: FeatureSpec, array: str) -> list[npt.NDArray[np.uint8]]:
    """Return DIFFERENT packed rows of noise."""
    rng = np.random.default_rng(0)
    shape = (spec.tokens(array), spec.width)
    rows = (rng.standard_normal(shape).astype(np.float32) for _ in range(DIFFERENT))
    return [codec.pack(row, spec.codec) for row in rows]


def samples_of(number: int, record: MediaRecord, said: Said) -> list[Sample]:
    """Return the samples of a media item: a question and its answer each."""
    media = (MediaRef(source=record.source, kind=record.kind),)
    samples = []
    for index, (question, answer) in enumerate(said):
        turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
        name = f"{number}-{index}" if index else str(number)
        samples.append(Sample(id=name, dataset="d", messages=turns, media=media))
    return samples


# ---- images


@functools.cache
def jpeg(seed: int) -> bytes:
    """Return a JPEG file of 640 x 480 pixels, as detailed as a photograph: about 90 KB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.float32)
    grain = rng.normal(0, 9, smooth.shape)
    pixels = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    out = io.BytesIO()
    pixels.save(out, "JPEG", quality=90)
    return out.getvalue()


def write_jpegs(folder: Path, count: int) -> None:
    """Write `count` different JPEG files."""
    folder.mkdir(parents=True)
    files = [jpeg(seed) for seed in range(DIFFERENT)]
    for number in range(count):
        # Bytes after the end of the image make another file of the same picture.
        (folder / f"{number}.jpg").write_bytes(
            files[number % DIFFERENT] + number.to_bytes(4, "big")
        )


class Decoder:
    """Decodes JPEG files and fits them to the encoder in threads, some ahead: a good live data loader."""

    def __init__(self, encoder: VisionEncoder, ahead: int) -> None:
        self._files: Sequence[bytes] = [jpeg(seed) for seed in range(DIFFERENT)]
        self._encoder, self._ahead, self._number = encoder, ahead, 0
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._queue: deque[Future[npt.NDArray[np.uint8]]] = deque()

    def one(self, number: int = 0) -> npt.NDArray[np.uint8]:
        """Decode and fit one file."""
        return self._encoder.prepare(decode_image(self._files[number % DIFFERENT]))

    def take(self, count: int) -> npt.NDArray[np.uint8]:
        """Return the next images, (count, S, S, 3), and have more decoded meanwhile."""
        while len(self._queue) < count + self._ahead:
            self._queue.append(self._pool.submit(self.one, self._number))
            self._number += 1
        return np.stack([self._queue.popleft().result() for _ in range(count)])

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def spec_of(encoder: VisionEncoder, codec_name: str, pool: int) -> FeatureSpec:
    """Return the spec of this encoder's rows with images pooled `pool` x `pool`."""
    return dataclasses.replace(encoder.spec(codec_name), pool_image=pool)
