"""`cache.gc` removes garbage and nothing else.

python -m cache.gc                           # list it
python -m cache.gc --delete                  # remove it
python -m cache.gc --unreferenced --delete   # and rows that no sample refers to
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache import gc
from cache.errors import CacheError, CorruptError, DiskError, InUseError
from cache.maintenance.checks import verify
from cache.store import index_file
from cache.store.ledger import MediaRecord, append_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import UserError
from tests.support.faults import garble
from tests.support.spaces import fill, key, make_space, row

pytestmark = pytest.mark.slow


Run = Callable[..., str]


@pytest.fixture
def run(run_command: Callable[..., tuple[None, str]], tmp_path: Path) -> Run:
    return lambda *words: run_command(gc, "--features", tmp_path, *words)[1]


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """Return a space whose shards 0 and 3 are committed, 1 is unfinished, and 2 lacks its commit."""
    space = make_space(tmp_path)
    fill(space, [0, 1])
    ShardWriter(space, "image", 1).append(key(9), "full", row(9))
    fill(space, [8])
    space.paths.commit("image", 2).unlink()
    fill(space, [2])
    space.grow("image")
    return space


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and "locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_nothing_is_removed_by_default(space: Space, tmp_path: Path, run: Run) -> None:
    before = files(tmp_path)
    lines = run().splitlines()
    shards = space.paths.shards_dir("image")
    assert [*lines[:2], lines[-1]] == [
        f"{shards / '1'}: shard, never committed, 268 B",
        f"{shards / '2'}: shard, never committed, 336 B",
        "would be freed: 604 B; do it: the same command with --delete",
    ]
    assert files(tmp_path) == before


def test_delete_removes_garbage_and_nothing_else(space: Space, tmp_path: Path, run: Run) -> None:
    media, root = tmp_path / "media", CacheRoot(tmp_path)
    write_samples(root, "toy", [])
    append_media(root, [MediaRecord(source="a", key=key(0))], "job")
    clean = files(tmp_path)
    for path in (
        media / "part-1-x.parquet",
        tmp_path / "samples" / "toy" / "part-00000.parquet",
        space.paths.root / "space.json",
        space.paths.commits_dir / "image-00000004.parquet",
        space.paths.array("frame") / "zarr.json",
    ):
        partial = path.with_name(f"{path.name}.0a.partial")
        partial.write_bytes(b"x")
        os.utime(partial, (time.time() - 7200,) * 2)
    young = media / "part-2-x.parquet.0f.partial"
    young.write_bytes(b"x")
    logical_hash = FeatureReader(space.paths).logical_hash()
    out = run("--delete")
    assert "freed: 609 B" in out
    garbage = [name for name in clean if "/c/1/" in name or "/c/2/" in name]
    assert len(garbage) == 2
    expected = {name: data for name, data in clean.items() if name not in garbage}
    assert files(tmp_path) == {**expected, str(young.relative_to(tmp_path)): b"x"}
    assert not space.paths.shard("image", 1).parent.parent.exists()
    assert FeatureReader(space.paths).logical_hash() == logical_hash
    young.unlink()
    assert verify(root, deep=True).all_findings == []
    assert "freed: 0 B" in run("--delete")
    assert space.next_shard("image") == 4


@pytest.mark.parametrize("argv", [(), ("--delete",)])
def test_it_refuses_while_a_job_writes_or_without_commits(
    space: Space, tmp_path: Path, run: Run, argv: tuple[str, ...]
) -> None:
    """Without the commits folder every shard would look like garbage."""
    shards = files(space.paths.shards_dir("image"))
    refused = pytest.raises((UserError, CacheError), match="being written by job 7")
    with DriverLock(space.paths, "job 7"), refused:
        run(*argv)
    shutil.move(space.paths.commits_dir, tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="commits is missing"):
        run(*argv)
    assert files(space.paths.shards_dir("image")) == shards


def test_unreferenced_rows_are_counted_and_kept(space: Space, tmp_path: Path, run: Run) -> None:
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(3)], "job")
    mentioned = Sample(id="0", dataset="toy", messages=(), media=(MediaRef(source="2"),))
    write_samples(root, "toy", [mentioned])
    out = run("--delete")
    assert f"{space.paths.name}: no sample refers to 2 image rows (604 B in 1 shards); kept" in out
    assert space.keys("image") == {(key(n), "full") for n in range(3)}


# ---- rows that no sample refers to


@pytest.fixture
def crowded(tmp_path: Path) -> Space:
    """Return shards of images (0 1 2 3) (4 5) (6) (7 8) (9), frames of 0 and 4; samples use 0 2 5 7 8."""
    space = make_space(tmp_path)
    for numbers in ([0, 1, 2, 3], [4, 5], [6], [7, 8], [9]):
        fill(space, numbers)
    fill(space, [0, 4], array="frame", view="t:0")
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(9)], "job")
    refs = tuple(MediaRef(source=str(n)) for n in (0, 2, 5, 7))
    by_hash = MediaRef(source="never fetched", sha256=key(8))
    write_samples(root, "toy", [Sample(id="0", dataset="toy", messages=(), media=(*refs, by_hash))])
    space.grow("image")
    space.grow("frame")
    return space


def test_removing_unreferenced_rows_keeps_the_others_bit_for_bit(
    crowded: Space, tmp_path: Path, run: Run
) -> None:
    paths = crowded.paths
    kept = (paths.shard("image", 3), paths.commit("image", 3))
    untouched = [path.read_bytes() for path in kept]
    (paths.root / "index").mkdir()  # derived from the commits
    (paths.root / "index" / "snapshot").write_bytes(b"old")
    alone = make_space(tmp_path / "alone")
    for number in (0, 2, 5, 7, 8):
        fill(alone, [number])
    fill(alone, [0], array="frame", view="t:0")
    before = files(paths.root)
    dry = run("--unreferenced")
    assert files(paths.root) == before
    assert "no sample refers to 5 image rows" in dry
    out = run("--unreferenced", "--delete")
    assert FeatureReader(paths).logical_hash() == FeatureReader(alone.paths).logical_hash()
    assert [path.read_bytes() for path in kept] == untouched
    assert paths.committed("image") == [3, 5], "what is left of three shards fits into one"
    assert paths.committed("frame") == [1]
    assert not (paths.root / "index").exists()
    assert verify(CacheRoot(tmp_path), deep=True).all_findings == []
    text = out.splitlines()[-1]
    said = float(text.split()[1]) * (1000 if "kB" in text else 1)
    sizes = [
        sum(len(data) for name, data in content.items() if "/c/" in name)
        for content in (before, files(paths.root))
    ]
    assert said == pytest.approx(sizes[0] - sizes[1], abs=10), "bytes freed, without the commits"
    assert "freed: 0 B" in run("--unreferenced", "--delete")


def test_a_rewrite_that_fails_changes_nothing(
    crowded: Space, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logical_hash = FeatureReader(crowded.paths).logical_hash()
    before = files(crowded.paths.root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DiskError, match=r"disk full \(.*is kept: free some space"):
            run("--unreferenced", "--delete")
    assert files(crowded.paths.root) == before
    garble(crowded.paths.shard("image", 0), 5)  # a row that is to be kept
    with pytest.raises(CorruptError, match=r"c/0/0/0: row 0 fails its checksum; .* --repair"):
        run("--unreferenced", "--delete")
    garble(crowded.paths.shard("image", 0), 5)
    assert files(crowded.paths.root) == before
    assert FeatureReader(crowded.paths).logical_hash() == logical_hash


def test_the_index_file_is_written_again_after_rows_were_removed(
    crowded: Space, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "WORTH_COMMITS", 1)
    index_file.save_index(crowded.paths, crowded.info)
    run("--unreferenced", "--delete")
    path = crowded.paths.index("image")
    assert path.exists()
    assert verify(CacheRoot(crowded.paths.root.parents[1]), deep=True).all_findings == []
    assert len(FeatureReader(crowded.paths).index["image"]) == 5


def test_unreferenced_refuses_without_intact_samples(
    crowded: Space, tmp_path: Path, run: Run
) -> None:
    before = files(crowded.paths.root)
    samples = CacheRoot(tmp_path).samples("toy")
    garble(samples, 40)
    with pytest.raises(CorruptError, match=r"part-00000\.parquet: its bytes do not match"):
        run("--unreferenced", "--delete")
    aside = CacheRoot(tmp_path).damaged_dir / "samples" / "toy"
    aside.mkdir(parents=True)
    samples.rename(aside / samples.name)
    with pytest.raises(UserError, match="no samples under"):
        run("--unreferenced", "--delete")
    write_samples(CacheRoot(tmp_path), "other", [])
    with pytest.raises(UserError, match="rows in use may look unreferenced"):
        run("--unreferenced", "--delete")
    assert "1 files that cache.verify --repair set aside; kept" in run("--delete")
    assert "1 files that cache.verify --repair set aside, " in run("--damaged", "--delete")
    assert not (tmp_path / "damaged").exists()
    assert files(crowded.paths.root) == before


def test_replaced_shards_are_removed_oldest_first(space: Space, run: Run) -> None:
    for replaces, numbers in (((0,), [1, 4]), ((4, 3), [1])):
        writer = ShardWriter(space, "image", space.next_shard("image"))
        for number in numbers:
            writer.append(key(number), "full", row(number))
        writer.commit(replaces=replaces)
    lines = run().splitlines()
    what = "shard, replaced by a newer one"
    assert [line.split("/")[-1].split(":")[0] for line in lines if what in line] == ["0", "3", "4"]
    run("--delete")
    assert space.paths.committed("image") == [5]
    assert space.keys("image") == {(key(1), "full")}


# ---- whole spaces


def test_a_space_is_dropped_by_its_full_name_only(crowded: Space, tmp_path: Path, run: Run) -> None:
    other = make_space(tmp_path, "fp16")
    fill(other, [0, 2])
    name, before = crowded.paths.name, files(tmp_path)
    for more in ((), ("--delete",)):
        with pytest.raises(UserError, match=r"no space 'toy-int8' .*takes the full name"):
            run("--drop-space", "toy-int8", *more)
    out = run("--drop-space", name)
    assert "10 image rows, 2 frame rows" in out
    # One media item of the sample has no features.
    assert "toy: 0.0% of 1 samples; without it 0.0%" in out
    assert "would be freed: " in out
    assert files(tmp_path) == before
    with DriverLock(other.paths, "job 7"), pytest.raises(InUseError, match="by job 7"):
        run("--drop-space", name, "--delete")
    assert files(tmp_path) == before
    run("--drop-space", name, "--delete")
    kept = {n: data for n, data in before.items() if name not in n}
    assert files(tmp_path) == kept


def test_an_interrupted_drop_is_finished_by_the_next_run(
    crowded: Space, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            run("--drop-space", crowded.paths.name, "--delete")
    assert CacheRoot(tmp_path).space_names() == []
    assert not verify(CacheRoot(tmp_path)).broken
    assert "half removed" in run("--delete")
    assert list((tmp_path / "garbage").iterdir()) == []
