"""Compare a trained model's loss on stored features with its loss on features computed now.

python -m encode.check.loss --run demo --features cache --samples 16

The command encodes the images and videos of a few samples again, from their files. It fails if the two
losses differ, so it also detects an encoder, a library or a machine that no longer computes what the space
was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import configs
from cache.errors import CacheError
from cache.format.frame_sampling import MAX_FRAMES
from cache.format.media_marks import split_at_marks
from cache.format.spec import FeatureSpec
from cache.maintenance.encode_command import encode_command
from cache.maintenance.local_media import LocalMedia
from cache.store.ledger import MediaRecord, media_table
from cache.store.paths import CacheRoot
from cache.store.references import edges_of, find_rows, number_media, read_references
from cache.store.samples import Sample, dataset_names, read_samples
from cache.store.space import find_space
from configs import UserError
from configs.text import say
from encode.check.media import CheckConfig, LoadedMedia, MediaLoader
from model.attention.batch import PackedBatch
from model.io.saved_model import find_run, load_final
from model.language.chat_template import (
    Message,
    fill_placeholders,
    has_answer,
    tokenize_messages,
    video_token_ids,
)
from model.language.tokenizer import image_id
from model.quantize import pack
from nanomolmo2.unpack import unpack

PROG = "python -m encode.check.loss"
TOLERANCE = 0.01
"""Largest relative difference of the two losses. It is 0 where precision and libraries are unchanged."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare a model's loss on stored features with its loss on features computed now."""

    run: str = "default"
    """Name of the run below runs/, or a path."""
    features: Path = Path("cache")
    """Folder of the feature cache."""
    samples: int = 16
    """Number of samples, taken from all data sets in turn."""
    weights: str | None = None
    """File or folder with the encoder's weights; when not given, the recorded place, or the hub."""
    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:N or mps."""
    max_frames: int | None = None
    """Largest number of frames of one video; when not given, as in the model's training."""
    media: Path | None = None
    """Folder of media that were not encoded on this machine, or have moved: they are opened, too."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Losses of one model on the same samples, nats per supervised token."""

    samples: int
    """Number of samples."""
    rows: int
    """Number of their images and video frames."""
    same_rows: int
    """Rows that are stored bit for bit as they are encoded now."""
    skipped: Mapping[str, int]
    """Reason -> number of media that were left out."""
    cached: float
    """Loss on stored rows."""
    live: float
    """Loss on rows encoded now and rounded by the codec."""
    unrounded: float
    """Loss on features encoded now, before the codec."""

    @property
    def difference(self) -> float:
        """Relative difference of `cached` and `live`."""
        return abs(self.cached - self.live) / max(self.cached, 1e-6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if the losses differ."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    result = compare(options)
    agree = result.difference <= TOLERANCE
    for why, count in result.skipped.items():
        say(f"left out {count:,} media: {why}")
    print(
        f"{result.samples} samples: {result.same_rows} of {result.rows} rows are equal to the bit; "
        f"loss before the codec's rounding {result.unrounded:.6f}\n"
        f"cached loss {'=' if agree else 'is not'} live loss: {result.cached:.6f} and {result.live:.6f} "
        f"(relative difference {result.difference:.1e})"
    )
    return 0 if agree else 1


def compare(options: Options) -> Comparison:
    """Compute the losses of a run's final model.

    Raises:
        UserError, CacheError: no such run or space; no sample has all its media stored and on this disk; a
            media item can no longer be decoded; the encoder is not available or has changed.
    """
    vlm, tokenizer, meta = load_final(find_run(options.run))
    root = CacheRoot(options.features)
    config = CheckConfig(
        local=LocalMedia(root, media=options.media),
        max_frames=options.max_frames or meta.get("max_frames", MAX_FRAMES),
        device=options.device,
        weights=options.weights,
    )
    sums = np.zeros(3)
    weights, samples, rows, same = 0.0, 0, 0, 0
    with MediaLoader(find_space(root, meta["space"]["name"]), config) as loader:
        spec = loader.reader.spec
        for sample, media in islice(_samples(root, loader), options.samples):
            computed = [loader.encoder.encode(one.pixels, one.array) for one in media]
            packed = [pack(features, spec.codec).rows.cpu() for features in computed]
            stored = [one.rows for one in media]
            samples += 1
            rows += sum(map(len, stored))
            same += sum(int((a == b).all(1).sum()) for a, b in zip(stored, packed, strict=True))
            unpacked = [
                [
                    unpack(one, spec.codec, spec.tokens(item.array), spec.width)
                    for one, item in zip(of, media, strict=True)
                ]
                for of in (stored, packed)
            ]
            batch = sample_batch(tokenizer, sample, media, spec.seen)
            for i, features in enumerate((*unpacked, [one.cpu() for one in computed])):
                with torch.inference_mode():
                    if vlm.tail is not None:
                        pairs = zip(features, media, strict=True)
                        features = [vlm.tail.see(one, item.array) for one, item in pairs]
                    values = torch.cat([one.flatten(0, 1) for one in features])
                    total, weight = vlm.loss(batch, values)
                sums[i] += float(total)
            weights += float(weight)
    if loader.undecodable:
        raise UserError(loader.undecodable[0])
    if not samples:
        why = "".join(f"; {n:,} media: {reason}" for reason, n in loader.skipped.items())
        raise UserError(
            f"{loader.reader.path}: no sample has a text, all its features, and its media in files of this "
            f"machine{why}; encode some: "
            + encode_command(root, None, loader.reader, configs.load("encoders"))
        )
    losses = dict(zip(("cached", "live", "unrounded"), (sums / weights).tolist(), strict=True))
    return Comparison(samples=samples, rows=rows, same_rows=same, skipped=loader.skipped, **losses)


def _samples(root: CacheRoot, loader: MediaLoader) -> Iterator[tuple[Sample, list[LoadedMedia]]]:
    """Yield samples with a text to predict and their media, from each data set in turn.

    All media of a sample must be stored and in files of this disk.
    """
    table = loader.available(media_table(root))

    def usable(dataset: str) -> Iterator[tuple[Sample, list[LoadedMedia]]]:
        references = read_references(root, dataset, table)
        media, (items,) = number_media([references], table)
        rows = find_rows(loader.reader, media, loader.max_frames)
        here = np.append(rows.counts > 0, False)[items]
        complete = (references.count(~here) == 0) & (references.counts > 0)
        edges = edges_of(references.counts)
        for number, sample in enumerate(read_samples(root, dataset)):
            if not complete[number] or not _can_be_learned(sample):
                continue
            records = table.take(pa.array(references.source[edges[number] : edges[number + 1]]))
            loaded = list(loader.load(MediaRecord(**record) for record in records.to_pylist()))
            if len(loaded) == len(sample.media):
                yield sample, loaded

    for found in zip_longest(*map(usable, dataset_names(root))):
        yield from filter(None, found)


def _can_be_learned(sample: Sample) -> bool:
    """Whether a sample has a text to predict, and marks that fit its media. The trainer leaves out others."""
    try:
        split_at_marks([(m.role, m.content) for m in sample.messages], len(sample.media))
    except ValueError:
        return False
    return has_answer([(m.role, m.content, m.weight) for m in sample.messages])


def sample_batch(
    tokenizer: Any, sample: Sample, media: Sequence[LoadedMedia], spec: FeatureSpec
) -> PackedBatch:
    """Return one sample as a batch of its own, with every token it has."""
    messages: list[Message] = [(m.role, m.content, m.weight) for m in sample.messages]
    text = tokenize_messages(tokenizer, messages, len(media))
    image = image_id(tokenizer)
    contents = [
        video_token_ids(tokenizer, one.times_s, spec.tokens(one.array))
        if one.times_s
        else np.full(spec.tokens(one.array), image, dtype=np.int32)
        for one in media
    ]
    filled, repeats = fill_placeholders(text.ids, image, contents)
    ids = torch.from_numpy(filled.astype(np.int64))
    weights = torch.from_numpy(np.repeat(text.weights, repeats))
    return PackedBatch.one_sample(ids, weights, image)


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
