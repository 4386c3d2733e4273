"""Images and videos as HTML that needs nothing else: an image whole or shrunk, a video as a strip of frames.

They are read from where the samples found them. One that is not on this machine, or has changed since it
was encoded, is said to be so.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps, UnidentifiedImageError

from cache.format.frame_sampling import sample_times
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from model.media import video
from model.media.images import BadMediaError

VERBATIM_BYTES = 100_000
"""Small images go into the page as they are."""
THUMBNAIL = 480
"""Longer side of what others are shrunk to, pixels."""
FRAMES = 6
"""Of a video, evenly from the first to the last."""
FRAME_SIDE = 200
"""Longer side of a frame in a strip, pixels."""
TYPES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the media table says of a source."""

    key: str | None
    """Under which it was encoded."""
    kind: str
    """image or video."""
    duration_s: float | None
    """Of a video: time of its last frame."""


def find_media(sources: Iterable[str], root: CacheRoot) -> dict[str, Found]:
    """Source -> what is known of it."""
    table = media_table(root)
    wanted = pa.array(sorted(set(sources)), pa.string())
    rows = table.filter(pc.is_in(table["source"], value_set=wanted))
    columns = ("source", "key", "kind", "duration_s")
    return {
        source: Found(key=key, kind=kind, duration_s=duration)
        for source, key, kind, duration in zip(
            *(rows[name].to_pylist() for name in columns), strict=True
        )
    }


def medium(source: str, found: Found | None) -> str:
    """HTML of an image or a video."""
    if found is not None and found.kind == "video":
        return strip(Path(source), found)
    return image(Path(source), None if found is None else found.key)


def image(path: Path, key: str | None) -> str:
    """An `img` with the image inside, or a box that says why not."""
    try:
        data = path.read_bytes()
    except OSError:
        return absent("image not on this machine")
    if key is not None and hashlib.sha256(data).hexdigest() != key:
        return absent("image has changed since it was encoded")
    kind = next((name for magic, name in TYPES.items() if data.startswith(magic)), None)
    if kind is None or len(data) > VERBATIM_BYTES:
        try:
            data, kind = shrunk(data), "jpeg"
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            return absent("image cannot be read")
    return _img(data, kind)


def shrunk(data: bytes) -> bytes:
    """A JPEG of at most THUMBNAIL pixels a side."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (THUMBNAIL, THUMBNAIL))
        small = ImageOps.exif_transpose(image).convert("RGB")
    return _jpeg(small, THUMBNAIL)


def strip(path: Path, found: Found) -> str:
    """A video's frames side by side, each with its time; or a box that says why not, and how long it is."""
    what = "video" if found.duration_s is None else f"video of {found.duration_s:.1f} s"
    try:
        with path.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
        if found.key not in (None, key):
            return absent(f"{what} has changed since it was encoded")
        info = video.probe(path)
        frames = list(video.frames(path, sample_times(info.duration_s, FRAMES), info))
    except OSError:
        return absent(f"{what} not on this machine")
    except BadMediaError as error:
        return absent(f"{what} cannot be read: {error}")
    shown = "".join(
        f"<span>{_img(_jpeg(frame.image, FRAME_SIDE), 'jpeg')}<small>{frame.time_s:.1f} s</small></span>"
        for frame in frames
    )
    return f'<div class="strip">{shown}</div>'


def absent(reason: str) -> str:
    """What stands where an image or video cannot."""
    return f'<div class="absent">{escape(reason)}</div>'


def _jpeg(image: Image.Image, side: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()


def _img(data: bytes, kind: str) -> str:
    text = base64.b64encode(data).decode()
    return f'<img alt="" loading="lazy" src="data:image/{kind};base64,{text}">'
