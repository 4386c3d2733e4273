"""After a fault at any system call the space is valid and nothing committed is lost; the next job goes on.

Every call is tried, with every kind of fault: see `tests.support.faults`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.errors import CorruptError
from cache.maintenance.checks import check_commits, verify
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from tests.support import faults
from tests.support.faults import CALLS, FAULTS, FINISHED, REFUSED, garble, struck, write
from tests.support.spaces import fill, key, make_space, row


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: thousands of fsyncs take minutes on a busy disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def good_rows(paths: SpacePaths) -> set[int]:
    """Numbers of the images whose rows a checked read returns; what it returns is what was written."""
    reader, found = FeatureReader(paths), set()
    out = np.empty((1, reader.spec.row_bytes("image")), np.uint8)
    for number in range(20):
        rows = reader.lookup("image", [key(number)])
        if rows[0] < 0:
            continue
        with contextlib.suppress(CorruptError):
            reader.read_into("image", rows, out)
            assert out.tobytes() == row(number).tobytes()
            found.add(number)
    return found


@pytest.mark.soak_counted
def test_a_fault_at_any_call_of_a_write_leaves_a_valid_space(
    folder: Path, soak: Callable[[int, int], int]
) -> None:
    space = make_space(folder / "cache")
    fill(space, [1, 2])
    space.grow("image")
    shutil.rmtree(space.paths.array("frame"))  # as if creation, too, had died half-way
    shutil.copytree(folder / "cache", folder / "whole")
    write(CacheRoot(folder / "whole"), [])
    whole = FeatureReader(folder / "whole" / "spaces" / space.paths.name).logical_hash()
    faults = list(FAULTS)[: soak(2, len(FAULTS))]
    seen: dict[str, list[int]] = {fault: [] for fault in faults}
    copies = struck(folder, "write", *faults)
    for copy in copies:
        root = CacheRoot(Path(copy["folder"]))
        rows = good_rows(root.space(space.paths.name))
        assert {1, 2} <= rows, copy
        assert {int(number) for number in copy["said"]} <= rows, "said to be committed, and is not"
        seen[copy["fault"]].append(len(rows))
        if copy["fault"] == "kill":
            assert len(rows) in (2, 6, 7), "a shard is there or not"
        elif copy["fault"] == "short":
            assert (copy["code"], len(rows)) == (FINISHED, 7), "a short write is continued"
        elif copy["fault"] == "stays full":
            assert copy["code"] == REFUSED, "a full disk ends a job"
        write(root, [])  # the next job
        report = verify(root, deep=True)
        assert not report.broken, copy
        assert report.spaces[0].logical_hash == whole, copy
    print(f"{len(copies)} faults at the calls of a write: {', '.join(faults)}")
    killed_at = {copy["call"] for copy in copies if copy["fault"] == "kill"}
    assert killed_at == set(CALLS) - {"pwrite", "unlink", "rmdir"}, "those are for what went wrong"
    assert {copy["call"] for copy in copies if copy["fault"] == "short"} == {"write", "pwritev"}
    assert seen["kill"] == sorted(seen["kill"]), "once visible, always visible"
    assert set(seen["kill"]) == {2, 6, 7}


@pytest.mark.soak_counted
def test_an_interrupted_repair_loses_no_intact_row(
    folder: Path, soak: Callable[[int, int], int]
) -> None:
    space = make_space(folder / "cache")
    paths = space.paths
    for numbers in ([0, 1, 2], [3, 4], [5, 6]):
        fill(space, numbers)
    space.grow("image")
    garble(paths.shard("image", 0), 300)  # of the second row
    garble(paths.commit("image", 1), 100)
    intact = {0, 2, 5, 6}
    copies = struck(folder, "repair", *list(FAULTS)[: soak(1, len(FAULTS))])
    for copy in copies:
        root = CacheRoot(Path(copy["folder"]))
        here = root.space(paths.name)
        space = Space.open(here)
        commits, _ = check_commits(here, space.info, "image", lambda _: None)
        kept = {k.hex() for commit in commits for k in commit.table["key"].to_pylist()}
        assert {key(n) for n in intact} <= kept, copy
        faults.repair(root, [])  # again, undisturbed
        assert good_rows(here) == intact, copy
        report = verify(root, deep=True)
        assert not report.broken, copy
        assert report.spaces[0].rows == {"image": len(intact), "frame": 0}, copy
    print(f"{len(copies)} faults at the calls of a repair")


def again(space: Space, numbers: list[int], *, new: set[int]) -> None:
    """One more shard with these images; all but `new` have bytes that must never count."""
    writer = ShardWriter(space, "image", space.next_shard("image"))
    for number in numbers:
        writer.append(key(number), "full", row(number if number in new else number + 100))
    writer.commit()


@pytest.mark.soak_counted
def test_an_interrupted_removal_loses_no_mentioned_row(
    folder: Path, soak: Callable[[int, int], int]
) -> None:
    root = CacheRoot(folder / "cache")
    space = make_space(folder / "cache")
    for numbers in ([0, 1, 2], [3, 4], [5, 6], [7]):
        fill(space, numbers)
    for numbers in ([0, 3], [8, 9, 6]):  # a worker was frozen, and committed 0, 3 and 6 again
        again(space, numbers, new={8, 9})
    space.grow("image")
    append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(10)], "job")
    mentioned = {0, 2, 4, 5, 6, 8, 9}  # the shard of 5 and 6 stays as it is; 7's goes
    refs = tuple(MediaRef(source=str(n)) for n in sorted(mentioned))
    write_samples(root, "toy", [Sample(id="0", dataset="toy", messages=(), media=refs)])
    untouched = space.paths.shard("image", 2).read_bytes()
    copies = struck(folder, "gc", *list(FAULTS)[: soak(1, len(FAULTS))])
    for copy in copies:
        root = CacheRoot(Path(copy["folder"]))
        here = root.space(space.paths.name)
        assert mentioned <= good_rows(here), copy
        doubled = FeatureReader(here).index["image"].doubled
        assert len(doubled) <= 3, "none becomes one"
        faults.collect(root, [])  # again, undisturbed
        assert good_rows(here) == mentioned, copy
        report = verify(root, deep=True)
        assert report.all_findings == [], copy
        assert here.shard("image", 2).read_bytes() == untouched
    print(f"{len(copies)} faults at the calls of a collection")
