"""The reader finds what was committed, and returns its exact bytes to any thread or process, or raises.

reader = FeatureReader(find_space(root, None))
reader.read_into("image", reader.lookup("image", keys), out)
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.errors import CacheError, CorruptError, NotFoundError
from cache.format import codec
from cache.format.space_info import info_bytes
from cache.store import commits, reader, shard_files
from cache.store.commits import SCHEMA, Commit, key_bytes
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.row_index import RowIndex
from cache.store.space import Space, find_space
from tests.support import ROOT
from tests.support.faults import flip
from tests.support.spaces import SLOTS, SPEC, features, fill, key, make_space, row


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Images 0-9 in shards of 4, 3, none, 2 and 1 rows; frames 0-2."""
    space = make_space(tmp_path_factory.mktemp("filled"))
    fill(space, [3, 1, 2, 0])
    fill(space, [6, 4, 5])
    space.paths.shard("image", 2).parent.mkdir(parents=True)  # begun, never committed
    fill(space, [8, 7])
    fill(space, [9])
    fill(space, [0, 1, 2], array="frame")
    return space


ROWS = {3: 0, 1: 1, 2: 2, 0: 3, 6: 4, 4: 5, 5: 6, 8: 12, 7: 13, 9: 16}
"""Image -> its row number there."""


def test_stored_keys_are_found_and_others_are_not(filled: Space) -> None:
    seen = FeatureReader(filled.paths)
    assert (seen.rows("image"), seen.rows("frame")) == (10, 3)
    rows = seen.lookup("image", [key(number) for number in range(12)])
    assert rows.dtype == np.int64
    assert rows.tolist() == [ROWS.get(number, -1) for number in range(12)]
    assert seen.lookup("frame", [key(2), key(3)]).tolist() == [2, -1]
    assert seen.lookup("image", []).tolist() == []
    assert seen.lookup("image", [key(0)], "crop:0,0,1,1").tolist() == [-1]
    assert seen.contains("image", key(9))
    assert not seen.contains("image", key(10))
    with pytest.raises(ValueError, match="64 hex digits"):
        seen.lookup("image", ["abc"])


def test_features_are_read_as_the_codec_stored_them(filled: Space) -> None:
    seen = FeatureReader(filled.paths.root)
    expected = codec.unpack(row(5), SPEC.codec, SPEC.tokens("image"), SPEC.width)
    np.testing.assert_array_equal(seen.read("image", key(5)), expected)
    np.testing.assert_allclose(seen.read("image", key(5)), features(5), atol=0.03)
    assert seen.read("frame", key(1)).shape == (1, 64)
    assert (seen.spec, seen.load, seen.path) == (filled.spec, filled.load, filled.paths.root)
    with pytest.raises(KeyError, match="no image"):
        seen.read("image", key(99))


