"""Decode the frames of a video, from any key frame on.

Skipping never asks the container to seek. FFmpeg's seeks land near the wanted packet, on another one in each
container, and sometimes after it. Here the packets up to a key frame are read and not decoded. That reads the
whole file (about a second for 1 GB), and decoding starts exactly at the chosen packet.
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

from model.media.video_open import open_video

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

US_PER_S = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Converts timestamps to microseconds after the first frame."""

    time_base: Fraction
    """Seconds in one unit of a timestamp."""
    first: int
    """Timestamp of the first frame."""
    counts_frames: bool
    """Whether the video has no timestamps, so that the number of a frame is its timestamp."""

    def microseconds(self, timestamp: int) -> int:
        """Return the time of a timestamp, rounded to the nearest microsecond, upwards on a tie."""
        scale = self.time_base * US_PER_S
        return (2 * (timestamp - self.first) * scale.numerator + scale.denominator) // (
            2 * scale.denominator
        )


@dataclass(frozen=True, kw_only=True)
class AccessPoints:
    """K key frames that decoding may start from, ascending in time and in the file, at least one."""

    packets: npt.NDArray[np.int64]
    """(K,) number of the key frame's packet among the stream's packets that have bytes; the first is 0."""
    times_us: npt.NDArray[np.int64]
    """(K,) time of the key frame, microseconds; all later frames can be decoded from it."""

    def last_before(self, time_us: int) -> int:
        """Return the index of the last access point that is not later than a time."""
        return max(0, int(np.searchsorted(self.times_us, time_us, side="right")) - 1)


class VideoDecoder:
    """Decodes a video's frames in order of time, from any key frame on. Not thread-safe."""

    position: int
    """Number of the next packet to decode."""
    pixel_aspect: Fraction
    """Width of a pixel divided by its height."""

    def __init__(
        self, data: bytes | Path, clock: Clock, on_progress: Callable[[], None] | None
    ) -> None:
        self._data = data
        self._clock = clock
        self._progress = on_progress or (lambda: None)
        self._open = ExitStack()
        self._reopen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start_at(self, packet: int, first_us: int) -> None:
        """Continue at the packet of a key frame; the packets before it are read and not decoded.

        Frames before `first_us` are left out: in an open group of pictures they refer to skipped frames.
        """
        if packet < self.position:
            self._reopen()
        self._context.flush_buffers()
        while self.position < packet and next(self._packets, None) is not None:
            self.position += 1
            if self.position % 1024 == 0:
                self._progress()
        self._frames = self._decode()
        self._last_us = first_us - 1

    def next_frame(self) -> tuple[int, VideoFrame] | None:
        """Return the next frame with its time, microseconds, or None at the end. Times ascend."""
        for frame in self._frames:
            self._progress()
            if self._clock.counts_frames:
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

    def _reopen(self) -> None:
        self._open.close()
        video = self._open.enter_context(open_video(self._data))
        self._context = video.stream.codec_context
        self._packets = video_packets(video.container.demux(video.stream), video.stream)
        self._frames = self._decode()
        self._last_us = -1
        self._count = 0
        self.pixel_aspect = video.pixel_aspect
        self.position = 0

    def _decode(self) -> Iterator[VideoFrame]:
        """Yield the remaining frames. Packets that do not decode are left out."""
        for packet in self._packets:
            self.position += 1
            yield from decode_packet(self._context, packet)
        yield from decode_packet(self._context, None)


def video_packets(
    packets: Iterator[Packet[VideoStream]], stream: VideoStream
) -> Iterator[Packet[VideoStream]]:
    """Yield the stream's packets that have bytes, up to the first read error."""
    import av

    try:
        for packet in packets:
            # An empty packet repeats a frame in AVI; a decoder would take it for the end of the stream.
            if packet.stream_index == stream.index and packet.size:
                yield packet
    except (av.FFmpegError, OSError):
        return


def decode_packet(context: VideoCodecContext, packet: Packet[Any] | None) -> list[VideoFrame]:
    """Return the frames that a packet completes, none if it is damaged. None flushes the decoder."""
    import av

    try:
        return context.decode(packet)
    except av.FFmpegError:
        return []
