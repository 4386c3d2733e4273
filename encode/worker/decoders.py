"""What a decoding thread of the prefetcher decodes with: itself, or a process (process_decoder.py).

    decoder.take(item)
    decoder.needed()        bytes of memory that decoding takes, by the header
    decoder.image()         pixels, size and note of an image; size() reads its header alone
    decoder.probe()         length and size of a video; then frames(...), one after the other
    decoder.images(items)   small images together, of processes alone

Both give equal pixels. Threads take no time to start, but wait for each other's Python code: at most some
hundred images a second, whatever the number of cores. A process that crashes or hangs on a media item is
started again and tries it once more; then the item has failed.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from cache.format.spec import FeatureSpec
from encode.worker.config import WorkerConfig
from encode.worker.decode_process import Found, Setup, needed_bytes
from encode.worker.local_files import size_in_header
from encode.worker.media_item import MediaItem, Pixels
from model.media.fit import InputFit
from model.media.images import DecodedImage
from model.media.video import frames
from model.media.video_index import VideoInfo, probe

NICE_BESIDE_GPU = 5
"""Added to the niceness of processes that decode for a GPU: its thread needs little, but at once."""

Touch = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A decoded image."""

    pixels: Pixels
    """Encoder input (S, S, 3)."""
    size: tuple[int, int]
    """Width and height of the upright image."""
    note: str | None
    """A defect that it has nevertheless."""


@dataclass(frozen=True, kw_only=True)
class DecodedFrame:
    """A decoded frame of a video."""

    pixels: Pixels
    """Encoder input (S, S, 3)."""
    wanted_us: int
    """Time asked for, microseconds after the first frame."""
    time_s: float
    """Time of the frame itself, seconds after the first frame."""


class Decoder(ABC):
    """Decodes one media item at a time. It belongs to the thread that has taken it.

    Methods raise BadMediaError for what is the media's fault; any other error is ours.
    """

    item: MediaItem
    """What is decoded now; set by `take`."""
    touch: Touch
    """Called when a decode makes progress; of a process, also while it is supervised."""

    def take(self, item: MediaItem) -> None:
        """Decode this item from now on."""
        self.item, self.touch = item, lambda: None

    def images(
        self,
        items: Sequence[MediaItem],
        at_once: int,  # noqa: ARG002
    ) -> list[Decoded | Exception | None]:
        """Decode small images together, if that is faster than one by one.

        Args:
            items: at most SLOTS images, with their bytes.
            at_once: memory that decoding one may take, bytes.

        Returns:
            of each what `image` would return, or its error; None: take it alone.
        """
        return [None] * len(items)

    @abstractmethod
    def needed(self) -> int:
        """Return the memory that decoding takes, bytes, estimated from the header; 0 if that is damaged.

        Called first for each item.
        """

    @abstractmethod
    def image(self) -> Decoded:
        """Decode an image."""

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Return width and height of the upright image by its header; (0, 0) if they are not in it."""

    @abstractmethod
    def probe(self) -> Found:
        """Read a video once, from its first to its last packet."""

    @abstractmethod
    def frames(self, wanted_us: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield the frames nearest to ascending times, as many as can be decoded. Called after `probe`."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. No other method may be running."""


class ThreadDecoder(Decoder):
    """Decodes in the thread that calls."""

    def __init__(
        self,
        decode: Callable[[bytes], DecodedImage],
        prepare: Callable[[Image.Image | DecodedImage], Pixels],
    ):
        self._decode, self._prepare = decode, prepare
        self._info: VideoInfo | None = None

    def needed(self) -> int:
        """Return the memory that decoding takes."""
        try:
            return needed_bytes(self.item.task.kind, self.item.data)
        except Exception:  # decoding reports what is wrong
            return 0

    def image(self) -> Decoded:
        """Decode an image."""
        assert isinstance(self.item.data, bytes), "images are read whole"
        decoded = self._decode(self.item.data)
        pixels = self._prepare(decoded)
        return Decoded(pixels=pixels, size=decoded.size, note=decoded.note)

    def size(self) -> tuple[int, int]:
        """Return the size of an image by its header."""
        assert isinstance(self.item.data, bytes), "images are read whole"
        return size_in_header(self.item.data)

    def probe(self) -> Found:
        """Read a video once."""
        info = self._info = probe(self.item.data, on_progress=self.touch)
        return Found(
            width=info.width, height=info.height, duration_s=info.duration_s, note=info.note
        )

    def frames(self, wanted_us: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield the frames nearest to these times."""
        assert self._info is not None, "it has been probed"
        for one in frames(self.item.data, wanted_us, self._info, on_progress=self.touch):
            pixels = self._prepare(one.image)
            yield DecodedFrame(pixels=pixels, wanted_us=one.wanted_us, time_s=one.time_s)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def niceness(device: str) -> int:
    """Return what is added to the niceness of processes that decode for a device of this type."""
    return 0 if device == "cpu" else NICE_BESIDE_GPU


def setup_for(config: WorkerConfig, spec: FeatureSpec, device: str) -> Setup | None:
    """Return how processes make the encoder inputs of a space; None if threads decode.

    Args:
        config: what the workers of a job have in common.
        spec: the spec of the space.
        device: type of the encoder's device, such as cpu or cuda.
    """
    if not config.decode_apart:
        return None
    return Setup(fit=InputFit.of(spec, compiled=config.compiled), nice=niceness(device))


class Decoders:
    """The decoders of a worker: each thread takes one, and gives it back."""

    def __init__(self, make: Callable[[], Decoder]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._free: list[Decoder] = []
        self._all: list[Decoder] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[Decoder]:
        """Take a decoder while the block runs: the one used last, or a new one."""
        with self._lock:
            if self._free:
                decoder = self._free.pop()
            else:
                decoder = self._make()
                self._all.append(decoder)
        try:
            yield decoder
        finally:
            with self._lock:
                self._free.append(decoder)

    def close(self) -> None:
        """Close all decoders. None may be taken."""
        for decoder in self._all:
            decoder.close()
