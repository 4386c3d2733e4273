"""Scan a video once: list its packets, decode its first and its last frame.

The length of a video is the time of its last frame *that decodes*, which takes decoding. The length that a
container declares may be that of the sound, may include frames that were cut away, or may be wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from model.media.images import BadMediaError
from model.media.kinds import recognise
from model.media.video_decoder import US_PER_S, AccessPoints, Clock, VideoDecoder, decode_packet
from model.media.video_open import OpenVideo, error_reason, open_video
from model.media.video_pixels import HDR, frame_to_image

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

MAX_DURATION_S = 7 * 24 * 3600
"""Longest video, seconds: one week. A longer one has damaged timestamps."""

NO_TIME = -(2**63)
"""FFmpeg's value for an unknown timestamp."""

_DECLARE_DURATION = frozenset({"matroska", "webm", "flv", "asf"})
"""Containers that store their length. For others FFmpeg estimates it from the bit rate or the packets."""

_ASF_FILE: Final = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""Identifier of the header in ASF that states the size of the file."""

_DECODING_SIDE_DATA: Final = ("new_extradata", "param_change", "palette")
"""Side data of packets that changes how later packets are decoded."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Facts about one video."""

    duration_s: float
    """Time of the last frame that decodes, seconds after the first, to the microsecond."""
    width: int
    """Width of the first frame, upright, in square pixels."""
    height: int
    """Height of the first frame, upright, in square pixels."""
    frames: int
    """Frames from the first to the last that decode, as the file lists them, damaged ones included."""
    note: str | None
    """What a report should mention: truncated, HDR. None for nothing."""
    clock: Clock = field(repr=False, compare=False)
    access_points: AccessPoints = field(repr=False, compare=False)


@dataclass(kw_only=True)
class _PacketList:
    """What one pass over the packets of a video collects."""

    times: array[int] = field(default_factory=lambda: array("q"))
    """Timestamp of each packet of the video stream that has bytes, `NO_TIME` for an unknown one."""
    keys: list[int] = field(default_factory=list)
    """Numbers of the packets that are key frames and have a timestamp."""
    hidden: set[int] = field(default_factory=set)
    """Numbers of the packets that an edit list hides. They are decoded and not shown."""
    changes_decoding: bool = False
    """Whether some packet changes how later ones are decoded, so that none may be skipped."""
    starts: dict[int, int] = field(default_factory=dict)
    """Stream number -> beginning of its first packet, in the stream's time base."""
    ends: dict[int, int] = field(default_factory=dict)
    """Stream number -> end of its last packet, in the stream's time base."""
    start_s: float = 0.0
    """Beginning of the first packet of any stream, seconds on the container's clock."""
    end_s: float = 0.0
    """End of the last packet of any stream, seconds on the container's clock."""
    first_frame: VideoFrame | None = None
    """The first frame that decodes."""
    error: str | None = None
    """The read error that ended the pass before the end of the file."""


def probe(data: bytes | Path, on_progress: Callable[[], None] | None = None) -> VideoInfo:
    """Read all packets of a video and decode its first and last frames.

    Args:
        data: the file's bytes, or its path.
        on_progress: called every 1,024 packets and for each decoded frame, as a sign of life.

    Raises:
        BadMediaError: it is not a video, or none of its frames decodes.
    """
    with open_video(data) as video:
        listed = _list_packets(video, on_progress)
        if listed.first_frame is None:
            raise BadMediaError("no frame of it can be decoded")
        found = recognise(video.head)
        if found.kind == "image" and len(listed.times) == 1:
            raise BadMediaError(found.instead_of("video"))  # one JPEG is not a stream of JPEGs
        clock = _clock(video, listed)
        width, height = frame_to_image(listed.first_frame, video.pixel_aspect).size
        access_points = _find_access_points(listed, clock)
        notes = _truncation_notes(video, listed)
        if transfer := HDR.get(listed.first_frame.color_trc):
            notes.append(f"HDR ({transfer}), shown without tone mapping")
    last_us, last_time, counted = _find_last(data, clock, access_points, on_progress)
    if last_us > MAX_DURATION_S * US_PER_S:
        raise BadMediaError(f"timestamps span {last_us / US_PER_S / 86400:.0f} days")
    if clock.counts_frames:
        frames = counted
    else:
        shown = np.array(listed.times, np.int64)
        shown[list(listed.hidden)] = NO_TIME
        shown = np.unique(shown[shown >= clock.first])
        frames = int(np.searchsorted(shown, last_time, side="right"))
        if missing := len(shown) - frames:
            notes.insert(0, f"ends early: its last {missing} frames cannot be decoded")
    return VideoInfo(
        duration_s=last_us / US_PER_S,
        width=width,
        height=height,
        frames=frames,
        note="; ".join(notes) or None,
        clock=clock,
        access_points=access_points,
    )


