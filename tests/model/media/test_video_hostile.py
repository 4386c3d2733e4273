"""Files that are not videos, and hostile ones: BadMediaError with a reason, and no second file is opened.

with pytest.raises(BadMediaError, match="an HTML page, not a video"):
    probe(b"<!DOCTYPE html>...")
"""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import av
import pytest
from PIL import Image

import model.media.video_open
from model.media.images import BadMediaError
from model.media.video import frames
from model.media.video_index import probe
from tests.support.photos import heic_file, png_file
from tests.support.videos import PHONE, ffmpeg, make_video, number_of


def reason(data: bytes | Path) -> str:
    with pytest.raises(BadMediaError) as caught:
        probe(data)
    assert caught.value.stage == "decode" and "\n" not in caught.value.reason
    return caught.value.reason


# ---- not videos -------------------------------------------------------------------------------------


def test_the_reason_names_what_is_not_a_video(tmp_path: Path) -> None:
    assert reason(b"") == "empty file"
    assert reason(b"\n<!DOCTYPE html><html>gone</html>") == "an HTML page, not a video"
    for data in (b"\0", b"words " * 500, bytes(100_000), bytes(range(256)) * 400):
        assert reason(data).startswith(("no readable video", "no video", "no frame", "a text"))
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tiff", "avif"):
        Image.new("RGB", (64, 64), "red").save(path := tmp_path / f"image.{suffix}")
        kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
        listed = f"{kind} image, not a video; list it as an image in the data set"
        assert reason(path).removeprefix("an ").removeprefix("a ") == listed
    heic = heic_file(Image.new("RGB", (64, 64), "red"))
    assert reason(heic) == "an HEIC image, not a video; list it as an image in the data set"
    assert reason(Path(__file__)) == "a text, not a video"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    assert reason(pointer) == "a Git LFS pointer, not a video; fetch the file itself: git lfs pull"


def test_the_reason_names_an_unsupported_codec(tmp_path: Path) -> None:
    ffmpeg("-i", PHONE, "-c:v", "snow", "-strict", "-2", "-t", 1, path := tmp_path / "snow.avi")
    assert reason(path) == "codec snow is not supported"


# ---- hostile ---------------------------------------------------------------------------------------


def playlists(secret: Path) -> dict[str, bytes]:
    """Return files that make FFmpeg read another file."""
    mpd = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        f'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="0" bandwidth="1"><BaseURL>file://{secret}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{secret}\n".encode(),
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "dash": mpd.encode(),
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    }


@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "sdp"])
def test_lists_of_other_files_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = make_video(tmp_path / "secret.mp4")
    assert re.search("no readable video|, not a video", reason(playlists(secret)[kind]))
    # Even with a longer list of formats there is no protocol to open the second file with.
    monkeypatch.setattr(model.media.video_open, "FORMATS", (*model.media.video_open.FORMATS, kind))
    with pytest.raises(BadMediaError):
        probe(playlists(secret)[kind])


def reference_movie(target: Path) -> bytes:
    """Return the table of a QuickTime file whose frames are in another file (a Macintosh alias)."""
    data = bytearray(target.read_bytes())
    path = str(target).encode()
    path += b"\0" * (len(path) % 2)
    alias = bytes(150) + struct.pack(">HH", 2, len(path)) + path + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    at = data.index(b"url ", data.index(b"dref"))
    data[at - 4 : at + 8] = entry
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        # The last `dinf` and `dref` before the entry: QuickTime has another for the handler.
        place = data.rindex(box, 0, at) - 4
        size = struct.unpack_from(">I", data, place)[0] + len(entry) - 12
        struct.pack_into(">I", data, place, size)
    return bytes(data[:20] + data[data.index(b"moov") - 4 :])


def test_a_quicktime_reference_to_another_file_is_not_followed(tmp_path: Path) -> None:
    target = make_video(tmp_path / "target.mov", codec="qtrle", pixels="rgb24")
    reference = reference_movie(target)
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(io.BytesIO(reference), options=options) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    followed = [number_of(Image.fromarray(image)) for image in shown]
    assert followed == list(range(8))  # PyAV follows it

    def outcome() -> object:
        try:
            info = probe(reference)
            return info, [f.image.tobytes() for f in frames(reference, [0, 1_000_000], info)]
        except BadMediaError as error:
            return error.reason

    there = outcome()
    target.unlink()
    assert outcome() == there


def test_huge_frames_are_refused_from_their_header(tmp_path: Path) -> None:
    y4m = b"YUV4MPEG2 W60000 H60000 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(1000)
    assert "60000 x 60000" in reason(y4m) or "no readable video" in reason(y4m)
    source = make_video(tmp_path / "video.mov", frames=1, codec="qtrle", pixels="rgb24")
    data = source.read_bytes()
    sized = struct.pack(">HH", 96, 64)
    assert data.count(sized) == 1
    headers = data.replace(sized, struct.pack(">HH", 60_000, 60_000))
    assert "pixels" in reason(headers)
    source = make_video(tmp_path / "video.mov", frames=1, codec="png", pixels="rgb24")
    data = source.read_bytes()
    # A valid table, and a frame that is a huge PNG of equal length, so that offsets stay valid.
    at = data.index(b"\x89PNG")
    length = data.index(b"IEND", at) + 8 - at
    inner = png_file(60_000, 60_000, bytes(1 << 20))[:length].ljust(length, b"\0")
    assert "no frame" in reason(data[:at] + inner + data[at + length :])


def test_a_video_of_many_days_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mkv", frames=3, times_ms=[0, 40, 700_000_000], codec="ffv1")
    assert reason(path) == "timestamps span 8 days"
