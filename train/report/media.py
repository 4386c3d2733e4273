"""Read images and videos for the report: an image as it is or smaller, a video as some of its frames.

Files, and media inside files, are read from where the samples name them. If one is not on this machine, or
has changed since it was encoded, the report says so instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cache.errors import EmbeddedMediaError
from cache.format.embedded.names import is_embedded, read_embedded
from cache.format.frame_sampling import sample_times
from cache.store.ledger import MediaRecord, media_table
from cache.store.paths import CacheRoot
from cache.view.thumbnails import NotShownError, data_uri, decode, jpeg, read_media
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


def picture(source: str, record: MediaRecord | None) -> Picture:
    """Return an image or a video for the page; `record` is None for a source that the media table lacks."""
    if record is not None and record.kind == "video":
        return _video(source, record)
    return _image(source, None if record is None else record.key)


def _image(source: str, key: str | None) -> Picture:
    try:
        data = read_media(source, key)
        file_format = next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)
        if file_format is not None and len(data) <= VERBATIM_BYTES:
            return Picture(uris=(data_uri(data, file_format),))
        return Picture(uris=(_small(decode(data, THUMBNAIL), THUMBNAIL),))
    except NotShownError as error:
        return Picture(absent=f"image {error}")


def _video(source: str, record: MediaRecord) -> Picture:
    what = "video" if record.duration_s is None else f"video of {record.duration_s:.1f} s"
    path = Path(source)
    try:
        data: bytes | Path = path
        if is_embedded(source):
            data = read_embedded(source, MAX_EMBEDDED_BYTES)
            key = hashlib.sha256(data).hexdigest()
        elif not path.is_file():  # opening a pipe would wait for ever
            return Picture(absent=f"{what} not on this machine")
        else:
            with path.open("rb") as file:
                key = hashlib.file_digest(file, "sha256").hexdigest()
        if record.key not in (None, key):
            return Picture(absent=f"{what} has changed since it was encoded")
        info = video_index.probe(data)
        frames = list(video.frames(data, sample_times(info.duration_s, FRAMES), info))
    except (OSError, EmbeddedMediaError):
        return Picture(absent=f"{what} not on this machine")
    except BadMediaError as error:
        return Picture(absent=f"{what} cannot be read: {error}")
    return Picture(
        uris=tuple(_small(frame.image, FRAME_SIDE) for frame in frames),
        times_s=tuple(frame.time_s for frame in frames),
    )


def _small(image: Image.Image, side: int) -> str:
    """Return a JPEG whose longer side is at most `side` pixels, as a data URI."""
    image.thumbnail((side, side))
    return jpeg(image)
