"""Compute the loss of a model on stored features, and on those of the same media encoded now: `compare`."""

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
from encode.check.media import CheckConfig, LoadedMedia, MediaLoader
from model.attention.batch import PackedBatch
from model.io.runs import find_run
from model.io.saved_model import load_final
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


def compare(
    *,
    run: str,
    features: Path,
    samples: int,
    weights: str | None,
    device: str,
    max_frames: int | None,
    media: Path | None,
) -> Comparison:
    """Compute the losses of a run's final model. The arguments are the options of the command.

    Raises:
        UserError, CacheError: no such run or space; no sample has all its media stored and on this disk; a
            media item can no longer be decoded; the encoder is not available or has changed.
    """
    vlm, tokenizer, meta = load_final(find_run(run))
    root = CacheRoot(features)
    config = CheckConfig(
        local=LocalMedia(root, media=media),
        max_frames=max_frames or meta.get("max_frames", MAX_FRAMES),
        device=device,
        weights=weights,
    )
    sums = np.zeros(3)
    counted, taken, rows, same = 0.0, 0, 0, 0
    with MediaLoader(find_space(root, meta["space"]["name"]), config) as loader:
        spec = loader.reader.spec
        for sample, items in islice(_samples(root, loader), samples):
            computed = [loader.encoder.encode(one.pixels, one.array) for one in items]
            packed = [pack(one, spec.codec).rows.cpu() for one in computed]
            stored = [one.rows for one in items]
            taken += 1
            rows += sum(map(len, stored))
            same += sum(int((a == b).all(1).sum()) for a, b in zip(stored, packed, strict=True))
            unpacked = [
                [
                    unpack(one, spec.codec, spec.tokens(item.array), spec.width)
                    for one, item in zip(of, items, strict=True)
                ]
                for of in (stored, packed)
            ]
            batch = sample_batch(tokenizer, sample, items, spec.seen)
            for i, given in enumerate((*unpacked, [one.cpu() for one in computed])):
                with torch.inference_mode():
                    if vlm.tail is not None:
                        pairs = zip(given, items, strict=True)
                        given = [vlm.tail.see(one, item.array) for one, item in pairs]
                    values = torch.cat([one.flatten(0, 1) for one in given])
                    total, weight = vlm.loss(batch, values)
                sums[i] += float(total)
            counted += float(weight)
    if loader.undecodable:
        raise UserError(loader.undecodable[0])
    if not taken:
        why = "".join(f"; {n:,} media: {reason}" for reason, n in loader.skipped.items())
        raise UserError(
            f"{loader.reader.path}: no sample has a text, all its features, and its media in files of this "
            f"machine{why}; encode some: "
            + encode_command(root, None, loader.reader, configs.load("encoders"))
        )
    losses = dict(zip(("cached", "live", "unrounded"), (sums / counted).tolist(), strict=True))
    return Comparison(samples=taken, rows=rows, same_rows=same, skipped=loader.skipped, **losses)


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
