"""Video frames at given times: the nearest frame, its own time, in every container, without decoding all.

info = probe(path)
for frame in frames(path, [0, 2_000_000], info):     # microseconds after the first frame
    frame.time_s, frame.image
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.format.frame_sampling import sample_times
from model.media.images import BadMediaError
from model.media.video import VIDEO_SUFFIXES, Frame, frames
from model.media.video_index import probe
from tests.support.videos import CONTAINERS, ffmpeg, make_video, number_of


def taken(data: bytes | Path, wanted: Sequence[int]) -> list[Frame]:
    return list(frames(data, wanted, probe(data)))


def numbers(data: bytes | Path, wanted: Sequence[int]) -> list[int]:
    return [number_of(frame.image) for frame in taken(data, wanted)]


def test_each_frame_is_found_at_its_time(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mp4", frames=40, fps=8)
    info = probe(path)
    assert (info.duration_s, info.width, info.height) == (39 / 8, 96, 64)
    assert (info.frames, info.note) == (40, None)
    found = taken(path, [n * 125_000 for n in range(40)])
    assert [number_of(frame.image) for frame in found] == list(range(40))
    assert [frame.time_s for frame in found] == [n / 8 for n in range(40)]
    assert {(frame.image.mode, frame.image.size) for frame in found} == {("RGB", (96, 64))}


def test_bytes_and_path_give_equal_frames_under_any_file_name(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mkv", frames=20, codec="ffv1")
    odd = tmp_path / "concat:a|b%03d.png"
    odd.write_bytes(path.read_bytes())
    for data in (path, odd, path.read_bytes()):
        assert probe(data) == probe(path)
        assert numbers(data, [0, 2_000_000, 4_750_000]) == [0, 8, 19]


def test_the_nearest_frame_is_taken_or_the_earlier_on_a_tie(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mkv", times_ms=[0, 100, 200, 1000], frames=4, codec="ffv1")
    wanted = [0, 49_999, 50_000, 50_001, 150_001, 600_000, 600_001, 9_000_000]
    found = taken(path, wanted)
    assert [number_of(frame.image) for frame in found] == [0, 0, 0, 1, 2, 2, 3, 3]
    assert [frame.wanted_us for frame in found] == wanted
    assert [frame.time_s for frame in found] == [0, 0, 0, 0.1, 0.2, 0.2, 1, 1]
    with pytest.raises(ValueError, match="ascend"):
        taken(path, [1, 0])


def test_no_times_give_no_frames_and_one_frame_is_a_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mp4", frames=1)
    info = probe(path)
    assert (info.duration_s, info.frames) == (0, 1)
    assert list(frames(path, [], info)) == []
    assert numbers(path, sample_times(info.duration_s, 8)) == [0]


@settings(max_examples=30, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 4000), min_size=1, max_size=40),
    gop=st.integers(1, 12),
    wanted=st.lists(st.integers(0, 160_000_000), max_size=12).map(sorted),
)
def test_any_times_give_the_frames_a_full_search_finds(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], gop: int, wanted: list[int]
) -> None:
    times = np.cumsum([0, *gaps])
    path = tmp_path_factory.mktemp("any") / "video.mkv"
    make_video(path, times_ms=times.tolist(), frames=len(times), gop=gop, fps=1000)
    info = probe(path)
    assert (info.duration_s, info.frames) == (times[-1] / 1000, len(times))
    nearest = [int(np.argmin(np.abs(times * 1000 - us))) for us in wanted]  # the first of equals
    assert numbers(path, wanted) == nearest


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container_gives_the_right_frames(tmp_path: Path, suffix: str) -> None:
    codec, pixels = CONTAINERS[suffix]
    source = make_video(tmp_path / "source.nut", frames=50, fps=25, codec="ffv1")
    path = tmp_path / f"video.{suffix}"
    ffmpeg("-i", source, "-c:v", codec, "-pix_fmt", pixels, "-b:v", "2M", path)
    assert f".{suffix}" in VIDEO_SUFFIXES
    info = probe(path)
    assert (info.duration_s, info.frames, info.note) == (49 / 25, 50, None)
    assert (info.width, info.height) == (96, 64)
    wanted = [0, 40_000, 1_000_000, 1_480_000, 1_960_000]
    found = taken(path, wanted)
    assert [number_of(frame.image) for frame in found] == [0, 1, 25, 37, 49]
    assert [frame.time_s for frame in found] == [us / 1_000_000 for us in wanted]


def test_a_long_video_is_not_decoded_completely_and_progress_is_reported(tmp_path: Path) -> None:
    times = [n * 45_000 for n in range(800)]  # ten hours, a key frame every nine minutes
    path = make_video(tmp_path / "long.mkv", times_ms=times, frames=800, fps=1000, size=(32, 32))
    beats: list[int] = []
    info = probe(path, lambda: beats.append(0))
    assert beats
    beats.clear()
    wanted = sample_times(info.duration_s, 16)
    found = list(frames(path, wanted, info, lambda: beats.append(0)))
    assert len(found) == 16 and found[-1].time_s == info.duration_s == 35_955
    assert [frame.time_s for frame in found] == [round(us / 45e6) * 45 for us in wanted]
    assert 16 <= len(beats) < 16 * 14  # at most a group of 12 and one more frame each


def test_iteration_may_stop_in_the_middle(tmp_path: Path) -> None:
    path = make_video(tmp_path / "video.mp4", frames=30)
    shown = frames(path, range(0, 7_000_000, 250_000), probe(path))
    assert number_of(next(shown).image) == 0
    shown.close()  # type: ignore[attr-defined]
    path.unlink()  # an open file would warn, and warnings are errors in tests


def test_times_count_from_the_first_frame_at_any_start_of_the_clock(tmp_path: Path) -> None:
    source = make_video(tmp_path / "source.nut", frames=60, fps=25, codec="ffv1")
    for offset in (7, 95_442.5):  # the second overflows the 33 bits of MPEG's clock
        path = tmp_path / "video.ts"
        encode = ["-c:v", "mpeg2video", "-bf", 2, "-b:v", "2M", "-output_ts_offset", offset]
        ffmpeg("-i", source, *encode, path)
        info = probe(path)
        assert (info.duration_s, info.frames) == (59 / 25, 60)
        assert numbers(path, [0, 1_000_000, 2_360_000]) == [0, 25, 59]


def test_edit_lists_are_applied(tmp_path: Path) -> None:
    source = make_video(tmp_path / "source.mp4", frames=60, fps=10, gop=20)
    path = tmp_path / "cut.mp4"
    ffmpeg("-ss", 2.5, "-i", source, "-c", "copy", path)  # the key frame is 0.5 s earlier, hidden
    info = probe(path)
    assert (info.duration_s, info.frames) == (3.4, 35)
    assert numbers(path, [0, 1_000_000, 3_400_000]) == [25, 35, 59]


def test_joined_recordings_give_the_frames_that_advance(tmp_path: Path) -> None:
    parts = [
        make_video(tmp_path / f"{name}.ts", frames=count, fps=25, codec="mpeg2video")
        for name, count in (("long", 50), ("short", 20))
    ]
    info = probe(b"".join(part.read_bytes() for part in parts))
    assert info.duration_s >= 49 / 25 and info.frames >= 50


def test_importing_it_imports_neither_pyav_nor_torch() -> None:
    code = (
        "import sys, model.media.video;"
        "print([m for m in sys.modules if m.split('.')[0] in ('av', 'torch', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_suffixes_are_lower_case_and_not_those_of_images() -> None:
    assert all(s.startswith(".") and s == s.lower() for s in VIDEO_SUFFIXES)
    assert not VIDEO_SUFFIXES & {".gif", ".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tiff"}


def test_frames_keep_their_own_size_when_it_changes(tmp_path: Path) -> None:
    parts = []
    for name, size in (("a", (96, 64)), ("b", (64, 96))):
        source = make_video(tmp_path / f"{name}.nut", frames=25, fps=25, size=size, codec="ffv1")
        ffmpeg("-i", source, "-c:v", "libx264", "-bf", 0, part := tmp_path / f"{name}.264")
        parts.append(part.read_bytes())
    data = b"".join(parts)
    info = probe(data)
    assert (info.frames, info.width, info.height) == (50, 96, 64)
    found = taken(data, [0, 960_000, 1_000_000, 1_960_000])
    assert [frame.image.size for frame in found] == [(96, 64)] * 2 + [(64, 96)] * 2
    assert [number_of(frame.image) for frame in found] == [0, 24, 0, 24]


def test_a_missing_file_is_a_fetch_error(tmp_path: Path) -> None:
    with pytest.raises(BadMediaError, match="cannot be read: No such file") as caught:
        probe(tmp_path / "gone.mp4")
    assert caught.value.stage == "fetch"
