"""A file appears whole or not at all, and an error of the disk becomes one line.

with new_file(path) as file:
    file.write(data)
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CacheError, DiskError
from cache.remote.listing import is_table
from cache.store.files import PARTIAL, disk_errors, new_file, write_atomic
from cache.store.paths import CacheRoot, as_dataset_name, is_dataset_name


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"new")
        assert [p.name.endswith(PARTIAL) for p in sorted(path.parent.iterdir())] == [False, True]
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_fence_stops_the_rename(tmp_path: Path) -> None:
    def fence() -> None:
        assert len(list(tmp_path.iterdir())) == 1, "the bytes are there, under another name"
        raise PermissionError

    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "file", b"data", fence)
    assert list(tmp_path.iterdir()) == []


def test_new_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_file_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    with new_file(tmp_path / "folder" / "file", durable=durable) as file:
        file.write(b"data")
    assert (tmp_path / "folder" / "file").read_bytes() == b"data"
    assert bool(calls) == durable


def test_errors_of_the_disk_are_one_line_with_advice(tmp_path: Path) -> None:
    for error, text in (
        (OSError(errno.ENOSPC, "full"), f"disk full ({tmp_path}); everything committed is kept"),
        (OSError(errno.EDQUOT, "quota", "/x"), "disk full (/x)"),
        (OSError(errno.EIO, "input/output error", "/x"), "/x: input/output error; everything"),
        (OSError(errno.EXDEV, "", "/x", None, "/y"), "/x and /y are on different disks"),
    ):
        with pytest.raises(DiskError) as found, disk_errors(tmp_path):
            raise error
        assert str(found.value).startswith(text)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "",
        ".hidden",
        "folder:/x",
        "my photos",
        "a..b",
        "-x",
        "e\u0301",
        "x\ud800",
        "a" * 201,
    ],
)
def test_a_data_set_name_is_a_folder_name(name: str) -> None:
    with pytest.raises(CacheError, match="data set name"):
        CacheRoot(Path()).samples(name)


@pytest.mark.parametrize("name", ["photos", "фото-2024", "写真", "तस्वीरें", "éa", "a.b_c-"])
def test_names_of_any_script_are_kept(name: str) -> None:
    assert CacheRoot(Path("c")).samples(name) == Path("c/samples", name, "part-00000.parquet")
    assert is_table(f"samples/{name}/part-00000.parquet")


@given(st.text(max_size=30) | st.text("ab.-_ é\u0301/", max_size=300))
def test_any_text_gives_a_name_or_none(text: str) -> None:
    name = as_dataset_name(text)
    assert name == as_dataset_name(name)
    assert not name or is_dataset_name(name)
    assert "/" not in name and ".." not in name and len(name.encode()) <= 200
