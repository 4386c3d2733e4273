"""What samples mention: their images and videos numbered, with the rows of each.

S samples of a data set, R media references of all its samples together, K distinct media among all data
sets: a media is the bytes of a key, looked at as an image or as a video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.store.paths import CacheRoot
from cache.store.samples import samples_digest
from configs import UserError
from train.data.media_rows import MEDIA_KINDS, MediaRows, Rows, find_rows
from train.data.sample_list import Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One data set's table, joined with media but not yet filtered."""

    digest: str
    """Of its texts."""
    ids: Any
    """Arrow strings."""
    weight: npt.NDArray[np.float32]
    task: Any
    """Arrow strings."""
    counts: Ints
    """Media of each sample."""
    source: Ints
    """(R,) row in the media table; -1 where it has none."""
    other: npt.NDArray[np.bool_]
    """(R,) what is known by that source hashes to something else than this data set says: not its image."""
    kind: npt.NDArray[np.uint8]
    """(R,) number in MEDIA_KINDS."""
    media: Ints
    """(R,) number among the media mentioned here; -1 unknown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """The K media that samples mention."""

    keys: npt.NDArray[np.uint8]
    """(K, 32) sha256 of their bytes."""
    kinds: npt.NDArray[np.uint8]
    """(K,) number in MEDIA_KINDS."""
    rows: MediaRows
    """Where their features are."""


def read_part(root: CacheRoot, name: str, ledger: pa.Table) -> Part:
    """Ids, weights and media of a data set: everything but its texts."""
    digest = samples_digest(root, name)  # checks the seal of the whole file
    table = pq.read_table(root.samples(name), columns=["id", "media", "weight", "task"])
    media = table["media"].combine_chunks()
    flat = media.flatten()
    kind = pc.index_in(flat.field("kind"), value_set=pa.array(MEDIA_KINDS))
    if kind.null_count:
        odd = sorted(map(str, set(pc.unique(flat.field("kind")).to_pylist()) - set(MEDIA_KINDS)))
        raise UserError(
            f"data set {name}: holds {', '.join(odd)} media; only images and videos can be trained "
            f"on: python -m encode.run --dataset {name} writes it again"
        )
    at = pc.index_in(flat.field("source"), value_set=ledger["source"].combine_chunks())
    other = pc.not_equal(flat.field("sha256"), ledger["key"].combine_chunks().take(at))
    return Part(
        digest=digest,
        ids=table["id"].combine_chunks(),
        weight=np.asarray(table["weight"], dtype=np.float32),
        task=table["task"].combine_chunks(),
        counts=np.asarray(media.value_lengths(), dtype=np.int64),
        source=np.asarray(at.fill_null(-1), dtype=np.int64),
        other=np.asarray(other.fill_null(False), dtype=bool),
        kind=np.asarray(kind, dtype=np.uint8),
        media=np.empty(0, dtype=np.int64),
    )


def mentioned(
    parts: list[Part], ledger: pa.Table, reader: Rows, max_frames: int
) -> tuple[list[Part], Media]:
    """Number the media that samples mention, and look them up: one number a (key, kind)."""
    table_keys = ledger["key"].combine_chunks()
    distinct = pc.unique(table_keys.drop_null())
    of_source = np.array(pc.index_in(table_keys, value_set=distinct).fill_null(-1), dtype=np.int64)
    known = of_source >= 0
    durations = np.full(len(distinct), np.nan)
    recorded = np.asarray(ledger["duration_s"].fill_null(np.nan), dtype=np.float64)
    timed = known & ~np.isnan(recorded)
    durations[of_source[timed]] = recorded[timed]
    of_source = np.append(of_source, -1)  # a source that no ledger knows is media -1

    codes = []  # key x kinds + kind
    for part in parts:
        key = np.where(part.other, -1, of_source[part.source])
        codes.append(np.where(key >= 0, key * len(MEDIA_KINDS) + part.kind, -1))
    seen = np.zeros(len(distinct) * len(MEDIA_KINDS) + 1, dtype=bool)
    for code in codes:
        seen[code] = True
    seen[-1] = False  # where code -1 went
    used = np.flatnonzero(seen)
    number = np.full(len(seen), -1, dtype=np.int64)
    number[used] = np.arange(len(used))
    key, kinds = used // len(MEDIA_KINDS), (used % len(MEDIA_KINDS)).astype(np.uint8)
    hexes = distinct.take(pa.array(key))
    media = Media(
        keys=_key_bytes(hexes),
        kinds=kinds,
        rows=find_rows(reader, hexes, kinds, durations[key], max_frames),
    )
    numbered = [replace(p, media=number[c]) for p, c in zip(parts, codes, strict=True)]
    return numbered, media


def _key_bytes(keys: Any) -> npt.NDArray[np.uint8]:
    """(K, 32) from K hex strings, at the speed of numpy: there may be ten million."""
    text = np.frombuffer("".join(keys.to_pylist()).encode(), dtype=np.uint8).reshape(-1, 64)
    nibbles = np.where(text < ord("a"), text - ord("0"), text - ord("a") + 10)
    return (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)
