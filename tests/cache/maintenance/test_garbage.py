"""Rows that are stored twice count once everywhere, and `cache.gc` removes those that do not count.

python -m cache.gc --delete
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanomolmo2 as nm
from cache import convert, gc, ls, merge
from cache.errors import CorruptError
from cache.export.rows import unique_rows
from cache.format.spec import ARRAYS
from cache.maintenance.checks import verify
from cache.maintenance.garbage import find_garbage, remove
from cache.maintenance.inventory import open_spaces
from cache.store import index_file
from cache.store.commits import read_commit
from cache.store.index_file import save_index
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, write_samples
from cache.store.space import Space
from cache.store.writer import ShardWriter
from cache.view.sampling import choose, sample_rows
from tests.support.faults import garble
from tests.support.spaces import SLOTS, fill, key, make_space, row

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[None, str]]
Identity = tuple[str, int, str]
"""Array, number of the media item, view."""
Stored = dict[Identity, bytes]
"""The rows that count."""

IMAGES = [("image", n, view) for n in range(4) for view in ("full", "crop:0,0,1,1")]
FRAMES = [("frame", n, f"t:{us}") for n in range(2) for us in (0, 500_000, 1_000_000)]


def begin(space: Space, identities: list[Identity]) -> ShardWriter:
    """A shard that is not committed yet. No two shards have equal bytes."""
    array = identities[0][0]
    number = space.next_shard(array)
    writer = ShardWriter(space, array, number)
    for at, (_, item, view) in enumerate(identities):
        time_s = int(view[2:]) / 1e6 if array == "frame" else None
        writer.append(key(item), view, row(1000 * number + at, array), time_s=time_s, error=0.005)
    return writer


def counting(space: Space) -> Stored:
    """The rows that count, found without an index: of each (key, view) the one in the first commit."""
    numbers = {key(n): n for n in range(10)}
    found: Stored = {}
    for array in ARRAYS:
        for number in space.paths.committed(array):
            data = space.paths.shard(array, number).read_bytes()
            for at, (name, view) in enumerate(in_order(space, array, number)):
                start = space.info.geometry(array).row_offset(at)
                stored = data[start : start + space.spec.row_bytes(array)]
                found.setdefault((array, numbers[name], view), stored)
    return found


def in_order(space: Space, array: str, number: int) -> list[tuple[str, str]]:
    table = read_commit(space.paths, space.info, array, number).table
    keys = [name.hex() for name in table["key"].to_pylist()]
    return list(zip(keys, table["view"].to_pylist(), strict=True))


def hash_of(rows: Stored) -> str:
    """The logical hash of a space with exactly these rows."""
    lines = sorted(
        (array, key(item), view, hashlib.sha256(stored).hexdigest())
        for (array, item, view), stored in rows.items()
    )
    text = "".join("\t".join(line) + "\n" for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()


def assert_read(space: Space, rows: Stored) -> None:
    """Every way to count, list or read the rows of a space finds exactly these."""
    reader = FeatureReader(space.paths)
    count = Counter(array for array, _, _ in rows)
    assert {array: reader.rows(array) for array in ARRAYS} == {a: count[a] for a in ARRAYS}
    for array in ARRAYS:
        expected = {(key(item), view) for kind, item, view in rows if kind == array}
        found = list(space.keys(array))
        assert (len(found), set(found), len(space.keys(array))) == (
            count[array],
            expected,
            count[array],
        )
        index = reader.index[array]
        positions = unique_rows(reader, array)
        assert {index.identity(at) for at in positions.tolist()} == expected
        assert len(positions) == len(index.errors) == count[array]
    for (array, item, view), stored in rows.items():
        out = np.empty((1, len(stored)), np.uint8)
        reader.read_into(array, reader.lookup(array, [key(item)], view), out)
        assert out.tobytes() == stored
        assert reader.contains(array, key(item), view)
    assert reader.logical_hash() == hash_of(rows)


@settings(max_examples=12)
@given(data=st.data())
def test_any_overlap_of_commits_counts_each_row_once(data: st.DataObject) -> None:
    """Workers begin shards in one order and commit them in another, as one that was frozen does."""
    draw = data.draw
    shards = draw(
        st.lists(
            st.sampled_from([IMAGES, IMAGES, FRAMES]).flatmap(
                lambda some: st.lists(
                    st.sampled_from(some), min_size=1, max_size=SLOTS, unique=True
                )
            ),
            min_size=2,
            max_size=6,
        )
    )
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(index_file, "WORTH_COMMITS", 1)
        root = CacheRoot(Path(name) / "cache")
        space = make_space(root.path)
        writers = [begin(space, identities) for identities in shards]
        for writer in draw(st.permutations(writers)):
            writer.commit()
            if draw(st.booleans()):
                save_index(space.paths, space.info)
            assert_read(space, counting(space))
        for array in ARRAYS:
            space.grow(array)
        rows, stored = counting(space), sum(map(len, shards))
        # What only reads.
        report = verify(root, deep=True)
        assert not report.broken
        assert report.spaces[0].logical_hash == hash_of(rows)
        assert sum(report.spaces[0].rows.values()) == len(rows)
        assert bool(report.all_findings) == (stored > len(rows))
        (summary,), _ = open_spaces(root, errors=True)
        assert sum(summary.rows.values()) == len(rows)
        assert sum(summary.doubled.values()) == stored - len(rows)
        # What copies.
        other = make_space(Path(name) / "other")
        fill(other, [7])
        merge.merge(CacheRoot(other.paths.cache_root), root, merge.Options(source=(root.path,)))
        assert_read(other, rows | {("image", 7, "full"): row(7).tobytes()})
        # What removes.
        mentioned = draw(st.sets(st.integers(0, 3)))
        unreferenced = draw(st.booleans())
        append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(4)], "job")
        refs = tuple(MediaRef(source=str(n)) for n in sorted(mentioned))
        write_samples(root, "d", [Sample(id="0", dataset="d", messages=(), media=refs)])
        gc.run(gc.Options(features=root.path, delete=True, unreferenced=unreferenced))
        if unreferenced:
            rows = {identity: of for identity, of in rows.items() if identity[1] in mentioned}
        assert_read(space, rows)
        for array in ARRAYS:
            assert len(FeatureReader(space.paths).index[array].doubled) == 0
            assert sum(len(in_order(space, array, n)) for n in space.paths.committed(array)) == sum(
                kind == array for kind, _, _ in rows
            )
        assert verify(root, deep=True).all_findings == []


# ---- one by one


@pytest.fixture
def doubled(tmp_path: Path) -> Space:
    """Images (0 1) (1' 2 0') (2' 1''): 3 of 7 rows count twice or more; samples mention 0, 1 and 2."""
    root, space = CacheRoot(tmp_path), make_space(tmp_path)
    for numbers in ([0, 1], [1, 2, 0], [2, 1]):
        begin(space, [("image", n, "full") for n in numbers]).commit()
    space.grow("image")
    append_media(root, [MediaRecord(source=str(n), key=key(n)) for n in range(3)], "job")
    refs = tuple(MediaRef(source=str(n)) for n in range(3))
    write_samples(root, "d", [Sample(id="0", dataset="d", messages=(), media=refs)])
    return space


def test_gc_frees_the_bytes_of_rows_that_do_not_count(
    doubled: Space, tmp_path: Path, run_command: Run
) -> None:
    rows = counting(doubled)
    words = (gc, "--features", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    _, dry = run_command(*words)
    name = doubled.paths.name
    line = f"{name}: 4 image rows are in older shards, too (1.14 kB in 2 shards, 336 B to copy)"
    assert dry.splitlines() == [
        line,
        "would be freed: 1.14 kB; do it: the same command with --delete",
    ]
    assert {path: path.read_bytes() for path in before} == before
    _, said = run_command(*words, "--delete")
    assert said.splitlines() == [line, "freed: 1.14 kB"]
    assert doubled.paths.committed("image") == [0, 3], "the first one is untouched"
    assert_read(doubled, rows)
    assert run_command(*words, "--delete")[1] == "freed: 0 B\n"
    assert doubled.next_shard("image") == 4


def test_gc_keeps_the_copies_of_a_row_that_is_damaged(
    doubled: Space, tmp_path: Path, run_command: Run
) -> None:
    garble(doubled.paths.shard("image", 0), 268 + 5)  # image 1, as it counts
    before = {path: path.read_bytes() for path in doubled.paths.root.rglob("*") if path.is_file()}
    with pytest.raises(CorruptError, match=r"c/0/0/0: row 1 fails its checksum; .* --repair"):
        run_command(gc, "--features", tmp_path, "--delete")
    assert {path: path.read_bytes() for path in before} == before


def test_a_shard_that_is_committed_late_is_not_removed(tmp_path: Path) -> None:
    """Its worker was frozen between its last look at the token and the rename of the commit."""
    root, space = CacheRoot(tmp_path), make_space(tmp_path)
    late = begin(space, [("image", 1, "full")])
    fill(space, [1, 2])
    (garbage,) = find_garbage(root, [space.paths])
    late.commit()
    remove(garbage, root)
    assert counting(space)["image", 1, "full"] == row(0).tobytes(), "shard 0 is older"
    assert_read(space, counting(space))


def test_unfinished_commits_are_removed_before_their_shards(tmp_path: Path) -> None:
    root, space = CacheRoot(tmp_path), make_space(tmp_path)
    fill(space, [1])
    fill(space, [2])
    path = space.paths.commit("image", 0)
    partial = path.rename(path.with_name(f"{path.name}.00ff.partial"))
    found = find_garbage(root, [space.paths])
    assert [one.path for one in found] == [partial, space.paths.shard_dir("image", 0)]
    partial.unlink()  # by its worker, which has woken meanwhile
    for one in found:
        remove(one, root)
    assert verify(root, deep=True).all_findings[1:] == []


def test_what_shows_rows_shows_each_once(doubled: Space, tmp_path: Path, run_command: Run) -> None:
    _, listed = run_command(ls, "--features", tmp_path)
    name = doubled.paths.name
    assert f"{name}: 4 rows are stored twice and count once; free their bytes: " in listed
    fields = [line.split() for line in listed.splitlines()]
    assert [name, "toy", "int8", "0", "1/2", "zarr", "3", "0", "2.08", "kB"] in fields
    reader = FeatureReader(doubled.paths)
    assert sorted(one.key for one in choose(reader, 9, 0)) == sorted(map(key, range(3)))
    assert {one.of for one in choose(reader, 9, 0)} == {1}
    assert sorted(sample_rows(reader, "image", 0).tolist()) == [0, 1, 5]
    cache = nm.open(tmp_path)
    assert "3 images of 4 x 64" in repr(cache)
    assert sorted(cache) == sorted(map(key, range(3)))


def test_a_converted_space_has_each_row_once(tmp_path: Path, run_command: Run) -> None:
    clean, twice = (make_space(tmp_path / name, "fp16") for name in ("clean", "twice"))
    for space, shards in ((clean, ([0, 1], [2])), (twice, ([0, 1], [1, 0], [2, 1]))):
        for numbers in shards:
            fill(space, numbers)
        run_command(convert, "--features", space.paths.cache_root, "--codec", "int8")
    made = [
        FeatureReader(CacheRoot(tmp_path / name).space(make_space(tmp_path / "int8").paths.name))
        for name in ("clean", "twice")
    ]
    assert made[0].logical_hash() == made[1].logical_hash()
    assert made[1].index["image"].stored == 3
