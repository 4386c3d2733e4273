"""Read images and videos for the report: an image as it is or smaller, a video as some of its frames.

Files, and media inside files, are read from where the samples name them, if `LocalMedia` opens them there. A
report is passed on, so it has only bytes whose sha256 is the recorded one. If one is not on this machine, has
changed since it was encoded, or is not opened, the report says so instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cache.format.embedded.names import is_embedded
from cache.format.frame_sampling import sample_times
from cache.maintenance.local_media import LocalMedia, MediaFileError, NotAllowedError
from cache.store.ledger import MediaRecord, media_table
from cache.store.paths import CacheRoot
from cache.view.thumbnails import MAX_FILE_BYTES, data_uri, decode, jpeg
from model.media import video, video_index
from model.media.images import BadMediaError

VERBATIM_BYTES = 100_000
"""Image files up to this size are part of the page unchanged."""
THUMBNAIL = 480
"""Longer side of larger images, pixels."""
FRAMES = 6
"""Frames of a video, evenly from the first to the last."""
FRAME_SIDE = 200
"""Longer side of a frame, pixels."""
MAX_EMBEDDED_BYTES = 1 << 30
"""Bytes of the largest video inside a file that is read: it is held in memory."""
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
"""First bytes of a file -> its format, of those that every browser shows."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image or a video for the page, or the reason why it cannot be shown."""

    uris: tuple[str, ...] = ()
    """Data URIs: one for an image, one for each frame of a video."""
    times_s: tuple[float, ...] = ()
    """When each frame is; empty for an image."""
    absent: str = ""
    """The reason; empty when there is something to show."""


def find_media(sources: Iterable[str], root: CacheRoot) -> dict[str, MediaRecord]:
    """Return source -> what the media table says of it, for the sources that it has."""
    table = media_table(root)
    wanted = pa.array(sorted(set(sources)), pa.string())
    rows = table.filter(pc.is_in(table["source"], value_set=wanted))
    return {row["source"]: MediaRecord(**row) for row in rows.to_pylist()}


def picture(source: str, record: MediaRecord | None, local: LocalMedia) -> Picture:
    """Return an image or a video for the page.

    Args:
        source: its name.
        record: what the media table says of it; None if it has no such source.
        local: which files are opened.
    """
    record = record or MediaRecord(source=source)
    is_video = record.kind == "video"
    what = record.kind if record.duration_s is None else f"video of {record.duration_s:.1f} s"
    try:
        return (_video if is_video else _image)(source, record, local)
    except NotAllowedError as error:
        return Picture(absent=error.reason)
    except MediaFileError as error:
        return Picture(absent=f"{what} {error.reason}")
    except (OSError, BadMediaError) as error:
        return Picture(absent=f"{what} cannot be read: {error}")


def _image(source: str, record: MediaRecord, local: LocalMedia) -> Picture:
    data = local.read(source, record.key, most=MAX_FILE_BYTES, size=record.bytes)
    image = decode(data, THUMBNAIL)
    file_format = next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)
    if file_format is not None and len(data) <= VERBATIM_BYTES:
        return Picture(uris=(data_uri(data, file_format),))
    return Picture(uris=(_small(image, THUMBNAIL),))


def _video(source: str, record: MediaRecord, local: LocalMedia) -> Picture:
    key, size = record.key, record.bytes
    data = (
        local.read(source, key, most=MAX_EMBEDDED_BYTES, size=size)
        if is_embedded(source)
        else local.video(source, key, size=size)
    )
    info = video_index.probe(data)
    frames = list(video.frames(data, sample_times(info.duration_s, FRAMES), info))
    return Picture(
        uris=tuple(_small(frame.image, FRAME_SIDE) for frame in frames),
        times_s=tuple(frame.time_s for frame in frames),
    )


def _small(image: Image.Image, side: int) -> str:
    """Return a JPEG whose longer side is at most `side` pixels, as a data URI."""
    image.thumbnail((side, side))
    return jpeg(image)
