"""Rows are copied from mapped shards only if the kernel reports them in memory, never at the risk of SIGBUS.

reader = FeatureReader(paths)  # maps a shard once it was read as often as it is long
plain = FeatureReader(paths, mapped=False)
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cache.errors import CorruptError
from cache.remote.open import RemoteOptions, open_reader
from cache.store import shard_files
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from tests.support import ROOT
from tests.support.faults import flip
from tests.support.spaces import SPEC, fill, key, make_space, row

SIZE = SPEC.row_bytes("image")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is mapped")


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Space:
    monkeypatch.setattr(shard_files, "COPIED_BYTES", 0)
    space = make_space(tmp_path)
    fill(space, [0, 1, 2, 3])
    return space


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where `preadv` was asked to read."""
    seen: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        seen.append(at)
        return real(fd, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def read(reader: FeatureReader, numbers: list[int]) -> None:
    out = np.zeros((len(numbers), SIZE), np.uint8)
    reader.read_into("image", np.array(numbers), out)
    for number, found in zip(numbers, out, strict=True):
        np.testing.assert_array_equal(found, row(number))


def test_rows_of_a_mapped_shard_need_no_system_call(space: Space, calls: list[int]) -> None:
    reader = FeatureReader(space.paths)
    read(reader, [0, 1, 2, 3])
    assert len(calls) == 1, "once through: by calls"
    read(reader, [2])
    assert len(calls) == 2, "the bytes around the rows are not read, so it takes a row more"
    calls.clear()
    for numbers in ([0], [3, 1], [2, 0, 1, 3], [1, 1]):
        read(reader, numbers)
    assert calls == []


def test_a_shard_is_mapped_only_after_it_was_read_once_over(space: Space, calls: list[int]) -> None:
    shard_files.COPIED_BYTES = SIZE
    reader = FeatureReader(space.paths)
    for _ in range(3):
        read(reader, [0, 1, 2, 3])
    assert len(calls) == 2, "a run of rows is worth asking for"
    read(reader, [2])
    assert len(calls) == 3, "one of this size is not"


def test_rows_that_are_not_in_memory_are_read(
    space: Space, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = FeatureReader(space.paths)
    for _ in range(3):
        read(reader, [0, 1, 2, 3])
    calls.clear()
    monkeypatch.setattr(
        shard_files, "_mincore", lambda *_: 0
    )  # nothing is: it leaves the answer empty
    shard_files._answer.pages[:] = bytes(shard_files.PAGES)
    read(reader, [1])
    read(reader, [0, 2, 3])
    monkeypatch.setattr(shard_files, "_mincore", lambda *_: -1)
    read(reader, [3])
    monkeypatch.setattr(shard_files, "_mincore", None)
    read(reader, [0])
    slot = SIZE + 4
    assert calls == [slot, 0, 2 * slot, 3 * slot, 0]


def test_only_pages_in_memory_are_copied(tmp_path: Path) -> None:
    """Pages of a file that nobody has read are not in memory; what was read of it is."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    fd = os.open(path, os.O_RDONLY)
    seen = shard_files.MappedFile(fd, 1 << 20)
    out = memoryview(bytearray(5000))
    page = mmap.PAGESIZE
    assert not seen.copy(200 * page - 10, [out], 5000), (
        "a hole of a file: the page cache has nothing"
    )
    os.pread(fd, 5000, 200 * page - 10)
    assert seen.copy(200 * page - 10, [out], 5000)
    os.close(fd)
    assert seen.copy(200 * page - 10, [out], 5000), "the mapping stays"


def test_nothing_is_copied_from_beyond_the_end(tmp_path: Path) -> None:
    """Where the file's last page, which is in memory, goes on."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    with path.open("rb") as file:
        seen = shard_files.MappedFile(file.fileno(), 5000)
    out = memoryview(bytearray(100))
    assert seen.copy(4900, [out], 100)
    assert not seen.copy(4901, [out], 100)
    assert not seen.copy(6000, [out], 100)


@pytest.mark.parametrize("why", ["trainer", "option", "other user", "file system"])
def test_what_is_not_mapped_is_read(
    space: Space, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """The trainer does not map: its memory figure is what training takes."""
    if why == "other user":  # the kernel says of such a file that all pages are in memory
        path = os.fspath(space.paths.shard("image", 0))
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
        assert shard_files.can_map(path), "it can be written"
        monkeypatch.setattr(os, "access", lambda *_: False)
    elif why == "file system":
        monkeypatch.setattr(mmap, "mmap", mock.Mock(side_effect=OSError(19, "No such device")))
    reader = FeatureReader(space.paths, mapped=why != "option")
    if why == "trainer":
        reader = open_reader(tmp_path, None, RemoteOptions())
    for _ in range(4):
        read(reader, [0, 1, 2, 3])
    assert len(calls) == 4


def test_damage_to_a_mapped_row_is_noticed(space: Space) -> None:
    reader = FeatureReader(space.paths)
    for _ in range(3):
        read(reader, [0, 1, 2, 3])
    flip(space.paths.shard("image", 0), 8 * (SIZE + 4 + 9))  # the file itself, as a disk would
    read(reader, [0, 2, 3])
    with pytest.raises(CorruptError, match="row 1 fails its checksum"):
        read(reader, [1])
    with pytest.raises(CorruptError, match="row 1 fails its checksum"):
        read(reader, [0, 1, 2, 3])


CUT = """
import os, sys
import numpy as np
from cache.store import shard_files
from cache.store.paths import CacheRoot, CorruptError
from cache.store.reader import FeatureReader
shard_files.COPIED_BYTES = 0
reader = FeatureReader(sys.argv[1])
out = np.empty((4, reader.spec.row_bytes("image")), np.uint8)
for _ in range(3):
    reader.read_into("image", np.arange(4), out)
assert reader._files._file("image", 0).mapped is not None
os.truncate(reader.paths.shard("image", 0), 20000)
try:
    reader.read_into("image", np.arange(4), out)
except CorruptError as error:
    print(error)
"""


def test_a_mapped_shard_that_is_cut_short_is_an_error_not_a_signal(tmp_path: Path) -> None:
    """Rows of several pages, so that whole pages go away beneath the mapping."""
    spec = dataclasses.replace(SPEC, codec="fp16", width=4096)
    space = Space.create(CacheRoot(tmp_path), spec, {})
    shard = ShardWriter(space, "image", 0)
    for number in range(4):
        shard.append(key(number), "full", bytes(spec.row_bytes("image")))
    shard.commit()
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(space.paths.root)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "it ends early" in done.stdout
