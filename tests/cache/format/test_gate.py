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
from cache.format.gate import (
    check_regular,
    decode,
    fit,
    open_file,
    open_regular,
    parse_json,
    read_file,
    read_regular,
    refuse_links,
)
from tests.support.faults import HUGE, NO_FILES, in_time, put_in_place


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


def test_a_file_outside_a_cache_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 100)
    (tmp_path / "name").symlink_to("blob")
    assert read_regular(tmp_path / "name", most=100) == b"x" * 100
    with open_regular(str(tmp_path / "name")) as file:
        assert os.get_blocking(file.fileno()) is False and file.read() == b"x" * 100
    assert check_regular(tmp_path / "name").st_size == 100
    with pytest.raises(OSError, match="100 bytes, at most 99 are read"):
        open_regular(tmp_path / "name", most=99)


@pytest.mark.parametrize("kind", [*NO_FILES, "a link to a FIFO", "10 GB"])
def test_anything_but_a_file_is_an_error_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    put_in_place(path, "a FIFO" if kind == "a link to a FIFO" else kind)
    if kind == "a link to a FIFO":
        path = tmp_path / "link"
        path.symlink_to("x")
    expected = {
        "a link to itself": "Too many levels of symbolic links",
        "a dangling link": "No such file or directory",
        "a link to a FIFO": "a FIFO, not a file",
        "10 GB": f"{HUGE:,} bytes, at most 67,108,864 are read",
    }.get(kind, f"{kind}, not a file")
    with in_time():
        for read in (read_regular, lambda path: check_regular(path, most=64 << 20)):
            with pytest.raises(OSError, match=expected) as caught:
                read(path)
            assert caught.value.strerror == expected and caught.value.filename == str(path)


def test_why_json_does_not_fit_is_one_line() -> None:
    assert parse_json(b'{"loss": [NaN, -Infinity]}', not_finite=True)["loss"][1] == float("-inf")
    for text, reason in (
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":\n1,}', "Illegal trailing comma|Expecting property name"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            parse_json(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$.rows`"):
        fit({"rows": "3"}, Rows)
