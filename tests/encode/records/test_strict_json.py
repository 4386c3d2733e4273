"""JSON that two readers may read in two ways is a fault.

parse(b'{"a": 1, "a": 2}')      # FaultError: the key 'a' is given twice
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.records import strict_json
from encode.records.account import FaultError
from encode.records.strict_json import MAX_DEPTH, find_end, parse

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(value=JSON, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans())
def test_what_json_writes_is_read(value: Any, indent: int | None, ascii_only: bool) -> None:
    if not ascii_only and "\\ud" in json.dumps(value):
        ascii_only = True  # half a surrogate pair cannot be written as UTF-8
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(FaultError, match="half a surrogate pair"):
            parse(text.encode())
    else:
        assert parse(text.encode()) == value


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"a": 1, "a": 1}', "duplicate key"),
        (b'[{"b": {"a": 1, "c": 2, "a": 1}}]', "duplicate key"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": -Infinity}', "not JSON"),
        (b'{"a": 1e999}', "number out of range"),
        (b'{"a": -1e999}', "number out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number too long"),
        (b'{"a": 0.' + b"9" * 5000 + b"}", "number too long"),
        (b'{"a": "\\ud83d"}', "half a surrogate pair"),
        (b'{"\\uDE00": 1}', "half a surrogate pair"),
        (b'{"a": "\\ude00\\ud83d"}', "half a surrogate pair"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a": "\xc0\x80"}', "not UTF-8"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 10_000_000, "nested too deeply"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 01}', "not JSON"),
        (b'{"a": .5}', "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b'{"a": "\x00"}', "not JSON"),
        (b'{"a": "\\x"}', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": 1} trailing', "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
        (b'{"a": 1 /* no */}', "not JSON"),
    ],
)
def test_what_is_not_strict_json_is_a_fault(data: bytes, kind: str) -> None:
    with pytest.raises(FaultError) as caught:
        parse(data)
    assert caught.value.kind == kind
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_a_pair_of_surrogates_and_brackets_in_texts_are_fine() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
    assert parse(b'{"a": "' + b"[" * 1000 + b'"}') == {"a": "[" * 1000}
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse(b'"\\\\ud83d"') == "\\ud83d", "an escaped backslash before letters"


def test_a_number_knows_how_it_was_written() -> None:
    value = parse(b"[3.50, 1E2, 12]")
    assert value == [3.5, 100.0, 12]
    assert [getattr(number, "written", str(number)) for number in value] == ["3.50", "1E2", "12"]


def test_the_line_of_a_fault_is_that_of_the_file() -> None:
    with pytest.raises(FaultError, match=r"line 9, column 7"):
        parse(b'{\n "a": 1,\n "b": x}', first_line=7)


@settings(deadline=None)
@given(value=st.lists(JSON) | st.dictionaries(st.text(), JSON), after=st.binary(max_size=20))
def test_the_end_of_a_value_is_found_whatever_follows(value: Any, after: bytes) -> None:
    data = json.dumps(value).encode()
    end = find_end(b"  " + data + after, 2)
    assert end is not None and end[0] == 2 + len(data)
    for cut in {1, len(data) // 2, len(data) - 1} - {0, len(data)}:
        assert find_end(data[:cut], 0, last=False) is None


@pytest.mark.parametrize("data", [b"[}", b'{"a": [1}', b'["\n"]', b'["\\\n"]'])
def test_an_end_that_is_not_certain_is_a_fault(data: bytes) -> None:
    with pytest.raises(FaultError):
        find_end(data, 0)


def test_an_unclosed_text_takes_one_pass() -> None:
    # Patterns that backtrack take minutes for this.
    data = b'["' + b'\\"' * 1_000_000
    assert find_end(data, 0, last=False) is None
    with pytest.raises(FaultError, match="without an end"):
        find_end(data, 0)


def test_a_key_in_a_message_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    key = json.dumps("k" * 10_000)
    with pytest.raises(FaultError) as caught:
        parse(f"{{{key}: 1, {key}: 2}}".encode())
    assert len(str(caught.value)) < 200
    assert strict_json.MAX_BYTES == 64 << 20
