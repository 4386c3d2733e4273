"""What a video contains: its packets listed, its first and last frame decoded.

The length of a video is the time of its last frame *that decodes*, which only decoding tells: containers
declare lengths that hold for the sound, for frames that were cut away, or for nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from model.media.images import BadMediaError
from model.media.video_decoder import Clock, Starts, VideoDecoder, decoded
from model.media.video_open import Video, open_video, reason_of
from model.media.video_pixels import HDR, image_of

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

MAX_DURATION_S = 7 * 24 * 3600
"""Longer videos are refused: a damaged timestamp says centuries, no camera runs for weeks."""

NO_TIME = -(2**63)
"""FFmpeg's own mark of a timestamp that is not known."""

_DECLARES = frozenset({"matroska", "webm", "flv", "asf"})
"""Containers whose length is written down, not guessed from the bit rate or from what is there."""

_US = 1_000_000


@dataclass(frozen=True, kw_only=True)
class VideoIndex:
    """Where the frames of a video are, and when."""

    clock: Clock
    starts: Starts


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All there is to know about a video without its frames in the middle."""

    index: VideoIndex
    first: Image.Image
    """The first frame that decodes."""
    last_us: int
    """Time of the last frame that decodes."""
    frames: int
    """From the first to the last that decode, as the file lists them."""
    note: str | None


@dataclass(kw_only=True)
class _Listing:
    """One pass over the packets of a video."""

    times: array[int] = field(default_factory=lambda: array("q"))
    """Timestamp of each packet of the video that has bytes, `NO_TIME` where it has none."""
    keys: list[int] = field(default_factory=list)
    """Numbers of those that are key frames and have a timestamp."""
    hidden: set[int] = field(default_factory=set)
    """Numbers of those that an edit list hides; decoding needs them."""
    changes: bool = False
    """Later packets need what earlier ones bring along."""
    ends: dict[int, int] = field(default_factory=dict)
    """Stream -> when its last packet ends, in its own units."""
    end_s: float = 0.0
    """When the last packet of any stream ends, on the container's clock."""
    head: VideoFrame | None = None
    """The first frame that decodes."""
    image: Image.Image | None = None
    trouble: str | None = None
    """Why the file could not be read to its end."""


def examine(data: bytes | Path, on_progress: Callable[[], None] | None = None) -> Contents:
    """List the packets, decode both ends.

    Raises:
        BadMediaError: no video, or not one of its frames decodes.
    """
    with open_video(data) as video:
        listing = _list_packets(video, on_progress)
        if listing.head is None or listing.image is None:
            raise BadMediaError("no frame of it can be decoded")
        index = VideoIndex(clock=_clock(video, listing), starts=_only_start())
        if not index.clock.counted and not listing.changes:
            index = VideoIndex(clock=index.clock, starts=_find_starts(listing, index.clock))
        notes = [*_cut(video, listing), *_colours(listing.head)]
    last_us, last_time, counted = _find_last(data, index, on_progress)
    if last_us > MAX_DURATION_S * _US:
        raise BadMediaError(f"it claims to last {last_us / _US / 86400:.0f} days")
    if index.clock.counted:
        frames = counted
    else:
        shown = np.array(listing.times, np.int64)
        shown[list(listing.hidden)] = NO_TIME
        shown = np.unique(shown[shown >= index.clock.first])
        frames = int(np.searchsorted(shown, last_time, side="right"))
        if missing := len(shown) - frames:
            notes.insert(0, f"ends early: its last {missing} frames cannot be decoded")
    return Contents(
        index=index,
        first=listing.image,
        last_us=last_us,
        frames=frames,
        note="; ".join(notes) or None,
    )


def _list_packets(video: Video, on_progress: Callable[[], None] | None) -> _Listing:
    """Read the video to its end, decoding until the first frame comes out."""
    listing = _Listing()
    context = video.stream.codec_context
    for number, packet in enumerate(_readable_packets(video, listing)):
        if on_progress and number % 1024 == 0:
            on_progress()
        _note_end(listing, packet)
        if packet.stream_index != video.stream.index or not packet.size:
            continue
        if packet.is_keyframe and packet.pts is not None:
            listing.keys.append(len(listing.times))
        listing.changes = listing.changes or _brings_along(packet)
        if packet.is_discard:
            listing.hidden.add(len(listing.times))
        listing.times.append(NO_TIME if packet.pts is None else packet.pts)
        if listing.head is None:
            _take_head(listing, video, decoded(context, packet))
    if listing.head is None:
        _take_head(listing, video, decoded(context, None))
    for number, end in listing.ends.items():
        tick = video.container.streams[number].time_base
        listing.end_s = max(listing.end_s, float(end * tick) if tick else 0.0)
    return listing


