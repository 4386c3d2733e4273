"""`cache.gc` removes what nothing refers to, and nothing else."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache import gc
from cache.damage import verify
from cache.layout import CacheRoot
from cache.locks import DriverLock
from cache.reader import FeatureReader
from cache.tables import MediaRecord, MediaRef, Sample, append_media, write_samples
from cache.writer import ShardWriter, Space
from configs import UserError
from tests.toy_space import fill, key, make_space, row

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def run_gc(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cache.gc", "--features", str(tmp_path), *argv])
        gc.main()
        return capsys.readouterr().out

    return run_gc


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """Shard 0 committed, 1 begun, 2 finished but not committed, 3 committed."""
    space = make_space(tmp_path)
    fill(space, [0, 1])
    ShardWriter(space, "picture", 1).append(key(9), "full", row(9))
    fill(space, [8])
    space.paths.commit("picture", 2).unlink()
    fill(space, [2])
    space.grow("picture")
    return space


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and "locks" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_dry_by_default(space: Space, tmp_path: Path, run: Run) -> None:
    before = files(tmp_path)
    lines = run().splitlines()
    shards = space.paths.shards_dir("picture")
    assert lines[:3] == [
        f"{shards / '1'}: shard, never committed, 268 B",
        f"{shards / '2'}: shard, never committed, 336 B",
        "to remove: 2 (604 B); do it: python -m cache.gc --delete",
    ]
    assert files(tmp_path) == before


def test_only_garbage_goes(space: Space, tmp_path: Path, run: Run) -> None:
    media, samples = tmp_path / "media", tmp_path / "samples" / "toy"
    root = CacheRoot(tmp_path)
    write_samples(root, "toy", [])
    append_media(root, [MediaRecord(source="a", key=key(0))], "job")
    clean = files(tmp_path)
    partial = [
        media / "part-1-x.parquet.0a.partial",
        samples / "part-00000.parquet.0b.partial",
        space.paths.root / "space.json.0c.partial",
        space.paths.commits_dir / "picture-00000004.parquet.0d.partial",
        space.paths.array("frame") / "zarr.json.0e.partial",
    ]
    for path in partial:
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 7200,) * 2)
    young = media / "part-2-x.parquet.0f.partial"
    young.write_bytes(b"x")
    logical_hash = FeatureReader(space.paths).logical_hash()
    out = run("--delete")
    assert "removed: 7 (609 B)" in out
    garbage = [name for name in clean if "/c/1/" in name or "/c/2/" in name]
    assert len(garbage) == 2
    expected = {name: data for name, data in clean.items() if name not in garbage}
    assert files(tmp_path) == {**expected, str(young.relative_to(tmp_path)): b"x"}
    assert not space.paths.shard("picture", 1).parent.parent.exists()
    assert FeatureReader(space.paths).logical_hash() == logical_hash
    young.unlink()
    assert verify(root, deep=True).all_findings == []
    assert "removed: 0 (0 B)" in run("--delete")
    assert space.next_shard("picture") == 4


def test_refused_while_a_job_writes(space: Space, tmp_path: Path, run: Run) -> None:
    before = files(tmp_path)
    with DriverLock(space.paths, "job 7"):
        for argv in ((), ("--delete",)):
            with pytest.raises(UserError, match="being written by job 7"):
                run(*argv)
    assert files(tmp_path) == before


def test_refused_when_the_commits_are_gone(space: Space, tmp_path: Path, run: Run) -> None:
    """A commits folder moved away would make every shard look like garbage."""
    shutil.move(space.paths.commits_dir, tmp_path / "elsewhere")
    before = files(tmp_path)
    for argv in ((), ("--delete",)):
        with pytest.raises(UserError, match="commits is missing"):
            run(*argv)
    assert files(tmp_path) == before


def test_rows_no_sample_mentions_are_counted_and_kept(
    space: Space, tmp_path: Path, run: Run
) -> None:
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(3)], "job")
    mentioned = Sample(id="0", dataset="toy", messages=(), media=(MediaRef(source="2"),))
    write_samples(root, "toy", [mentioned])
    line = f"{space.paths.name}: no sample mentions 2 picture rows (536 B); kept"
    assert run("--delete").splitlines()[-1] == line
    assert space.keys("picture") == {(key(n), "full") for n in range(3)}
