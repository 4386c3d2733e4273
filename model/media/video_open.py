"""The bytes of a video, opened so that nothing but those bytes is ever read. PyAV, no torch.

A video comes from strangers, and FFmpeg knows formats that are lists of other files (HLS, DASH, concat),
devices and filter graphs. So: only demuxers and decoders named here; no file name, which demuxers take hints
from; and an empty list of protocols. Our bytes come through a reader of our own and need none, and whatever
asks for a second file (a QuickTime reference movie) finds every way barred.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

from model.media.images import MAX_REASON, BadMediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_FRAME_PIXELS = 35_651_584
"""Larger frames are refused: the largest any level of H.264 and the 8K levels of HEVC and AV1 allow. A
decoder keeps up to 16 of them, so PIL's limit of 89 million would mean gigabytes."""

FORMATS = (
    "mov",
    "matroska",
    "webm",
    "avi",
    "mpegts",
    "mpeg",
    "mpegvideo",
    "flv",
    "asf",
    "ogg",
    "yuv4mpegpipe",
    "mjpeg",
    "h264",
    "hevc",
    "m4v",
    "h263",
    "obu",
    "ivf",
    "nut",
    "dv",
    "mxf",
)
"""FFmpeg's names of the containers that are read: those that hold their own images, and only those."""

CODECS = (
    "av1",
    "cinepak",
    "dnxhd",
    "dvvideo",
    "ffv1",
    "ffvhuff",
    "flv",
    "h261",
    "h263",
    "h263i",
    "h263p",
    "h264",
    "hevc",
    "huffyuv",
    "libdav1d",
    "mjpeg",
    "mpeg1video",
    "mpeg2video",
    "mpeg4",
    "msmpeg4",
    "msmpeg4v1",
    "msmpeg4v2",
    "msvideo1",
    "png",
    "prores",
    "qtrle",
    "rawvideo",
    "svq1",
    "svq3",
    "theora",
    "utvideo",
    "v210",
    "vc1",
    "vp6",
    "vp6f",
    "vp8",
    "vp9",
    "wmv1",
    "wmv2",
    "wmv3",
)
"""FFmpeg's decoders that are run: what cameras, screens and the web make, and what archives keep."""

BUFFER_BYTES = 1 << 18
"""Read at a time. PyAV's own 32 KiB takes Python's lock eight times as often."""

_IMAGE_STREAMS = ("attached_pic", "still_image", "timed_thumbnails")
"""Dispositions of streams that are no video: cover art, thumbnails."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """An open video and its video stream."""

    container: InputContainer
    stream: VideoStream
    size: int
    """Bytes of the file."""
    head: bytes
    """The first of them."""
    pixel_aspect: Fraction
    """Width of a pixel / its height, before any turn; 1 where nothing sensible is said."""

    @property
    def tick(self) -> Fraction:
        """Seconds in one unit of a timestamp."""
        return Fraction(self.stream.time_base or 0)


class _Reader:
    """A file without a name: what FFmpeg finds in it must not depend on what it is called."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read: Callable[[int], bytes] = file.read
        self.seek: Callable[[int, int], int] = file.seek
        self.tell: Callable[[], int] = file.tell
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.head = file.read(512)
        file.seek(0)


@contextmanager
def open_video(data: bytes | Path) -> Iterator[Video]:
    """Open a video for reading once, from its beginning.

    Raises:
        BadMediaError: no video, none that we read, or none whose frames have a sensible size.
    """
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb", buffering=0)
    except OSError as error:
        raise BadMediaError(f"cannot be read: {error.strerror}", "fetch") from None
    with file:
        reader = _Reader(file)
        if not reader.size:
            raise BadMediaError("empty file")
        with _open_container(reader) as container:
            stream = _video_stream(container)
            context = stream.codec_context
            context.thread_type = "NONE"
            context.thread_count = (
                1  # damaged frames look the same every time, and memory is bounded
            )
            context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield Video(
                container=container,
                stream=stream,
                size=reader.size,
                head=reader.head,
                pixel_aspect=_pixel_aspect(stream),
            )


def _open_container(reader: _Reader) -> InputContainer:
    import av

    lists = {"format_whitelist": ",".join(FORMATS), "codec_whitelist": ",".join(CODECS)}
    try:
        return av.open(
            reader,
            "r",
            options={
                "max_pixels": str(MAX_FRAME_PIXELS)
            },  # for what FFmpeg decodes to know a stream
            container_options={"protocol_whitelist": "", **lists},
            metadata_errors="replace",
            buffer_size=BUFFER_BYTES,
        )
    except (av.FFmpegError, ValueError) as error:
        raise BadMediaError(_describe_unknown(reader.head, error)) from None


def _video_stream(container: InputContainer) -> VideoStream:
    """The best video stream that is no cover art, with a decoder we run and a sane size."""
    best = container.streams.best("video")
    videos = [s for s in container.streams.video if not _is_image(s)]
    if not videos:
        kinds = sorted({stream.type for stream in container.streams})
        raise BadMediaError(f"no video in it, only {', '.join(kinds) or 'an empty container'}")
    stream = next((video for video in videos if video is best), videos[0])
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise BadMediaError(f"codec {context.name if context else 'unknown'} is not supported")
    check_size(context.width, context.height)
    if not stream.time_base:
        raise BadMediaError("its timestamps have no unit")
    return stream


def _is_image(stream: VideoStream) -> bool:
    return any(getattr(type(stream.disposition), n) in stream.disposition for n in _IMAGE_STREAMS)


def check_size(width: int, height: int) -> None:
    """Refuse frames without pixels, and with more than `MAX_FRAME_PIXELS`."""
    if width < 1 or height < 1:
        raise BadMediaError(f"frames of {width} x {height} pixels")
    if width * height > MAX_FRAME_PIXELS:
        raise BadMediaError(f"frames of {width} x {height} pixels, more than {MAX_FRAME_PIXELS}")


def _pixel_aspect(stream: VideoStream) -> Fraction:
    """As the container or the codec says, and 1 where that is absurd: real ones lie within 1:4 and 4:1."""
    aspect = stream.sample_aspect_ratio
    if not aspect or not Fraction(1, 4) <= aspect <= 4:
        return Fraction(1)
    return Fraction(aspect)


def _describe_unknown(head: bytes, error: Exception) -> str:
    """Dead links often answer with a page instead of a video: say so."""
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not a video"
    return f"no readable video ({reason_of(error)})"


def reason_of(error: Exception) -> str:
    """What FFmpeg says of an error, in one line, without its numbers and names."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(said).split())
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
