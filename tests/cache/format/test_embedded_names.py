"""A source names bytes inside a table, a tar or a line of JSON, and reading it returns them.

source = row_source("parquet", "/data/train.parquet", "image", 17)
data = read_embedded(source, max_bytes=1 << 30)
"""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import EmbeddedMediaError
from cache.format.embedded import rows as embedded_rows
from cache.format.embedded.names import (
    container_of,
    data_uri_source,
    data_uris,
    is_embedded,
    member_source,
    parse,
    read_embedded,
    row_source,
)

MOST = 1 << 20
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
paths = st.text(min_size=1).filter(lambda text: "\0" not in text).map("/{}".format)


def write(path: Path, columns: dict[str, Any], rows: int = 1000) -> str:
    """Write a table as Parquet, as an Arrow file or as an Arrow stream, by the suffix; return its path."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    elif path.suffix == ".feather":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, rows)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, rows)
    return str(path)


def format_of(path: str) -> str:
    return "parquet" if path.endswith(".parquet") else "arrow"


# ---- names


@given(
    paths,
    st.text(min_size=1),
    st.integers(0, 10**18 - 1),
    st.none() | st.integers(0, 99),
    st.sampled_from(["parquet", "arrow"]),
)
def test_any_path_and_column_is_read_back_from_a_name(
    path: str, column: str, row: int, index: int | None, table_format: str
) -> None:
    source = row_source(table_format, path, column, row, index)
    assert is_embedded(source) and "\n" not in source
    assert container_of(source) == path
    assert parse(source)[:5] == (table_format, path, column, row, index)


@given(paths, st.text(), st.integers(0, 10**18 - 1), st.integers(0, 10**18 - 1))
def test_any_member_is_read_back_from_a_name(path: str, name: str, offset: int, size: int) -> None:
    place = parse(member_source(path, offset, size, name))
    assert (place.container, place.member, place.offset, place.size) == (path, name, offset, size)
    place = parse(data_uri_source(path, offset, size, 7))
    assert (place.container, place.item, place.offset, place.size) == (path, 7, offset, size)


def test_names_that_are_not_utf_8_become_text_and_are_found_again(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9#1 100%")
    Path(folder).mkdir()
    Path(write(tmp_path / "a.parquet", {"image": [b"one", b"two"]})).rename(
        path := f"{folder}/a.parquet"
    )
    source = row_source("parquet", path, "image", 1)
    source.encode()  # no lone surrogates: a samples table stores it
    assert container_of(source) == path
    assert read_embedded(source, MOST) == b"two"


@pytest.mark.parametrize(
    "source",
    ["/data/a.jpg", "/parquet:/a#b:1", "https://a.org/tar:/b", "HTTP://parquet", "tar", "", "json"],
)
def test_paths_and_urls_are_no_embedded_media(source: str) -> None:
    assert not is_embedded(source)


@pytest.mark.parametrize(
    "source",
    [
        "parquet:/a",
        "parquet:/a#image",
        "parquet:/a#image:-1",
        "parquet:/a#image:1:2:3",
        "parquet:/a#image:x",
        "parquet:/a#image:" + "9" * 5000,
        "tar:/a#1:b",
        "tar:/a#1+:b",
        "tar:/a#image:1",
        "json:/a#1+2",
        "json:/a#1+2:x",
        "zip:/a#1+2:x",
    ],
)
def test_what_is_no_name_is_refused(source: str) -> None:
    with pytest.raises(EmbeddedMediaError, match="no name of embedded media"):
        read_embedded(source, MOST)


# ---- tables


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_each_kind_of_column_gives_its_bytes(tmp_path: Path, suffix: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"five").decode()
    path = write(
        tmp_path / f"a{suffix}",
        {
            "image": pa.array([{"bytes": b"one", "path": "1.png"}, None, {"bytes": None}], IMAGE),
            "images": pa.array(
                [[{"bytes": b"two"}, {"bytes": b"three"}], [], None], pa.list_(IMAGE)
            ),
            "blob": pa.array([b"four", None, b""], pa.large_binary()),
            "blobs": pa.array([[b"a", b"b"], None, [None]], pa.large_list(pa.binary())),
            "text": [uri, base64.b64encode(b"six").decode(), "no base64!"],
            "a.b:c#d": [b"seven", b"eight", b"nine"],
            "number": [1, 2, 3],
        },
    )
    source = lambda *place: row_source(format_of(path), path, *place)  # noqa: E731
    wanted = {
        source("image", 0): b"one",
        source("images", 0, 0): b"two",
        source("images", 0, 1): b"three",
        source("blob", 0): b"four",
        source("blob", 2): b"",
        source("blobs", 0, 1): b"b",
        source("text", 0): b"five",
        source("text", 1): b"six",
        source("a.b:c#d", 2): b"nine",
    }
    assert {name: read_embedded(name, MOST) for name in wanted} == wanted
    for place, reason in {
        ("image", 1): "no bytes",
        ("image", 2): "no bytes",
        ("image", 3): "row 3 of a file of 3 rows",
        ("image", 0, 0): "not a list",
        ("images", 0): "a list, and no item is named",
        ("images", 0, 2): "item 2 of a list of 2",
        ("images", 1, 0): "item 0 of a list of 0",
        ("images", 2, 0): "item 0 of a list of 0",
        ("blobs", 2, 0): "no bytes",
        ("text", 2): "damaged base64",
        ("picture", 0): "no column 'picture'",
        ("number", 0): "int64 instead of bytes",
    }.items():
        with pytest.raises(EmbeddedMediaError, match=reason):
            read_embedded(source(*place), MOST)
    assert read_embedded(source("image", 0), MOST) == b"one"  # errors leave the file readable
    with pytest.raises(EmbeddedMediaError, match="3 bytes, more than 2"):
        read_embedded(source("image", 0), 2)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_rows_are_found_in_any_order_by_several_threads(tmp_path: Path, suffix: str) -> None:
    rows = 5000
    images = [{"bytes": b"%d" % n * (n % 50), "path": None} for n in range(rows)]
    path = write(tmp_path / f"a{suffix}", {"image": pa.array(images, IMAGE)}, 1700)
    names = [row_source(format_of(path), path, "image", n) for n in range(rows)]
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda name: read_embedded(name, MOST), names))
    assert read == [image["bytes"] for image in images]
    for n in (4999, 0, 1699, 1700, 1698, 3399, 12, 3400):
        assert read_embedded(names[n], MOST) == images[n]["bytes"]


def test_reading_in_order_is_one_pass_and_holds_few_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, size = 400, 100_000
    images = [os.urandom(size) for _ in range(rows)]
    path = tmp_path / "a.parquet"
    table = pa.table({"image": images})
    pq.write_table(table, path, row_group_size=rows, use_dictionary=False, write_batch_size=10)
    del table
    monkeypatch.setattr(embedded_rows, "BATCH_BYTES", 10 * size)
    passes = []
    read = embedded_rows._ParquetCursor._read
    monkeypatch.setattr(
        embedded_rows._ParquetCursor, "_read", lambda self, n: passes.append(n) or read(self, n)
    )
    before = most = pa.total_allocated_bytes()
    order = [n ^ 3 for n in range(rows)]  # slightly out of order, as threads ask
    for n in order:
        assert read_embedded(row_source("parquet", str(path), "image", n), MOST) == images[n]
        most = max(most, pa.total_allocated_bytes())
    assert passes == [0]
    assert most - before < 80 * size


def test_a_value_that_every_row_repeats_is_not_held_once_for_each_row(tmp_path: Path) -> None:
    image = os.urandom(900_000)  # one entry of the dictionary: the file is small, its rows are not
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([image] * 1000)}), path)
    assert path.stat().st_size < 3_000_000
    before = pa.total_allocated_bytes()
    for n in (0, 500, 999):
        assert read_embedded(row_source("parquet", str(path), "image", n), MOST) == image
    assert pa.total_allocated_bytes() - before < 2 * embedded_rows.MAX_BATCH_BYTES


def test_a_container_that_changes_is_read_again(tmp_path: Path) -> None:
    for suffix in (".parquet", ".arrow"):
        path = tmp_path / f"a{suffix}"
        for content in (b"old", b"new, and longer"):
            new = tmp_path / f"new{suffix}"
            write(new, {"image": [content] * 3})
            new.rename(path)
            source = row_source(format_of(str(path)), str(path), "image", 2)
            assert read_embedded(source, MOST) == content
        path.unlink()
        with pytest.raises(EmbeddedMediaError, match="no such file"):
            read_embedded(source, MOST)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_damaged_table_never_gives_other_bytes_than_it_has(tmp_path: Path, suffix: str) -> None:
    """Each cut and each flipped bit gives an error or bytes; nothing ends the process."""
    images = [os.urandom(40) for _ in range(20)]
    path = Path(write(tmp_path / f"a{suffix}", {"image": pa.array(images, pa.binary())}, 10))
    whole = path.read_bytes()
    source = row_source(format_of(str(path)), str(path), "image", 15)
    failed = 0
    cuts = [whole[:at] for at in range(0, len(whole), 37)]
    end = len(whole)
    if suffix == ".parquet":
        # pyarrow 26 itself ends the process at 2 of the footer's bits (size statistics).
        end -= 8 + int.from_bytes(whole[-8:-4], "little")
    flips = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(0, end, 5)
    ]
    for data in (*cuts, *flips):
        path.unlink()
        path.write_bytes(data)
        try:
            assert len(read_embedded(source, MOST)) <= MOST
        except EmbeddedMediaError:
            failed += 1
    assert failed >= len(cuts) - 5  # an Arrow stream may lack its last marker


def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path) -> None:
    pointer = tmp_path / "a.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n")
    os.mkfifo(tmp_path / "pipe.arrow")
    for name in ("a.parquet", "pipe.arrow", "none.arrow", "."):
        for table_format in ("parquet", "arrow"):
            with pytest.raises(EmbeddedMediaError) as found:
                read_embedded(row_source(table_format, str(tmp_path / name), "image", 0), MOST)
            assert "\n" not in str(found.value) and len(str(found.value)) < 200


# ---- tars


def test_members_of_a_tar_are_read_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    files = {"a.jpg": b"one", "x" * 300 + ".jpg": b"two", "ü/c.png": b"", "d.txt": b"4" * 600}
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = {m.name: (m.offset_data, m.size) for m in tar}
    for name, data in files.items():
        assert read_embedded(member_source(str(path), *places[name], name), MOST) == data
    offset, size = places["d.txt"]
    for place, reason in {
        (offset, size + 1): "another member",
        (offset + 512, 88): "another member",
        (0, 3): "no member of a tar begins here",
        (10**12, 3): "cut short",
        (offset, 10**9): "more than",
    }.items():
        with pytest.raises(EmbeddedMediaError, match=reason):
            read_embedded(member_source(str(path), *place, "d.txt"), MOST)
    path.write_bytes(path.read_bytes()[: offset + 10])
    with pytest.raises(EmbeddedMediaError, match="cut short"):
        read_embedded(member_source(str(path), offset, size, "d.txt"), MOST)


# ---- JSON


def test_data_uris_are_numbered_in_document_order(tmp_path: Path) -> None:
    uri = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()  # noqa: E731
    value = {
        "images": [uri(b"one"), uri(b"two")],
        "text": "data: see below, it is no URI",
        "messages": [{"content": [{"image_url": {"url": uri(b"three")}}]}],
        "plain": "data:,f%6Fur",
        "bad": "data:image/png;base64,%%%",
    }
    line = json.dumps(value).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"first": 1}\n' + line + b"\n")
    source = lambda n, at=13: data_uri_source(str(path), at, len(line), n)  # noqa: E731
    found = [read_embedded(source(n), MOST) for n in range(4)]
    assert found == [b"one", b"two", b"three", b"four"]
    assert len(list(data_uris(value))) == 5
    for name, reason in {
        source(4): "damaged base64",
        source(5): "no data: URI 5",
        source(0, 12): "no JSON object here",
        source(0, 14): "cut short|no JSON object here",
        source(0, 10**9): "cut short",
    }.items():
        with pytest.raises(EmbeddedMediaError, match=reason):
            read_embedded(name, MOST)
    with pytest.raises(EmbeddedMediaError, match="more than 4"):
        read_embedded(data_uri_source(str(path), 13, len(line), 2), 4)