def _brings_along(packet: Packet[Any]) -> bool:
    """Whether later packets need what this one changes, so that it may not be skipped."""
    return (
        packet.has_sidedata("new_extradata")
        or packet.has_sidedata("param_change")
        or packet.has_sidedata("palette")
    )


def _readable_packets(video: Video, listing: _Listing) -> Iterator[Packet[Any]]:
    import av

    try:
        yield from video.container.demux()
    except (av.FFmpegError, OSError) as error:
        listing.trouble = reason_of(error)


def _note_end(listing: _Listing, packet: Packet[Any]) -> None:
    time = packet.pts if packet.pts is not None else packet.dts
    if time is not None:
        end = time + (packet.duration or 0)
        stream = packet.stream_index
        listing.ends[stream] = max(listing.ends.get(stream, end), end)


def _take_head(listing: _Listing, video: Video, frames: list[VideoFrame]) -> None:
    if frames:
        listing.head = frames[0]
        listing.image = image_of(frames[0], video.pixel_aspect)


def _clock(video: Video, listing: _Listing) -> Clock:
    """By the timestamps, or by counting where half of the packets have none (raw streams)."""
    assert listing.head is not None
    missing = listing.times.count(NO_TIME)
    first = listing.head.pts
    if first is not None and 2 * missing < len(listing.times):
        return Clock(tick=video.tick, first=first, counted=False)
    rate = video.stream.average_rate or video.stream.guessed_rate or Fraction(25)
    return Clock(tick=1 / Fraction(rate), first=0, counted=True)


def _only_start() -> Starts:
    return Starts(packets=np.zeros(1, np.int64), times_us=np.zeros(1, np.int64))


def _find_starts(listing: _Listing, clock: Clock) -> Starts:
    """The beginning, and the key frames that are later than everything read before them."""
    packets, times = [0], [0]
    keys = set(listing.keys)
    latest = clock.first
    for number, time in enumerate(listing.times):
        if time <= latest:
            continue
        latest = time
        time_us = clock.microseconds(time)
        if number in keys and time_us <= MAX_DURATION_S * _US:
            packets.append(number)
            times.append(time_us)
    return Starts(packets=np.array(packets, np.int64), times_us=np.array(times, np.int64))


def _find_last(
    data: bytes | Path, index: VideoIndex, on_progress: Callable[[], None] | None
) -> tuple[int, int, int]:
    """The last frame that decodes: microseconds, timestamp; and how many were decoded to find it."""
    starts = index.starts
    with VideoDecoder(data, index.clock, on_progress) as tape:
        start, back = len(starts.packets) - 1, 1
        while True:
            tape.begin(int(starts.packets[start]), int(starts.times_us[start]))
            last, count = None, 0
            while (found := tape.next()) is not None:
                last = found
                count += 1
            if last is not None:
                return last[0], last[1].pts or 0, count
            if start == 0:
                raise BadMediaError("no frame of it can be decoded")
            start = max(0, start - back)
            back *= 2


def _cut(video: Video, listing: _Listing) -> list[str]:
    """What says that a file is shorter than it was written."""
    container = video.container
    kinds = set(container.format.name.split(","))
    if listing.trouble:
        return [f"ends early: unreadable after {listing.end_s:.1f} s ({listing.trouble})"]
    if _lacks_bytes(video, kinds):
        return [f"ends early: the file is cut off after {listing.end_s:.1f} s"]
    if kinds & _DECLARES and container.duration:
        seen_s = listing.end_s - (container.start_time or 0) / _US
        declared_s = container.duration / _US
        if seen_s < declared_s - max(0.5, 0.02 * declared_s):
            return [f"ends early: {seen_s:.1f} s of {declared_s:.1f} s"]
    return []


def _lacks_bytes(video: Video, kinds: set[str]) -> bool:
    """Whether the file says that it was longer."""
    if "mov" in kinds:
        entries = video.stream.index_entries
        last = entries[max(0, len(entries) - 64) :]
        return any(entry.pos + entry.size > video.size for entry in last)
    if "avi" in kinds:
        return 8 + int.from_bytes(video.head[4:8], "little") > video.size
    return False


def _colours(frame: VideoFrame) -> list[str]:
    name = HDR.get(frame.color_trc)
    return [f"HDR ({name}), shown without tone mapping"] if name else []
