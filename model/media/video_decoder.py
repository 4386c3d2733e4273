"""Reading a video: its packets listed, its frames decoded from wherever decoding may begin.

Skipping ahead never asks the container to seek. FFmpeg's seeks land near the place, on another packet in each
container, and sometimes too late; here the packets up to a key frame are read and not decoded. That costs
the reading of the file (about a second for 1 GB), and the packet we begin at is the packet we chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from model.media.video_open import Video, open_video

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_US = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Clock:
    """From timestamps to microseconds after the first frame."""

    tick: Fraction
    """Seconds in one unit of a timestamp."""
    first: int
    """Timestamp of the first frame."""
    counted: bool
    """The video has no timestamps: a frame's number is its time."""

    def microseconds(self, timestamp: int) -> int:
        """Rounded to the nearest whole one."""
        scale = self.tick * _US
        return (2 * (timestamp - self.first) * scale.numerator + scale.denominator) // (
            2 * scale.denominator
        )


@dataclass(frozen=True, kw_only=True)
class Starts:
    """Where decoding may begin: key frames, in order of time and of reading, at least one."""

    packets: npt.NDArray[np.int64]
    """(K,) number of the packet, counting the stream's packets that have bytes; the first is always 0."""
    times_us: npt.NDArray[np.int64]
    """(K,) time of the frame it begins with; all frames from then on can be decoded from here."""

    def before(self, time_us: int) -> int:
        """Number of the last start that is not later than a time."""
        return max(0, int(np.searchsorted(self.times_us, time_us, side="right")) - 1)


class VideoDecoder:
    """The frames of a video in order of time, beginning at any key frame. Not thread-safe."""

    def __init__(
        self, data: bytes | Path, clock: Clock, on_progress: Callable[[], None] | None
    ) -> None:
        self._data = data
        self._clock = clock
        self._progress = on_progress or _nothing
        self._open = ExitStack()
        self._rewind()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def position(self) -> int:
        """Number of the packet that is decoded next."""
        return self._reader.position

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel / its height."""
        return self._video.pixel_aspect

    def begin(self, packet: int, floor_us: int) -> None:
        """Go on from a packet, a key frame.

        Frames before `floor_us` are left out: in an open group of images they lean on skipped ones.
        """
        if packet < self._reader.position:
            self._rewind()
        self._reader.skip_to(packet)
        self._last_us = floor_us - 1

    def next(self) -> tuple[int, VideoFrame] | None:
        """The next frame with its time; None at the end. Times only grow."""
        for frame in self._reader.frames():
            self._progress()
            if self._clock.counted:
                self._count += 1
                time_us = self._clock.microseconds(self._count - 1)
            elif frame.pts is None:
                continue
            else:
                time_us = self._clock.microseconds(frame.pts)
            if time_us > self._last_us:
                self._last_us = time_us
                return time_us, frame
        return None

    def _rewind(self) -> None:
        self._open.close()
        self._video = self._open.enter_context(open_video(self._data))
        self._reader = FrameReader(self._video, self._progress)
        self._last_us = -1
        self._count = 0


class FrameReader:
    """Packets of an open video through its decoder."""

    def __init__(self, video: Video, on_progress: Callable[[], None]) -> None:
        self._context = video.stream.codec_context
        self._packets = video_packets(video.container.demux(video.stream), video.stream)
        self._progress = on_progress
        self._frames = self._decode()
        self.position = 0
        """Number of the packet that is decoded next."""

    def skip_to(self, packet: int) -> None:
        """Decode nothing before this packet, and forget what was decoded."""
        self._context.flush_buffers()
        while self.position < packet and next(self._packets, None) is not None:
            self.position += 1
            if self.position % 1024 == 0:
                self._progress()
        self._frames = self._decode()

    def frames(self) -> Iterator[VideoFrame]:
        """The frames not yet taken, as decoded; what cannot be decoded is left out."""
        return self._frames

    def _decode(self) -> Iterator[VideoFrame]:
        for packet in self._packets:
            self.position += 1
            yield from decoded(self._context, packet)
        yield from decoded(self._context, None)


def video_packets(
    packets: Iterator[Packet[VideoStream]], stream: VideoStream
) -> Iterator[Packet[VideoStream]]:
    """The stream's packets that have bytes, up to where the file cannot be read on."""
    import av

    try:
        for packet in packets:
            # Empty ones repeat a frame in AVI; to a decoder they would mean the end.
            if packet.stream_index == stream.index and packet.size:
                yield packet
    except (av.FFmpegError, OSError):
        return


def decoded(context: VideoCodecContext, packet: Packet[Any] | None) -> list[VideoFrame]:
    """Frames that a packet completes (None: the last ones); none where it is damaged."""
    import av

    try:
        return context.decode(packet)
    except av.FFmpegError:
        return []


def _nothing() -> None:
    """Where nobody wants to know of progress."""
