"""Open the bytes of a video so that FFmpeg reads those bytes and nothing else. PyAV, no torch.

Videos come from strangers, and some of FFmpeg's formats are lists of other files (HLS, DASH, concat), devices
or filter graphs. Therefore:

- Only the demuxers and decoders named here run.
- FFmpeg gets no file name, because demuxers draw conclusions from it. A reader object supplies the bytes.
- The list of protocols is empty, so a file that refers to a second one (a QuickTime reference movie) cannot
  open it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cache.format.gate import check_regular
from configs import one_line
from model.media.images import MAX_REASON, BadMediaError, check_size
from model.media.kinds import HEAD_BYTES, Recognised, recognise

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_FRAME_PIXELS = 35_651_584
"""Largest frame that is decoded: the largest that any level of H.264 and the 8K levels of HEVC and AV1 allow.

A decoder keeps up to 16 frames, so PIL's limit of 89 million pixels would take gigabytes.
"""

# fmt: off
FORMATS = (
    "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg",
    "yuv4mpegpipe", "mjpeg", "h264", "hevc", "m4v", "h263", "obu", "ivf", "nut", "dv", "mxf",
)
# fmt: on
"""FFmpeg's names of the containers that are read. None of them refers to other files for its frames."""

# fmt: off
CODECS = (
    "av1", "cinepak", "dnxhd", "dvvideo", "ffv1", "ffvhuff", "flv", "h261", "h263", "h263i",
    "h263p", "h264", "hevc", "huffyuv", "libdav1d", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4",
    "msmpeg4", "msmpeg4v1", "msmpeg4v2", "msvideo1", "png", "prores", "qtrle", "rawvideo", "svq1",
    "svq3", "theora", "utvideo", "v210", "vc1", "vp6", "vp6f", "vp8", "vp9", "wmv1", "wmv2", "wmv3",
)
# fmt: on
"""FFmpeg's names of the decoders that run: codecs of cameras, screen recorders, the web and archives."""

BUFFER_BYTES = 1 << 18
"""Bytes per read. PyAV's default of 32 KiB takes the interpreter lock eight times as often."""

_IMAGE_STREAMS = ("attached_pic", "still_image", "timed_thumbnails")
"""Dispositions of video streams that are cover art or thumbnails."""


@dataclass(frozen=True, kw_only=True)
class OpenVideo:
    """An open video and its video stream."""

    container: InputContainer
    stream: VideoStream
    size: int
    """Size of the file, bytes."""
    head: bytes
    """The first bytes of the file, `HEAD_BYTES` of a longer one."""
    pixel_aspect: Fraction
    """Width of a pixel divided by its height, before any rotation."""


class _Reader:
    """A file without a name, so that FFmpeg identifies it by its bytes only."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read: Callable[[int], bytes] = file.read
        self.seek: Callable[[int, int], int] = file.seek
        self.tell: Callable[[], int] = file.tell
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.head = file.read(HEAD_BYTES)
        file.seek(0)


@contextmanager
def open_video(data: bytes | Path) -> Iterator[OpenVideo]:
    """Open a video for one pass from its beginning.

    Raises:
        BadMediaError: the file cannot be read, is not a video in one of `FORMATS` and `CODECS`, or has frames
            without pixels or above `MAX_FRAME_PIXELS`.
    """
    try:
        if isinstance(data, Path):
            check_regular(data)
        file = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb", buffering=0)
    except OSError as error:
        raise BadMediaError(f"cannot be read: {error.strerror}", "fetch") from None
    with file:
        reader = _Reader(file)
        if not reader.size:
            raise BadMediaError("empty file")
        found = recognise(reader.head, data.name if isinstance(data, Path) else "")
        # FFmpeg would open HEIC and AVIF. A JPEG may be the first frame of a stream: the packets tell.
        if found.format != "JPEG" and (found.kind == "image" or found.format in ("HEIC", "HEIF")):
            raise BadMediaError(found.instead_of("video"))
        with _open_container(reader, found) as container:
            stream = _video_stream(container)
            context = stream.codec_context
            context.thread_type = "NONE"
            # Equal pixels for damaged frames each time, and bounded memory.
            context.thread_count = 1
            context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield OpenVideo(
                container=container,
                stream=stream,
                size=reader.size,
                head=reader.head,
                pixel_aspect=_pixel_aspect(stream),
            )


def _open_container(reader: _Reader, found: Recognised) -> InputContainer:
    import av

    lists = {"format_whitelist": ",".join(FORMATS), "codec_whitelist": ",".join(CODECS)}
    try:
        return av.open(
            reader,
            "r",
            # For the frames that FFmpeg decodes while it identifies the streams.
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            container_options={"protocol_whitelist": "", **lists},
            metadata_errors="replace",
            buffer_size=BUFFER_BYTES,
        )
    except (av.FFmpegError, ValueError) as error:
        if found.format and found.kind != "video":
            raise BadMediaError(found.instead_of("video")) from None
        raise BadMediaError(f"no readable video ({error_reason(error)})") from None


def _video_stream(container: InputContainer) -> VideoStream:
    """Return the container's best video stream that is not cover art.

    Raises:
        BadMediaError: there is none, its codec is not in `CODECS`, or its size is refused.
    """
    best = container.streams.best("video")
    videos = [s for s in container.streams.video if not _is_image(s)]
    if not videos:
        kinds = sorted({stream.type for stream in container.streams})
        raise BadMediaError(f"no video stream, only {', '.join(kinds) or 'an empty container'}")
    stream = next((video for video in videos if video is best), videos[0])
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        raise BadMediaError(f"codec {context.name if context else 'unknown'} is not supported")
    check_size(context.width, context.height, MAX_FRAME_PIXELS)
    if not stream.time_base:
        raise BadMediaError("timestamps without a unit")
    return stream


def _is_image(stream: VideoStream) -> bool:
    return any(getattr(type(stream.disposition), n) in stream.disposition for n in _IMAGE_STREAMS)


def _pixel_aspect(stream: VideoStream) -> Fraction:
    """Return the pixel aspect of the container or the codec, 1 if there is none or an absurd one."""
    # Real ones are within 1:4 and 4:1.
    aspect = stream.sample_aspect_ratio
    if not aspect or not Fraction(1, 4) <= aspect <= 4:
        return Fraction(1)
    return Fraction(aspect)


def error_reason(error: Exception) -> str:
    """Return FFmpeg's message of an error in one line, without its error numbers and file names."""
    return one_line(getattr(error, "strerror", None) or error, MAX_REASON)