def _list_packets(video: OpenVideo, on_progress: Callable[[], None] | None) -> _PacketList:
    """Read the video to its end; decode until the first frame is complete."""
    listed = _PacketList()
    context = video.stream.codec_context
    for number, packet in enumerate(_readable_packets(video, listed)):
        if on_progress and number % 1024 == 0:
            on_progress()
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            end = time + (packet.duration or 0)
            stream = packet.stream_index
            listed.starts[stream] = min(listed.starts.get(stream, time), time)
            listed.ends[stream] = max(listed.ends.get(stream, end), end)
        if packet.stream_index != video.stream.index or not packet.size:
            continue
        if packet.is_keyframe and packet.pts is not None:
            listed.keys.append(len(listed.times))
        if any(packet.has_sidedata(kind) for kind in _DECODING_SIDE_DATA):
            listed.changes_decoding = True
        if packet.is_discard:
            listed.hidden.add(len(listed.times))
        listed.times.append(NO_TIME if packet.pts is None else packet.pts)
        if listed.first_frame is None:
            listed.first_frame = next(iter(decode_packet(context, packet)), None)
    if listed.first_frame is None:
        listed.first_frame = next(iter(decode_packet(context, None)), None)
    ticks = {n: video.container.streams[n].time_base or Fraction(0) for n in listed.ends}
    listed.start_s = min((float(t * ticks[n]) for n, t in listed.starts.items()), default=0.0)
    listed.end_s = max((float(t * ticks[n]) for n, t in listed.ends.items()), default=0.0)
    return listed


def _readable_packets(video: OpenVideo, listed: _PacketList) -> Iterator[Packet[Any]]:
    import av

    try:
        yield from video.container.demux()
    except (av.FFmpegError, OSError) as error:
        listed.error = error_reason(error)


def _clock(video: OpenVideo, listed: _PacketList) -> Clock:
    """Return a clock of timestamps, or of frame numbers if most packets have none (raw streams)."""
    assert listed.first_frame is not None
    missing = listed.times.count(NO_TIME)
    first = listed.first_frame.pts
    if first is not None and 2 * missing < len(listed.times):
        tick = Fraction(video.stream.time_base or 0)
        return Clock(time_base=tick, first=first, counts_frames=False)
    # 25: FFmpeg's own default for raw streams.
    rate = video.stream.average_rate or video.stream.guessed_rate or Fraction(25)
    return Clock(time_base=1 / Fraction(rate), first=0, counts_frames=True)


def _find_access_points(listed: _PacketList, clock: Clock) -> AccessPoints:
    """Return the beginning, and the key frames that are later than every packet before them.

    If decoding depends on every packet, or frames are counted, the beginning is the only one.
    """
    packets, times = [0], [0]
    keys = set(listed.keys)
    latest = clock.first
    may_skip = not (clock.counts_frames or listed.changes_decoding)
    for number, time in enumerate(listed.times if may_skip else ()):
        if time <= latest:
            continue
        latest = time
        time_us = clock.microseconds(time)
        if number in keys and time_us <= MAX_DURATION_S * US_PER_S:
            packets.append(number)
            times.append(time_us)
    return AccessPoints(packets=np.array(packets, np.int64), times_us=np.array(times, np.int64))


def _find_last(
    data: bytes | Path,
    clock: Clock,
    access_points: AccessPoints,
    on_progress: Callable[[], None] | None,
) -> tuple[int, int, int]:
    """Find the last frame that decodes: try the last access point, then earlier ones.

    Returns:
        Its time in microseconds, its timestamp, and the number of frames decoded from the access point on.
    """
    with VideoDecoder(data, clock, on_progress) as decoder:
        start, back = len(access_points.packets) - 1, 1
        while True:
            decoder.start_at(int(access_points.packets[start]), int(access_points.times_us[start]))
            last, count = None, 0
            while (found := decoder.next_frame()) is not None:
                last = found
                count += 1
            if last is not None:
                return last[0], last[1].pts or 0, count
            if start == 0:
                raise BadMediaError("no frame of it can be decoded")
            start = max(0, start - back)
            back *= 2  # a long damaged end takes few tries


def _truncation_notes(video: OpenVideo, listed: _PacketList) -> list[str]:
    """Return a note if the file is shorter than its container says, else nothing."""
    container = video.container
    kinds = set(container.format.name.split(","))
    seen_s = listed.end_s - listed.start_s
    if listed.error:
        return [f"ends early: unreadable after {seen_s:.1f} s ({listed.error})"]
    if _is_truncated(video, kinds):
        return [f"ends early: the file is cut off after {seen_s:.1f} s"]
    if kinds & _DECLARE_DURATION and container.duration:
        declared_s = container.duration / US_PER_S
        # Of a video whose clock starts late, most programs declare the time of its end, others its length.
        if declared_s > listed.start_s:
            declared_s -= max(0.0, listed.start_s)
        if seen_s < declared_s - max(0.5, 0.02 * declared_s):
            return [f"ends early: {seen_s:.1f} s of {declared_s:.1f} s"]
    return []


def _is_truncated(video: OpenVideo, kinds: set[str]) -> bool:
    """Return whether the container names bytes beyond the end of the file."""
    if "mov" in kinds:
        entries = video.stream.index_entries
        last = entries[max(0, len(entries) - 64) :]
        return any(entry.pos + entry.size > video.size for entry in last)
    if "avi" in kinds:
        return 8 + int.from_bytes(video.head[4:8], "little") > video.size
    if "asf" in kinds and (at := video.head.find(_ASF_FILE)) >= 0:
        is_live = video.head[at + 88 : at + 89] == b"\1"  # then the size is not stated
        return not is_live and int.from_bytes(video.head[at + 40 : at + 48], "little") > video.size
    return False
