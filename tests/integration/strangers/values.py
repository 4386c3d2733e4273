"""Change the JSON of a cache as a stranger may: any type, range and name, under a valid seal.

    said = JSON_KINDS["value"](path, dice)

`dice` is a seeded random.Random, so a change can be repeated. `said` tells what was done. A file that is not
what it should be, because an earlier change made it so, raises Unchangeable.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cache.format.checksums import UNSEALED, crc32c, seal
from cache.store.index_file import HEADER_BYTES

Change = Callable[[Path, random.Random], str]


class Unchangeable(Exception):
    """There is nothing in the file that this change is about."""


_ENDINGS = ("secret.txt", "folder", "fifo", "private.png", "cache/samples")
TEXTS = (
    *(
        "",
        ".",
        "..",
        "../x",
        "../../x",
        "../../../../x",
        "~/x",
        "a/b",
        "a\\b",
        "C:\\x",
        "/dev/zero",
    ),
    *(f"OUTSIDE/{name}" for name in _ENDINGS),
    *("\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "a\rb", "a\nFORGED: line", "a\x85FORGED: line"),
    *(
        "a\u2028FORGED: line",
        "\u202eevil\u202c",
        "\u2066x\u2069",
        "\x9b31m",
        "\x00",
        "a\x00b",
        "\x7f",
    ),
    *('"><script>FORGED</script>', "</script><script>FORGED</script>", "javascript:FORGED"),
    *(
        "{{7*7}}",
        "%s%n",
        "$(touch x)",
        "`touch x`",
        "; touch x",
        "--features",
        "-rf",
        "'",
        '"',
        "\t",
    ),
    *("image", "frame", "full", "t:0", "t:-1", "t:99999999999999999999", "t:x", "video", "NaN"),
    *("webdataset", "zarr", "fp16", "int8", "int4", "gelu", "ok", "failed", "decode", "/dev/stdin"),
    *(
        "http://169.254.169.254/x",
        "http://127.0.0.1:1/x.png",
        "file:///etc/passwd",
        "https://[::1]/a b",
    ),
    *("sha256:" + "0" * 64, "0" * 64, "f" * 64, "g" * 64, "é" * 64, "é\u0301\u200b\ufeff"),
    *("x" * 255, "x" * 256, "x" * 4096, "x" * (1 << 20), "\x1b" * 70_000),
)
"""Texts that a name, a path, a number or a sentence should not be. OUTSIDE is replaced by a folder."""

NUMBERS = (
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        255,
        4096,
        65536,
        2**30,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**62,
        2**63 - 1,
    ),
    *(
        2**63,
        2**64,
        -(2**63),
        -(2**64),
        10**30,
        -(10**30),
        0.5,
        -0.0,
        1e308,
        -1e308,
        1e-320,
        12345.678,
    ),
)


class Raw:
    """JSON text that `json.dumps` does not write."""

    def __init__(self, text: str, name: str = ""):
        self.text, self.name = text, name or text

    def __repr__(self) -> str:
        return f"Raw({self.name})"


RAWS = (
    *(
        Raw("NaN"),
        Raw("Infinity"),
        Raw("-Infinity"),
        Raw("1e999"),
        Raw("-1e999"),
        Raw("01"),
        Raw("1."),
    ),
    Raw("9" * 5000, "5000 digits"),
    Raw("[" * 900 + "]" * 900, "900 lists"),
    Raw("[" * 100_000 + "]" * 100_000, "100,000 lists"),
    Raw('{"a":' * 50_000 + "1" + "}" * 50_000, "50,000 objects"),
    Raw('"\\ud800"', "half a surrogate pair"),
    *(Raw("'x'"), Raw("tru"), Raw(""), Raw("[1,]"), Raw('"a\tb"'), Raw("/* x */ 1")),
)


OUTSIDE: list[Path] = []
"""The folder outside of the cache; set once, by the process that makes changes."""


def draw_text(dice: random.Random) -> str:
    """Draw one of TEXTS."""
    return dice.choice(TEXTS).replace("OUTSIDE", str(OUTSIDE[0]) if OUTSIDE else "/absent")


def draw_value(dice: random.Random) -> Any:
    """Draw a JSON value of any type."""
    match dice.randrange(8):
        case 0:
            return dice.choice([None, True, False])
        case 1 | 2:
            return dice.choice(NUMBERS)
        case 3 | 4:
            return draw_text(dice)
        case 5:
            return dice.choice([[], {}, [[]], [None], {"a": {}}, {"": 0}, [0] * 100_000, ["image"]])
        case _:
            return dice.choice(RAWS)


def short(value: object) -> str:
    """Return a value for a message."""
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)})"


# ---- JSON


def load_json(path: Path) -> tuple[Any, bytes]:
    """Return the value of a JSON file, and what follows its first 4,096 bytes in an index file."""
    data = path.read_bytes()
    head, rest = (
        (data[:HEADER_BYTES], data[HEADER_BYTES:]) if path.suffix == ".bin" else (data, b"")
    )
    try:
        values = json.loads(head)
    except (ValueError, RecursionError):
        raise Unchangeable from None
    if not isinstance(values, dict):
        raise Unchangeable
    return values, rest


def dump_json(path: Path, values: Any, rest: bytes) -> None:
    """Write a value with a valid seal in its last key, if it is an object."""
    raws: list[Raw] = []

    def raw(value: object) -> str:
        assert isinstance(value, Raw)
        raws.append(value)
        return f"@@{len(raws) - 1}@@"

    if isinstance(values, dict):
        values = {k: v for k, v in values.items() if k != "seal"}
        values |= {"seal": UNSEALED}
    text = json.dumps(values, default=raw, indent=2)
    for number, value in enumerate(raws):
        text = text.replace(f'"@@{number}@@"', value.text)
    data = text.encode("utf-8", "surrogatepass")
    if path.suffix == ".bin":
        data = data.ljust(HEADER_BYTES)
    if UNSEALED.encode() in data:
        data = seal(data)
    path.write_bytes(data + rest)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Yield (container, key, path) of every value inside."""
    items: Any = ()
    if isinstance(value, dict):
        items = [(k, v) for k, v in value.items() if k != "seal"]
    elif isinstance(value, list):
        items = list(enumerate(value))[:8]
    for key, inner in items:
        yield value, key, (*path, key)
        yield from _places(inner, (*path, key))


