"""Strict JSON: an object that other readers would read in another way is a fault.

    value = parse(b'{"a": 1}')          # FaultError: duplicate keys, NaN, half a surrogate pair, ...
    find_end(b'[1, [2]] ...', 0)        # (8, 2): where a list or object ends, and how deep it is nested

The standard library parses: it can be told to refuse, and it has no limit of its own that ends the process.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from encode.records.account import FaultError
from encode.records.keys import show

MAX_BYTES = 64 << 20
"""Bytes of one object, at most. A `data:` URI of a large photograph takes about 20 MB."""
MAX_DEPTH = 64
"""Levels of nesting, at most. Known formats have up to six."""
MAX_DIGITS = 1000
"""Characters of one number, at most. Python itself refuses integers of more than 4,300 digits."""

# Possessive (`*+`): an unclosed string costs one pass. A line break inside a string is not JSON.
_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|[\[\]{}"]')
_SURROGATE = re.compile(rb"\\u[dD][89abcdefABCDEF]")
_CLOSES = {0x5D: 0x5B, 0x7D: 0x7B}
_QUOTE = 0x22


class Written(float):
    """A number with a point or exponent, which remembers how it was written."""

    written: str

    @classmethod
    def of(cls, written: str) -> Written:
        """Return the number, or raise FaultError if it is too large or too long."""
        number = cls(_short(written))
        if not math.isfinite(number):
            raise FaultError("number out of range", f"{written:.40} is too large for a number")
        number.written = written
        return number


def parse(data: bytes, first_line: int = 1) -> Any:
    """Return the value of a JSON text.

    Args:
        data: the text as UTF-8, without a byte order mark.
        first_line: number of its first line, for messages.

    Raises:
        FaultError: it is not JSON in UTF-8, has equal keys in one object, NaN or Infinity, half a surrogate
            pair, a number that is too long or too large, or is nested deeper than MAX_DEPTH.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FaultError("not UTF-8", f"not UTF-8 (byte {error.start + 1:,})") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_nesting(data)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = "several values" if error.msg == "Extra data" else error.msg
        line = f"line {first_line + error.lineno - 1}, " if error.lineno > 1 else ""
        raise FaultError("not JSON", f"not JSON: {what} ({line}column {error.colno})") from None
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FaultError("half a surrogate pair", "half a surrogate pair is not text") from None
    return value


def find_end(data: bytes | bytearray, start: int, *, last: bool = True) -> tuple[int, int] | None:
    """Find the end of the list or object that starts at `start`.

    Args:
        data: the bytes read until now.
        start: position of `[` or `{`.
        last: whether no more bytes follow.

    Returns:
        Position after its end, and how deep it is nested; None if it is not complete.

    Raises:
        FaultError: a string has no end, or brackets do not match.
    """
    opened = bytearray()
    deepest = 0
    for token in _TOKEN.finditer(data, start):
        byte = data[token.start()]
        if byte == _QUOTE:
            if token.end() - token.start() == 1:
                if not last and data.find(b"\n", token.end()) < 0:
                    return None
                raise FaultError("not JSON", "not JSON: a string without an end")
        elif byte in _CLOSES:
            if opened.pop() != _CLOSES[byte]:
                raise FaultError("not JSON", "not JSON: brackets that do not match")
            if not opened:
                return token.end(), deepest
        else:
            opened.append(byte)
            deepest = max(deepest, len(opened))
    return None


def check_depth(depth: int) -> None:
    """Raise FaultError if a value is nested too deeply."""
    if depth > MAX_DEPTH:
        raise FaultError("nested too deeply", f"nested more than {MAX_DEPTH} levels deep")


def _check_nesting(data: bytes) -> None:
    """Raise FaultError if the brackets of a text, matching or not, are nested too deeply."""
    depth = 0
    for token in _TOKEN.finditer(data):
        byte = data[token.start()]
        if byte in _CLOSES:
            depth -= 1
        elif byte != _QUOTE:
            depth += 1
            check_depth(depth)


def _short(written: str) -> str:
    if len(written) > MAX_DIGITS:
        raise FaultError("number too long", f"a number of {len(written):,} characters")
    return written


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FaultError("duplicate key", f"the key {show(key)} is given twice")
            seen.add(key)
    return value


def _constant(name: str) -> Any:
    raise FaultError("not JSON", f"not JSON: {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=lambda written: int(_short(written)),
    parse_float=Written.of,
    parse_constant=_constant,
)