@pytest.mark.parametrize("mapped", ["", "held", "let go"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("checked", [True, False])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(wanted=st.lists(st.sampled_from(sorted(ROWS)), max_size=30))
def test_any_rows_in_any_order_are_the_bytes_written(
    filled: Space,
    monkeypatch: pytest.MonkeyPatch,
    checked: bool,
    threads: int,
    mapped: str,
    wanted: list[int],
) -> None:
    """`mapped`: copied from mappings from the second time on, other threads of Python held or let go."""
    monkeypatch.setattr(reader, "THREAD_BYTES", 300)
    monkeypatch.setattr(shard_files, "COPIED_BYTES", 0 if mapped else 10**6)
    monkeypatch.setattr(shard_files, "LOCKED_BYTES", 0 if mapped == "let go" else 10**6)
    seen = FeatureReader(filled.paths, checked=checked, threads=threads)
    rows = np.array([ROWS[number] for number in wanted], np.int64)
    for _ in range(6 if mapped else 1):
        out = np.zeros((len(wanted), SPEC.row_bytes("image")), np.uint8)
        seen.read_into("image", rows, out)
        for number, found in zip(wanted, out, strict=True):
            np.testing.assert_array_equal(found, row(number))


def test_adjacent_rows_are_one_system_call(filled: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        calls.append(len(buffers))
        return real(fd, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", counted)
    seen = FeatureReader(filled.paths, mapped=False)
    out = np.empty((7, SPEC.row_bytes("image")), np.uint8)
    seen.read_into("image", np.arange(7), out)
    assert calls == [7, 5], "one for each shard: its rows, and the crcs between them"
    calls.clear()
    seen.read_into("image", np.array([2, 1, 12, 13, 5, 6, 0]), out)
    assert calls == [5, 3, 3], "0-2, 5-6 and 12-13: whatever the order asked for"
    calls.clear()
    monkeypatch.setattr(reader, "RUN_ROWS", 2)
    seen = FeatureReader(filled.paths)
    seen.read_into("image", np.arange(7), out)
    assert calls == [3, 3, 3, 1]


def test_short_reads_are_continued(filled: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    chunk = 0

    def short(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        left = chunk
        some = []
        for buffer in buffers:
            some.append(buffer[:left])
            left -= len(some[-1])
        return real(fd, some, at, flags)

    monkeypatch.setattr(os, "preadv", short)
    out = np.empty((4, SPEC.row_bytes("image")), np.uint8)
    for chunk in (1, 97, 266, 700):  # noqa: B007 - `short` reads it: ends within rows and crcs
        FeatureReader(filled.paths).read_into("image", np.arange(4), out)
        np.testing.assert_array_equal(out, [row(number) for number in (3, 1, 2, 0)])


def test_reads_that_wait_for_the_disk_are_begun_together(
    filled: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the page cache held shard 0 alone; then as if this file system could not tell."""
    begun: list[tuple[int, int]] = []
    real = os.preadv
    first = filled.paths.shard("image", 0).stat().st_ino
    answer: OSError = BlockingIOError()

    def only_first(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags and os.fstat(fd).st_ino != first:
            raise answer
        return real(fd, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", only_first)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, size, __: begun.append((at, size)))
    monkeypatch.setattr(reader, "AHEAD_RUNS", 2)
    wanted = [9, 3, 8, 6, 4, 0]
    slot_bytes = SPEC.row_bytes("image") + 4
    for answer, expected in (  # noqa: B007 - `only_first` reads it
        (BlockingIOError(), [(0, 2 * slot_bytes), (0, slot_bytes), (0, slot_bytes)]),
        (OSError(95, "Operation not supported"), []),
    ):
        out = np.zeros((6, SPEC.row_bytes("image")), np.uint8)
        begun.clear()
        FeatureReader(filled.paths).read_into("image", np.array([ROWS[n] for n in wanted]), out)
        np.testing.assert_array_equal(out, [row(n) for n in wanted])
        assert begun == expected, "4 and 6 side by side; 8; then 9"
    begun.clear()
    seen = FeatureReader(filled.paths)
    with pytest.raises(IndexError):  # what is begun need not be there; what is read must
        seen.read_into("image", np.array([0, 4, 12, 400]), np.empty((4, out.shape[1]), np.uint8))


def test_invalid_reads_are_refused(filled: Space) -> None:
    seen = FeatureReader(filled.paths)
    size = SPEC.row_bytes("image")
    for rows in ([-1], [7], [8], [17], [0, 400], [10**12]):
        with pytest.raises(IndexError, match="not committed"):
            seen.read_into("image", np.array(rows), np.empty((len(rows), size), np.uint8))
    for out in (
        np.empty((1, size - 1), np.uint8),
        np.empty((2, size), np.uint8),
        np.empty((1, size), np.int8),
        np.empty((size, 1), np.uint8).T[:, ::-1],
    ):
        with pytest.raises(ValueError, match="out is"):
            seen.read_into("image", np.array([0]), out)


def test_an_empty_space_has_no_rows(tmp_path: Path) -> None:
    seen = FeatureReader(make_space(tmp_path).paths)
    assert seen.rows("image") == 0
    assert seen.lookup("image", [key(0)]).tolist() == [-1]
    with pytest.raises(IndexError):
        seen.read_into("image", np.array([0]), np.empty((1, SPEC.row_bytes("image")), np.uint8))
    assert len(seen.logical_hash()) == 64


def test_a_flipped_byte_of_a_shard_is_never_returned(tmp_path: Path) -> None:
    """Every byte. What is no part of a row (crc, index) leaves the rows what they are."""
    space = make_space(tmp_path)
    fill(space, [0, 1])
    path = space.paths.shard("image", 0)
    size, slot_bytes = SPEC.row_bytes("image"), SPEC.row_bytes("image") + 4
    seen = FeatureReader(space.paths)
    for at in range(path.stat().st_size):
        flip(path, 8 * at + at % 8)
        hit, within = divmod(at, slot_bytes)
        for number in (0, 1):
            out = np.empty((1, size), np.uint8)
            if number == hit and within < size:
                with pytest.raises(
                    CorruptError, match=rf"row {number} fails its checksum; .* --repair"
                ):
                    seen.read_into("image", np.array([number]), out)
            else:
                seen.read_into("image", np.array([number]), out)
                np.testing.assert_array_equal(out[0], row(number))
        flip(path, 8 * at + at % 8)


@pytest.mark.parametrize("which", ["space.json", "commits/image-00000000.parquet"])
def test_a_flipped_byte_of_the_metadata_is_noticed_at_opening(tmp_path: Path, which: str) -> None:
    space = make_space(tmp_path)
    fill(space, [0, 1])
    path = space.paths.root / which
    for at in range(0, path.stat().st_size, 5):
        flip(path, 8 * at + at % 8)
        with pytest.raises(CorruptError, match=f"{which}: "):
            FeatureReader(space.paths)
        flip(path, 8 * at + at % 8)


def test_intact_bytes_in_the_wrong_place_are_noticed(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [0, 1])
    fill(space, [2, 3])
    first, second = (space.paths.shard("image", number) for number in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptError, match="row 0 fails"):
        FeatureReader(space.paths).read("image", key(0))
    shutil.copy(space.paths.commit("image", 1), space.paths.commit("image", 0))
    with pytest.raises(
        CorruptError, match=r"image-00000000\.parquet: it is the commit of image shard 1"
    ):
        FeatureReader(space.paths)
    other = make_space(tmp_path / "other", "fp16")
    fill(other, [0, 1])
    shutil.copy(other.paths.commit("image", 0), space.paths.commit("image", 0))
    with pytest.raises(CorruptError, match="or of another space"):
        FeatureReader(space.paths)


def test_a_description_with_other_shards_is_noticed(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [0, 1])
    other = dataclasses.replace(space.info, slots={**space.info.slots, "image": 8})
    space.paths.space_json.write_bytes(info_bytes(other))
    with pytest.raises(CorruptError, match="not made with 8 rows a shard"):
        FeatureReader(space.paths)


def test_a_missing_or_shortened_shard_is_named_with_advice(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [0, 1])
    path, commit = space.paths.shard("image", 0), space.paths.commit("image", 0)
    seen = FeatureReader(space.paths)
    seen.read("image", key(0))
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(300)
    assert seen.read("image", key(0)) is not None, "the row before the cut"
    with pytest.raises(CorruptError, match="it ends early"):
        seen.read("image", key(1))
    with pytest.raises(CorruptError, match=r"300 bytes, not 604; .* --repair"):
        FeatureReader(space.paths).read("image", key(0))
    path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        FeatureReader(space.paths).read("image", key(0))
    path.write_bytes(whole)
    commit.unlink()  # the way out
    assert FeatureReader(space.paths).rows("image") == 0


def test_a_disk_that_fails_is_named(filled: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CorruptError, match=r"c/0/0/0: Input/output error; .* --repair"):
        FeatureReader(filled.paths).read("image", key(0))


def test_threads_share_one_reader_while_files_are_closed(
    filled: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "open_files", lambda: 1)
    seen = FeatureReader(filled.paths)
    numbers = sorted(ROWS)

    def work(seed: int) -> int:
        draw = random.Random(seed)
        out = np.empty((6, SPEC.row_bytes("image")), np.uint8)
        for _ in range(150):
            chosen = [draw.choice(numbers) for _ in range(6)]
            seen.read_into("image", np.array([ROWS[number] for number in chosen]), out)
            for number, found in zip(chosen, out, strict=True):
                assert (found == EXPECTED[number]).all()
        return 1

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(work, range(6))) == 6


def test_no_thread_outlives_a_call_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage in one thread's part: it is raised, and nobody writes to the buffer afterwards."""
    monkeypatch.setattr(reader, "THREAD_BYTES", 1)
    space = make_space(tmp_path)
    for n in range(4):
        fill(space, [n])
    flip(space.paths.shard("image", 0), 40)
    seen = FeatureReader(space.paths, threads=4)
    running, real = [], os.preadv

    def slow(*arguments: object) -> int:
        running.append(1)
        time.sleep(0.02 * len(running))
        got = real(*arguments)  # type: ignore[arg-type]
        running.pop()
        return got

    monkeypatch.setattr(os, "preadv", slow)
    out = np.zeros((4, SPEC.row_bytes("image")), np.uint8)
    for _ in range(3):
        with pytest.raises(CorruptError, match="row 0 fails"):
            seen.read_into("image", np.arange(4) * SLOTS, out)
        assert not running
    seen.read_into("image", np.array([4, 8, 12]), out[:3])
    assert (out[:3] == [row(n) for n in (1, 2, 3)]).all()


EXPECTED = {number: row(number) for number in ROWS}

FORKED = """
import json, os, sys
import numpy as np
from pathlib import Path
from cache.store.reader import FeatureReader
from cache.store import reader as module
from tests.support.spaces import row
module.THREAD_BYTES = 300
reader = FeatureReader(Path(sys.argv[1]), threads=int(sys.argv[2]))
ROWS = {int(n): at for n, at in json.loads(sys.argv[3]).items()}
EXPECTED = {n: row(n) for n in ROWS}
numbers = list(ROWS)
out = np.empty((len(ROWS), reader.spec.row_bytes("image")), np.uint8)
def work():
    for _ in range(200):
        out[:] = 0
        reader.read_into("image", np.array([ROWS[n] for n in numbers]), out)
        assert all((EXPECTED[n] == found).all() for n, found in zip(numbers, out))
work()
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    children.append(child)
work()
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_forked_processes_share_one_reader(filled: Space, threads: int) -> None:
    subprocess.run(
        [sys.executable, "-c", FORKED, str(filled.paths.root), str(threads), json.dumps(ROWS)],
        check=True,
        cwd=ROOT,
    )


def test_files_are_closed_with_their_reader(filled: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "COPIED_BYTES", 0)

    def open_shards() -> int:
        links = list(Path("/proc/self/fd").iterdir())
        return sum(str(filled.paths.root) in str(link.resolve()) for link in links)

    def mapped_shards() -> int:
        return Path("/proc/self/maps").read_text().count(str(filled.paths.root))

    gc.collect()  # readers of other tests, in the tracebacks of the errors they expect
    seen = FeatureReader(filled.paths)
    seen.read("image", key(0))
    seen.read("image", key(9))
    assert (open_shards(), mapped_shards()) == (2, 0)
    for _ in range(SLOTS):
        seen.read("image", key(0))
    assert (open_shards(), mapped_shards()) == (3, 1)
    del seen
    assert (open_shards(), mapped_shards()) == (0, 0)


def test_equal_content_has_an_equal_logical_hash(tmp_path: Path, filled: Space) -> None:
    other = make_space(tmp_path / "a")
    fill(other, [0, 1, 2], array="frame")
    for number in range(10):
        fill(other, [number])
    expected = FeatureReader(filled.paths).logical_hash()
    assert FeatureReader(other.paths).logical_hash() == expected
    fill(other, [10])
    assert FeatureReader(other.paths).logical_hash() != expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_index_behaves_like_a_dictionary(data: st.DataObject) -> None:
    """Against a dict, with keys, views and hashes that collide on purpose."""
    keys = [bytes([a]) * 8 + bytes([b]) * 24 for a in range(3) for b in range(3)]
    views = ["full", "t:0", "t:500000"]
    identity = st.tuples(st.sampled_from(keys), st.sampled_from(views))
    shards = data.draw(st.lists(st.lists(identity, min_size=1, max_size=SLOTS), max_size=5))
    numbers = data.draw(
        st.lists(st.integers(0, 30), min_size=len(shards), max_size=len(shards), unique=True)
    )
    model: dict[tuple[bytes, str], int] = {}
    twice = []
    made = []
    for number, identities in zip(sorted(numbers), shards, strict=True):
        rows = range(number * SLOTS, number * SLOTS + len(identities))
        for row_number, found in zip(rows, identities, strict=True):
            if model.setdefault(found, row_number) != row_number:
                twice.append(row_number)
        columns = {
            "key": [found[0] for found in identities],
            "view": [found[1] for found in identities],
            "time_s": [None] * len(identities),
            "row": list(rows),
            "crc": list(rows),
            "error": [0.0] * len(identities),
        }
        table = commits.pa.table(columns, SCHEMA)
        made.append(Commit(shard=number, nbytes=0, index_crc=0, table=table))
    index = RowIndex.of(made, SLOTS)
    for view in [*views, "other"]:
        wanted = [model.get((name, view), -1) for name in keys]
        found_rows = index.lookup(key_bytes([name.hex() for name in keys]), view)
        assert found_rows.tolist() == wanted
    positions = np.arange(index.stored)
    rows_found = index.rows(positions)
    assert rows_found.tolist() == [r for commit in made for r in commit.table["row"].to_pylist()]
    assert index.positions(rows_found).tolist() == positions.tolist()
    assert index.rows(index.doubled).tolist() == twice
    assert len(index) == len(model)
    counting = index.numbered(np.arange(len(index)))
    assert index.rows(counting).tolist() == sorted(model.values())
    assert index.counting(positions).tolist() == counting.tolist()
    order = [index.identity(position) for position in index.by_identity()]
    assert order == sorted((name.hex(), view) for name, view in model)


def test_a_space_is_found_by_name_or_if_it_is_the_only_one(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    with pytest.raises(
        NotFoundError, match=r"no feature space under .*Make one: python -m encode\.run"
    ):
        find_space(root, None)
    with pytest.raises(NotFoundError, match="no feature space"):
        find_space(root, "toy")
    int8 = make_space(tmp_path).paths
    assert find_space(root, None) == int8
    fp16 = make_space(tmp_path, "fp16").paths
    assert find_space(root, "toy-fp16") == fp16
    assert find_space(root, int8.name) == int8
    with pytest.raises(CacheError, match=f"2 spaces .*--space {fp16.name} | {int8.name}"):
        find_space(root, None)
    with pytest.raises(CacheError, match="2 spaces"):
        find_space(root, "toy")
    with pytest.raises(NotFoundError, match="no space 'toi'"):
        find_space(root, "toi")


def test_a_file_in_place_of_a_cache_is_named_without_a_command_that_cannot_work(
    tmp_path: Path,
) -> None:
    (tmp_path / "notes.txt").write_text("no cache")
    with pytest.raises(
        NotFoundError, match=r"notes\.txt: a file; features are in a folder"
    ) as said:
        find_space(CacheRoot(tmp_path / "notes.txt"), None)
    assert "encode.run" not in str(said.value)