def json_value(path: Path, dice: random.Random) -> str:
    """Replace one value."""
    values, rest = load_json(path)
    where, key, names = dice.choice(list(_places(values)) or [({}, "x", ("x",))])
    where[key] = new = draw_value(dice)
    dump_json(path, values, rest)
    return f"{'.'.join(map(str, names))} = {short(new)}"


def json_number(path: Path, dice: random.Random) -> str:
    """Replace one number by another."""
    values, rest = load_json(path)
    places = [place for place in _places(values) if type(place[0][place[1]]) in (int, float)]
    if not places:
        raise Unchangeable
    where, key, names = dice.choice(places)
    where[key] = new = dice.choice(NUMBERS)
    dump_json(path, values, rest)
    return f"{'.'.join(map(str, names))} = {short(new)}"


def json_text(path: Path, dice: random.Random) -> str:
    """Replace one text by another."""
    values, rest = load_json(path)
    places = [place for place in _places(values) if type(place[0][place[1]]) is str]
    if not places:
        raise Unchangeable
    where, key, names = dice.choice(places)
    where[key] = new = draw_text(dice)
    dump_json(path, values, rest)
    return f"{'.'.join(map(str, names))} = {short(new)}"


def json_keys(path: Path, dice: random.Random) -> str:
    """Remove, add, rename or repeat a key; or replace the whole."""
    values, rest = load_json(path)
    places = [p for p in _places(values) if isinstance(p[0], dict)]
    where, key, names = dice.choice(places or [(values, "x", ("x",))])
    way = dice.choice(["remove", "add", "rename", "repeat", "whole"])
    name = draw_text(dice)[:100]
    if way == "repeat":
        data = json.dumps(values | {"seal": UNSEALED})
        one = json.dumps(str(key)) + ": "
        again = json.dumps(dice.choice(NUMBERS + TEXTS[:8]))
        data = data.replace(one, one + again + ", " + one, 1)
        path.write_bytes(seal(data.encode().ljust(HEADER_BYTES if rest else 0)) + rest)
        return f"{key} twice"
    if way == "whole":
        whole = dice.choice([[], [1], 1, "x", None, {}, {"seal": 1}, [values], RAWS[0]])
        if dice.random() < 0.5 and isinstance(whole, list):
            whole = [*whole, UNSEALED]
        dump_json(path, whole, rest)
        return f"whole = {short(whole)}"
    if way in ("remove", "rename"):
        old = where.pop(key, None)
        if way == "rename":
            where[name] = old
    else:
        where[name] = draw_value(dice)
    dump_json(path, values, rest)
    return f"{way} {'.'.join(map(str, names))} {short(name) if way != 'remove' else ''}"


JSON_KINDS: dict[str, Change] = {
    "value": json_value,
    "number": json_number,
    "text": json_text,
    "keys": json_keys,
}

# ---- index files


def index_arrays(path: Path, dice: random.Random) -> str:
    """Change numbers in one array of an index file, and make its checksum fit."""
    values, rest = load_json(path)
    arrays = values.get("arrays")
    if not isinstance(arrays, dict) or not arrays:
        raise Unchangeable
    name = dice.choice(sorted(arrays))
    data = bytearray(rest)
    try:
        entry = arrays[name]
        start = entry["offset"] - HEADER_BYTES
        size = np.dtype(entry["dtype"]).itemsize * int(
            np.prod([entry["stored"], *entry["shape"][1:]])
        )
        if size <= 0:
            raise Unchangeable
        place = start + dice.randrange(size) // 8 * 8
        data[place : min(place + 8, start + size)] = dice.choice(
            [b"\xff" * 8, bytes(8), dice.randbytes(8), b"\xff" * 7 + b"\x7f"]
        )[: max(0, min(8, start + size - place))]
        entry["crc32c"] = crc32c(bytes(data[start : start + size + -size % 64]))
    except (KeyError, TypeError, ValueError, OverflowError, IndexError):
        raise Unchangeable from None
    dump_json(path, values, bytes(data))
    return f"array {name} at {place - start}"
