"""Times and pixels of real videos agree with the ffmpeg program, a separate build of another version.

info = probe(path)
frame = next(frames(path, [1_000_000], info))     # equals frame n of `ffmpeg -i path`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cache.format.frame_sampling import sample_times
from model.media.images import BadMediaError
from model.media.video import frames
from model.media.video_decoder import AccessPoints
from model.media.video_index import probe
from model.media.video_pixels import frame_to_image
from tests.support.videos import BIKES, BUNNY, PHONE, ffmpeg, images_by_ffmpeg, make_video, psnr
from tests.support.videos import times_by_ffmpeg as their_times

SMALL = ("-vf", "scale=160:68", "-an")


def made(
    *arguments: str | int | float,
    before: Sequence[str | int] = (),
    source: Path = BIKES,
    suffix: str = "mp4",
) -> Make:
    """Return a function that makes a variant of a real video."""

    def make(folder: Path) -> Path:
        path = folder / f"variant.{suffix}"
        ffmpeg(*before, "-i", source, *arguments, path)
        return path

    return make


Make = Callable[[Path], Path]


def turned(*arguments: str | int) -> Make:
    """Return a function that changes only the display matrix of a real video."""
    return made("-c", "copy", "-t", 2, before=arguments)


X264 = ("-c:v", "libx264", "-preset", "veryfast")
SLOW = ("-c:v", "libx264", "-preset", "ultrafast", "-t", 3, *SMALL)
EVERY = "select=not(mod(n\\,7))+not(mod(n\\,5)),scale=160:68"
VARIANTS: dict[str, Make] = {
    "bikes": lambda _: BIKES,
    "bunny": lambda _: BUNNY,
    "phone": lambda _: PHONE,
    "no-sound": made(*SLOW, source=BUNNY, suffix="mkv"),
    "variable-rate": made(*X264, "-vf", EVERY, "-fps_mode", "vfr"),
    "variable-rate-mkv": made(*X264, "-vf", EVERY, "-fps_mode", "vfr", suffix="mkv"),
    "edit-list": made("-ss", 1.3, "-c", "copy", "-t", 4),
    "vp9": made(
        "-c:v", "libvpx-vp9", "-cpu-used", 8, "-deadline", "realtime", *SMALL, suffix="webm"
    ),
    "vp8": made("-c:v", "libvpx", "-auto-alt-ref", 1, "-t", 4, *SMALL, suffix="webm"),
    "av1": made("-c:v", "libsvtav1", "-preset", 12, "-t", 3, *SMALL, suffix="webm"),
    "hevc-open": made("-c:v", "libx265", "-preset", "ultrafast", "-t", 4, *SMALL, suffix="mkv"),
    "mpeg4-avi": made("-c:v", "mpeg4", "-bf", 2, "-q:v", 3, *SMALL, suffix="avi"),
    "mpeg2-ts": made("-c:v", "mpeg2video", "-bf", 2, "-q:v", 3, *SMALL, suffix="ts"),
    "mpeg1-ps": made("-c:v", "mpeg1video", "-bf", 2, "-q:v", 3, *SMALL, suffix="mpg"),
    "h264-ts": made("-c", "copy", suffix="ts"),
    "theora": made("-c:v", "libtheora", "-q:v", 8, "-t", 3, *SMALL, suffix="ogv"),
    "prores-10-bit-422": made("-c:v", "prores_ks", "-t", 1, *SMALL, suffix="mov"),
    "h264-10-bit": made(*SLOW, "-pix_fmt", "yuv420p10le"),
    "h264-444": made(*SLOW, "-pix_fmt", "yuv444p"),
    "h264-rgb": made("-c:v", "libx264rgb", "-preset", "ultrafast", "-t", 2, *SMALL),
    "grey": made(*SLOW, "-pix_fmt", "gray"),
    "interlaced": made("-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-t", 2, *SMALL, suffix="ts"),
    "full-range": made(*SLOW, "-vf", "scale=160:68:out_range=full,format=yuvj420p"),
    "bt709": made(*SLOW, "-vf", "scale=160:68:out_color_matrix=bt709", "-colorspace", "bt709"),
    "bt2020": made(*SLOW, "-vf", "scale=160:68:out_color_matrix=bt2020", "-colorspace", "bt2020nc"),
    "odd-size": made("-c:v", "ffv1", "-vf", "scale=97:63", "-t", 1, suffix="mkv"),
    "fragmented": made(*SLOW, "-movflags", "+frag_keyframe+empty_moov+default_base_moof"),
    "live": made(*SLOW, "-f", "matroska", "-live", 1, suffix="mkv"),
    "mjpeg": made("-c:v", "mjpeg", "-q:v", 3, "-t", 2, *SMALL, suffix="avi"),
    "turned-90": turned("-display_rotation", 90),
    "turned-180": turned("-display_rotation", 180),
    "turned-270": turned("-display_rotation", 270),
    "flipped": turned("-display_hflip"),
    "flipped-down": turned("-display_vflip"),
    "transposed": turned("-display_rotation", 90, "-display_hflip"),
    "transversed": turned("-display_rotation", 90, "-display_vflip"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_times_and_pixels_agree(name: str, tmp_path: Path) -> None:
    path = VARIANTS[name](tmp_path)
    theirs = their_times(path)
    info = probe(path)
    step = 1 if info.width < 200 else 5
    asked = sorted({*theirs[::step], theirs[1], theirs[len(theirs) // 2], theirs[-1]})
    ours = {frame.wanted_us: frame for frame in frames(path, asked, info)}
    assert [round(frame.time_s * 1e6) for frame in ours.values()] == asked
    assert (info.frames, info.duration_s, info.note) == (len(theirs), theirs[-1] / 1e6, None)
    numbers = sorted({0, 1, len(theirs) // 2, len(theirs) - 1})
    # The bunny is HD and has no matrix: players take BT.709, the ffmpeg program takes BT.601.
    matrix = "bt709" if name == "bunny" else "auto"
    shown = images_by_ffmpeg(path, numbers, (info.width, info.height), matrix)
    likeness = [psnr(ours[theirs[n]].image, image) for n, image in zip(numbers, shown, strict=True)]
    assert min(likeness) > 42, likeness


def sequential(path: Path) -> dict[int, bytes]:
    """Decode every frame of a video in PyAV's plain loop: microseconds -> pixels."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        found: dict[int, bytes] = {}
        first = None
        for frame in container.decode(stream):
            assert frame.pts is not None
            first = frame.pts if first is None else first
            time_us = round((frame.pts - first) * stream.time_base * 1_000_000)
            found[time_us] = frame_to_image(frame, stream.sample_aspect_ratio or 1).tobytes()  # type: ignore[arg-type]
        return found


