"""Videos: how long one is, and its frames at given times, as upright RGB images. PyAV and PIL, no torch.

    info = probe(data)                                   # bytes or a path
    wanted = sample_times(info.duration_s, max_frames)   # cache.views
    for frame in frames(data, wanted, info): ...         # frame.time_s, frame.image

Every input that is no sound video raises `BadMediaError` and nothing else. One video a call; calls may run
in any number of threads, and give the same frames whatever their number. Decisions, made once:

- Times count from the first frame that decodes, by the timestamps in the file: variable frame rates and edit
  lists are as the author meant them. A raw stream without timestamps is counted at its frame rate.
- A video that is cut off or damaged gives the frames it has; `note` says so. Without any frame it is refused.
  How FFmpeg patches a damaged H.264 frame may depend on which frames are asked for; sound ones never do.
- Where times run backwards (recordings glued together), the frames that do not advance are left out.
- Cover art and thumbnails are no video; of several videos the container's best counts; sound is ignored.
- What becomes of colours, turned cameras and the like: model/video_pixels.py. What is not even opened:
  model/video_source.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from model.media.images import BadMediaError
from model.media.video_decoder import VideoDecoder
from model.media.video_index import VideoIndex, examine
from model.media.video_pixels import image_of

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

VIDEO_SUFFIXES = frozenset(
    {
        ".3g2",
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".dv",
        ".f4v",
        ".flv",
        ".ivf",
        ".m1v",
        ".m2ts",
        ".m2v",
    }
    | {".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf"}
    | {".nut", ".ogm", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv", ".y4m"}
    | {".264", ".265", ".h264", ".h265", ".hevc"}
)
"""Lower-case endings of files that are videos. An animated GIF or WebP stays an image."""

MAX_FALSE_STARTS = 3
"""After so many key frames that were none, a video is decoded without skipping."""

_US = 1_000_000


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video, as far as a plan needs to know it."""

    duration_s: float
    """Time of the last frame that decodes, seconds after the first, to the microsecond; 0 for one frame."""
    width: int
    """Pixels of the first frame, upright, made square."""
    height: int
    """Likewise."""
    frames: int
    """From the first to the last that decode, as the file lists them; damage between may cost some."""
    note: str | None
    """What the reader of a report should know: cut off, HDR. None for nothing."""
    index: VideoIndex | None = field(default=None, repr=False, compare=False)
    """Where its frames are; without it `frames` reads the packets once more."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a video."""

    wanted_us: int
    """The time it was asked for, microseconds after the first frame."""
    time_s: float
    """Its own time, seconds after the first frame, exact to the microsecond."""
    image: Image.Image
    """RGB, upright, square pixels."""


def probe(data: bytes | Path, on_progress: Callable[[], None] | None = None) -> VideoInfo:
    """Read a video through and decode its ends.

    Args:
        data: the file's bytes, or where it is.
        on_progress: called now and then while reading, so that others see that it is alive.

    Raises:
        BadMediaError: not one frame can be had of it.
    """
    contents = examine(data, on_progress)
    return VideoInfo(
        duration_s=contents.last_us / _US,
        width=contents.first.width,
        height=contents.first.height,
        frames=contents.frames,
        note=contents.note,
        index=contents.index,
    )


def frames(
    data: bytes | Path,
    wanted_us: Sequence[int],
    info: VideoInfo,
    on_progress: Callable[[], None] | None = None,
) -> Iterator[Frame]:
    """For each time the frame nearest to it, the earlier one on a tie.

    Args:
        data: the file's bytes, or where it is.
        wanted_us: microseconds after the first frame, ascending.
        info: what `probe` said of it.
        on_progress: called at least once a decoded frame.

    Raises:
        BadMediaError: while iterating: no frame can be had of it.
    """
    if any(later < earlier for earlier, later in pairwise(wanted_us)):
        raise ValueError("times of frames must ascend")
    return _frames(data, wanted_us, info.index or examine(data, on_progress).index, on_progress)


def _frames(
    data: bytes | Path,
    wanted_us: Sequence[int],
    index: VideoIndex,
    on_progress: Callable[[], None] | None,
) -> Iterator[Frame]:
    with VideoDecoder(data, index.clock, on_progress) as tape:
        finder = _Finder(tape, index)
        shown: tuple[int, Image.Image] | None = None
        for wanted in wanted_us:
            time_us, frame = finder.nearest(wanted)
            if shown is None or shown[0] != time_us:
                shown = time_us, image_of(frame, tape.pixel_aspect)
            yield Frame(wanted_us=wanted, time_s=time_us / _US, image=shown[1])


class _Finder:
    """The frame nearest to each of ascending times, decoding no more than needed."""

    def __init__(self, tape: VideoDecoder, index: VideoIndex) -> None:
        self._tape = tape
        self._starts = index.starts
        self._start = 0
        """Where decoding began: frames from there on are as a reader from the beginning sees them."""
        self._false_starts = 0
        self._below: tuple[int, VideoFrame] | None = None
        self._latest: tuple[int, VideoFrame] | None = None

    def nearest(self, wanted_us: int) -> tuple[int, VideoFrame]:
        """Its time and the frame."""
        self._skip_ahead(wanted_us)
        while self._latest is None or self._latest[0] < wanted_us:
            found = self._tape.next()
            if found is None:
                break
            self._below, self._latest = self._latest, found
        around = [frame for frame in (self._below, self._latest) if frame is not None]
        if not around:
            raise BadMediaError("no frame of it can be decoded")
        return min(around, key=lambda frame: abs(frame[0] - wanted_us))

    def _skip_ahead(self, wanted_us: int) -> None:
        """Leave out what need not be decoded, if the next start for this time is still to come."""
        if self._latest is not None and self._latest[0] >= wanted_us:
            return
        start = self._starts.before(wanted_us)
        if (
            int(self._starts.packets[start]) <= self._tape.position
            or self._false_starts == MAX_FALSE_STARTS
        ):
            return
        if not self._begin(start):
            self._false_starts += 1
            back = 1
            while not self._begin(max(self._start, start - back)):
                back *= 2

    def _begin(self, start: int) -> bool:
        """Go on from a start; False where it is not whole or shows something else first than itself.

        Such a key frame is damaged, or begins to refresh an image piece by piece (live H.264), which
        FFmpeg takes for complete too early: what comes of it differs from what comes of the beginning.
        """
        time_us = int(self._starts.times_us[start])
        self._tape.begin(int(self._starts.packets[start]), time_us)
        self._below, self._latest = None, self._tape.next()
        shows_itself = self._latest is not None and self._latest[0] == time_us
        whole = self._latest is not None and not self._latest[1].is_corrupt
        proven = start <= self._start or (shows_itself and whole)
        if proven:
            self._start = start
        return proven
