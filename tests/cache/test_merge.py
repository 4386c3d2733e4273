"""A merge copies each missing row once, bit for bit, however often it is interrupted.

python -m cache.merge --source /mnt/other/cache --features cache
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache import merge
from cache.errors import CacheError, CorruptError, DiskError, InUseError
from cache.format.frame_sampling import time_view
from cache.maintenance.checks import verify
from cache.store.ledger import MediaRecord, append_media, read_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import (
    MediaRef,
    Origin,
    Sample,
    dataset_names,
    read_origin,
    read_samples,
    write_samples,
)
from cache.store.space import Space, find_space
from cache.store.writer import ShardWriter
from configs import UserError
from tests.support import encode_jobs, faults
from tests.support.encode_jobs import draw, encode
from tests.support.faults import garble, struck
from tests.support.spaces import SPEC, committed_rows, fill, key, make_space, row

pytestmark = pytest.mark.slow


A, B = Path("a"), Path("b")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- rows


def run(*argv: Any) -> int:
    sys.argv = ["cache.merge", *map(str, argv)]
    return merge.main()


def merge_b_into_a(*argv: Any) -> int:
    return run("--source", B, "--features", A, *argv)


def hash_of(folder: Path) -> str:
    report = verify(CacheRoot(folder), deep=True)
    assert not report.broken, report.all_findings
    (space,) = report.spaces
    assert space.logical_hash is not None
    return space.logical_hash


def test_two_merged_halves_equal_one_encoding_of_the_whole() -> None:
    """With real images, a real encoder and an overlap, the logical hashes are equal."""
    one, whole = Path("one"), Path("all")
    images = draw(Path("photos"), 9)
    for name, part in (("left", images[:6]), ("right", images[4:])):
        Path(name).mkdir()
        for path in part:
            shutil.copy(path, name)
    few = replace(encode_jobs.CONFIG, commit_every_s=1e9)
    encode(whole, "folder:photos", config=few)
    encode(A, "folder:left")
    encode(B, "folder:right", config=few)
    assert run("--source", A, B, "--features", one) == 0
    assert hash_of(one) == hash_of(whole)
    assert dataset_names(CacheRoot(one)) == ["left", "right"]
    again = encode(one, "folder:left", "folder:right")
    assert not again.plan.todo and again.plan.reused == 11


def columns(folder: Path, array: str) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Return (key, view) -> the commit's values of the row, without its number."""
    root = CacheRoot(folder)
    table = committed_rows(Space.open(find_space(root, None)), array).to_pylist()
    return {(r["key"].hex(), r["view"]): (r["time_s"], r["crc"], r["error"]) for r in table}


def add_video(space: Space, number: int, frames: int) -> None:
    """Write one shard with the frames of one video, each with its own time and error."""
    shard = ShardWriter(space, "frame", space.next_shard("frame"))
    for at in range(frames):
        stored = row(100 * number + at, "frame", space.spec)
        view, error = time_view(at * 500_000), 0.001 * (at + 1)
        shard.append(key(number), view, stored, time_s=at / 2 + 0.01, error=error)
    shard.commit()


def test_rows_keep_bytes_times_and_errors_and_are_stored_once() -> None:
    ours, theirs = make_space(A), make_space(B)
    fill(ours, [1, 2, 3])
    fill(theirs, [3, 4])
    fill(theirs, [5, 1, 6])
    add_video(ours, 20, 3)
    add_video(theirs, 21, 4)
    add_video(theirs, 20, 5)
    expected = {array: columns(B, array) for array in ("image", "frame")}
    for array, rows in expected.items():
        rows.update(columns(A, array))
    assert merge_b_into_a() == 0
    for array, rows in expected.items():
        assert columns(A, array) == rows
    hash_of(A)  # reads every row, and reports rows that are stored twice
    reader = FeatureReader(find_space(CacheRoot(A), None))
    assert reader.read("image", key(6)).shape == (4, 64)
    assert len(set(reader.index["frame"].shards.tolist())) <= 3


def test_the_frames_of_a_video_stay_adjacent_in_one_shard() -> None:
    make_space(A)
    theirs = make_space(B)
    for number in (20, 21, 22):
        add_video(theirs, number, 10)
    assert theirs.rows_per_shard("frame") == 16
    merge_b_into_a()
    reader = FeatureReader(find_space(CacheRoot(A), None))
    views = [time_view(at * 500_000) for at in range(10)]
    for number in (20, 21, 22):
        rows = reader.lookup_pairs("frame", [key(number)] * 10, views)
        assert (rows == rows[0] + range(10)).all() and rows[0] // 16 == rows[-1] // 16