LOOP = ("-stream_loop", "1", "-i", str(BIKES))
SKIPPED = {
    "h264": ["-c:v", "libx264", "-bf", 3, "-g", 30, "x.mp4"],
    "h264-open": ["-c:v", "libx264", "-bf", 3, "-g", 30, "-x264-params", "open-gop=1", "x.mkv"],
    "h264-open-ts": ["-c:v", "libx264", "-bf", 3, "-g", 30, "-x264-params", "open-gop=1", "x.ts"],
    "h264-refresh": ["-c:v", "libx264", "-g", 30, "-x264-params", "intra-refresh=1", "x.mkv"],
    "hevc-open": ["-c:v", "libx265", "-preset", "ultrafast", "-g", 30, "x.mp4"],
    "vp9": ["-c:v", "libvpx-vp9", "-cpu-used", 8, "-deadline", "realtime", "-g", 30, "x.webm"],
    "vp8": ["-c:v", "libvpx", "-cpu-used", 8, "-auto-alt-ref", 1, "-g", 30, "x.webm"],
    "av1": ["-c:v", "libsvtav1", "-preset", 12, "-g", 30, "x.mkv"],
    "mpeg4": ["-c:v", "mpeg4", "-bf", 2, "-g", 30, "x.avi"],
    "mpeg2-open": ["-c:v", "mpeg2video", "-bf", 2, "-g", 30, "x.ts"],
    "wmv": ["-c:v", "wmv2", "-g", 30, "x.wmv"],
}


@pytest.mark.parametrize("name", SKIPPED)
def test_skipping_gives_equal_pixels(name: str, tmp_path: Path) -> None:
    *encode, target = SKIPPED[name]
    path = tmp_path / str(target)
    ffmpeg(*LOOP, "-vf", "scale=96:40", *encode, path)
    whole = sequential(path)
    times = np.array(sorted(whole))
    info = probe(path)
    assert (info.frames, info.duration_s) == (len(times), times[-1] / 1e6)
    assert len(info.access_points.packets) > 5
    rng = np.random.default_rng(3)
    for count in (1, 3, 30):
        beats: list[int] = []
        wanted = sorted(int(us) for us in rng.integers(0, times[-1] + 1, count))
        for frame in frames(path, wanted, info, lambda beats=beats: beats.append(0)):  # type: ignore[misc]
            nearest = int(times[np.argmin(np.abs(times - frame.wanted_us))])
            assert frame.time_s == nearest / 1e6
            assert frame.image.tobytes() == whole[nearest]
        assert len(beats) < len(times) or count > 3  # frames were skipped


