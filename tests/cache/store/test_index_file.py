"""The index file says what the commits say, after any history of commits and any damage.

save_index(paths, info)
index = open_index(paths, info, "image")
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.errors import CorruptError
from cache.store import index_file as derived
from cache.store.commits import read_commits
from cache.store.index_file import check_index, open_index, save_index
from cache.store.reader import FeatureReader
from cache.store.row_index import ROW_COLUMNS, SHARD_COLUMNS, RowIndex
from cache.store.space import Space
from tests.support.spaces import SLOTS, fill, key, make_space


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every commit is worth an index, and no time is too young to be relied on."""
    monkeypatch.setattr(derived, "WORTH_COMMITS", 1)
    monkeypatch.setattr(derived, "RACY_NS", -(10**18))


def rebuilt(space: Space, array: str = "image") -> RowIndex:
    """From the commits alone."""
    return RowIndex.of(read_commits(space.paths, space.info, array), space.rows_per_shard(array))


def opened(space: Space, array: str = "image") -> RowIndex:
    return open_index(space.paths, space.info, array)


def assert_same(one: RowIndex, other: RowIndex) -> None:
    for name in (*SHARD_COLUMNS, *ROW_COLUMNS):
        np.testing.assert_array_equal(getattr(one.columns, name), getattr(other.columns, name))
    for ours, theirs in zip(one.by_hash, other.by_hash, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (one.nbytes, one.spans) == (other.nbytes, other.spans)
    everything = np.arange(one.stored)
    assert [one.identity(i) for i in everything] == [other.identity(i) for i in everything]
    for view in ("full", "t:0", "crop:0,0,1,1"):
        np.testing.assert_array_equal(one.lookup(one.keys, view), other.lookup(one.keys, view))
    np.testing.assert_array_equal(one.doubled, other.doubled)


def commits_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the commits that are read from now on."""
    numbers: list[int] = []
    real = derived.read_commit

    def noted(*arguments: object) -> object:
        numbers.append(arguments[-1])  # type: ignore[arg-type]
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(derived, "read_commit", noted)
    return numbers


def age(space: Space) -> None:
    """As if all commits had been copied here: other times."""
    for path in space.paths.commits_dir.iterdir():
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000_007))


# ---- histories

STEPS = st.sampled_from(
    ["add"] * 3 + ["save"] * 2 + ["again", "clip", "replace", "remove", "age", "damage", "flip"]
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), steps=st.lists(STEPS, min_size=3, max_size=14))
def test_after_any_history_it_equals_a_rebuilt_index(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, steps: list[str]
) -> None:
    space = make_space(tmp_path_factory.mktemp("history"))
    paths, new, sound = space.paths, 0, b""
    for step in steps:
        there = paths.committed("image")
        some = data.draw(st.sampled_from(there)) if there else None
        if step == "add":
            rows = data.draw(st.integers(1, SLOTS))
            fill(space, range(new, new + rows))
            new += rows
        elif step == "again" and new:  # identities that are there already: the older ones win
            fill(space, sorted({data.draw(st.integers(0, new - 1)) for _ in range(2)}))
        elif step == "clip":
            fill(space, [new], view=data.draw(st.sampled_from(["t:0", "t:500000", "crop:0,0,1,1"])))
        elif step == "replace" and some is not None:
            fill(space, [new], replaces=[some])
        elif step == "remove" and some is not None:
            paths.commit("image", some).unlink()
        elif step == "save":
            save_index(paths, space.info)
            if paths.index("image").exists():  # not of a space without commits
                sound = paths.index("image").read_bytes()
            assert (
                check_index(paths, space.info, "image", deep=True, rebuilt=rebuilt(space)) is None
            )
        elif step == "age":
            age(space)
        elif step == "damage" and some is not None:
            path = paths.commit("image", some)
            good, stat = path.read_bytes(), path.stat()
            path.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
            os.utime(path, ns=(1, stat.st_mtime_ns + 5))
            for view_of in (rebuilt, opened):
                if some in paths.committed("image"):
                    with pytest.raises(CorruptError, match=path.name):
                        view_of(space)
            path.write_bytes(good)
        elif step == "flip" and paths.index("image").exists():
            flip(paths.index("image"), data.draw(st.integers(0, 10**6)))
            found = check_index(paths, space.info, "image", deep=True, rebuilt=rebuilt(space))
            assert (found is None) == (paths.index("image").read_bytes() == sound), "flipped back"
        assert_same(opened(space), rebuilt(space))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    path.unlink()  # a reader may have mapped the file as it was
    path.write_bytes(content)


# ---- one by one


def test_only_new_commits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space(tmp_path)
    for n in range(5):
        fill(space, [2 * n, 2 * n + 1])
    save_index(space.paths, space.info)
    read = commits_read(monkeypatch)
    assert_same(opened(space), rebuilt(space))
    assert read == [], "it is all in the index"
    fill(space, [50])
    assert opened(space).lookup(rebuilt(space).keys[-1:], "full").tolist() == [5 * SLOTS]
    assert read == [5], "a new commit"
    read.clear()
    assert fill(space, [51], replaces=[1, 2]) == 6
    assert_same(opened(space), rebuilt(space))
    assert read == [5, 6], "what it replaces is left out, what is left is not read again"
    read.clear()
    space.paths.commit("image", 6).unlink()
    assert_same(opened(space), rebuilt(space))
    assert read == [5], "1 and 2 exist again"
    read.clear()
    age(space)
    assert_same(opened(space), rebuilt(space))
    assert read == [5], "the same seals: the same commits, copied"
    fill(space, [52], replaces=[1])
    save_index(space.paths, space.info)
    read.clear()
    assert_same(opened(space), rebuilt(space))
    assert read == []
    space.paths.commit("image", 7).unlink()
    assert_same(opened(space), rebuilt(space))
    assert read == [1], "it was replaced when the file was written, and exists again"


def test_a_commit_written_again_under_its_old_name_is_noticed(tmp_path: Path) -> None:
    """Same number, same size; its time may even be the same, when that was too young to be relied on."""
    space = make_space(tmp_path)
    fill(space, [1])
    path = space.paths.commit("image", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "RACY_NS", 2 * 10**9)
        save_index(space.paths, space.info)
    stat = path.stat()
    path.unlink()
    shutil.rmtree(space.paths.shard("image", 0).parents[1])
    fill(space, [2])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    seen = FeatureReader(space.paths)
    assert (seen.contains("image", key(1)), seen.contains("image", key(2))) == (False, True)


def test_every_flipped_bit_is_found_and_the_file_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = make_space(tmp_path)
    for n in range(3):
        fill(space, [2 * n, 2 * n + 1], view="full" if n else "crop:0,0,1,1")
    expected = rebuilt(space)
    save_index(space.paths, space.info)
    path = space.paths.index("image")
    good = path.read_bytes()
    header = len(json.dumps(json.loads(good[:4096])))
    places = [*range(0, header, 41), *range(header, 4096, 211), *range(4096, len(good), 7)]
    for at in places:
        flip(path, at + at % 8 * len(good))
        error = check_index(space.paths, space.info, "image", deep=True, rebuilt=expected)
        assert error is not None and error.path == path, at
        with caplog.at_level(logging.ERROR):
            index = opened(space)
        np.testing.assert_array_equal(index.keys, expected.keys)
        np.testing.assert_array_equal(index.crcs, expected.crcs)
        path.write_bytes(good)
    path.write_bytes(good[:-1])
    assert check_index(space.paths, space.info, "image", deep=False) is not None, (
        "the size is looked at always"
    )
    assert_same(opened(space), expected)
    assert "reading all commits instead" in caplog.text


def test_an_index_of_another_space_is_ignored(tmp_path: Path) -> None:
    one, other = make_space(tmp_path / "one"), make_space(tmp_path / "other", "fp16")
    fill(one, [1])
    fill(other, [2])
    for space in (one, other):
        save_index(space.paths, space.info)
    shutil.copy(other.paths.index("image"), one.paths.index("image"))
    assert_same(opened(one), rebuilt(one))
    error = check_index(one.paths, one.info, "image", deep=False)
    assert error is not None and "another space" in str(error)


def test_an_intact_index_that_is_wrong_is_found(tmp_path: Path) -> None:
    """Intact, and wrong all the same: as if we had written it wrong."""
    space = make_space(tmp_path)
    fill(space, [1, 2])
    snapshot, _ = derived._current(space.paths, space.info, "image")
    columns = replace(snapshot.index.columns, crcs=snapshot.index.crcs ^ 1)
    snapshot = replace(snapshot, index=RowIndex(columns, SLOTS))
    derived._write(space.paths, snapshot, space.info, "image")
    assert check_index(space.paths, space.info, "image", deep=False) is None
    error = check_index(space.paths, space.info, "image", deep=True, rebuilt=rebuilt(space))
    assert error is not None and "differs from the commits" in str(error)
    with pytest.raises(CorruptError, match="row 0 fails"):
        FeatureReader(space.paths).read("image", key(1))


def test_it_is_written_only_where_it_saves_enough_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "WORTH_COMMITS", 3)
    space = make_space(tmp_path)
    path = space.paths.index("image")
    for n, expected in enumerate([False, False, True]):
        fill(space, [n])
        save_index(space.paths, space.info)
        assert path.exists() == expected
    before = path.stat()
    fill(space, [3])
    save_index(space.paths, space.info)
    assert path.stat() == before, "one commit more"
    fill(space, [4])
    fill(space, [5])
    save_index(space.paths, space.info)
    assert path.stat().st_ino != before.st_ino
    assert not space.paths.index("frame").exists()


def test_a_reader_writes_nothing_and_needs_no_permission(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [1])
    save_index(space.paths, space.info)
    fill(space, [2])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        seen = FeatureReader(space.paths)
        assert (seen.contains("image", key(1)), seen.contains("image", key(2))) == (True, True)
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            path.chmod(0o700)


def test_an_open_reader_is_unaffected_by_a_new_index(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [1, 2])
    save_index(space.paths, space.info)
    seen = FeatureReader(space.paths)
    fill(space, [3])
    save_index(space.paths, space.info)
    assert seen.rows("image") == 2
    np.testing.assert_array_equal(
        seen.read("image", key(2)), FeatureReader(space.paths).read("image", key(2))
    )


def test_identities_behave_like_a_set(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [1, 2])
    fill(space, [2], view="crop:0,0,1,1")
    fill(space, [2, 3])  # 2 again
    expected = {(key(n), "full") for n in (1, 2, 3)} | {(key(2), "crop:0,0,1,1")}
    found = space.keys("image")
    assert found == expected
    assert (len(found), set(found)) == (4, expected)
    assert found - {(key(1), "full")} == expected - {(key(1), "full")}
    for stranger in (key(1), "crop:0,0,1,1"), ("video:" + key(1), "full"), (key(1)[:8], "full"):
        assert stranger not in found