def test_a_second_merge_copies_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fill(make_space(A), [1])
    fill(make_space(B), [2])
    for root in (A, B):
        append_media(CacheRoot(root), [MediaRecord(source=root.name, key=key(1))], "job")
        gone = MediaRecord(source="x", status="failed", stage="fetch", error=root.name)
        append_media(CacheRoot(root), [gone], "job")
        write_samples(CacheRoot(root), "d", [Sample(id="1", dataset="d", messages=())])
    states = []
    for _ in range(2):
        capsys.readouterr()
        assert merge_b_into_a() == 0
        files = [path for path in A.rglob("*") if path.is_file() and "lock" not in str(path)]
        states.append({path: path.stat().st_mtime_ns for path in files})
    assert states[0] == states[1]
    out = capsys.readouterr().out
    assert "0 of 1 rows to copy (0 B)" in out
    assert "0 new; 0 that failed here and came there; 0 newer failures" in out
    assert out.endswith("0 rows, 0 media, 0 data sets\n")


def test_a_plan_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fill(make_space(B), [2])
    assert merge_b_into_a("--plan") == 0
    assert "1 of 1 rows to copy (264 B)" in capsys.readouterr().out
    assert not A.exists()


def test_the_shard_size_may_differ() -> None:
    fill(make_space(A), [1])
    other = Space.create(CacheRoot(B), SPEC, {}, shard_bytes=16 * SPEC.row_bytes("image"))
    fill(other, range(10, 23))
    merge_b_into_a()
    assert len(columns(A, "image")) == 14
    hash_of(A)


def test_damaged_rows_are_reported_and_not_copied(capsys: pytest.CaptureFixture[str]) -> None:
    fill(make_space(A), [1])
    theirs = make_space(B)
    fill(theirs, [2, 3, 4])
    damage = theirs.paths.shard("image", 0), theirs.info.geometry("image").row_offset(1)
    garble(*damage)
    assert merge_b_into_a() == 1
    out = capsys.readouterr().out
    assert "1 damaged rows were not copied" in out and "row 1 fails its checksum" in out
    assert set(columns(A, "image")) == {(key(n), "full") for n in (1, 2, 4)}
    hash_of(A)
    garble(*damage)  # a second time restores the bytes
    assert merge_b_into_a() == 0
    assert (key(3), "full") in columns(A, "image")


def test_rows_that_differ_between_machines_keep_the_local_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = make_space(A), make_space(B)
    fill(ours, [1, 2])
    shard = ShardWriter(theirs, "image", 0)
    shard.append(key(1), "full", row(7))
    shard.commit()
    before = columns(A, "image")
    merge_b_into_a()
    assert "1 are here with other bytes, which are kept" in capsys.readouterr().out
    assert columns(A, "image") == before


# ---- interrupted


def test_a_merge_killed_at_any_system_call_can_be_repeated(tmp_path: Path) -> None:
    fill(make_space(tmp_path / "cache"), [1, 2])
    theirs = make_space(B)
    fill(theirs, [2, 3, 4, 5])
    fill(theirs, [6])
    append_media(CacheRoot(B), [MediaRecord(source="s", key=key(3))], "job")
    write_samples(CacheRoot(B), "d", [Sample(id="1", dataset="d", messages=())])
    shutil.copytree(tmp_path / "cache", tmp_path / "whole")
    faults.merge_other(CacheRoot(tmp_path / "whole"), [])
    wanted = hash_of(tmp_path / "whole")
    copies = struck(tmp_path, "merge", "kill")
    assert len(copies) > 25
    for copy in copies:
        folder = Path(copy["folder"])
        known = columns(folder, "image")
        assert {(key(1), "full"), (key(2), "full")} <= set(known), copy
        faults.merge_other(CacheRoot(folder), [])
        reader = FeatureReader(find_space(CacheRoot(folder), None))
        assert reader.logical_hash() == wanted and reader.rows("image") == 6, copy
        assert read_media(CacheRoot(folder))["s"].key == key(3)
        assert dataset_names(CacheRoot(folder)) == ["d"]


# ---- media


def merged_media(ours: list[MediaRecord], theirs: list[MediaRecord]) -> dict[str, MediaRecord]:
    for folder, records in ((A, ours), (B, theirs)):
        make_space(folder)
        for record in records:
            append_media(CacheRoot(folder), [record], "job")
    merge_b_into_a()
    return read_media(CacheRoot(A))


def ok(source: str, number: int, **more: Any) -> MediaRecord:
    return MediaRecord(source=source, key=key(number), **more)


def bad(source: str, error: str, **more: Any) -> MediaRecord:
    return MediaRecord(source=source, status="failed", stage="fetch", error=error, **more)


def test_a_success_replaces_a_failure_and_never_the_reverse() -> None:
    ours = [ok("both", 1, width=3), bad("revived", "404"), ok("kept", 2), bad("newer", "old")]
    theirs = [ok("both", 1, width=4), ok("revived", 5), bad("kept", "gone"), ok("new", 6)]
    append_media(CacheRoot(B), [bad("older", "old")], "job")
    merged = merged_media([*ours, bad("older", "new")], [*theirs, bad("newer", "new")])
    assert merged["both"].width == 3
    assert (merged["revived"].status, merged["revived"].key) == ("ok", key(5))
    assert (merged["kept"].status, merged["kept"].key) == ("ok", key(2))
    assert merged["new"] == ok("new", 6)
    assert merged["newer"].error == merged["older"].error == "new"


