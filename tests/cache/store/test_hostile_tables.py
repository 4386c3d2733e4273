"""Sealed files that this program would not write: each is one CacheError, and takes little memory.

change a value of space.json, a commit, an index, samples or the media table; seal it; open the cache
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nanomolmo2 as nm
from cache.errors import CacheError, CorruptError
from cache.format.checksums import UNSEALED, seal, seal_file, sealed_json
from cache.maintenance.checks import verify
from cache.maintenance.garbage import find_garbage, find_removals, wanted_keys
from cache.maintenance.inventory import list_failures, list_notes, open_spaces, summarise_datasets
from cache.maintenance.merge_tables import plan_media, plan_samples
from cache.maintenance.repair import Repair
from cache.store import index_file
from cache.store.index_file import save_index
from cache.store.ledger import MediaRecord, append_media, media_table, read_media
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.samples import (
    MediaRef,
    Message,
    Origin,
    Sample,
    dataset_names,
    read_origin,
    read_samples,
    samples_table,
    write_samples,
)
from cache.store.space import find_space
from tests.support import ROOT
from tests.support.spaces import fill, key, make_space

HUGE = 10**30
TEXT = "x" * (1 << 20)


def deep(levels: int = 500) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


ODD: Sequence[Any] = (
    *(None, True, False, -1, 0, 1.5, 3.0, HUGE, 2**31, 2**63, -(2**63), 1e308, "", "x", "../../x"),
    *(
        "/etc",
        "a\nb",
        "\x1b[31m",
        "\u202e",
        "\udcff",
        TEXT,
        "9" * 5000,
        [],
        {},
        [None],
        [[]],
        {"": {}},
    ),
)
"""Values that are put where another is."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    """A cache with two shards, an index, samples and media; each test gets a copy."""
    root = CacheRoot(tmp_path_factory.mktemp("made") / "cache")
    space = make_space(root.path)
    fill(space, [1, 2, 3, 4])
    fill(space, [5, 6])
    fill(space, [7], "frame", "t:0")
    worth, index_file.WORTH_COMMITS = index_file.WORTH_COMMITS, 1
    save_index(space.paths, space.info)
    index_file.WORTH_COMMITS = worth
    assert space.paths.index("image").is_file()
    samples = [
        Sample(
            id=str(n),
            dataset="toy",
            messages=(
                Message(role="user", content="<image>?"),
                Message(role="assistant", content="a"),
            ),
            media=(MediaRef(source=f"/{n}.png", sha256=key(n)),),
        )
        for n in (1, 2, 3)
    ]
    write_samples(root, "toy", samples, Origin(words=("--dataset", "toy"), said="3 samples"))
    records = [MediaRecord(source=f"/{n}.png", key=key(n), width=4, height=4) for n in (1, 2)]
    failed = MediaRecord(source="/3.png", status="failed", stage="decode", error="cut")
    append_media(root, [*records, failed], "test")
    return root


@pytest.fixture
def root(made: CacheRoot, tmp_path: Path) -> CacheRoot:
    """A copy of that cache."""
    shutil.copytree(made.path, tmp_path / "cache")
    return CacheRoot(tmp_path / "cache")


def use(root: CacheRoot, *names: str) -> list[str]:
    """Read a cache as the library and the commands do, in all ways or these; return the errors."""

    def reader() -> None:
        opened = FeatureReader(find_space(root, None))
        for array, index in opened.index.items():
            rows = index.rows(np.arange(index.stored))
            out = np.empty((len(rows), opened.geometry[array].row_bytes), np.uint8)
            opened.read_into(array, rows, out)
            [index.identity(at) for at in range(index.stored)]
        opened.logical_hash()

    def listing() -> None:
        spaces, readers = open_spaces(root, errors=True)
        json.dumps([repr(space) for space in spaces])
        summarise_datasets(root, readers)

    def texts() -> None:
        for name in dataset_names(root):
            list(read_samples(root, name))
            samples_table(root, name)
            read_origin(root, name)

    def garbage() -> None:
        find_garbage(root, root.space_folders())
        wanted = wanted_keys(root)
        for space in root.space_folders():
            find_removals(space, wanted, unreferenced=True)

    def merging() -> None:
        plan_media(CacheRoot(root.path.with_name("other")), root)
        plan_samples(CacheRoot(root.path.with_name("other")), root, None)

    def dataset() -> None:
        data = nm.open(root.path).dataset(min_coverage=0.0, held_out=0.0)
        [data[at] for at in range(len(data))]

    ways: dict[str, Callable[[], object]] = {
        "reader": reader,
        "listing": listing,
        "texts": texts,
        "garbage": garbage,
        "merging": merging,
        "dataset": dataset,
        "failures": lambda: list_failures(root),
        "notes": lambda: list_notes(root),
        "media": lambda: read_media(root),
        "verify": lambda: verify(root, deep=True),
    }
    errors = []
    for name in names or ways:
        try:
            ways[name]()
        except CacheError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)[:200]
            errors.append(str(error))
    return errors


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value inside another."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in inner:
        yield (*at, name)
        if isinstance(item, dict | list):
            yield from places(item, (*at, name))


def replaced(value: Any, place: Sequence[Any], new: Any) -> Any:
    """Return a copy of `value` in which another value is at a place; `...` removes it."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for name in place[:-1]:
        holder = holder[name]
    if new is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = new
    return copy


