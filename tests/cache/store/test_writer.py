"""Shards appear whole or not at all, in the right order, under numbers that are never used again.

shard = ShardWriter(space, "image", space.next_shard("image"))
shard.append(key, "full", row)
shard.commit()
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.errors import CorruptError
from cache.format.checksums import read_sealed_json, sealed_json
from cache.format.space_info import MAX_SLOTS, new_info
from cache.maintenance.checks import verify
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import NewRow, ShardWriter
from tests.support.spaces import SLOTS, SPEC, committed_rows, features, fill, key, make_space, row


def test_rows_and_their_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    writer = ShardWriter(space, "image", space.next_shard("image"))
    writer.append(key(1), "full", row(1), error=0.25)
    writer.append(key(1), "crop:0,0,1,1", row(2), time_s=1.5)
    assert (writer.rows, writer.full) == (2, False)
    assert space.keys("image") == set()
    assert writer.commit() == 2
    table = committed_rows(space, "image").to_pydict()
    assert table["key"] == [bytes.fromhex(key(1))] * 2
    assert (table["view"], table["time_s"]) == (["full", "crop:0,0,1,1"], [None, 1.5])
    assert (table["row"], table["error"]) == ([0, 1], [0.25, 0.0])
    assert space.keys("image") == {(key(1), "full"), (key(1), "crop:0,0,1,1")}
    assert space.shard_keys("image", 0) == space.keys("image")
    assert space.shard_keys("image", 1) == set()
    assert FeatureReader(space.paths).read("image", key(1)).shape == features(1).shape


def test_an_invalid_row_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    writer = ShardWriter(space, "image", 0)
    writer.append(key(0), "full", row(0))
    for name, view, payload, why in (
        (key(0), "full", row(0), "already"),
        (key(1), "full", row(1)[:-1], "263 bytes, not 264"),
        (key(1)[:-2], "full", row(1), "64 hex digits"),
        ("x" * 64, "full", row(1), "hexadecimal"),
    ):
        with pytest.raises(ValueError, match=why):
            writer.append(name, view, payload)
    for number in range(1, SLOTS):
        writer.append(key(number), "full", row(number).tobytes())
    assert writer.full
    with pytest.raises(ValueError, match="full"):
        writer.append(key(9), "full", row(9))
    assert writer.commit() == SLOTS
    assert not verify(CacheRoot(tmp_path), deep=True).broken


def test_a_failed_write_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space(tmp_path)
    writer = ShardWriter(space, "image", 0)

    def full_disk(fd: int, buffers: Any, at: int) -> int:
        os.pwrite(fd, b"half a row" * 20, at)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full_disk)
        with pytest.raises(OSError, match="No space"):
            writer.append(key(1), "full", row(1))
    assert writer.rows == 0
    writer.append(key(1), "full", row(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full_disk)
        with pytest.raises(OSError, match="No space"):
            writer.append(key(2), "full", row(2))
    assert writer.commit() == 1, "what fitted, with nothing of the other row behind it"
    assert not verify(CacheRoot(tmp_path), deep=True).broken


def test_rows_appended_together_are_all_written_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new(number: int) -> NewRow:
        return NewRow(key=key(number), view="full", payload=row(number), error=number / 100)

    space = make_space(tmp_path)
    writer = ShardWriter(space, "image", 0)
    writer.append(key(0), "full", row(0))
    for wrong, why in (
        ([new(1), new(1)], "already"),
        ([new(1), new(0)], "already"),
        ([new(n) for n in range(1, 5)], "full"),
        ([new(1), dataclasses.replace(new(2), payload=row(2)[1:])], "263 bytes"),
    ):
        with pytest.raises(ValueError, match=why):
            writer.extend(wrong)
    assert writer.rows == 1
    monkeypatch.setattr("cache.store.writer.WRITE_BYTES", 300)  # two rows a call
    real, calls = os.pwritev, 0

    def full_at_the_second(fd: int, buffers: Any, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "pwritev", full_at_the_second)
    with pytest.raises(OSError, match="No space"):
        writer.extend([new(1), new(2), new(3)])
    assert writer.rows == 1
    writer.extend([new(3), new(2)])
    assert writer.commit() == 3
    table = committed_rows(space, "image").to_pydict()
    assert table["key"] == [bytes.fromhex(key(n)) for n in (0, 3, 2)]
    assert (table["row"], table["error"][1]) == ([0, 1, 2], pytest.approx(0.03))
    assert not verify(CacheRoot(tmp_path), deep=True).broken


def test_shard_numbers_are_never_used_again(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    assert fill(space, [0]) == 0
    ShardWriter(space, "image", 1)  # begun, and its process died
    assert space.next_shard("image") == 2
    with pytest.raises(FileExistsError):
        ShardWriter(space, "image", 1)
    assert fill(space, [2]) == 2
    shutil.rmtree(space.paths.shard("image", 2).parent.parent)  # lost, but committed
    assert space.next_shard("image") == 3
    assert space.next_shard("frame") == 0


def test_a_shard_replaces_others_in_one_step(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [0, 1])
    fill(space, [2])
    assert len(space.keys("image")) == 3
    fill(space, [1, 2], replaces=(0, 1))
    assert space.keys("image") == {(key(1), "full"), (key(2), "full")}
    reader = FeatureReader(space.paths)
    assert reader.lookup("image", [key(0), key(1), key(2)]).tolist() == [-1, 8, 9]
    assert not verify(CacheRoot(tmp_path), deep=True).broken, "no row is there twice"
    assert space.next_shard("image") == 3


def test_an_aborted_or_empty_shard_leaves_nothing(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    writer = ShardWriter(space, "image", 0)
    writer.append(key(1), "full", row(1))
    writer.abort()
    assert ShardWriter(space, "image", 0).commit() == 0
    assert list(space.paths.shards_dir("image").iterdir()) == []
    committed = ShardWriter(space, "image", 0)
    committed.append(key(1), "full", row(1))
    committed.commit()
    committed.abort()
    writer.abort()  # late, when the number is another's
    assert space.keys("image") == {(key(1), "full")}
    assert not verify(CacheRoot(tmp_path), deep=True).broken


def test_creating_a_space_again_changes_nothing(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    fill(space, [1])
    space.grow("image")
    files = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    again = Space.create(CacheRoot(tmp_path), space.spec, {"other": 1}, shard_bytes=1 << 30)
    assert (again.load, again.info) == (space.load, space.info)
    for path, (inode, mtime_ns) in files.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, mtime_ns)


def test_a_folder_with_another_space_is_refused(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    values = read_sealed_json(space.paths.space_json)
    del values["seal"]
    values["spec"]["patch_size"] = 1
    space.paths.space_json.write_bytes(sealed_json(values))
    with pytest.raises(CorruptError, match="fingerprint"):
        Space.open(space.paths)
    other = make_space(tmp_path / "other", "fp16")
    shutil.copy(other.paths.space_json, space.paths.space_json)
    with pytest.raises(CorruptError, match="another space"):
        make_space(tmp_path)


def test_zarr_json_only_grows_and_is_written_again_when_damaged(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    path = space.paths.array_json("image")

    def rows() -> int:
        return int(read_sealed_json(path)["shape"][0])

    assert rows() == 0
    fill(space, [1])
    ShardWriter(space, "image", 1)
    fill(space, [2])
    space.grow("image")
    assert rows() == 3 * SLOTS
    space.paths.commit("image", 2).unlink()
    space.grow("image")
    assert rows() == 3 * SLOTS
    path.write_bytes(path.read_bytes().replace(b"float16", b"float32"))
    with pytest.raises(CorruptError):
        rows()
    space.grow("image")
    assert rows() == SLOTS
    space.paths.group_json.unlink()
    make_space(tmp_path)
    assert not verify(CacheRoot(tmp_path)).broken


def test_shards_have_about_the_requested_size() -> None:
    info = new_info(SPEC, {}, 1000)  # 264 bytes an image, 66 a frame
    assert info.slots == {"image": 4, "frame": 16}
    assert new_info(SPEC, {}, 1).slots == {"image": 1, "frame": 1}
    assert new_info(SPEC, {}, 1 << 40).slots == {"image": MAX_SLOTS, "frame": MAX_SLOTS}


def test_nothing_gets_its_name_before_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename comes after the fsync of what it names, and before the fsync of its folder."""
    space = make_space(tmp_path)
    trace: list[tuple[str, str]] = []

    def name(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def spy(module: Any, call: str, describe: Any) -> None:
        real = getattr(module, call)

        def spied(*args: Any, **kwargs: Any) -> Any:
            trace.append((call, describe(*args, **kwargs)))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, call, spied)

    spy(os, "pwritev", lambda fd, *_: name(fd))
    spy(os, "fsync", name)
    spy(os, "mkdir", lambda path, dir_fd: f"{name(dir_fd)}/{path}")
    spy(
        os,
        "rename",
        lambda source, target, src_dir_fd, dst_dir_fd: (
            f"{name(src_dir_fd)}/{source}>{name(dst_dir_fd)}/{target}"
        ),
    )
    fill(space, [1, 2])
    shard = str(space.paths.shard("image", 0))
    folders = [str(parent) for parent in Path(shard).parents][:3]
    commits = str(space.paths.commits_dir)
    assert trace[:2] == [("mkdir", folders[1]), ("mkdir", folders[0])]
    assert trace[2:6] == [("pwritev", f"{shard}.partial")] * 3 + [("fsync", f"{shard}.partial")]
    assert trace[6] == ("rename", f"{shard}.partial>{shard}")
    assert trace[7:10] == [("fsync", folder) for folder in folders]
    (call, temporary), renamed, last = trace[10:]
    assert call == "fsync"
    assert temporary.startswith(commits)
    assert renamed == ("rename", f"{temporary}>{space.paths.commit('image', 0)}")
    assert last == ("fsync", commits)
