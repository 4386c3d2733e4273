"""Change sealed Parquet files of a cache as a stranger may, under a valid seal, and files of any kind.

said = TABLE_KINDS["cells"](path, dice)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.format.checksums import UNSEALED, seal
from tests.integration.strangers.values import (
    NUMBERS,
    TEXTS,
    Change,
    Unchangeable,
    draw_text,
    draw_value,
    dump_json,
    load_json,
    short,
)


def load_table(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """Return the table of a sealed Parquet file and the metadata that we gave it, in order."""
    try:
        with pq.ParquetFile(pa.BufferReader(path.read_bytes())) as file:
            if file.metadata.num_rows > 10_000:
                raise Unchangeable
            metadata = {
                k.decode(): v.decode()
                for k, v in (file.metadata.metadata or {}).items()
                if k != b"ARROW:schema"
            }
            return file.read(use_threads=False).replace_schema_metadata(), metadata
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise Unchangeable from None


def save_table(path: Path, table: pa.Table, metadata: dict[str, str], **options: Any) -> None:
    """Write a Parquet file with a valid seal."""
    # As ours are written: another way may be refused before the content is looked at.
    usual: dict[str, Any] = {"compression": "zstd"} if path.parent.parent.name == "samples" else {}
    if path.parent.name == "commits":
        usual = {"compression": "none", "use_dictionary": ["view"]}
    options = usual | options
    sink = pa.BufferOutputStream()
    groups = options.pop("row_group_size", None)
    try:
        with pq.ParquetWriter(sink, table.schema, write_statistics=False, **options) as writer:
            writer.write_table(table, row_group_size=groups)
            rest = {k: v for k, v in metadata.items() if k != "seal"}
            writer.add_key_value_metadata({**rest, "seal": UNSEALED})
    except (pa.ArrowException, NotImplementedError):
        raise Unchangeable from None
    path.write_bytes(seal(sink.getvalue().to_pybytes()))


_TYPES = (
    *(pa.string(), pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float64(), pa.bool_()),
    *(pa.binary(), pa.binary(32), pa.large_string(), pa.timestamp("ns"), pa.decimal128(30, 2)),
    *(pa.list_(pa.int64()), pa.list_(pa.string()), pa.struct({"a": pa.int64()})),
    *(pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.struct({"source": pa.int64()}))),
)


def _column(kind: pa.DataType, rows: int, dice: random.Random) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x"])
    samples: dict[str, Any] = {"string": "7", "large_string": "x", "binary": b"x", "bool": True}
    name = str(kind)
    if pa.types.is_list(kind):
        value: Any = []
    elif pa.types.is_struct(kind):
        value = {"a": 1}
    elif pa.types.is_fixed_size_binary(kind):
        value = bytes(32)
    else:
        value = samples.get(name, 1)
    return pa.array([dice.choice([value, None]) for _ in range(rows)], kind)


def table_columns(path: Path, dice: random.Random) -> str:
    """Drop, rename, repeat, retype, empty or add a column."""
    table, metadata = load_table(path)
    if not table.num_columns:
        raise Unchangeable
    at = dice.randrange(table.num_columns)
    name = table.column_names[at]
    way = dice.choice(
        ["drop", "rename", "twice", "retype", "retype", "nulls", "add", "order", "none"]
    )
    match way:
        case "drop":
            table = table.remove_column(at)
        case "rename":
            names = list(table.column_names)
            names[at] = draw_text(dice)[:200]
            table = table.rename_columns(names)
        case "twice":
            table = table.append_column(name, table.column(at))
        case "retype":
            kind = dice.choice(_TYPES)
            way += f" to {kind}"
            table = table.set_column(at, name, _column(kind, len(table), dice))
        case "nulls":
            table = table.set_column(at, name, pa.nulls(len(table), table.schema.field(at).type))
        case "add":
            table = table.append_column(draw_text(dice)[:200], pa.array(range(len(table))))
        case "order":
            table = table.select(sorted(table.column_names, key=lambda _: dice.random()))
        case "none":
            table = table.select([])
    save_table(path, table, metadata)
    return f"column {name}: {way}"


def table_cells(path: Path, dice: random.Random) -> str:
    """Change some values of one column: nulls, hostile texts, numbers out of range, broken UTF-8."""
    table, metadata = load_table(path)
    if not len(table):
        raise Unchangeable
    at = dice.randrange(table.num_columns)
    field = table.schema.field(at)
    values = table.column(at).to_pylist()
    rows = range(len(values)) if dice.random() < 0.4 else [dice.randrange(len(values))]
    new: Any = None
    for row in rows:
        new = _cell(field.type, values[row], dice)
        values[row] = new
    try:
        if pa.types.is_string(field.type) and any(isinstance(v, bytes) for v in values):
            values = [v.encode() if isinstance(v, str) else v for v in values]
            raw = pa.array(values, pa.binary())
            column = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
        else:
            column = pa.array(values, field.type)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        raise Unchangeable from None
    save_table(path, table.set_column(at, field.name, column), metadata)
    return f"column {field.name}: {len(rows)} cells {short(new)}"


def _cell(kind: pa.DataType, old: Any, dice: random.Random) -> Any:
    if dice.random() < 0.12:
        return None
    if pa.types.is_string(kind):
        return b"\xff\xfe\x80" if dice.random() < 0.08 else draw_text(dice)
    if pa.types.is_fixed_size_binary(kind):
        return dice.choice([bytes(kind.byte_width), b"\xff" * kind.byte_width])
    if pa.types.is_floating(kind):
        return dice.choice([float("nan"), float("inf"), -float("inf"), -1.0, 1e308, 0.0, 1e300])
    if pa.types.is_integer(kind):
        bits, signed = kind.bit_width, pa.types.is_signed_integer(kind)
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return dice.choice([n for n in NUMBERS if isinstance(n, int) and least <= n <= most])
    if pa.types.is_list(kind):
        inner = kind.value_type
        items = list(old or [])
        match dice.randrange(5):
            case 0:
                return []
            case 1:
                return [None]
            case 2:
                return items * dice.choice([2, 3, 2000])
            case _:
                if not items and pa.types.is_struct(inner):
                    items = [dict.fromkeys((f.name for f in inner), None)]
                if items:
                    place = dice.randrange(len(items))
                    items[place] = _cell(inner, items[place], dice)
                return items
    if pa.types.is_struct(kind):
        made = dict(old or {})
        one = kind.field(dice.randrange(kind.num_fields))
        value = _cell(one.type, made.get(one.name), dice)
        made[one.name] = "?" if isinstance(value, bytes) and pa.types.is_string(one.type) else value
        return made
    return old


def table_rows(path: Path, dice: random.Random) -> str:
    """Drop, repeat or shuffle rows, or write them in several row groups."""
    table, metadata = load_table(path)
    way = dice.choice(["none", "first", "twice", "reversed", "2,000 times", "groups", "zstd"])
    options: dict[str, Any] = {}
    match way:
        case "none":
            table = table.slice(0, 0)
        case "first":
            table = table.slice(0, 1)
        case "twice":
            table = pa.concat_tables([table, table])
        case "reversed":
            table = table.take(pa.array(np.arange(len(table))[::-1]))
        case "2,000 times":
            table = pa.concat_tables([table] * 2000).combine_chunks()
        case "groups":
            options = {"row_group_size": 1}
        case "zstd":
            options = {"compression": "zstd", "use_dictionary": True}
    save_table(path, table, metadata, **options)
    return f"rows: {way}"


def table_metadata(path: Path, dice: random.Random) -> str:
    """Change, remove or add metadata of the file."""
    table, metadata = load_table(path)
    key = dice.choice([k for k in metadata if k != "seal"] or ["x"])
    way = dice.choice(["remove", "change", "change", "add"])
    if way == "remove":
        metadata.pop(key, None)
        new: Any = None
    else:
        new = dice.choice([str(dice.choice(NUMBERS)), draw_text(dice), "1 2 x", "0 " * 50_000])
        key = key if way == "change" else draw_text(dice)[:50]
        if key == "origin" and dice.random() < 0.7:
            words = [draw_text(dice)[:99] for _ in range(3)]
            account = dice.choice(
                [{}, [], {"lines": draw_value(dice)}, {draw_text(dice)[:99]: {"a": 1}}]
            )
            new = json.dumps(
                {"words": words, "account": account, "said": draw_text(dice)},
                default=lambda raw: raw.text,
            )
        if "\x00" in key:
            raise Unchangeable
        metadata[key] = new.encode(errors="replace").decode()
    if "sha256:" in str(new):
        raise Unchangeable
    save_table(path, table, metadata)
    return f"metadata {key}: {way} {short(new)}"


def file_bytes(path: Path, dice: random.Random) -> str:
    """Make a file junk, empty, cut, longer or changed in places; most of it under a valid seal."""
    data = bytearray(path.read_bytes())
    way = dice.choice(["junk", "empty", "cut", "longer", "flips", "flips", "flips", "head", "4 MB"])
    match way:
        case "junk":
            data = bytearray(dice.randbytes(dice.choice([1, 16, 5000])))
        case "empty":
            data = bytearray()
        case "cut":
            data = data[: dice.randrange(len(data) + 1)]
        case "longer":
            data += dice.randbytes(dice.choice([1, 100, 100_000]))
        case "flips":
            for _ in range(dice.choice([1, 3, 30])):
                if data:
                    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "head":
            data[:200] = dice.randbytes(200)
        case "4 MB":
            data = data + bytes(4 << 20)
    sealed = bytes(data)
    if dice.random() < 0.8:
        at = sealed.rfind(b"sha256:")
        if at >= 0 and len(sealed) >= at + 71:
            sealed = seal(sealed[:at] + UNSEALED.encode() + sealed[at + 71 :])
        elif dice.random() < 0.5:
            sealed = seal(sealed + UNSEALED.encode())
    path.write_bytes(sealed)
    return f"bytes: {way}"


def table_bomb(path: Path, dice: random.Random) -> str:
    """Make a table of few bytes that is huge when it is read: 20 million rows, or long texts repeated."""
    kind = "commit" if path.parent.name == "commits" else path.parent.name[:5]
    made = Path(os.environ["FUZZ_BOMBS"]) / f"{kind}-{dice.randrange(2)}.parquet"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        table, metadata = load_table(path)
        if made.stem.endswith("0"):
            rows = 20_000_000
            columns = []
            for field in table.schema:
                if pa.types.is_string(field.type):
                    indices = pa.array(np.zeros(rows, np.int8))
                    columns.append(pa.DictionaryArray.from_arrays(indices, ["full"]))
                else:
                    columns.append(pa.nulls(rows, field.type))
        else:
            columns = []
            for field in table.schema:
                if pa.types.is_string(field.type):
                    indices = pa.array(np.zeros(200, np.int8))
                    columns.append(pa.DictionaryArray.from_arrays(indices, ["a" * (32 << 20)]))
                else:
                    columns.append(pa.nulls(200, field.type))
        names = table.column_names
        save_table(path, pa.table(columns, names=names), metadata, store_schema=False)
        made.write_bytes(path.read_bytes())
    path.write_bytes(made.read_bytes())
    return f"bomb {made.stem}"


TABLE_KINDS: dict[str, Change] = {
    "columns": table_columns,
    "cells": table_cells,
    "rows": table_rows,
    "metadata": table_metadata,
    "bomb": table_bomb,
}


def spec_forged(path: Path, dice: random.Random) -> str:
    """Change the spec of a space, and make fingerprint, commits and the folder's name fit it."""
    values, rest = load_json(path)
    spec = values.get("spec")
    if not isinstance(spec, dict):
        raise Unchangeable
    key = dice.choice(["encoder", *spec])
    usual = {int: NUMBERS, str: TEXTS}.get(type(spec.get(key)))
    if usual and dice.random() < 0.7:
        new: Any = dice.choice(usual)
        new = draw_text(dice) if isinstance(new, str) else new
    else:
        new = draw_value(dice)
    if isinstance(spec.get(key), list) and dice.random() < 0.5:
        is_short = isinstance(new, str | int | float) and len(str(new)) < 40
        new = [new] * dice.choice([1, 3, 100_000 if is_short else 9])
    spec[key] = new
    hashed = {k: v for k, v in spec.items() if k != "encoder" and (k, v) != ("container", "zarr")}
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), allow_nan=False)
        values["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    values["name"] = f"{spec.get('encoder')}-{spec.get('codec')}-{values['fingerprint'][:8]}"
    dump_json(path, values, rest)
    for commit in sorted(path.parent.glob("commits/*.parquet")):
        with contextlib.suppress(Unchangeable, OSError):
            table, metadata = load_table(commit)
            metadata["space"] = values["fingerprint"]
            save_table(commit, table, metadata)
    name = values["name"]
    with contextlib.suppress(OSError, ValueError):
        if "/" not in name and dice.random() < 0.7:
            path.parent.rename(path.parent.with_name(name))
    return f"forged spec.{key} = {short(new)}"
