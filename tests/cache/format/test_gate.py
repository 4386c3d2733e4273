"""What a cache names is opened only if it is a regular file below the cache, and decoded only if it fits.

with open_file(path, root, most=100) as file: ...
decode(b'{"rows": 3}', Rows, path)
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from cache.errors import CorruptError
from cache.format.gate import decode, open_file, read_file, refuse_links


@dataclass(frozen=True)
class Rows:
    rows: Annotated[int, msgspec.Meta(ge=0, le=100)]


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    path.write_bytes(b"x" * 100)
    assert read_file(path, tmp_path, most=100) == b"x" * 100
    with pytest.raises(CorruptError, match="100 bytes, at most 99 are read"):
        open_file(path, tmp_path, most=99)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "c" / "d", tmp_path)


@pytest.mark.parametrize("kind", ["a link", "a folder", "a FIFO", "a device", "a socket"])
def test_anything_else_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    listener = socket.socket(socket.AF_UNIX)
    match kind:
        case "a link":
            (tmp_path / "file").write_text("")
            path.symlink_to(tmp_path / "file")
        case "a folder":
            path.mkdir()
        case "a FIFO":
            os.mkfifo(path)
        case "a device":
            path = Path(os.devnull)
        case "a socket":
            listener.bind(os.path.relpath(path))
    with listener, pytest.raises(CorruptError, match=f"x?: {kind}, refused; a cache has files"):
        open_file(path)


def test_no_folder_on_the_way_is_a_link(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "b").mkdir(parents=True)
    (outside / "b" / "file").write_text("secret")
    (root / "c").mkdir(parents=True)
    (root / "a").symlink_to(outside)
    (root / "c" / "b").symlink_to(outside / "b")
    for path in (root / "a" / "b" / "file", root / "c" / "b" / "file"):
        assert path.read_text() == "secret"
        with pytest.raises(CorruptError, match="a link, refused"):
            open_file(path, root)
    (tmp_path / "named").symlink_to(outside)  # the user's own link
    assert read_file(tmp_path / "named" / "b" / "file", tmp_path / "named") == b"secret"
    refuse_links(root / "missing" / "too", root)


def test_json_becomes_a_typed_structure(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert decode(b'{"rows": 3}', Rows, path) == Rows(3)
    for text in (
        b'{"rows": "3"}',
        b'{"rows": 3.5}',
        b'{"rows": 101}',
        b'{"rows": -1}',
        b'{"rows": 1, "rows": 2}',
        b'{"rows": NaN}',
        b"{}",
        b"[3]",
        b"null",
        b"",
        b"\xff",
        b'{"rows": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"rows": {"a": ' * 5000,
    ):
        with pytest.raises(
            CorruptError, match=r"x\.json: not what this program writes: "
        ) as caught:
            decode(text, Rows, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
