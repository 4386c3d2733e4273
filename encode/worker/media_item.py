"""What travels from a source to the encoder: an item a source, a piece a few encoder inputs of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.store.ledger import MediaRecord
from encode.worker.messages import SourceTask

Pixels = npt.NDArray[np.uint8]


@dataclass(kw_only=True, eq=False)
class Item:
    """One source on its way to the encoder."""

    task: SourceTask
    """What was asked for."""
    record: MediaRecord
    """What is known of it."""
    data: bytes | Path = b""
    """Its bytes, or where they are, until they are decoded."""
    failure: tuple[str, str] | None = None
    """Stage, and why."""
    duplicate: bool = False
    """Somebody else has, or had, these bytes to encode."""
    present: bool = False
    """Nothing of it is missing."""
    read_s: float = 0.0
    """Opening, reading, hashing."""
    decode_s: float = 0.0
    """Bytes to encoder input."""
    release: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called once the bytes are not needed any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Encoder inputs of one source, and whether more will come."""

    item: Item
    """Whose they are; final when `last`."""
    pixels: Pixels
    """(n, S, S, 3); n may be 0."""
    views: tuple[str, ...]
    """(n,) what they are called."""
    times: tuple[float | None, ...]
    """(n,) where in its video, seconds."""
    last: bool
    """Nothing more comes of this source."""


def piece_of(
    item: Item,
    pixels: Sequence[Pixels],
    views: Sequence[str],
    times: Sequence[float | None],
    *,
    last: bool,
) -> Piece:
    """A piece of these frames or this image; its arrays may be empty."""
    return Piece(
        item=item,
        pixels=np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8),
        views=tuple(views),
        times=tuple(times),
        last=last,
    )