def test_wrong_key_frames_are_not_used() -> None:
    """With a wrong list of key frames, the pixels equal those of decoding everything."""
    info = probe(BIKES)
    with av.open(str(BIKES)) as container:
        pts = [packet.pts for packet in container.demux(video=0) if packet.size]
    packets = [0, 30, 85, 100, 137, 150, 160, 200, 220, 242]  # three of them are key frames
    times = [info.clock.microseconds(pts[number] or 0) for number in packets]
    bad_points = AccessPoints(packets=np.array(packets), times_us=np.array(times))
    changed = replace(info, access_points=bad_points)
    for count in (2, 5, 25):
        wanted = sample_times(info.duration_s, count)
        true = [frame.image.tobytes() for frame in frames(BIKES, wanted, info)]
        assert [frame.image.tobytes() for frame in frames(BIKES, wanted, changed)] == true


@pytest.mark.parametrize(
    ("aspect", "size"),
    [("2/1", (320, 68)), ("1/2", (160, 136)), ("1000/1", (160, 68)), ("1/1000", (160, 68))],
)
def test_pixels_are_made_square_unless_their_aspect_is_absurd(
    tmp_path: Path, aspect: str, size: tuple[int, int]
) -> None:
    path = made(*SLOW, "-vf", f"scale=160:68,setsar={aspect}")(tmp_path)
    info = probe(path)
    assert (info.width, info.height) == next(iter(frames(path, [0], info))).image.size == size


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_noted(tmp_path: Path, transfer: str, name: str) -> None:
    colours = f"setparams=color_trc={transfer}:color_primaries=bt2020:colorspace=bt2020nc"
    encode = ["-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le", "-t", 0.5]
    info = probe(made("-vf", f"scale=160:68,{colours}", *encode)(tmp_path))
    assert info.note == f"HDR ({name}), shown without tone mapping"


@pytest.mark.parametrize(("codec", "pixels"), [("qtrle", "argb"), ("png", "rgba")])
def test_transparent_pixels_are_drawn_on_white(tmp_path: Path, codec: str, pixels: str) -> None:
    glass = Image.new("RGBA", (64, 48), (255, 0, 0, 0))
    glass.paste((0, 0, 255, 255), (0, 0, 32, 48))
    glass.save(tmp_path / "glass.png")
    path = tmp_path / "glass.mov"
    ffmpeg("-i", tmp_path / "glass.png", "-c:v", codec, "-pix_fmt", pixels, path)
    image = next(iter(frames(path, [0], probe(path)))).image
    assert image.getpixel((8, 24)) == (0, 0, 255) and image.getpixel((56, 24)) == (255, 255, 255)


def test_palette_changes_are_applied(tmp_path: Path) -> None:
    """Key frames with 8-bit pixels carry new palettes, which must not be skipped."""
    path = made("-c:v", "rawvideo", "-pix_fmt", "pal8", "-t", 2, *SMALL, suffix="nut")(tmp_path)
    whole = sequential(path)
    info = probe(path)
    assert info.frames == len(whole)
    for frame in frames(path, [0, 1_000_000, 1_960_000], info):
        assert frame.image.tobytes() == whole[round(frame.time_s * 1e6)]


def test_sound_and_cover_art_are_not_a_video(tmp_path: Path) -> None:
    ffmpeg("-i", BUNNY, "-vn", "-c", "copy", "-t", 1, sound := tmp_path / "sound.mp4")
    video = make_video(tmp_path / "video.mp4", frames=8)
    Image.new("RGB", (640, 640), "red").save(cover := tmp_path / "cover.png")

    def with_cover(media: Path) -> Path:
        path = tmp_path / f"{media.stem}-with-cover.mp4"
        ffmpeg("-i", cover, "-i", media, "-map", 0, "-map", 1, "-c", "copy",
               "-disposition:v:0", "attached_pic", path)  # fmt: skip
        return path

    for path in (sound, with_cover(sound)):
        with pytest.raises(BadMediaError, match="no video stream, only audio"):
            probe(path)
    assert probe(with_cover(video)) == probe(video)
