"""Each file below a folder is yielded once, with the reason if it is not looked at.

[file.path for file in walk(Path("/photos"), leave_out=Path("/photos/cache"))]
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from encode.sources.folder_files import BROKEN, HIDDEN, LINKED, walk, why_unused
from model.media.kinds import recognise


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def found(folder: Path, leave_out: Path | None = None) -> dict[str, str]:
    return {file.path: file.problem for file in walk(folder, leave_out or folder / "cache")}


def test_files_come_sorted_before_subfolders(tmp_path: Path) -> None:
    put(tmp_path, "b.jpg", "Z.png", "a/2.jpg", "a/10.jpg", "a/x/1.jpg", "c/1.jpg")
    expected = ["Z.png", "b.jpg", "a/10.jpg", "a/2.jpg", "a/x/1.jpg", "c/1.jpg"]
    assert list(found(tmp_path)) == expected
    assert set(found(tmp_path).values()) == {""}


def test_what_is_not_looked_at_has_a_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", ".hidden.png", ".git/x.png", ".git/objects/y", "sub/.z", "cache/row.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "again.jpg").symlink_to("a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert found(tmp_path) == {
        "a.jpg": "",
        "again.jpg": "",
        ".hidden.png": HIDDEN,
        ".git/x.png": HIDDEN,
        ".git/objects/y": HIDDEN,
        "sub/.z": HIDDEN,
        "loop": LINKED,
        "gone.jpg": BROKEN,
        "pipe.jpg": "a FIFO, not a file",
    }


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.jpg")
        assert found(tmp_path) == {"s.jpg": "a socket, not a file"}


def test_only_the_one_folder_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "cache/a.jpg", "sub/cache/b.jpg", "caches/c.jpg")
    assert set(found(tmp_path)) == {"sub/cache/b.jpg", "caches/c.jpg"}


def test_deep_folders_are_no_problem(tmp_path: Path) -> None:
    here = tmp_path
    for _ in range(300):  # not more: pytest removes folders by nested calls
        here = here / "d"
        here.mkdir()
    (here / "x.jpg").write_bytes(b"x")
    (only,) = found(tmp_path)
    assert only.endswith("d/x.jpg")


def test_names_in_no_encoding_are_yielded(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    assert list(found(tmp_path)) == ["caf\udce9.jpg"]


@pytest.mark.parametrize(
    ("head", "name", "reason"),
    [
        (b"hello", "notes.txt", ".txt"),
        (b"# A", "README.MD", ".md"),
        (b"MIT", "LICENSE", "without a suffix"),
        (b"\x00\x01\x02", "x.bin", ".bin"),
        (b"\x00\x01\x02", "shard.00017", "without a suffix"),
        (b'{"a": 1}', "x.json", ".json"),
        (b"<!doctype html><p>Not found", "cat.jpg", ".jpg (HTML page)"),
        (b"Not found", "cat.JPG", ".jpg (text)"),
        (b"%PDF-1.7", "a.pdf", ".pdf (PDF document; convert it to PNG or JPEG)"),
        (b"PK\x03\x04", "all.zip", ".zip (ZIP archive; unpack it)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a.png",
            ".png (Git LFS pointer; fetch the file itself: git lfs pull)",
        ),
        (
            b"\0\0\0\x0cjP  \r\n\x87\n",
            "scan.jp2",
            ".jp2 (JPEG 2000; convert it to PNG or JPEG)",
        ),
    ],
)
def test_the_reason_is_what_the_content_is(head: bytes, name: str, reason: str) -> None:
    assert why_unused(recognise(head, name), name) == reason


def test_a_file_that_cannot_be_read_says_so() -> None:
    assert why_unused(None, "x.dat") == ".dat (cannot be read)"
