"""Videos: how long one is, and its frames at given times, as upright RGB images. PyAV and PIL, no torch.

    info = probe(data)                                   # bytes or a path; model.media.video_index
    wanted = sample_times(info.duration_s, max_frames)   # cache.format.frame_sampling
    for frame in frames(data, wanted, info): ...         # frame.time_s, frame.image

Every input that is not a readable video raises `BadMediaError` and nothing else. A call decodes one video in
one thread; calls may run in any number of threads and return equal frames. These decisions are made here:

- Times count from the first frame that decodes, by the timestamps in the file, so variable frame rates and
  edit lists are followed. A raw stream without timestamps is counted at its frame rate.
- A truncated or damaged video gives the frames that decode; `VideoInfo.note` says what is missing. A video
  without any frame is refused. How FFmpeg conceals a damaged H.264 frame may depend on which frames are asked
  for; intact frames never do.
- Where timestamps run backwards (joined recordings), frames that do not advance are left out.
- Cover art and thumbnails are not videos. Of several video streams the container's best is used. Sound is
  ignored.

model/media/video_pixels.py decides on colours and rotation, model/media/video_open.py on what is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from model.media.images import BadMediaError
from model.media.video_decoder import US_PER_S, AccessPoints, VideoDecoder
from model.media.video_index import VideoInfo
from model.media.video_pixels import frame_to_image

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

# fmt: off
VIDEO_SUFFIXES = frozenset((
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".h264",
    ".h265", ".hevc", ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov",
    ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".ts", ".vob",
    ".webm", ".wmv", ".y4m",
))
# fmt: on
"""Lower-case suffixes of video files. An animated GIF or WebP counts as an image."""

MAX_BAD_KEY_FRAMES = 3
"""Key frames that turn out unusable before a video is decoded without skipping."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a video."""

    wanted_us: int
    """Time asked for, microseconds after the first frame."""
    time_s: float
    """Time of the frame itself, seconds after the first frame, exact to a microsecond."""
    image: Image.Image
    """RGB, upright, square pixels."""


def frames(
    data: bytes | Path,
    wanted_us: Sequence[int],
    info: VideoInfo,
    on_progress: Callable[[], None] | None = None,
) -> Iterator[Frame]:
    """Yield the frame nearest to each time, the earlier one on a tie. Errors are raised while iterating.

    Args:
        data: the file's bytes, or its path.
        wanted_us: microseconds after the first frame, ascending.
        info: the result of `probe` for this video.
        on_progress: called for each decoded frame.

    Raises:
        ValueError: the times do not ascend.
        BadMediaError: none of its frames decodes.
    """
    if any(later < earlier for earlier, later in pairwise(wanted_us)):
        raise ValueError("times of frames must ascend")
    with VideoDecoder(data, info.clock, on_progress) as decoder:
        finder = _NearestFrames(decoder, info.access_points)
        shown: tuple[int, Image.Image] | None = None
        for wanted in wanted_us:
            time_us, frame = finder.nearest(wanted)
            if shown is None or shown[0] != time_us:
                shown = time_us, frame_to_image(frame, decoder.pixel_aspect)
            yield Frame(wanted_us=wanted, time_s=time_us / US_PER_S, image=shown[1])


class _NearestFrames:
    """Finds the frame nearest to each of ascending times and skips to key frames on the way."""

    def __init__(self, decoder: VideoDecoder, access_points: AccessPoints) -> None:
        self._decoder = decoder
        self._access_points = access_points
        self._start = 0
        """Last access point that decoding started from and that proved usable."""
        self._bad_key_frames = 0
        self._below: tuple[int, VideoFrame] | None = None
        self._latest: tuple[int, VideoFrame] | None = None

    def nearest(self, wanted_us: int) -> tuple[int, VideoFrame]:
        """Return the nearest frame with its time, microseconds."""
        self._skip_ahead(wanted_us)
        while self._latest is None or self._latest[0] < wanted_us:
            found = self._decoder.next_frame()
            if found is None:
                break
            self._below, self._latest = self._latest, found
        around = [frame for frame in (self._below, self._latest) if frame is not None]
        if not around:
            raise BadMediaError("no frame of it can be decoded")
        return min(around, key=lambda frame: abs(frame[0] - wanted_us))

    def _skip_ahead(self, wanted_us: int) -> None:
        """Skip to the last access point before a time, if that is further on."""
        if self._latest is not None and self._latest[0] >= wanted_us:
            return
        start = self._access_points.last_before(wanted_us)
        if (
            int(self._access_points.packets[start]) <= self._decoder.position
            or self._bad_key_frames == MAX_BAD_KEY_FRAMES
        ):
            return
        if not self._start_at(start):
            self._bad_key_frames += 1
            back = 1
            while not self._start_at(max(self._start, start - back)):
                back *= 2

    def _start_at(self, start: int) -> bool:
        """Start decoding at an access point. Return False if its key frame is not usable.

        The key frame is unusable if it is damaged or if another frame comes out first. Live H.264 refreshes
        an image piece by piece, and FFmpeg takes it for complete too early: frames decoded from there differ
        from frames decoded from the beginning.
        """
        time_us = int(self._access_points.times_us[start])
        self._decoder.start_at(int(self._access_points.packets[start]), time_us)
        self._below, self._latest = None, self._decoder.next_frame()
        shows_itself = self._latest is not None and self._latest[0] == time_us
        whole = self._latest is not None and not self._latest[1].is_corrupt
        usable = start <= self._start or (shows_itself and whole)
        if usable:
            self._start = start
        return usable
