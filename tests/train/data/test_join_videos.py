"""Selecting samples with videos: the frames they need, and the frames that replace them when blind.

samples.times_of(item), samples.rows_of(item)    # seconds and rows of the frames of a video
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.format.frame_sampling import frame_views, sample_times
from cache.store.reader import FeatureReader, Keys
from cache.store.references import IMAGE, VIDEO
from cache.store.samples import MediaRef
from configs import UserError
from tests.support.feature_caches import World, ask, frame_time, key_of, names_of


def media_named(world: World, joined: object, name: str) -> int:
    """Return the number of the media item with a name."""
    assert hasattr(joined, "keys")
    return next(m for m in range(len(joined.keys)) if joined.key(m) == key_of(name))


def test_a_video_needs_all_its_frames(world: World) -> None:
    world.write(
        d=[
            ask("video", ["video a"]),
            ask("both", ["p", "video b", "video a"]),
            ask("unknown", ["video a", "video nowhere"]),
            ask("image", ["p"]),
        ]
    )
    world.encode(["p"])
    world.encode_videos({"video a": 3.2, "video b": 0.0})
    joined = world.join()
    assert names_of(joined) == ["d/video", "d/both", "d/image"]
    assert (joined.missing, joined.failed) == (1, 0)
    a, b, p = (media_named(world, joined, name) for name in ("video a", "video b", "p"))
    assert [joined.is_video(m) for m in (a, b, p)] == [True, True, False]
    views = frame_views(3.2, 128)
    assert len(views) == 8  # 0, 0.5, ... 3.0, and the last frame
    wanted = world.reader.lookup_pairs("frame", [key_of("video a")] * 8, views)
    assert joined.rows_of(a).tolist() == wanted.tolist()
    assert joined.times_of(a).tolist() == [frame_time(us) for us in sample_times(3.2, 128)]
    assert joined.times_of(b).tolist() == [0.0]
    assert joined.rows_of(p).tolist() == world.reader.lookup("image", [key_of("p")]).tolist()
    assert np.isnan(joined.times_of(p)).all()


def test_two_views_of_one_frame_are_one_row(world: World) -> None:
    """At 12.5 frames a second, the nearest frame to 12.0 s and to 12.02 s is the same."""
    world.write(d=[ask("1", ["video"])])
    world.encode_videos({"video": 12.02})
    assert len(frame_views(12.02, 128)) == 26
    joined = world.join()
    times = joined.times_of(0).tolist()
    assert times == [frame_time(500_000 * i) for i in range(25)]
    first = world.reader.lookup_pairs("frame", [key_of("video")], ["t:12000000"])
    assert joined.rows_of(0)[-1] == first[0]


def test_videos_encoded_with_another_limit_are_reported_separately(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.write(d=[ask("long", ["video long"]), ask("short", ["video short"]), ask("text")])
    world.encode_videos({"video long": 30.0, "video short": 3.0}, max_frames=8)
    with pytest.raises(UserError) as refused:
        world.join(min_coverage=0.9, max_frames=16)
    message = str(refused.value)
    assert "1 videos have some of their frames and not those for at most 16" in message
    assert "python -m encode.run --dataset d --encoder toy --codec fp16 " in message
    assert f"--features {world.root.path} --max-frames 16, or lower" in message
    assert "66.7%" in message and "\n" not in message
    joined = world.join(max_frames=16)  # the short video needs no other frames
    assert names_of(joined) == ["d/short", "d/text"]
    assert "--max-frames 16" in caplog.text
    assert world.join(max_frames=8, min_coverage=1.0).size == 3
    world.encode_videos({"video long": 30.0}, max_frames=16)
    assert world.join(max_frames=16, min_coverage=1.0).size == 3
    assert len(world.join(max_frames=16).rows_of(0)) == 16
    assert len(world.join(max_frames=8).rows_of(0)) == 8


def test_a_video_of_unknown_duration_is_missing(world: World) -> None:
    world.write(d=[ask("1", ["video"]), ask("2")])
    world.encode_videos({"video": 1.0})
    world.record("video", key=key_of("video"))
    joined = world.join()
    assert (names_of(joined), joined.missing) == (["d/2"], 1)


def test_one_file_may_be_an_image_and_a_video(world: World) -> None:
    """The bytes of an animated image are two media items, each with its own rows."""
    as_image = replace(ask("image"), media=(MediaRef(source="/video.mp4"),))
    world.write(d=[ask("video", ["video"]), as_image])
    world.encode(["video"])
    world.encode_videos({"video": 1.0})
    world.record("video", key=key_of("video"), duration_s=1.0, attempts=2)
    joined = world.join()
    assert names_of(joined) == ["d/video", "d/image"]
    assert sorted(joined.kinds.tolist()) == [IMAGE, VIDEO]
    assert joined.key(0) == joined.key(1) == key_of("video")


def test_a_failed_video_does_not_count_against_coverage(world: World) -> None:
    world.write(d=[ask("1", ["video good"]), ask("2", ["video bad"])])
    world.encode_videos({"video good": 1.0})
    world.fail("video bad")
    joined = world.join(min_coverage=1.0)
    assert (joined.failed, joined.missing) == (1, 0)


def test_other_kinds_of_media_are_an_error(world: World) -> None:
    sound = replace(ask("1"), media=(MediaRef(source="/a.wav", kind="sound"),))
    world.write(d=[sound])
    world.encode(["p"])
    with pytest.raises(UserError, match="data set d: holds sound media; only images and videos"):
        world.join()


def test_the_digest_depends_on_the_frames_of_videos(world: World, tmp_path: Path) -> None:
    world.write(d=[ask("1", ["video"]), ask("2", ["p"])])
    world.encode(["p"])
    world.encode_videos({"video": 30.0}, max_frames=8)
    world.encode_videos({"video": 30.0}, max_frames=16)
    first = world.join(max_frames=8)
    path = tmp_path / "samples.safetensors"
    first.freeze(path)
    assert world.join(max_frames=8, frozen=path).digest == first.digest
    assert world.join(max_frames=16).digest != first.digest
    with pytest.raises(UserError, match="not the same any more"):
        world.join(max_frames=16, frozen=path)


def test_blind_exchanges_images_among_images_and_videos_among_videos(world: World) -> None:
    videos = {f"video {i}": float(i) for i in range(1, 7)}
    world.write(
        d=[
            ask(f"{i}", [f"p{i % 5}", f"video {1 + i % 6}"], "<image> or <image>")
            for i in range(30)
        ]
    )
    world.encode([f"p{i}" for i in range(5)])
    world.encode_videos(videos)
    joined = world.join()
    blind = joined.blind(0)
    assert blind.kinds.tolist() == joined.kinds.tolist()
    assert blind.starts.tolist() == joined.starts.tolist()
    np.testing.assert_array_equal(blind.times, joined.times)
    donors = []
    for m in range(len(joined.kinds)):
        other = next(
            k
            for k in range(len(joined.kinds))
            if joined.key(k) == blind.key(m) and joined.kinds[k] == joined.kinds[m]
        )
        assert other != m
        donors.append(other)
        theirs = joined.rows_of(other).tolist()
        given = blind.rows_of(m).tolist()
        assert set(given) <= set(theirs)  # only rows of the donor
        assert given == sorted(given)  # in time order
        assert (given[0], given[-1]) == (theirs[0], theirs[-1] if len(given) > 1 else theirs[0])
        if len(given) >= len(theirs):
            assert set(given) == set(theirs)
        else:
            assert len(set(given)) == len(given)
    assert sorted(donors) == list(range(len(joined.kinds)))
    # Sequences keep their lengths, so the losses are over equal tokens.
    assert world.trees(blind).length.tolist() == world.trees(joined).length.tolist()


def test_a_single_video_cannot_be_exchanged(world: World) -> None:
    world.write(d=[ask("1", ["video"]), ask("2", ["p"]), ask("3", ["q"])])
    world.encode(["p", "q"])
    world.encode_videos({"video": 1.0})
    with pytest.raises(UserError, match=r"one video, so none.*--no-blind.*more videos"):
        world.join().blind(0)


def test_videos_are_looked_up_a_few_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [f"video {i}" for i in range(7)]
    world.write(d=[ask(video, [video]) for video in videos])
    world.encode_videos(dict.fromkeys(videos, 1.0))
    expected = world.join().rows.tolist()
    lookup_pairs, sizes = FeatureReader.lookup_pairs, list[int]()

    def spy(reader: FeatureReader, array: str, keys: Keys, views: Sequence[str]) -> np.ndarray:
        sizes.append(len(views))
        return lookup_pairs(reader, array, keys, views)

    monkeypatch.setattr(FeatureReader, "lookup_pairs", spy)
    monkeypatch.setattr("cache.store.references.VIDEOS_AT_ONCE", 3)
    assert world.join().rows.tolist() == expected
    assert sizes == [9, 9, 3]  # three frames of each video
