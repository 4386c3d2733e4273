"""Features by name: equal to those that were stored, or a KeyError that says what is missing and what to do.

cache = nm.open("cache")
cache["photos/cat.jpg"]             # (tokens, width) float16
cache["videos/cat.mp4"].times       # (frames,) seconds
"""

from __future__ import annotations

import hashlib
import multiprocessing
import operator
import pickle
import shlex
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import configs
import nanomolmo2 as nm
from cache.errors import CacheError, CorruptError, NotFoundError
from cache.maintenance.local_media import remember
from cache.share import share
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from encode import run as encode_run
from tests.support.feature_caches import SPEC, World, ask, features, frame_time, key_of, new_world
from tests.support.remote_servers import WebServer
from tests.support.spaces import fill, make_space


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Three images and two videos with rows, one image that failed and one without rows."""
    world = new_world(tmp_path)
    world.write(d=[ask("1", ["a", "b"]), ask("2", ["video v"])], e=[ask("1", ["c"])])
    world.encode(["a", "b", "c"])
    world.encode_videos({"video v": 2.2, "video w": 0.0})
    world.fail("bad")
    world.record("later", key=key_of("later"))
    return world


@pytest.fixture
def cache(world: World) -> nm.Cache:
    return nm.open(world.root.path)


def test_an_image_is_found_by_path_and_by_key(cache: nm.Cache) -> None:
    for name in ("/a.png", Path("/a.png"), key_of("a"), key_of("a").upper()):
        found = cache[name]
        assert (found.shape, found.dtype) == ((SPEC.tokens("image"), SPEC.width), np.float16)
        np.testing.assert_array_equal(found, features("a"))
        assert name in cache and cache.key(name) == key_of("a")


def test_a_video_has_all_its_frames_and_their_times(cache: nm.Cache) -> None:
    for name in ("/video v.mp4", key_of("video v")):
        clip = cache[name]
        assert isinstance(clip, nm.Clip)
        times = [frame_time(us) for us in (0, 500000, 1000000, 1500000, 2000000, 2200000)]
        assert clip.times.tolist() == times
        expected = np.stack([features("video v", time_s) for time_s in times])
        np.testing.assert_array_equal(np.asarray(clip), expected)
    one = cache["/video w.mp4"]
    assert one.shape == (1, SPEC.tokens("frame"), SPEC.width)


def test_a_cache_says_what_it_has(cache: nm.Cache, world: World) -> None:
    assert len(cache) == 5
    assert sorted(cache) == sorted(map(key_of, ("a", "b", "c", "video v", "video w")))
    assert cache.datasets == ["d", "e"]
    assert (cache.where, cache.space, cache.spec) == (str(world.root.path), SPEC.name, SPEC)
    text = repr(cache)
    assert all(part in text for part in ("3 images of 4 x 64", "7 frames of 1 x 64", "d, e"))
    assert 5 not in cache
    for odd in ("\0", "x" * 5000, "", "/", "." * 64):
        assert odd not in cache


def test_one_missing_name_is_a_keyerror_that_says_why_and_what_to_do(
    cache: nm.Cache, world: World
) -> None:
    encode = f"python -m encode.run --dataset d --encoder toy --codec {SPEC.codec}"
    for name, why in {
        "/bad.png": "it failed at decode: truncated. Try again: ",
        "/later.png": "it is not encoded there. Encode it: ",
        "/nobody.png": "not among its 7 media",
        "https://host/x.png": "not among its 7 media",
        key_of("nobody"): "no image or video has this key",
        key_of("later"): "no image or video has this key",
    }.items():
        with pytest.raises(KeyError) as caught:
            cache[name]
        message = str(caught.value)
        assert isinstance(caught.value, nm.MissingFeaturesError)
        assert message.startswith(
            f"{name}: no features in space {SPEC.name} of {world.root.path}: "
        )
        assert why in message and encode in message and "\n" not in message
        assert message.split("python -m ")[1].count(f"--features {world.root.path}") == 1
        assert name not in cache
        assert ("--retry-failed" in message) == (name == "/bad.png")


def test_the_end_of_a_path_is_enough_if_only_one_fits(world: World, tmp_path: Path) -> None:
    for source in ("/x/photos/cat.jpg", "/y/cat.jpg"):
        append_media(world.root, [MediaRecord(source=source, key=key_of("a"))], "test")
    append_media(world.root, [MediaRecord(source="/z/cat.jpg", key=key_of("b"))], "test")
    cache = nm.open(world.root.path)
    np.testing.assert_array_equal(cache["photos/cat.jpg"], features("a"))
    np.testing.assert_array_equal(cache["z/cat.jpg"], features("b"))
    with pytest.raises(
        nm.MissingFeaturesError, match="3 media of the cache have names that end so"
    ):
        cache["cat.jpg"]
    for name in ("/photos/cat.jpg", "at.jpg"):  # an absolute path is meant; half a name is none
        assert name not in cache


def test_a_file_that_exists_counts_by_its_bytes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of this world are hashes of names, so the files contain their names."""
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"a")
    assert hashlib.sha256(b"a").hexdigest() == key_of("a")
    cache = nm.open(world.root.path)
    np.testing.assert_array_equal(cache["photo.png"], features("a"))  # known by its bytes alone
    status = photo.stat()
    record = MediaRecord(
        source=str(photo),
        key=key_of("b"),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
    )
    append_media(world.root, [record], "test")
    cache = nm.open(world.root.path)
    np.testing.assert_array_equal(cache[photo], features("b"))  # unchanged, so as recorded
    photo.write_bytes(b"c")
    np.testing.assert_array_equal(cache[photo], features("c"))
    photo.write_bytes(b"changed")
    with pytest.raises(nm.MissingFeaturesError, match="the file has changed since it was encoded"):
        cache[photo]
    other = tmp_path / "my photos" / "new.png"
    other.parent.mkdir()
    other.write_bytes(b"unknown")
    with pytest.raises(nm.MissingFeaturesError) as caught:
        cache["my photos/new.png"]
    words = shlex.split(str(caught.value).split("Encode it: ")[1])
    options = configs.parse(encode_run.Options, words[3:], prog="")
    assert options.dataset == (f"folder:{other.parent}",)
    assert str(options.features) == str(world.root.path)


