"""Files of records in any layout give their objects, each with its line and its bytes.

for line in read_lines(Path("photos/metadata.jsonl"), account): line.where, line.value
"""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs import UserError
from encode.records import json_window, stream
from encode.records.account import Account
from encode.records.record import Line
from encode.records.stream import read_lines

VALUES = [{"image": "a.jpg", "n": 1}, {"caption": 'ä "]}\n'}, {"turns": [{"x": [1, {}]}]}]


def read(path: Path, data: bytes | str) -> tuple[list[Line], list[str]]:
    """Return the lines of a file, and its faults as LINE: MESSAGE."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    account = Account(name="photos")
    lines = list(read_lines(path, account))
    assert sum(account.faults.values()) == len(account.first_faults)
    return lines, [fault.removeprefix(f"{path}:") for fault in account.first_faults]


def numbers(lines: list[Line]) -> list[int]:
    return [int(line.where.rpartition(":")[2]) for line in lines]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def test_json_lines(tmp_path: Path) -> None:
    text = "\n".join(["", dumped(VALUES[0]), "  ", f"\t{dumped(VALUES[1])} \r", dumped(VALUES[2])])
    lines, faults = read(tmp_path / "a.jsonl", text)
    assert [line.value for line in lines] == VALUES and not faults
    assert [line.where for line in lines] == [f"{tmp_path}/a.jsonl:{n}" for n in (2, 4, 5)]


def test_one_list_on_one_line_or_pretty_printed(tmp_path: Path) -> None:
    lines, faults = read(tmp_path / "a.json", dumped(VALUES))
    assert [line.value for line in lines] == VALUES and not faults and numbers(lines) == [1, 1, 1]
    lines, faults = read(tmp_path / "a.json", json.dumps(VALUES, indent=2))
    assert [line.value for line in lines] == VALUES and not faults and numbers(lines) == [2, 6, 9]


def test_objects_that_span_lines(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(value, indent=1) for value in VALUES)
    lines, faults = read(tmp_path / "a.jsonl", text)
    assert [line.value for line in lines] == VALUES and not faults and numbers(lines) == [1, 5, 8]
    lines, faults = read(tmp_path / "a.json", json.dumps(VALUES[2], indent=0))
    assert [line.value for line in lines] == VALUES[2:] and not faults


@given(
    values=st.lists(
        st.dictionaries(
            st.text(max_size=8),
            st.text(max_size=20) | st.integers() | st.lists(st.text(max_size=5), max_size=3),
            max_size=3,
        ),
        min_size=1,
        max_size=6,
    ),
    layout=st.sampled_from(["lines", "list", "pretty list", "pretty objects", "list of lines"]),
    block=st.integers(1, 90),
    bom=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_layout_gives_each_object_with_its_place(
    tmp_path: Path, values: list[Any], layout: str, block: int, bom: bool
) -> None:
    text = {
        "lines": lambda: "\n".join(map(json.dumps, values)),
        "list": lambda: json.dumps(values),
        "pretty list": lambda: json.dumps(values, indent=1),
        "pretty objects": lambda: "\n".join(json.dumps(value, indent=1) for value in values),
        "list of lines": lambda: "[\n" + ",\n".join(map(json.dumps, values)) + "\n]\n",
    }[layout]()
    data = b"\xef\xbb\xbf" * bom + text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_window, "BLOCK", block)
        lines, faults = read(tmp_path / "a.json", data)
    half = [value for value in values if "\\ud" in json.dumps(value)]
    assert len(lines) + len(faults) == len(values) and len(faults) <= len(half)
    assert [line.value for line in lines] == [v for v in values if v not in half] or half
    for line, number in zip(lines, numbers(lines), strict=True):
        assert json.loads(data[line.offset : line.offset + line.length]) == line.value
        assert number == 1 + data.count(b"\n", 0, line.offset)


@given(data=st.binary(max_size=60) | st.text('[]{}",:\\\n 1aé', max_size=40).map(str.encode))
@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".parquet"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_objects_or_faults(tmp_path: Path, suffix: str, data: bytes) -> None:
    lines, faults = read(tmp_path / f"a{suffix}", data)
    if suffix == ".json" and data.strip(b" \t\r\n\xef\xbb\xbf[]"):
        assert lines or faults, "nothing disappears"


@given(
    rows=st.lists(
        st.integers(0, 9).map(lambda n: json.dumps({"n": n, "t": ["x"]}))
        | st.text('x{["} ,]', min_size=1, max_size=6).filter(str.strip),
        min_size=1,
        max_size=8,
    )
)
@example(
    rows=[" {", "[", '{"n": 0, "t": ["x"]}']
)  # the broken one is indented, the sound one is not
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_broken_line_takes_a_sound_one_with_it(tmp_path: Path, rows: list[str]) -> None:
    lines, faults = read(tmp_path / "a.jsonl", "\n".join(["{}", *rows]))
    sound = [number for number, row in enumerate(rows, 2) if row.startswith('{"n"')]
    found = [
        number for number, line in zip(numbers(lines), lines, strict=True) if "n" in line.value
    ]
    assert found == sound
    others = len(lines) - 1 - len(sound)  # an empty object, which may be two lines: "{" and "}"
    assert faults or others or len(rows) == len(sound)


@given(values=st.lists(st.integers(0, 99), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_damaged_byte_loses_no_other_line(
    tmp_path: Path, values: list[int], data: st.DataObject
) -> None:
    """JSON Lines: a fault is of one line. In a list, what is behind it may be lost, with a fault."""
    rows = [json.dumps({"n": value, "t": "x"}) for value in values]
    for text in ("\n".join(rows), "[" + ",\n".join(rows) + "]"):
        at = data.draw(st.integers(0, len(text) - 1))
        damaged = text[:at] + data.draw(st.sampled_from('{}[]",:x\\')) + text[at + 1 :]
        lines, faults = read(tmp_path / "a.json", damaged)
        if text[0] == "{" and damaged[0] == "{" and damaged.count("\n") == text.count("\n"):
            assert len(lines) + len(faults) >= len(rows)
            assert len(faults) <= 1
        assert len(lines) == len(rows) or faults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": 1, "a": 2}\n{"b": 2}', "2: the key 'a' is given twice"),
        ('{"a": 1}\n{"a": NaN}\n{"b": 2}', "2: not JSON: NaN"),
        ('{"a": 1}\n{"a": 1} {"c": 2}\n{"b": 2}', "2: not JSON: several values (column 10)"),
        ('{"a": 1}\n{"a": \n{"b": 2}', "2: not JSON: Expecting value (column 6)"),
        ('{"a": 1}\n[1]\n{"b": 2}', "2: expected an object in braces, found a list"),
        ('{"a": 1}\nnull\n{"b": 2}', "2: expected an object in braces, found None"),
        ('{"a": 1}\n{"x": "\\ud800"}\n{"b": 2}', "2: half a surrogate pair is not text"),
        ('[{"a": 1},\n{"a": 1, "a": 2},\n{"b": 2}]', "2: the key 'a' is given twice"),
        ('[{"a": 1},\n{"a": 1,},\n{"b": 2}]', "2: not JSON: "),
        ('[{"a": 1},\n7,\n{"b": 2}]', "2: expected an object in braces, found 7"),
        ('[{"a": 1}\n{"b": 2}]', "2: not JSON: no comma between two values"),
        ('[{"a": 1},\n,{"b": 2}]', "2: not JSON: a comma without a value"),
        ('[{"a": 1},\n{"b": 2},\n]', "3: not JSON: a comma before the end of a list"),
        ('[{"a": 1},\n{"b": 2}\n', "3: not JSON: a list without an end"),
        ('[{"a": 1},\n{"b": 2}]\n{"c": 3}', "3: not JSON: text behind the list"),
        (
            '[{"a": 1},{"b": 2},\n{"c": [3}, {"d": 4}]',
            "2: not JSON: brackets that do not match; the rest",
        ),
        ('[{"a": 1},{"b": 2},\n{"c": "x\n"}]', "2: not JSON: a string without an end; the rest"),
        ('[{"a": 1},{"b": 2},\n{"c": "x', "2: not JSON: a string without an end; the rest"),
        ('[{"a": 1},{"b": 2},\n:', "2: not JSON: ':' instead of a value; the rest"),
        ('{\n"a": 1}\n{\n"b": 2}\n{\n"c": [}', "5: not JSON: brackets that do not match"),
        (
            '{\n"a": 1}\n{\n"c": [},\n"d": 4}\n{\n"b": 2}\n',
            "3: not JSON: brackets that do not match",
        ),
        ('{"a": 1}\n{"c": [\nx\n]}\n{"b": 2}', "2: not JSON: Expecting value (line 3, column 1)"),
        ('{"a": 1}\n{\n"c": "x\n"}\n{"b": 2}\n', "2: not JSON: a string without an end"),
        ('{\n"a": 1}{"b": 2}\n3', "3: expected an object in braces, found 3"),
    ],
)
def test_a_fault_names_its_line_and_reading_goes_on(
    tmp_path: Path, text: str, expected: str
) -> None:
    lines, faults = read(tmp_path / "a.json", text)
    assert [dict(line.value) for line in lines] == [{"a": 1}, {"b": 2}]
    assert len(faults) == 1 and faults[0].startswith(expected), faults


@pytest.mark.parametrize("text", ["", "\n \n", "[]", " [ ] \n", "\ufeff[\n]"])
def test_a_file_without_objects_gives_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "a.json", text) == ([], [])


@pytest.mark.parametrize("text", ["hello", "[", '"', "{", "[1", "\0", "]", "}"])
def test_a_file_that_is_not_json_is_one_fault(tmp_path: Path, text: str) -> None:
    lines, faults = read(tmp_path / "a.json", text)
    assert not lines and faults and all(fault.startswith("1: ") for fault in faults)


def test_utf_16_is_named(tmp_path: Path) -> None:
    lines, faults = read(tmp_path / "a.json", '{"a": 1}'.encode("utf-16"))
    assert not lines and faults == ["1: not UTF-8 but UTF-16; save the file as UTF-8"]


def test_bytes_that_are_not_utf_8_are_a_fault_of_their_line(tmp_path: Path) -> None:
    lines, faults = read(tmp_path / "a.jsonl", b'{"a": "\xff"}\n{"b": 2}')
    assert [line.value for line in lines] == [{"b": 2}] and faults == ["1: not UTF-8 (byte 8)"]


@pytest.mark.parametrize("text", ['{"a": "%s"}\n{"b": 2}', '[{"a": "%s"},\n{"b": 2}]'])
def test_a_huge_object_is_a_fault_before_it_is_in_memory(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (stream, json_window):
        monkeypatch.setattr(module, "MAX_BYTES", 1000)
    monkeypatch.setattr(json_window, "BLOCK", 100)
    lines, faults = read(tmp_path / "a.json", text % ("x" * 1100))
    assert len(faults) == 1 and faults[0].startswith("1: a ") and "MiB" in faults[0]
    if text[0] == "{":
        assert [line.value for line in lines] == [{"b": 2}]
    path = tmp_path / "large.json"
    path.write_text(text % ("x" * 30_000_000))
    tracemalloc.start()
    assert len(list(read_lines(path, Account(name="photos")))) == (text[0] == "{")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, "bytes, for a value of 30 MB"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(40_000):
            file.write(json.dumps({"n": number, "t": "x" * 500}) + ",\n")
        file.write("{}]")
    tracemalloc.start()
    assert sum(1 for _ in read_lines(path, Account(name="photos"))) == 40_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000 and peak < 6_000_000


def test_a_file_that_cannot_be_opened_is_a_users_error(tmp_path: Path) -> None:
    for name in ("a.json", "a.csv", "a.parquet"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            list(read_lines(tmp_path / name, Account(name="photos")))
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            list(read_lines(tmp_path / name, Account(name="photos")))


# ---- CSV and TSV


def test_csv_has_a_header_and_may_have_line_breaks_in_quotes(tmp_path: Path) -> None:
    text = (
        '\ufefffile_name,caption,label\r\na.jpg,"A ""cat"",\r\nasleep.",\r\n\r\nb.jpg,A dog.,3\r\n'
    )
    lines, faults = read(tmp_path / "metadata.csv", text)
    assert not faults and [dict(line.value) for line in lines] == [
        {"file_name": "a.jpg", "caption": 'A "cat",\r\nasleep.'},
        {"file_name": "b.jpg", "caption": "A dog.", "label": "3"},
    ]
    assert numbers(lines) == [2, 5]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "image\tcaption\na.jpg\tA, cat\n"),
        ("a.csv", "image;caption\na.jpg;A, cat\n"),
        ("a.csv", "image\tcaption\na.jpg\tA, cat\n"),
        ("a.txt", "\ufeffimage|caption\na.jpg|A, cat\n"),
        ("captions", 'image,caption\na.jpg,"A, cat"\n'),
        ("a.CSV", 'image,caption\na.jpg,"A, cat"'),
    ],
)
def test_the_delimiter_is_seen_from_the_header(tmp_path: Path, name: str, text: str) -> None:
    lines, faults = read(tmp_path / name, text)
    assert not faults and [line.value for line in lines] == [
        {"image": "a.jpg", "caption": "A, cat"}
    ]


def test_lists_and_weights_in_cells(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(["images", "conversations", "weight", "note"])
    rows.writerow([json.dumps(["a.jpg", "b.jpg"]), json.dumps(turns), "0.5", "[not json"])
    rows.writerow(["a.jpg", "[broken", "1", ""])
    rows.writerow(["a.jpg", "", "heavy", ""])
    lines, faults = read(tmp_path / "a.csv", file.getvalue())
    assert [line.value for line in lines] == [
        {
            "images": ["a.jpg", "b.jpg"],
            "conversations": turns,
            "weight": 0.5,
            "note": "[not json",
        },
        {"images": "a.jpg", "weight": "heavy"},
    ]
    assert len(faults) == 1 and faults[0].startswith("3: not JSON")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('image,caption\na.jpg,"A" cat\nb.jpg,B', "2: not CSV: ',' expected"),
        ("image,caption\na.jpg\nb.jpg,B", "2: 1 cells for 2 columns"),
        ("image,caption\na.jpg,A,cat\nb.jpg,B", "2: 3 cells for 2 columns"),
        ("image,caption,caption\na.jpg,A,B", "1: two columns named 'caption'"),
        ("a.jpg,A cat\nb.jpg,B", "1: the first line names no known column (a.jpg, A cat)"),
        ('image,caption\nb.jpg,B\na.jpg,"A cat', "3: not CSV: unexpected end of data"),
    ],
)
def test_rows_that_do_not_fit_are_faults(tmp_path: Path, text: str, expected: str) -> None:
    lines, faults = read(tmp_path / "a.csv", text)
    assert len(faults) == 1 and faults[0].startswith(expected), faults
    if "b.jpg,B" in text and not expected.startswith("1"):
        assert [line.value for line in lines] == [{"image": "b.jpg", "caption": "B"}]


def test_bytes_of_a_row_that_are_not_utf_8(tmp_path: Path) -> None:
    lines, faults = read(tmp_path / "a.csv", b"image,caption\na.jpg,\xff\nb.jpg,B\n")
    assert faults == ["2: not UTF-8 (byte 7)"]
    assert [line.value for line in lines] == [{"image": "b.jpg", "caption": "B"}]


def test_what_hides_the_rest_of_a_file_is_counted_as_such(tmp_path: Path) -> None:
    texts = {
        "a.csv": 'image,caption\na.jpg,"A cat\nb.jpg,B\nc.jpg,C\n',
        "b.csv": "a.jpg,A cat\nb.jpg,B\n",
        "a.json": '[{"a": [1}, {"b": 2}]',
        "b.json": '[{"a": 1}] {"b": 2}',
        "c.json": '[\n {"a": 1},\n {"a": [\n {"b": 2}]\n',
    }
    for name, text in texts.items():
        account = Account(name="photos")
        (tmp_path / name).write_text(text)
        list(read_lines(tmp_path / name, account))
        expected = {"not JSON": 1} if name == "c.json" else {"rest of a file": 1}
        assert account.faults == expected, name


def test_a_cell_may_be_a_data_uri(tmp_path: Path) -> None:
    cell = "data:image/png;base64," + "A" * 1_000_000
    lines, faults = read(tmp_path / "a.csv", f'image,caption\n"{cell}",A\n')
    assert not faults and lines[0].value["image"] == cell


@given(
    rows=st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2
        ),
        max_size=5,
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_csv_writes_is_read(tmp_path: Path, rows: list[list[str]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerow(["image", "caption"])
    writer.writerows(rows)
    lines, faults = read(tmp_path / "a.csv", file.getvalue())
    names = ("image", "caption")
    cells = [{n: cell for n, cell in zip(names, row, strict=True) if cell} for row in rows]
    assert [line.value for line in lines] == cells and not faults


# ---- Parquet


def test_rows_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH", 2)
    path = tmp_path / "metadata.parquet"
    values = [
        {"file_name": f"{n}.jpg", "texts": [{"user": "?", "assistant": str(n)}]} for n in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(values), path)
    account = Account(name="photos")
    lines = list(read_lines(path, account))
    assert [line.value for line in lines] == values and numbers(lines) == [1, 2, 3, 4, 5]
    assert {line.offset for line in lines} == {-1} and not account.faults


def test_a_damaged_parquet_file_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "metadata.parquet"
    pq.write_table(pa.table({"file_name": ["a.jpg"] * 1000}), path, compression="none")
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-10], data[:-400] + b"\0" * 392 + data[-8:]):
        lines, faults = read(path, damaged)
        assert not lines and len(faults) == 1 and "not Parquet" in faults[0]
        assert "\n" not in faults[0]


def test_lines_that_a_broken_object_takes_in_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file": "a.jpg"\nnot json\n[1, 2]\n{"file": "b.jpg"}\n')
    account = Account(name="photos")
    assert [line.value["file"] for line in read_lines(path, account)] == ["b.jpg"]
    assert account.first_faults == [
        f"{path}:1: not JSON: a value without an end; lines 1 to 3 are not read"
    ]


def test_indented_lines_behind_a_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(' {"file": "a.jpg"\n {"file": "b.jpg"}\n\n {"file": "c.jpg"}\n')
    account = Account(name="photos")
    assert [line.value["file"] for line in read_lines(path, account)] == ["b.jpg", "c.jpg"]
    assert len(account.first_faults) == 1
