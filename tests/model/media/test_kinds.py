"""What a file is, by its first bytes.

found = recognise(file.read(HEAD_BYTES), "IMG_1.HEIC")
found.kind, found.format, found.advice      # "image" or "video" if it can be decoded
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from model.media import kinds
from model.media.images import decode_image
from model.media.kinds import HEAD_BYTES, Recognised, recognise
from model.media.signatures import OTHERS
from model.media.video_index import probe
from tests.support.photos import image_files, saved
from tests.support.videos import BIKES, BUNNY, CONTAINERS, PHONE, ffmpeg, make_video

IMAGES = image_files()
NAMES = {"progressive": "JPEG", "cmyk": "JPEG", "mpo": "JPEG", "palette": "PNG", "grey16": "PNG"}
NAMES |= {"apng": "PNG", "webp-moving": "WEBP", "tiff-cmyk": "TIFF"}


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_that_is_decoded_is_recognised(name: str) -> None:
    decode_image(IMAGES[name])
    expected = Recognised("image", NAMES.get(name, name.upper()))
    assert recognise(IMAGES[name][:HEAD_BYTES], "wrong.mp4") == expected
    assert recognise(IMAGES[name][:40]) == expected  # a head that is cut is enough


def test_variants_of_images_are_recognised() -> None:
    rgb = Image.new("RGB", (9, 9), "teal")
    assert recognise(saved(rgb.convert("L"), "PPM")) == Recognised("image", "PPM")
    assert recognise(saved(rgb.convert("1"), "PPM")) == Recognised("image", "PPM")
    assert recognise(b"P3\n# a comment\n2 1\n255\n1 2 3 4 5 6\n") == Recognised("image", "PPM")
    assert recognise(saved(rgb, "TIFF", big_tiff=True)) == Recognised("image", "TIFF")
    motorola = b"MM\0*" + saved(rgb, "TIFF")[4:]
    assert recognise(motorola) == Recognised("image", "TIFF")


def test_real_photos_are_images() -> None:
    folder = Path(skimage.data.__file__).parent
    for suffix, name in ((".png", "PNG"), (".jpg", "JPEG"), (".gif", "GIF"), (".tif", "TIFF")):
        files = sorted(folder.glob(f"*{suffix}"))
        assert files
        for path in files:
            assert recognise(path.read_bytes()[:HEAD_BYTES]) == Recognised("image", name), path


VIDEOS = {
    "mp4": "MP4", "mov": "MOV", "mkv": "Matroska", "webm": "WebM", "avi": "AVI", "ts": "MPEG-TS",
    "mpg": "MPEG-PS", "flv": "FLV", "wmv": "ASF", "y4m": "Y4M", "nut": "NUT", "ivf": "IVF", "mxf": "MXF",
    "m4v": "M4V", "m2v": "MPEG video stream", "264": "H.264 stream", "ogv": "OGG", "3gp": "3GP",
    "divx": "MPEG-4 video stream", "mjpeg": "MJPEG stream", "265": "HEVC stream", "dv": "DV",
    "m2ts": "MPEG-TS", "obu": "AV1 stream",
}  # fmt: skip
MORE = {
    "265": ["-c:v", "libx265", "-x265-params", "log-level=none"],
    "divx": ["-c:v", "mpeg4", "-f", "m4v"],
    "dv": ["-c:v", "dvvideo", "-s", "720x576", "-r", 25, "-pix_fmt", "yuv420p"],
    "m2ts": ["-c:v", "libx264", "-mpegts_m2ts_mode", 1],
    "obu": ["-c:v", "libaom-av1", "-cpu-used", 8, "-f", "obu"],
}


def test_the_videos_cover_every_container() -> None:
    assert VIDEOS.keys() == CONTAINERS.keys() | MORE.keys()


@pytest.mark.parametrize("suffix", VIDEOS)
def test_every_video_that_is_decoded_is_recognised(tmp_path: Path, suffix: str) -> None:
    source = make_video(tmp_path / "source.nut", frames=8, fps=25, codec="ffv1")
    path = tmp_path / f"video.{suffix}"
    codec, pixels = CONTAINERS.get(suffix, ("", ""))
    ffmpeg("-i", source, *MORE.get(suffix, ["-c:v", codec, "-pix_fmt", pixels]), path)
    probe(path)
    head = path.read_bytes()[:HEAD_BYTES]
    name = "video.mjpeg" if suffix == "mjpeg" else "wrong.jpg"
    assert recognise(head, name) == Recognised("video", VIDEOS[suffix])


def test_real_videos_and_old_quicktime_are_videos(tmp_path: Path) -> None:
    for path in (BIKES, BUNNY, PHONE):
        assert recognise(path.read_bytes()[:HEAD_BYTES]).kind == "video"
    data = BIKES.read_bytes()
    without_brands = data[int.from_bytes(data[:4], "big") :]
    assert recognise(without_brands[:HEAD_BYTES]) == Recognised("video", "MOV")


def test_a_name_decides_only_where_the_bytes_are_equal() -> None:
    jpeg = IMAGES["jpeg"]
    assert recognise(jpeg, "clip.mjpeg").kind == "video"
    assert recognise(jpeg, "clip.mp4").kind == "image"
    assert recognise(b"", "clip.mp4") == Recognised("", "empty")
    assert recognise(b"\x01\x02\x03" * 99, "clip.mp4") == Recognised("", "")
    assert recognise(IMAGES["tiff"], "IMG_1.NEF").format == "camera raw"
    assert recognise(IMAGES["tiff"], "odd/.nef/photo.tiff").format == "TIFF"


def brands(major: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + major + bytes(4) + b"".join(others)
    return (len(body) + 4).to_bytes(4, "big") + body + b"\0\0\0\x08mdat"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (brands(b"heic", b"mif1", b"heic"), "HEIC"),
        (brands(b"heix", b"mif1"), "HEIC"),
        (brands(b"hevc", b"msf1", b"hevc"), "HEIC"),
        (brands(b"mif1", b"heic", b"miaf"), "HEIC"),
        (brands(b"mif1", b"j2ki"), "HEIF"),
        (brands(b"msf1", b"hevc"), "HEIC"),
        (brands(b"heic")[:12], "HEIC"),
    ],
)
def test_heic_is_an_image_exactly_if_its_reader_is_installed(
    head: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "can_decode_heic", lambda: True)
    assert recognise(head) == Recognised("image", name)
    monkeypatch.setattr(kinds, "can_decode_heic", lambda: False)
    found = recognise(head)
    assert (found.kind, found.format) == ("", name)
    reason = f"an {name} image, which is not supported; install its reader: "
    assert found.instead_of("image") == reason + "pip install 'nanomolmo2[heic]'"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (brands(b"mif1", b"avif"), Recognised("image", "AVIF")),
        (brands(b"avis", b"msf1"), Recognised("image", "AVIF")),
        (brands(b"isom", b"iso2", b"avc1", b"mp41"), Recognised("video", "MP4")),
        (brands(b"qt  "), Recognised("video", "MOV")),
        (brands(b"M4V ", b"isom"), Recognised("video", "M4V")),
        (brands(b"3gp5"), Recognised("video", "3GP")),
        (brands(b"3g2a"), Recognised("video", "3GP")),
        (brands(b"M4A ", b"isom"), Recognised("", "M4A sound")),
        (brands(b"crx ", b"isom"), Recognised("", "camera raw", "convert it to PNG or JPEG")),
    ],
)
def test_brands_tell_images_from_videos_and_sound(head: bytes, expected: Recognised) -> None:
    assert recognise(head) == expected


def dng(order: str, tags: dict[int, int]) -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return mark + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)


def parquet() -> bytes:
    pq.write_table(pa.table({"a": [1]}), file := io.BytesIO())
    return file.getvalue()


def npy() -> bytes:
    np.save(file := io.BytesIO(), np.zeros(3))
    return file.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadb\n"
)
OTHER = {
    "jp2": (saved(Image.new("RGB", (9, 9)), "JPEG2000"), "JPEG 2000"),
    "j2k": (saved(Image.new("RGB", (9, 9)), "JPEG2000", no_jp2=True), "JPEG 2000"),
    "jxl": (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "JPEG XL"),
    "jxl stream": (b"\xff\x0a\xfa\x1f\x01", "JPEG XL"),
    "svg": (b'<?xml version="1.0"?>\n<!-- a comment --><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg alone": (b'\xef\xbb\xbf<svg width="3"></svg>', "SVG"),
    "svg comment": (b"<!-- Generator: Inkscape -->\n<svg></svg>", "SVG"),
    "html": (b"  <!DOCTYPE html><html>404</html>", "HTML page"),
    "html comment": (b"<!-- moved -->\n<html lang=en>", "HTML page"),
    "html latin": ("<html><title>Café</title>".encode("latin-1") + b"</html>" * 9, "HTML page"),
    "html utf16": ("<html><title>Café</title>".encode("utf-16"), "HTML page"),
    "xhtml": (b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">', "HTML page"),
    "html fragment": (b"<script>location='/'</script>", "HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML text"),
    "pdf": (saved(Image.new("RGB", (9, 9)), "PDF"), "PDF document"),
    "eps": (saved(Image.new("RGB", (9, 9)), "EPS"), "PostScript document"),
    "lfs": (LFS, "Git LFS pointer"),
    "annex": (b"/annex/objects/SHA256E-s1--ab.jpg\n", "git-annex pointer"),
    "psd": (b"8BPS\0\1" + bytes(20), "Photoshop document"),
    "ico": (saved(Image.new("RGB", (16, 16)), "ICO"), "ICO icon"),
    "tga": (saved(Image.new("RGB", (9, 9)), "TGA"), "TGA"),
    "dds": (saved(Image.new("RGB", (9, 9)), "DDS"), "DDS texture"),
    "cr2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(20), "camera raw"),
    "dng": (dng("<", {254: 0, 50706: 0x00000401}), "camera raw"),
    "nef": (dng(">", {254: 1, 330: 2000}), "camera raw"),
    "raf": (b"FUJIFILMCCD-RAW 0201FF", "camera raw"),
    "zip": (b"PK\x03\x04" + bytes(30), "ZIP archive"),
    "tar": (bytes(100).ljust(257, b"0") + b"ustar\x0000", "tar archive"),
    "gz": (b"\x1f\x8b\x08\0", "gzip archive"),
    "parquet": (parquet(), "Parquet table"),
    "npy": (npy(), "NumPy array"),
    "json": (b'{"error": "not found"}', "JSON text"),
    "array": (b'[{"image": "a.jpg"}]', "JSON text"),
    "m3u8": (b"#EXTM3U\n#EXT-X-VERSION:3\n", "M3U playlist"),
    "txt": (b"Not Found", "text"),
    "cut": ("grün".encode()[:3], "text"),  # a character of two bytes, cut
    "letters": (b"BMW and P5 are words", "text"),
    "pnm text": (b"P1 is not a bitmap", "text"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt ", "WAV sound"),
    "mp3": (b"ID3\x03\0\0", "MP3 sound"),
    "ogg": (b"OggS\0\x02" + bytes(20) + b"\x01\x1e\x01vorbis", "Ogg sound"),
    "apple": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ", "AppleDouble file of macOS"),
    "store": (b"\0\0\0\x01Bud1\0\0\x10\0", "folder view of macOS"),
    "zeros": (bytes(100), ""),
    "noise": (bytes([1, 2, 3, 200]) * 9, ""),
    "h264-like": (b"\0\0\0\x01\x42", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_what_cannot_be_used_is_named(name: str) -> None:
    data, expected = OTHER[name]
    found = recognise(data[:HEAD_BYTES], "x.tga" if name == "tga" else "")
    assert (found.kind, found.format) == ("", expected)
    for wanted in ("image", "video"):
        reason = found.instead_of(wanted)
        assert reason.startswith(found.what) and reason.endswith(found.advice)
        assert "\n" not in reason and len(reason) < 120


def test_reasons_say_what_it_is_and_what_to_do() -> None:
    def reason(name: str, wanted: str = "image") -> str:
        return recognise(OTHER[name][0]).instead_of(wanted)

    assert reason("html") == "an HTML page, not an image"
    assert reason("html", "video") == "an HTML page, not a video"
    convert = "; convert it to PNG or JPEG"
    assert reason("svg") == f"an SVG image, which is not supported{convert}"
    assert reason("jp2") == f"a JPEG 2000 image, which is not supported{convert}"
    assert reason("pdf") == f"a PDF document, not an image{convert}"
    assert reason("lfs") == "a Git LFS pointer, not an image; fetch the file itself: git lfs pull"
    assert reason("zip") == "a ZIP archive, not an image; unpack it"
    assert reason("noise") == "an unknown format, not an image"
    assert recognise(b"").instead_of("video") == "empty file"
    listed = "an MP4 video, not an image; list it as a video in the data set"
    assert recognise(BIKES.read_bytes()[:HEAD_BYTES]).instead_of("image") == listed
    listed = "a PNG image, not a video; list it as an image in the data set"
    assert recognise(IMAGES["png"]).instead_of("video") == listed


@given(st.binary(max_size=600), st.text(max_size=12))
@example(b"II*\0\xff\xff\xff\xff", "a.dng")
@example(b"MM\0*\0\0\0\x08\xff\xff", "")
@example(b"\xff\xfe\x00", "")
@example(b"\xff\xfe<\xd8", "")
@example(b"P", ".")
@example(b"<!--", "")
def test_any_bytes_have_an_answer(head: bytes, name: str) -> None:
    found = recognise(head, name)
    assert found.kind in ("image", "video", "") and found.instead_of("image")


STARTS = [data[:300] for data in (*IMAGES.values(), *(data for data, _ in OTHER.values()))]
STARTS += [magic.rjust(offset + len(magic)) for offset, magic, _ in OTHERS]


@given(st.sampled_from(STARTS), st.integers(0, 300), st.binary(max_size=40))
def test_any_damage_behind_a_known_start_has_an_answer(
    start: bytes, kept: int, rest: bytes
) -> None:
    recognise(start[:kept] + rest)


def test_long_texts_and_comments_take_no_time() -> None:
    """Patterns that search a comment's end must not do so from every position."""
    for head in (b"<!--" * 30_000, b" " * 100_000, b"<?xml" + b"<" * 100_000, b"P3 #" * 30_000):
        recognise(head)


def test_importing_it_imports_no_library() -> None:
    code = (
        "import sys, model.media.kinds;"
        "print([m for m in sys.modules if m.split('.')[0] in ('PIL', 'av', 'numpy', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
