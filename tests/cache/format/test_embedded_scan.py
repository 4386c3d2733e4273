"""Rows are read without the bytes of their media, and each row tells which media it has.

with TableFile(path) as table:
    for part in table.scan(0, media_columns(table.schema)):
        part.rows.to_pylist(), part.media["image"]
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.format.embedded import scan as embedded_scan
from cache.format.embedded.names import read_embedded, row_source
from cache.format.embedded.scan import Item, TableFile, declared_types, media_columns

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(path: Path, table: pa.Table, rows: int = 1000, **options: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows, **options)
        return path
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, rows)
    return path


def scan(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Return all rows without media, and what each row has in each column of media."""
    rows: list[dict[str, Any]] = []
    with TableFile(path) as table:
        columns = media_columns(table.schema)
        media: dict[str, list[Any]] = {column.name: [] for column in columns}
        for block in range(table.blocks):
            for part in table.scan(block, columns):
                assert part.first == len(rows)
                rows += (
                    part.rows.to_pylist() if part.rows.num_columns else [{}] * part.rows.num_rows
                )
                for name, items in part.media.items():
                    media[name] += items
    return rows, media


images = st.none() | st.fixed_dictionaries(
    {"bytes": st.none() | st.binary(max_size=3), "path": st.none() | st.just("a.png")}
)
KINDS = {
    "image": (IMAGE, images),
    "images": (pa.list_(IMAGE), st.none() | st.lists(images, max_size=3)),
    "bare": (pa.struct({"bytes": pa.binary()}), st.none() | st.just({"bytes": b"1"})),
    "blob": (pa.binary(), st.none() | st.binary(max_size=3)),
    "blobs": (pa.large_list(pa.large_binary()), st.none() | st.lists(st.none() | st.just(b"1"))),
}


def wanted(cell: Any) -> Any:
    """Return what a scan says of a cell."""
    if isinstance(cell, list):
        return [wanted(one) or Item(None, False) for one in cell]
    if isinstance(cell, dict):
        return Item(cell.get("path"), cell["bytes"] is not None)
    return None if cell is None else Item(None, True)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_column_of_media_is_described_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, name: str, data: st.DataObject
) -> None:
    type_, strategy = KINDS[name]
    cells = data.draw(st.lists(strategy, max_size=20))
    table = pa.table({"text": pa.array(map(str, range(len(cells)))), name: pa.array(cells, type_)})
    options = {"write_statistics": data.draw(st.booleans())} if suffix == ".parquet" else {}
    path = tmp_path_factory.mktemp("scan") / f"a{suffix}"
    rows, media = scan(write(path, table, data.draw(st.integers(1, 7)), **options))
    assert [row["text"] for row in rows] == [str(n) for n in range(len(cells))]
    assert media == {name: [wanted(cell) for cell in cells]}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_names_of_a_scan_are_read(tmp_path: Path, suffix: str) -> None:
    cells = [[{"bytes": b"%d.%d" % (n, k)} for k in range(n % 3)] for n in range(1500)]
    path = write(
        tmp_path / f"a{suffix}", pa.table({"images": pa.array(cells, pa.list_(IMAGE))}), 700
    )
    _, media = scan(path)
    for row in range(0, 1500, 7):
        assert len(media["images"][row]) == len(cells[row])
        for index, cell in enumerate(cells[row]):
            source = row_source(suffix[1:], str(path), "images", row, index)
            assert read_embedded(source, 99) == cell["bytes"]


def test_the_bytes_of_media_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"bytes": os.urandom(100_000), "path": None} for _ in range(200)]
    table = pa.table(
        {
            "text": ["text"] * 200,
            "image": pa.array(cells, IMAGE),
            "images": pa.array([[cell] if n % 9 else [] for n, cell in enumerate(cells)]),
            "blob": [cell["bytes"] for cell in cells],
        }
    )
    path = write(
        tmp_path / "a.parquet", table.cast(table.schema.set(2, pa.field("images", pa.list_(IMAGE))))
    )
    read = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *a, **k: read.extend(k["columns"]) or batches(self, *a, **k),
    )
    rows, media = scan(path)
    assert [len(items or ()) for items in media["images"]] == [int(n % 9 > 0) for n in range(200)]
    assert len(rows) == len(media["image"]) == len(media["blob"]) == 200
    assert "images.list.element.path" in read
    assert not [name for name in read if name.endswith("bytes") or name == "blob"]


def test_only_columns_that_can_hold_bytes_are_media() -> None:
    schema = pa.schema(
        {
            "text": pa.string(),
            "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()})),
            "image": IMAGE,
            "numbers": pa.list_(pa.int64()),
            "blob": pa.large_binary(),
            "struct": pa.struct({"bytes": pa.string()}),
            "deep": pa.list_(pa.list_(IMAGE)),
        }
    )
    assert [column.name for column in media_columns(schema)] == ["image", "blob"]


def test_types_that_the_library_datasets_declares() -> None:
    features = {
        "a": {"_type": "Image"},
        "b": [{"_type": "Image"}],
        "c": {"feature": {"_type": "Video"}, "_type": "Sequence"},
        "d": {"dtype": "string", "_type": "Value"},
        "e": {"feature": {"feature": {"_type": "Audio"}, "_type": "List"}, "_type": "List"},
        "f": [{"user": {"_type": "Value"}}],
        "g": [],
    }
    text = json.dumps({"info": {"features": features}})
    found = declared_types(pa.schema({}, metadata={"huggingface": text}))
    assert found == {
        "a": "Image",
        "b": "Image",
        "c": "Video",
        "d": "Value",
        "e": "Audio",
        "f": "",
        "g": "",
    }
    for odd in ("", "{", "[]", '{"info": 1}', '{"info": {"features": []}}', "[" * 99_999):
        assert declared_types(pa.schema({}, metadata={"huggingface": odd})) == {}
    assert declared_types(pa.schema({})) == {}


def test_the_first_bytes_tell_what_a_column_has(tmp_path: Path) -> None:
    cells = [None, {"bytes": None}, {"bytes": b"\x89PNG and more"}]
    for suffix in (".parquet", ".arrow"):
        path = write(
            tmp_path / f"a{suffix}", pa.table({"x": pa.array(cells, IMAGE), "y": [None, b"", b"1"]})
        )
        with TableFile(path) as table:
            column, blob = media_columns(table.schema)
            assert table.first_bytes(column, 4) == b"\x89PNG"
            assert table.first_bytes(blob, 4) == b""
    empty = write(tmp_path / "b.parquet", pa.table({"x": pa.array([], IMAGE)}))
    with TableFile(empty) as table:
        assert table.first_bytes(column, 4) == b""


def test_a_part_has_few_rows_and_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_scan, "ROWS", 16)
    cells = [[os.urandom(10)] for _ in range(100)]
    path = write(tmp_path / "a.parquet", pa.table({"blobs": cells, "text": ["a"] * 100}))
    with TableFile(path) as table:
        sizes = [part.rows.num_rows for part in table.scan(0, media_columns(table.schema))]
    assert sizes == [16] * 6 + [4]