def test_merging_in_both_directions_repeatedly_adds_nothing() -> None:
    merged_media([bad("s", "ours"), ok("t", 1)], [bad("s", "theirs"), bad("t", "404")])
    for source, target in ((A, B), (B, A), (A, B)):
        run("--source", source, "--features", target)
        assert [len(list((folder / "media").iterdir())) for folder in (A, B)] == [3, 3]
    tables = [read_media(CacheRoot(folder)) for folder in (A, B)]
    assert tables[0] == tables[1]
    assert (tables[0]["s"].error, tables[0]["t"].status) == ("theirs", "ok")


def test_a_source_with_other_bytes_is_reported_and_keeps_its_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = "https://a.example/1.jpg"
    merged = merged_media([ok(url, 1)], [ok(url, 2)])
    assert merged[url].key == key(1)
    out = capsys.readouterr().out
    assert "1 gave other bytes there: the records here are kept" in out
    assert f"{url}: {key(1)[:12]}... here, {key(2)[:12]}... there" in out


def test_a_failed_source_keeps_its_key_when_the_other_has_other_bytes() -> None:
    merged = merged_media([ok("s", 1), bad("s", "404")], [ok("s", 2)])
    assert (merged["s"].status, merged["s"].key) == ("failed", key(1))
    for folder in (A, B):
        shutil.rmtree(folder)
    merged = merged_media([ok("s", 1), bad("s", "404")], [ok("s", 1)])
    assert (merged["s"].status, merged["s"].key) == ("ok", key(1))


# ---- samples


def sample(name: str, *sources: str) -> Sample:
    media = tuple(MediaRef(source=source) for source in sources)
    return Sample(id=name, dataset="d", messages=(), media=media)


def test_differing_samples_are_refused_without_the_option() -> None:
    root = CacheRoot(A)

    def make() -> None:
        shutil.rmtree(A, ignore_errors=True)
        fill(make_space(A), [1])
        write_samples(root, "d", [sample("1", "x"), sample("2", "ours")])

    fill(make_space(B), [2])
    write_samples(CacheRoot(B), "d", [sample("2", "theirs"), sample("3", "y")])
    make()
    with pytest.raises(CacheError, match=r"d: the samples .*--samples ours \| theirs \| both"):
        merge_b_into_a()
    assert len(columns(A, "image")) == 1  # refused before anything was written
    for choice, wanted in (("ours", "1x 2ours"), ("theirs", "2theirs 3y"), ("both", "1x 2ours 3y")):
        make()
        for _ in range(2):
            assert merge_b_into_a("--samples", choice) == 0
            found = [f"{s.id}{s.media[0].source}" for s in read_samples(root, "d")]
            assert found == wanted.split()
        assert len(columns(A, "image")) == 2


def test_merged_samples_say_where_they_came_from() -> None:
    for path, name in ((A, "ours"), (B, "theirs")):
        fill(make_space(path), [1])
        origin = Origin(words=("--dataset", f"d=folder:/{name}"), said=f"d: {name}")
        write_samples(CacheRoot(path), "d", [sample(name)], origin)
        write_samples(CacheRoot(path), name, [sample(name)], origin)
    assert merge_b_into_a("--samples", "both") == 0
    both, copied = (read_origin(CacheRoot(A), dataset) for dataset in ("d", "theirs"))
    assert both is not None and copied is not None
    assert both.words == ("--dataset", "d=folder:/ours")
    assert both.said.startswith("d: ours; and samples of ") and both.said.endswith(str(B))
    assert (copied.words, copied.said) == (("--dataset", "d=folder:/theirs"), "d: theirs")


def test_a_damaged_data_set_is_not_copied() -> None:
    make_space(A)
    make_space(B)
    root = CacheRoot(B)
    write_samples(root, "d", [sample("1")])
    garble(root.samples("d"), 40)
    with pytest.raises(CorruptError, match="its bytes do not match its seal"):
        merge_b_into_a()
    assert dataset_names(CacheRoot(A)) == []


# ---- refused


def test_impossible_merges_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_space(A)
    fill(make_space(B), [1])
    with pytest.raises(UserError, match="is the cache to merge into"):
        run("--source", A, "--features", A)
    with pytest.raises(UserError, match=r"no cache at .*looked for spaces/ and samples/"):
        run("--source", tmp_path / "none", "--features", A)
    with DriverLock(ours.paths, "job 7"), pytest.raises(InUseError, match="being written by job 7"):
        merge_b_into_a()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("configs.console.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"the merge needs .* where 1 kB are free"):
        merge_b_into_a()
    assert columns(A, "image") == {}


def test_a_full_disk_is_one_line_and_the_next_run_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(make_space(A), [1])
    theirs = make_space(B)
    fill(theirs, [2, 3, 4, 5])
    fill(theirs, [6, 7])
    real, calls = os.pwritev, itertools.count(1)

    def pwritev(*args: Any) -> int:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(DiskError, match=r"disk full .*everything committed is kept"),
    ):
        patch.setattr(os, "pwritev", pwritev)
        merge_b_into_a()
    assert len(columns(A, "image")) in (1, 5)
    merge_b_into_a()
    assert len(columns(A, "image")) == 7
    hash_of(A)
