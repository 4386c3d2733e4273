"""Truncated and damaged videos: the frames that decode, or BadMediaError, within seconds.

info = probe(data)       # info.note == "ends early: ..."
frames(data, sample_times(info.duration_s, 5), info)
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from cache.format.frame_sampling import sample_times
from model.media.images import BadMediaError
from model.media.video import frames
from model.media.video_index import probe
from tests.support.video_mutations import TIMEOUT_S, Outcome, mutated
from tests.support.videos import BIKES, BUNNY, ffmpeg, make_video, number_of, times_by_ffmpeg

pytestmark = pytest.mark.slow


# ---- cut off ---------------------------------------------------------------------------------------


CUT = ("mkv", "flv", "ts", "avi", "wmv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make real videos that stay readable when they are cut: their tables are at the front."""
    folder = tmp_path_factory.mktemp("whole")
    small = ["-c:v", "libx264", "-g", 25, "-vf", "scale=160:90"]
    ffmpeg("-i", BUNNY, *small, "-movflags", "+faststart", folder / "front.mp4")
    ffmpeg("-i", folder / "front.mp4", "-c", "copy", folder / "video.mkv")
    ffmpeg("-i", folder / "front.mp4", "-c", "copy", folder / "video.flv")
    ffmpeg("-i", folder / "front.mp4", "-c", "copy", "-an", folder / "video.ts")
    ffmpeg("-i", folder / "front.mp4", "-an", "-c:v", "wmv2", "-g", 25, folder / "video.wmv")
    ffmpeg("-i", BUNNY, "-c:v", "mpeg4", "-bf", 2, "-vf", "scale=160:90", folder / "video.avi")
    return folder


@pytest.mark.parametrize("name", ["front.mp4", *(f"video.{suffix}" for suffix in CUT)])
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_a_truncated_video_gives_the_frames_that_decode_and_a_note(
    whole: Path, tmp_path: Path, name: str, part: float
) -> None:
    data = (whole / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(data[: int(len(data) * part)])
    full, info = probe(whole / name), probe(cut)
    assert full.note is None
    assert 0 < info.duration_s < full.duration_s and info.frames < full.frames
    if name != "video.ts":  # MPEG-TS stores no length
        assert info.note is not None and info.note.startswith("ends early: ")
    theirs = times_by_ffmpeg(cut)
    assert abs(theirs[-1] / 1e6 - info.duration_s) < 0.1  # the last one may be cut in two
    wanted = sample_times(info.duration_s, 5)
    ours = list(frames(cut, wanted, info))
    same = list(frames(whole / name, wanted, full))
    assert [frame.time_s for frame in ours] == [frame.time_s for frame in same]
    pairs = list(zip(ours, same, strict=True))[:-1]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in pairs)