# ---- space.json and zarr.json


def test_space_json_is_typed_and_ranged(root: CacheRoot) -> None:
    path = find_space(root, None).space_json
    good = json.loads(path.read_bytes())
    del good["seal"]
    checked = 0
    for place in places(good):
        for new in (..., *ODD, deep()):
            values = replaced(good, place, new)
            if values == good and str(values) == str(good):
                continue
            try:
                path.write_bytes(sealed_json(values))
            except (ValueError, RecursionError):
                continue
            try:
                FeatureReader(SpacePaths(path.parent))
            except CacheError as error:
                assert "\n" not in str(error), place
                assert len(str(error)) < 1500, place
            else:
                # Any JSON that is not nested deeply; and a field with the value that it has anyway.
                assert place[0] == "load" or (place[0] == "spec" and new is ...), (place, new)
            checked += 1
    assert checked > 500
    for text in (b"[1]", b"null", b'{"format": 1, "format": 1}', b"\xff", b"{", b'{"a": NaN}'):
        path.write_bytes(seal(text + b'\n"' + UNSEALED.encode() + b'"'))
        assert use(root)
    path.write_bytes(sealed_json({**good, "more": 1}))
    assert use(root)


def test_the_shape_in_zarr_json_is_a_number_of_rows(root: CacheRoot) -> None:
    paths = find_space(root, None)
    path = paths.array_json("image")
    good = json.loads(path.read_bytes())
    del good["attributes"]
    for new in (..., *ODD, [], [HUGE], [2**62, 4, 64], ["8", 4, 64], [True, 4, 64], deep()):
        path.write_bytes(sealed_json(replaced(good, ("shape",), new)))
        assert not use(root, "garbage")
        assert verify(root).all_findings, new


# ---- commits


def commit_with(root: CacheRoot, table: pa.Table, meta: dict[str, Any], **options: Any) -> None:
    path = find_space(root, None).commit("image", 0)
    shutil.rmtree(find_space(root, None).index_dir, ignore_errors=True)
    parquet_with(path, table, meta, **options)


def parquet_with(path: Path, table: pa.Table, meta: dict[str, Any], **options: Any) -> None:
    """Write and seal a Parquet file."""
    options = {"compression": "none", "write_statistics": False} | options
    with path.open("w+b") as file:
        with pq.ParquetWriter(file, table.schema, **options) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({**meta, "seal": UNSEALED})
        seal_file(file)


