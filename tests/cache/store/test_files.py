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

from cache.errors import CacheError, CorruptError, DiskError
from cache.remote.listing import is_table
from cache.store.files import (
    MAX_DEPTH,
    PARTIAL,
    create_file,
    disk_errors,
    entries,
    make_folder,
    move,
    new_file,
    new_folder,
    open_in_place,
    regular_files,
    remove_file,
    remove_tree,
    strangers,
    write_atomic,
)
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


# ---- links


@pytest.mark.parametrize("place", ["spaces", "spaces/a", "spaces/a/b"])
def test_no_operation_goes_through_a_link(tmp_path: Path, place: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    file = root / "spaces" / "a" / "b" / "file"
    file.parent.mkdir(parents=True)
    file.write_text("ours")
    (root / place).rename(outside)
    (root / place).symlink_to(outside)
    before = sorted((path, path.is_file() and path.read_text()) for path in outside.rglob("*"))
    other = root / "damaged" / "file"
    for refused in (
        lambda: write_atomic(file, b"new", root=root),
        lambda: write_atomic(file.with_name("new"), b"new", root=root),
        lambda: make_folder(file.parent / "new", root),
        lambda: new_folder(file.parent / "new", root),
        lambda: create_file(file.with_name("new"), root),
        lambda: open_in_place(file, root),
        lambda: move(file, other, root),
        lambda: remove_file(file, root),
        lambda: remove_tree(file.parent, root),
        lambda: list(entries(file, root)),
    ):
        with pytest.raises(CorruptError, match=f"{place}: a link, refused.*cache.gc --delete"):
            refused()
    assert before == sorted((p, p.is_file() and p.read_text()) for p in outside.rglob("*"))
    assert strangers(root) == [(root / place, (root / place).lstat().st_mode)]
    remove_file(root / place, root)
    assert outside.exists() and not (root / place).is_symlink()


@pytest.mark.parametrize("kind", ["link", "link to nothing", "FIFO", "folder"])
def test_a_file_is_not_written_where_something_else_is(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "media" / "file", tmp_path / "target"
    path.parent.mkdir()
    target.write_text("precious")
    match kind:
        case "link":
            path.symlink_to(target)
        case "link to nothing":
            path.symlink_to(tmp_path / "nothing")
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    what = f"media/file: a {kind.split()[0]}, refused"
    with pytest.raises(CorruptError, match=what):
        write_atomic(path, b"new", root=tmp_path)
    with pytest.raises(CorruptError, match=what):
        os.close(open_in_place(path, tmp_path))
    with pytest.raises(FileExistsError):
        create_file(path, tmp_path)
    assert target.read_text() == "precious" and not (tmp_path / "nothing").exists()
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208 - links to nothing too


def test_trees_are_removed_with_their_links_and_bounded(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "garbage" / "tree"
    outside.mkdir()
    (outside / "file").write_text("precious")
    tree.mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "file").write_text("xy")
    os.mkfifo(tree / "fifo")
    found = {path.name: status.st_size for path, status in entries(tree, tmp_path)}
    assert found.keys() == {"link", "file", "fifo"} and found["file"] == 2
    assert regular_files(tree, tmp_path) == [tree / "file"]
    remove_tree(tree, tmp_path)
    assert (outside / "file").exists() and not tree.exists()
    Path(tree, *["d"] * (MAX_DEPTH + 1)).mkdir(parents=True)
    with pytest.raises(CorruptError, match="nested too deeply"):
        list(entries(tree, tmp_path))
    remove_tree(tree, tmp_path)
    with pytest.raises(CorruptError, match="not below its cache"):
        remove_file(tmp_path / "garbage" / ".." / ".." / "x", tmp_path)
