"""Real photographs from installed packages, with captions written for them, as a folder to encode.

python -m tests.support.photos photos
python -m encode.run --dataset folder:photos --encoder clip-vit-l14-336

The images are those that scikit-image and scikit-learn carry in their wheels. Several are saved again
in another mode, so that the folder holds what folders hold: grey, palette, alpha, CMYK, 16 bit, WebP,
GIF, an image the camera held sideways, sizes from 14 x 25 to 1411 x 1411.
"""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, PngImagePlugin

CAPTIONS = {
    "astronaut.png": "A smiling astronaut in an orange suit beside a flag and a model shuttle.",
    "brick.png": "A pavement of long grey bricks running away from the viewer.",
    "camera.png": "A man in a dark coat looks through a camera on a tripod.",
    "cell.png": "One round bright cell on a dark grey ground.",
    "chelsea.png": "The face of a tabby cat with green eyes.",
    "clock_motion.png": "A clock so blurred by motion that only a bright oval is left.",
    "coffee.png": "An espresso in a brown cup with a spoon on its saucer.",
    "coins.png": "Four rows of old coins laid out on a dark cloth.",
    "grass.png": "Short blades of grass in every direction.",
    "gravel.png": "A bed of small angular stones.",
    "horse.png": "The black outline of a standing horse.",
    "hubble_deep_field.jpg": "Thousands of small galaxies on a black sky.",
    "ihc.png": "Tissue under a microscope, glands brown and nuclei blue.",
    "microaneurysms.png": "Thin dark vessels crossing a small grey patch.",
    "moon.png": "The surface of the moon with a few craters.",
    "motorcycle_left.png": "A red motorcycle parked in a garage.",
    "no_time_for_that_tiny.gif": "A tiny animated image of a person.",
    "page.png": "A printed page headed Region-based segmentation.",
    "retina.jpg": "The back of an eye, orange with red vessels.",
    "rocket.jpg": "A rocket on its launch pad at dusk between lightning towers.",
    "text.png": "Handwritten signs on a sheet of paper, seen at a slant.",
    "china.jpg": "A Chinese temple with tiled roofs above a lake.",
    "flower.jpg": "An orange dahlia in front of dark leaves.",
}
SIDEWAYS = 6  # EXIF orientation: the camera was turned; shown upright it needs a quarter turn


# Every corner and edge differs, so a test notices each rotation and flip.
GRADIENT = np.stack(
    [
        np.tile(np.linspace(0, 255, 24), (16, 1)),
        np.tile(np.linspace(0, 200, 16)[:, None], (1, 24)),
        np.full((16, 24), 80.0),
    ],
    axis=-1,
).astype(np.uint8)


# EXIF orientation -> what a camera in that position stores; applying the tag undoes it. 0, 9 and 60000 are
# undefined and ignored.
STORED = {
    **dict.fromkeys((0, 1, 9, 60000), lambda x: x),
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_files() -> dict[str, bytes]:
    """Return one intact file of each kind that PIL decodes in its own way."""
    rgb = Image.fromarray(GRADIENT)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(128)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words " * 40, zip=True)
    grey16 = Image.fromarray(np.linspace(0, 65535, 384).astype(np.uint16).reshape(16, 24))
    return {
        "jpeg": saved(rgb, "JPEG", exif=exif),
        "progressive": saved(rgb, "JPEG", progressive=True),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "mpo": saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "png": saved(rgba, "PNG", exif=exif, pnginfo=text),
        "palette": saved(rgb.quantize(8), "PNG", transparency=b"\x00\x80\xff"),
        "grey16": saved(grey16, "PNG"),
        "apng": saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "webp": saved(rgba, "WEBP", exif=exif),
        "webp-moving": saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]),
        "gif": saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        "bmp": saved(rgb, "BMP"),
        "tiff": saved(rgb, "TIFF", compression="tiff_lzw", exif=exif),
        "tiff-cmyk": saved(rgb.convert("CMYK"), "TIFF"),
        "ppm": saved(rgb, "PPM"),
        "avif": saved(rgb, "AVIF"),
    }


def heic_file(image: Image.Image, *, more: Sequence[Image.Image] = (), **options: object) -> bytes:
    """Return `image`, and further images, as a HEIC file; the first is the primary one."""
    import pillow_heif  # of the extras `heic` and `dev`; the photographs need none

    several = pillow_heif.from_pillow(image)
    for other in more:
        several.add_from_pillow(other)
    several.save(file := io.BytesIO(), primary_index=0, save_all=True, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, data: bytes, *chunks: bytes) -> bytes:
    """Return an RGB PNG whose header states a size, whatever its pixel `data` and its other chunks are."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(data))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, png_chunk(b"IEND", b"")))


def make_folder(folder: Path) -> Path:
    """Write the images and their metadata.jsonl into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for name, caption in CAPTIONS.items():
            saved = _save(_original(name), folder)
            lines.write(json.dumps({"file": saved.name, "caption": caption}) + "\n")
    return folder


def _original(name: str) -> Path:
    here = Path(skimage.data.__file__).parent / name
    if here.exists():
        return here
    spec = importlib.util.find_spec("sklearn")  # importing it takes seconds
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "images" / name


def _save(source: Path, folder: Path) -> Path:
    """Copy `source`, or save it in another mode where this folder wants variety."""
    stem = source.stem
    with Image.open(source) as image:
        if stem == "coffee":
            image.convert("CMYK").save(path := folder / "coffee.jpg", quality=95)
        elif stem == "astronaut":
            exif = Image.Exif()
            exif[0x0112] = SIDEWAYS
            turned = image.transpose(Image.Transpose.ROTATE_90)
            turned.save(path := folder / "astronaut.jpg", quality=95, exif=exif)
        elif stem == "camera":
            deep = np.asarray(image).astype(np.uint16) * 257
            Image.fromarray(deep).save(path := folder / "camera.png")
        elif stem == "chelsea":
            image.save(path := folder / "chelsea.webp", quality=95)
        elif stem == "motorcycle_left":
            image.quantize(64).save(path := folder / "motorcycle_left.png")
        else:
            path = folder / source.name
            path.write_bytes(source.read_bytes())
    return path


if __name__ == "__main__":
    print(make_folder(Path(sys.argv[1])))
