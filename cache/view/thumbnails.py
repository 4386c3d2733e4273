"""Arrays and small images as images that stand inside the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

JPEG_QUALITY = 82
NEIGHBOUR = 96
"""Side of the images in the list of neighbours, pixels."""

_HEAT = ((13, 14, 38), (58, 28, 99), (129, 37, 110), (201, 62, 86), (243, 120, 62), (252, 222, 140))
"""Dark to bright in even steps of lightness: readable in grey, and by all who see colours differently."""


def heat(values: npt.NDArray[np.floating], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Numbers (...) as colours (..., 3) from dark at `low` to bright at `high`."""
    anchors = np.array(_HEAT, np.float64)
    share = np.clip((values.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(share, places, anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Pixels (height, width, 3) as a data URI, without loss."""
    return _uri(Image.fromarray(np.ascontiguousarray(pixels)), "PNG")


def jpeg(image: Image.Image) -> str:
    """A photograph as a data URI."""
    return _uri(image, "JPEG")


def stamp(image: Image.Image) -> str:
    """The middle of an image, tiny, as a data URI."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return _uri(square.resize((NEIGHBOUR, NEIGHBOUR), Image.Resampling.BICUBIC), "JPEG")


def _uri(image: Image.Image, kind: str) -> str:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {"optimize": True}))
    text = base64.b64encode(out.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"
