"""Stored samples with their texts and the media their features belong to, as evaluation needs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample
from train.data.sample_list import SampleList
from train.data.tokens import messages_of

READ_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSample:
    """One sample as evaluation wants it: words to answer, rows to look at."""

    sample: Sample
    """As stored: messages, task, media."""
    messages: list[tuple[str, str, float]]
    """(role, content, weight), as the template takes them."""
    media: tuple[int, ...]
    """Its images and videos, in order, as the join numbers them."""


def evaluation_samples(root: CacheRoot, joined: SampleList) -> Iterator[EvaluationSample]:
    """The samples of a join with their texts, in the order of the list."""
    at = 0
    for number, name in enumerate(joined.names):
        chosen = joined.index[joined.dataset == number]
        start = 0
        with pq.ParquetFile(root.samples(name)) as file:
            for batch in file.iter_batches(batch_size=READ_AT_ONCE):
                here = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
                for row in batch.take(here).to_pylist():
                    messages = tuple(Message(**m) for m in row.pop("messages"))
                    media = tuple(MediaRef(**m) for m in row.pop("media"))
                    sample = Sample(messages=messages, media=media, **row)
                    yield EvaluationSample(
                        sample=sample,
                        messages=messages_of(sample),
                        media=tuple(joined.media_of(at).tolist()),
                    )
                    at += 1
                start += len(batch)
    assert at == joined.size, "the samples file is shorter than the list made from it"