def parquet_of(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """Return the table and the metadata of a file of ours."""
    found = pq.read_metadata(path).metadata
    meta = {k.decode(): v.decode() for k, v in found.items() if k not in (b"ARROW:schema", b"seal")}
    return pq.read_table(path).replace_schema_metadata(), meta


def variants(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield tables with other columns or values than a good one."""
    yield "more", table.append_column("more", pa.nulls(len(table), pa.int8()))
    yield "none", table.slice(0, 0)
    yield (
        "all null",
        pa.table({f.name: pa.nulls(len(table), f.type) for f in table.schema}, table.schema),
    )
    for at, field in enumerate(table.schema):
        column = table.column(at)
        yield f"{field.name} missing", table.remove_column(at)
        yield f"{field.name} twice", table.append_column(field, column)
        yield f"{field.name} null", table.set_column(at, field, pa.nulls(len(table), field.type))
        for kind in (
            pa.string(),
            pa.binary(),
            pa.int8(),
            pa.bool_(),
            pa.float16(),
            pa.list_(pa.int64()),
        ):
            if kind != field.type:
                yield (
                    f"{field.name} {kind}",
                    table.set_column(at, field.name, pa.nulls(len(table), kind)),
                )
        new: Sequence[Any] = ()
        if pa.types.is_string(field.type):
            new = ("", "x\ny", "\x1b[2J", "\u202e", TEXT, "t:" + "9" * 30, b"\xff\xfe")
        elif pa.types.is_floating(field.type):
            new = (float("nan"), float("inf"), -1.0, 1e300)
        elif pa.types.is_integer(field.type):
            new = (-1, 2**31 - 1, 2**62)
        for value in new:
            if isinstance(value, bytes):
                values = pa.array([value] * len(table), pa.binary()).view(pa.string())
            else:
                try:
                    values = pa.array([value] * len(table), field.type)
                except (pa.ArrowException, OverflowError):
                    continue
            yield f"{field.name}={str(value)[:20]!r}", table.set_column(at, field, values)


def test_commits_are_typed_and_ranged(root: CacheRoot) -> None:
    path = find_space(root, None).commit("image", 0)
    table, meta = parquet_of(path)
    commit_with(root, table, meta)
    assert not use(root)
    harmless = ("error=", "time_s='1e", "view='t:99", "time_s null")
    for number, (name, other) in enumerate(variants(table)):
        commit_with(root, other, meta)
        assert use(root, *([] if number % 8 == 0 else ["reader"])) or name.startswith(harmless), (
            name
        )
    for name in meta:
        for new in (None, "", "-1", "1.5", "9" * 5000, "x", "0x10", "\u0663", TEXT, "1 2 3", "01"):
            changed = {k: v for k, v in meta.items() if k != name}
            changed |= {} if new is None else {name: new}
            commit_with(root, table, changed)
            assert use(root, "reader"), (name, new)
    for replaces in ("-1", "x", "1  2", "9" * 9, " ".join(["1"] * 600_000), "\n"):
        commit_with(root, table, {**meta, "replaces": replaces})
        assert use(root, "reader"), replaces[:20]


def test_commits_that_are_stored_in_other_ways(root: CacheRoot) -> None:
    table, meta = parquet_of(find_space(root, None).commit("image", 0))
    for options in (
        {"compression": "zstd"},
        {"compression": "gzip"},
        {"data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"row": "DELTA_BINARY_PACKED"}},
        {"use_dictionary": False, "column_encoding": {"view": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"error": "BYTE_STREAM_SPLIT"}},
    ):
        commit_with(root, table, meta, **options)
        assert use(root), options
    commit_with(root, table, meta, use_dictionary=False)
    assert not use(root)
    for data in (b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 4 + b"PAR1", bytes(100)):
        path = find_space(root, None).commit("image", 0)
        path.write_bytes(seal(data + UNSEALED.encode() + b"\xff\xff\xff\x7fPAR1"))
        assert use(root)


# ---- samples


def test_samples_are_typed_and_ranged(root: CacheRoot) -> None:
    path = root.samples("toy")
    table, meta = parquet_of(path)
    parquet_with(path, table, meta)
    assert not use(root)
    for number, (name, other) in enumerate(variants(table)):
        parquet_with(path, other, meta)
        fine = name.startswith(("id=", "dataset=", "task=", "choice=", "weight='1e", "none"))
        fine &= "xff" not in name
        assert use(root, *([] if number % 12 == 0 else ["texts", "dataset"])) or fine, name
    rows = table.to_pylist()
    for place in places(rows[:1]):
        for new in (None, -1.0, float("nan"), float("inf"), "", "x", "\x1b", TEXT, [], [None]):
            changed = replaced(rows, place, new)
            try:
                odd = pa.Table.from_pylist(changed, table.schema)
            except (pa.ArrowException, AttributeError, TypeError):
                continue
            parquet_with(path, odd, meta)
            errors = use(root, "texts", "listing")
            assert errors or new is not None or place[-1] == "sha256", place
    for name in meta:
        for new in (
            None,
            "",
            "x",
            "[]",
            "{}",
            "null",
            "[" * 100_000,
            '{"words": [1]}',
            TEXT,
            "\u0663" * 64,
        ):
            changed_meta = {k: v for k, v in meta.items() if k != name}
            parquet_with(path, table, changed_meta | ({} if new is None else {name: new}))
            errors = use(root, "texts", "listing")
            assert errors or name == "origin", (name, new)


def test_folders_below_samples_with_odd_names(root: CacheRoot) -> None:
    for name in (
        b"..x",
        b"-x",
        b" ",
        b"a\nb",
        b"\xff\xfe",
        b"\x1b[31m",
        b"x" * 250,
        "e\u0301".encode(),
    ):
        folder = root.samples_dir / os.fsdecode(name)
        folder.mkdir()
        shutil.copy(root.samples("toy"), folder)
    assert dataset_names(root) == ["toy"]
    assert not use(root)
    assert sum("no file of ours" in f.what for f in verify(root).findings) == 8


# ---- the media table


def test_media_parts_are_typed_and_ranged(root: CacheRoot) -> None:
    (path,) = root.media_dir.iterdir()
    table, meta = parquet_of(path)
    parquet_with(path, table, meta)
    assert not use(root)
    nullable = ("key", "duration_s", "size", "mtime_ns", "ctime_ns", "inode", "note")
    for number, (name, other) in enumerate(variants(table)):
        parquet_with(path, other, meta)
        fine = name.startswith(
            (
                *(f"{n} null" for n in nullable),
                *("source=", "kind=", "error=", "note="),
                "bytes=",
                "none",
            )
        )
        fine |= any(
            name.startswith(f"{n}=") for n in ("width", "height", "size", "inode", "attempts")
        )
        fine |= name.startswith(("mtime_ns=", "ctime_ns="))
        assert use(root, *([] if number % 16 == 0 else ["media"])) or fine, name


@pytest.mark.parametrize(
    "name",
    ["part-x-y.parquet", "part-1-y.parquet", f"part-{'9' * 20}-y.parquet", "part-.parquet"],
)
def test_media_parts_with_odd_names(root: CacheRoot, name: str) -> None:
    (path,) = root.media_dir.iterdir()
    path.rename(path.with_name(name))
    with pytest.raises(CorruptError, match="no part of the media table"):
        media_table(root)
    assert use(root)
    Repair(root, deep=False, tell=lambda _: None, progress=lambda _: None).run(None)
    append_media(root, [MediaRecord(source="/1.png", key=key(1))], "test")
    assert len(media_table(root)) == 1


# ---- the index


def test_an_odd_index_is_ignored(root: CacheRoot, caplog: pytest.LogCaptureFixture) -> None:
    path = find_space(root, None).index("image")
    data = path.read_bytes()
    header = json.loads(data[: index_file.HEADER_BYTES])
    del header["seal"]
    good = FeatureReader(find_space(root, None)).index["image"].keys.tobytes()
    odd = (..., None, True, -1, 1.5, HUGE, 2**60, "x", [], [2**60], [2**60, 32], "|O", deep(50))
    for number, place in enumerate(places(header)):
        for new in odd[number % 4 :: 4]:
            values = replaced(header, place, new)
            if values == header:
                continue
            text = json.dumps({**values, "seal": UNSEALED}).encode().ljust(index_file.HEADER_BYTES)
            path.write_bytes(
                seal(text[: index_file.HEADER_BYTES * 4]) + data[index_file.HEADER_BYTES :]
            )
            caplog.clear()
            opened = FeatureReader(find_space(root, None))
            assert opened.index["image"].keys.tobytes() == good, (place, new)
            ignored = [r for r in caplog.records if "reading all commits instead" in r.getMessage()]
            assert ignored, (place, new)


# ---- memory

BOMBS = """
import resource, sys
from pathlib import Path
from cache.errors import CacheError
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.samples import samples_table

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder = Path(sys.argv[1])
before = peak()
for name in sys.argv[2:]:
    try:
        if name == "samples":
            samples_table(CacheRoot(folder / name), "toy")
        else:
            FeatureReader(SpacePaths(next((folder / name / "spaces").iterdir())))
    except CacheError as error:
        print(name, round(peak() - before), error)
"""


def test_what_a_file_takes_is_known_before_it_is_read(root: CacheRoot, tmp_path: Path) -> None:
    """Before, these took 350 MB, 16 GiB and 8 GB."""
    table, meta = parquet_of(find_space(root, None).commit("image", 0))
    bombs = {name: CacheRoot(tmp_path / name) for name in ("commit", "slots", "samples", "long")}
    for bomb in bombs.values():
        shutil.copytree(root.path, bomb.path)
    ones = table.take(pa.array(np.zeros(1_000_000, np.int64)))
    path = find_space(bombs["commit"], None).commit("image", 0)
    shutil.rmtree(find_space(bombs["commit"], None).index_dir)
    options = {"compression": "zstd", "write_statistics": False}
    with path.open("w+b") as file:
        with pq.ParquetWriter(file, ones.schema, **options) as writer:
            for _ in range(4):
                writer.write_table(ones)
            writer.add_key_value_metadata({**meta, "seal": UNSEALED})
        seal_file(file)
    assert path.stat().st_size < 1 << 20
    path = find_space(bombs["slots"], None).space_json
    values = json.loads(path.read_bytes())
    del values["seal"]
    values["rows_per_shard"]["image"] = 2**30
    path.write_bytes(sealed_json(values))
    path = bombs["samples"].samples("toy")
    texts, meta_of_texts = parquet_of(path)
    many = texts.take(pa.array(np.zeros(8192, np.int64)))
    long = pa.DictionaryArray.from_arrays(np.zeros(8192, np.int32), ["x" * (1 << 20)])
    many = many.set_column(many.column_names.index("choice"), "choice", long)
    parquet_with(path, many, meta_of_texts, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20
    views = pa.DictionaryArray.from_arrays(np.zeros(4, np.int32), ["x" * (1 << 20)])
    commit_with(bombs["long"], table.set_column(1, "view", views), meta, store_schema=False)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path), *bombs],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(bombs), done.stdout
    assert all(int(line.split()[1]) < 100 for line in lines), done.stdout