def test_a_file_that_only_the_cache_names_is_not_opened(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user gives the end of a name; a stranger chose the folder."""
    photo = tmp_path / "private" / "x" / "photo.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"b")
    append_media(world.root, [MediaRecord(source=str(photo), key=key_of("a"))], "test")
    monkeypatch.chdir(world.root.path)
    cache = nm.open(world.root.path)
    np.testing.assert_array_equal(cache["x/photo.png"], features("a"))  # as recorded
    np.testing.assert_array_equal(cache[photo], features("b"))  # the user names the file itself
    remember(world.root, [photo.parent])
    cache = nm.open(world.root.path)
    np.testing.assert_array_equal(cache["x/photo.png"], features("b"))


def test_a_video_with_some_of_its_frames_is_missing(tmp_path: Path) -> None:
    world = new_world(tmp_path)
    world.write(d=[ask("1", ["video v"])])
    world.encode_videos({"video v": 60.0}, max_frames=8)
    with pytest.raises(nm.MissingFeaturesError) as caught:
        nm.open(world.root.path)["/video v.mp4"]
    assert "8 frames, but not those for at most 128" in str(caught.value)
    assert "nm.open(..., max_frames=8)" in str(caught.value)
    cache = nm.open(world.root.path, max_frames=8)
    assert cache["/video v.mp4"].shape[0] == 8
    world.encode_videos({})
    unfinished = make_space(tmp_path / "other")
    fill(unfinished, [3], array="frame", view="t:0")
    other = nm.open(tmp_path / "other")
    with pytest.raises(nm.MissingFeaturesError, match=r"encoding it did not finish. Go on: "):
        other[next(iter(other))]


def test_a_damaged_row_is_an_error(world: World) -> None:
    cache = nm.open(world.root.path)
    path = world.root.space(SPEC.name).shard("image", 0)
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"row 0 fails its checksum.*cache\.verify"):
        cache[key_of("a")]
    np.testing.assert_array_equal(cache[key_of("b")], features("b"))


def test_what_cannot_be_opened_is_said_in_terms_of_this_package(
    tmp_path: Path, world: World
) -> None:
    with pytest.raises(NotFoundError, match=r"no feature space under .*python -m encode\.run"):
        nm.open(tmp_path / "nowhere")
    make_space(world.root.path, "int8")
    with pytest.raises(
        CacheError, match=r"2 spaces under .*, say which, space=: toy-fp16-\w+ \| toy"
    ):
        nm.open(world.root.path)
    assert nm.open(world.root.path, "toy-fp16").space == SPEC.name
    with pytest.raises(NotFoundError, match="no space 'clip'"):
        nm.open(world.root.path, space="clip")
    with pytest.raises(CacheError, match=r"allow_private=True"):
        nm.open("http://10.1.2.3/features")
    with pytest.raises(ValueError, match="max_frames 0"):
        nm.open(world.root.path, max_frames=0)


def test_a_relative_folder_means_the_one_at_opening(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(world.root.path.parent)
    cache = nm.open("cache")
    monkeypatch.chdir(tmp_path / "..")
    again = pickle.loads(pickle.dumps(cache))
    assert again.where == str(world.root.path)
    np.testing.assert_array_equal(again["/a.png"], features("a"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_other_processes_read_it(cache: nm.Cache, method: str) -> None:
    read = operator.itemgetter("/a.png")  # a function of this file would import torch there
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as processes:
        found = list(processes.map(read, [cache] * 4))
    assert len(found) == 4
    assert all(np.array_equal(one, features("a")) for one in found)


def test_a_remote_cache_is_read_alike_and_asked_for_tables_once(
    world: World, tmp_path: Path
) -> None:
    share(CacheRoot(world.root.path))
    with WebServer(world.root.path) as server:
        cache = nm.open(server.url, mirror=tmp_path / "mirror")
        np.testing.assert_array_equal(cache["/a.png"], features("a"))
        assert cache["/video v.mp4"].shape[0] == 6
        before = len(server.requests)
        again = pickle.loads(pickle.dumps(cache))
        np.testing.assert_array_equal(again["/b.png"], features("b"))
        new = [path for path, _ in server.requests[before:]]
        assert all("/features/" in path for path in new), new
        with pytest.raises(nm.MissingFeaturesError, match=r"--features DIR"):
            cache["/later.png"]


def test_the_public_names_are_there() -> None:
    assert set(dir(nm)) >= set(nm._MODULE_OF)
    assert all(getattr(nm, name).__name__ == name for name in nm._MODULE_OF)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        nm.nope  # noqa: B018


def test_another_module_cache_is_named(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "cache.py").write_text("")
    code, _, error = in_process(tmp_path, "import nanomolmo2 as nm; nm.open('x')")
    assert code == 1
    assert f"{tmp_path / 'cache.py'} hides the package `cache` of nanomolmo2" in error
