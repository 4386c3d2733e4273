"""The two types inside a worker: a media item, and one encoder input made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.store.ledger import MediaRecord
from cache.store.writer import NewRow
from encode.worker.messages import Outcome, Result, SourceTask
from model.media.images import Failure

Pixels = npt.NDArray[np.uint8]


@dataclass(kw_only=True, eq=False)
class MediaItem:
    """One source inside a worker. Reading, decoding, encoding and writing each fill in their part."""

    task: SourceTask
    """The source to encode."""
    record: MediaRecord
    """What the ledger will say about it. Reading adds the key, decoding adds the size."""
    data: bytes | Path = b""
    """Its bytes, or the file that holds them, until they are decoded."""
    release: Callable[[], None] = field(default=lambda: None, repr=False)
    """Returns the memory of `data` to the download budget."""
    failure: Failure | None = None
    """Why no row of it will be written."""
    result: Result = "ok"
    """What its outcome will be unless it fails."""
    decoded: bool = False
    """The worker has received its last encoder input."""
    pending: int = 0
    """Encoder inputs that are in a batch and not encoded yet."""
    rows: list[NewRow] = field(default_factory=list)
    """Encoded rows that are not written yet, in time order."""
    read_s: float = 0.0
    """Seconds to open, read and hash the source, or its share of a download."""
    decode_s: float = 0.0
    """Seconds from its bytes to encoder inputs, without waiting for the encoder."""

    @property
    def key(self) -> str:
        """The sha256 of its bytes, 64 hex digits. It must have been read."""
        assert self.record.key is not None, f"{self.task.source} has not been read"
        return self.record.key

    def drop_data(self) -> None:
        """Free the bytes once they are decoded or stored."""
        self.data = b""
        self.release()

    def outcome(self) -> Outcome:
        """Return the outcome that is sent to the driver."""
        result: Result = self.result if self.failure is None else "failed"
        return Outcome(task=self.task, record=self.record, result=result, failure=self.failure)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderInput:
    """One view of a media item, decoded: an image or one frame of a video."""

    item: MediaItem
    """The media item it was decoded from."""
    pixels: Pixels
    """(S, S, 3) uint8, S the encoder's input size in pixels."""
    view: str
    """`full`, or `t:<microseconds>` of a video."""
    time_s: float | None
    """Time of the frame in its video, seconds; None for an image."""
