"""`cache.verify` finds every flipped byte of a cache, and reports nothing in an intact one.

python -m cache.verify --deep
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cache import verify as cache_verify
from cache.errors import CorruptError
from cache.maintenance.checks import Report, verify
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.samples import write_samples
from cache.store.writer import ShardWriter
from tests.support import faults
from tests.support.spaces import fill, key, make_space, row

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path: Path) -> CacheRoot:
    """Return a space with two shards of images and one of frames, with samples and media."""
    space = make_space(tmp_path)
    fill(space, [0, 1])
    fill(space, [2])
    fill(space, [0], array="frame")
    space.grow("image")
    space.grow("frame")
    root = CacheRoot(tmp_path)
    write_samples(root, "toy", [])
    append_media(root, [MediaRecord(source="a", key=key(0))], "job")
    return root


def broken(report: Report) -> list[str]:
    return [finding.path for finding in report.all_findings if finding.broken]


def flip(path: Path, at: int) -> None:
    """Flip one bit of byte `at`; a second time restores it."""
    faults.flip(path, 8 * at + at % 8)


def only_space(root: CacheRoot) -> SpacePaths:
    return root.space(root.space_names()[0])


@pytest.mark.soak_counted
def test_any_flipped_byte_is_found_and_not_returned(
    root: CacheRoot, soak: Callable[[int, int], int]
) -> None:
    """Flip some bytes of each file; `make soak` flips every one."""
    paths = only_space(root)
    clean = FeatureReader(paths).logical_hash()
    stride = soak(97, 1)
    files = [path for path in sorted(root.path.rglob("*")) if path.is_file()]
    assert len(files) == 12
    for path in files:
        size = path.stat().st_size
        for at in {*range(0, size, stride), size - 1}:
            flip(path, at)
            report = verify(root, deep=True)
            assert broken(report) == [str(path)], f"byte {at}"
            assert (report.spaces[0].logical_hash is None) == path.is_relative_to(paths.root)
            try:
                assert FeatureReader(paths).logical_hash() == clean
            except CorruptError as error:
                assert error.path == path
            flip(path, at)
    assert verify(root, deep=True).all_findings == []


def test_the_quick_check_finds_wrong_files_and_sizes(root: CacheRoot) -> None:
    paths = only_space(root)
    shard = paths.shard("image", 0)
    flip(shard, 0)
    assert broken(verify(root)) == [], "a row: only deep reads those"
    flip(shard, shard.stat().st_size - 1)
    assert broken(verify(root)) == [str(shard)], "the index"
    with shard.open("ab") as file:
        file.write(b"x")
    assert broken(verify(root)) == [str(shard)], "the size"
    shard.unlink()
    assert broken(verify(root)) == [str(shard)], "gone"
    for path in (paths.array_json("frame"), paths.group_json, paths.space_json):
        path.unlink()
        assert str(path) in broken(verify(root))


def test_an_intact_file_in_the_wrong_place_is_found(root: CacheRoot) -> None:
    paths = only_space(root)
    shutil.copy(paths.array_json("frame"), paths.array_json("image"))
    shutil.copy(paths.commit("frame", 0), paths.commit("image", 0))
    wrong = [paths.commit("image", 0), paths.array_json("image")]
    assert broken(verify(root)) == list(map(str, wrong))


def test_rows_that_are_stored_twice_are_a_note(root: CacheRoot) -> None:
    space = make_space(root.path)
    expected = FeatureReader(space.paths).logical_hash()
    again = fill(space, [1, 2])
    space.grow("image")
    for deep in (False, True):
        report = verify(root, deep=deep)
        assert not report.broken
        (finding,) = report.all_findings
        assert finding.path == str(space.paths.shard("image", again))
        assert finding.what == (
            "2 of its rows are in older shards, too, and count once there "
            f"(row 8 first: {key(1)} full is row 1)"
        )
        assert "cache.gc --delete" in finding.way_out
        assert report.spaces[0].rows == {"image": 3, "frame": 1}
    assert report.spaces[0].logical_hash == expected


def test_files_left_by_a_crash_are_notes(root: CacheRoot) -> None:
    space = make_space(root.path)
    begun = ShardWriter(space, "image", 2)
    begun.append(key(9), "full", row(9))
    fill(space, [8])
    space.paths.commit("image", 3).unlink()
    (root.media_dir / "part-1.parquet.abcd.partial").write_bytes(b"")
    (space.paths.commits_dir / "README").write_text("mine")
    (root.spaces_dir / "begun").mkdir()
    report = verify(root, deep=True)
    assert not report.broken
    assert [(Path(f.path).name, f.what) for f in report.all_findings] == [
        ("part-1.parquet.abcd.partial", "was never finished"),
        ("README", "is no file of ours"),
        ("0.partial", "was never finished"),
        ("0", "no commit names it"),
    ]
    assert report.spaces[1].logical_hash


def test_the_command_prints_one_line_for_each_finding_and_exits_with_1(
    root: CacheRoot, run_command: Callable[..., tuple[int, str]]
) -> None:
    run = partial(run_command, cache_verify, "--features", root.path)
    paths = only_space(root)
    intact = f"{paths.name}: 3 image rows, 1 frame rows, 1.27 kB: intact\n"
    expected = FeatureReader(paths).logical_hash()
    assert run() == (0, intact)
    assert run("--deep") == (0, f"{intact}logical hash: {expected}\n")
    flip(paths.shard("image", 1), 0)
    code, out = run("--deep", "--space", "toy")
    assert code == 1
    assert out.splitlines()[0].startswith(
        f"BROKEN: {paths.shard('image', 1)}: 1 of 1 rows fail their checksum (row 4 first); "
    )
    assert "logical hash" not in out
    code, out = run("--deep", "--json")
    values = json.loads(out)
    assert (code, values["broken"]) == (1, True)
    assert values["spaces"][0]["rows"] == {"image": 3, "frame": 1}
    assert values["spaces"][0]["findings"][0]["path"] == str(paths.shard("image", 1))
