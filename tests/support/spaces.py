"""Spaces of a few hundred bytes, and what the cache's tests do with them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.format import codec
from cache.format.spec import FeatureSpec
from cache.format.tail import Tail, file_bytes, file_sha256
from cache.store.commits import SCHEMA, read_commits
from cache.store.paths import CacheRoot
from cache.store.space import Space
from cache.store.writer import ShardWriter

SPEC = FeatureSpec(
    encoder="toy",
    architecture="toy:2x2",
    weights="0" * 64,
    activation="gelu",
    blocks=(0,),
    image_size=4,
    patch_size=2,
    width=64,
    fit="squash",
    resize="none",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    pool_image=1,
    pool_frame=2,
    compute_dtype="float32",
    batch_size=1,
    codec="int8",
)
"""4 tokens of 64 values an image: 264 bytes as int8, 512 as fp16. A frame has one token."""

TAIL = Tail(first=1, blocks=(2, 1), heads=4, hidden=96, eps=1e-5, pool_image=1, pool_frame=2)
"""Two blocks behind the one of SPEC, whose outputs are concatenated. Without a file."""

SLOTS = 4
"""Rows in a full shard of images."""


def tail_arrays(seed: int = 0, tail: Tail = TAIL) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights of the blocks of a tail."""
    random = np.random.default_rng(seed)
    return {
        name: (0.2 * random.normal(size=shape)).astype(np.float32)
        for name, shape in tail.shapes(SPEC.width).items()
    }


def tail_of(seed: int = 0, **changes: Any) -> tuple[Tail, bytes]:
    """A tail, and the bytes of its file; `changes` to TAIL."""
    tail = dataclasses.replace(TAIL, **changes)
    data = file_bytes(tail, tail_arrays(seed, tail), SPEC.width)
    return dataclasses.replace(tail, sha256=file_sha256(data)), data


def key(number: int) -> str:
    """The key of the number-th made-up image."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def features(
    number: int, array: str = "image", spec: FeatureSpec = SPEC
) -> npt.NDArray[np.float32]:
    """Its features, (tokens, width)."""
    shape = spec.tokens(array), spec.width
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def row(number: int, array: str = "image", spec: FeatureSpec = SPEC) -> npt.NDArray[np.uint8]:
    """Its stored row."""
    return codec.pack(features(number, array, spec), spec.codec)


def make_space(
    folder: Path,
    codec_name: str = "int8",
    container: str = "zarr",
    *,
    tail_file: bytes | None = None,
    **changes: Any,
) -> Space:
    """An empty space below `folder`; `changes` to SPEC, and the bytes of its tail if they give it one."""
    spec = dataclasses.replace(SPEC, codec=codec_name, container=container, **changes)
    load = {"library": "toy", "note": "a text like sha256:" + "0" * 64 + " must do no harm"}
    shard_bytes = SLOTS * spec.row_bytes("image")
    return Space.create(CacheRoot(folder), spec, load, shard_bytes=shard_bytes, tail=tail_file)


def fill(
    space: Space,
    numbers: Sequence[int],
    array: str = "image",
    view: str = "full",
    *,
    replaces: Sequence[int] = (),
    errors: Mapping[int, float] = MappingProxyType({}),
) -> int:
    """One committed shard with these images; its number."""
    shard = space.next_shard(array)
    writer = ShardWriter(space, array, shard)
    for number in numbers:
        writer.append(
            key(number), view, row(number, array, space.spec), error=errors.get(number, 0.005)
        )
    writer.commit(replaces)
    return shard


def write_rows(space: Space, rows: Iterable[npt.NDArray[np.uint8]], array: str = "image") -> None:
    """Write and commit packed rows of image 0, 1, ..., in shards as full as they can be."""
    writer: ShardWriter | None = None
    for number, packed in enumerate(rows):
        writer = writer or ShardWriter(space, array, space.next_shard(array))
        writer.append(key(number), "full", packed, error=0.005)
        if writer.full:
            writer.commit()
            writer = None
    if writer is not None:
        writer.commit()


def committed_rows(space: Space, array: str) -> pa.Table:
    """Return all committed rows in row order, with the columns of SCHEMA."""
    commits = read_commits(space.paths, space.info, array)
    return pa.concat_tables([SCHEMA.empty_table(), *(commit.table for commit in commits)])