@pytest.mark.parametrize("offset", [0, 3600])
@pytest.mark.parametrize("suffix", ["mkv", "webm", "flv", "wmv", "mp4", "ts", "ogv", "nut"])
def test_a_clock_that_starts_late_is_no_missing_end(
    tmp_path: Path, suffix: str, offset: int
) -> None:
    source = make_video(tmp_path / "source.nut", frames=40, fps=10, codec="ffv1")
    path = tmp_path / f"video.{suffix}"
    ffmpeg("-i", source, "-g", 5, "-output_ts_offset", offset, path)
    info = probe(path)
    assert (info.duration_s, info.note) == (3.9, None)
    if suffix in ("mkv", "webm", "wmv"):  # they declare the time of the end
        cut = path.read_bytes()
        cut = probe(cut[: len(cut) * 6 // 10])
        assert cut.note is not None and cut.note.startswith("ends early: ")
        assert float(cut.note.split(" s")[0].split()[-1]) <= 4


def test_an_mp4_without_its_table_is_refused() -> None:
    data = BIKES.read_bytes()
    at = data.index(b"moov")
    if at < len(data) // 2:
        data = data[: at - 4]
    with pytest.raises(BadMediaError, match="no readable video"):
        probe(data[: len(data) // 2])


def test_damage_in_the_middle_affects_only_its_own_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mkv", frames=60, fps=10, gop=10, codec="ffv1")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 60] = bytes(60)
    info = probe(bytes(data))
    wanted = [n * 100_000 for n in range(60)]
    found = [number_of(frame.image) for frame in frames(bytes(data), wanted, info)]
    assert len(found) == 60 and sum(n == m for n, m in enumerate(found)) >= 50
    assert found[:20] == list(range(20)) and found[-20:] == list(range(40, 60))


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("video.avi", ["-c:v", "mpeg4", "-bf", 2]),
        ("video.webm", ["-c:v", "libvpx-vp9", "-cpu-used", 8, "-deadline", "realtime"]),
    ],
)
def test_a_frame_of_a_damaged_video_is_equal_asked_for_alone_or_with_all(
    tmp_path: Path, name: str, encode: list[str | int]
) -> None:
    path = tmp_path / name
    ffmpeg("-i", BIKES, "-t", 4, "-vf", "scale=96:40", "-an", *encode, "-g", 15, path)
    whole = path.read_bytes()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for at in rng.integers(len(data) // 10, len(data) * 9 // 10, 6):
            data[at : at + 8] = rng.bytes(8)
        info = probe(bytes(data))
        every = frames(bytes(data), range(0, round(info.duration_s * 1e6) + 1, 40_000), info)
        together = {frame.time_s: frame.image.tobytes() for frame in every}
        for wanted in rng.integers(0, round(info.duration_s * 1e6) + 1, 6):
            frame = next(iter(frames(bytes(data), [int(wanted)], info)))
            assert frame.image.tobytes() == together[frame.time_s]


def test_frames_at_the_end_that_do_not_decode_are_not_counted(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.avi", frames=40, fps=10, codec="mjpeg", pixels="yuvj420p")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    for at, size in packets[-3:]:
        assert at is not None
        data[at : at + size] = bytes(size)
    info = probe(bytes(data))
    assert (info.frames, info.duration_s) == (37, 3.6)
    assert info.note == "ends early: its last 3 frames cannot be decoded"
    last = list(frames(bytes(data), [3_600_000, 3_900_000], info))
    assert [number_of(frame.image) for frame in last] == [36, 36]


# ---- mutations -------------------------------------------------------------------------------------


def decode_in_children(folder: Path, count: int) -> tuple[list[Outcome], list[tuple[int, int]]]:
    """Decode damaged videos in a child process, and in a new one after each crash.

    Returns:
        The outcomes, and for each crash the number of the video and the signal that ended the child.
    """
    outcomes: list[Outcome] = []
    crashes: list[tuple[int, int]] = []
    command = [sys.executable, "-m", "tests.support.video_mutations", str(folder)]
    while (first := len(outcomes) + len(crashes)) < count:
        numbers = [str(first), str(count)]
        done = subprocess.run([*command, *numbers], capture_output=True, text=True, check=False)
        outcomes += [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]
        number = len(outcomes) + len(crashes)
        assert done.returncode <= 0, f"video {number}: {done.stderr}"
        assert done.returncode != -signal.SIGALRM, f"video {number} took {TIMEOUT_S} s"
        if done.returncode < 0:
            crashes.append((number, -done.returncode))
    return outcomes, crashes


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make small real videos, one of each kind that FFmpeg decodes in its own way."""
    folder = tmp_path_factory.mktemp("victims")
    small = ["-t", 1.2, "-vf", "scale=96:40", "-an"]
    kinds = {
        **{f"h264.{s}": ["-c:v", "libx264", "-g", 12] for s in ("mp4", "ts", "flv", "264")},
        "hevc.mkv": ["-c:v", "libx265", "-preset", "ultrafast", "-g", 12],
        "vp8.webm": ["-c:v", "libvpx", "-g", 12],
        "vp9.webm": ["-c:v", "libvpx-vp9", "-cpu-used", 8, "-deadline", "realtime", "-g", 12],
        "av1.mp4": ["-c:v", "libsvtav1", "-preset", 12, "-g", 12],
        "mpeg4.avi": ["-c:v", "mpeg4", "-bf", 2, "-g", 12],
        "mpeg2.mpg": ["-c:v", "mpeg2video", "-bf", 2, "-g", 12],
        "theora.ogv": ["-c:v", "libtheora", "-g", 12],
        "wmv2.wmv": ["-c:v", "wmv2", "-g", 12],
        "qtrle.mov": ["-c:v", "qtrle"],
        "prores.mov": ["-c:v", "prores_ks"],
        "ffv1.nut": ["-c:v", "ffv1"],
        "mjpeg.mxf": ["-c:v", "mpeg2video"],
    }
    for name, encode in kinds.items():
        ffmpeg("-i", BIKES, *small, *encode, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.soak_counted
def test_damaged_videos_decode_or_raise_bad_media(
    victims: Path, soak: Callable[[int, int], int]
) -> None:
    count = soak(96, 4000)
    outcomes, crashes = decode_in_children(victims, count)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    megabytes = max(outcome.megabytes for outcome in outcomes)
    with_frames = sum(outcome.reason == "frames" for outcome in outcomes)
    print(
        f"\n{count} damaged videos, {with_frames} with frames; crashes (video, signal): {crashes}"
    )
    print(f"slowest {slowest}, peak {megabytes} MB")
    # Both outcomes occurred.
    assert min(with_frames, len(outcomes) - with_frames) > count // 12
    assert slowest.seconds < 10
    assert megabytes < 1500
    assert len(crashes) <= count // 500  # crashes inside FFmpeg; printed above


def test_damaged_videos_give_equal_results_in_any_thread(victims: Path) -> None:
    files = [path.read_bytes() for path in sorted(victims.iterdir())]
    videos = [mutated(number, files) for number in range(32)]

    def outcome(data: bytes) -> object:
        try:
            info = probe(data)
            shown = frames(data, sample_times(info.duration_s, 3), info)
            return [(frame.time_s, frame.image.tobytes()) for frame in shown], info
        except BadMediaError as error:
            return error.reason

    alone = [outcome(video) for video in videos]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, videos)) == alone
