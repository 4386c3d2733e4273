"""A file that is one object: COCO captions give one line for each image; a list of records is read as such.

{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat."}]}
{"data": [{"image": "1.jpg", "caption": "A cat."}]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from encode.records import json_window, one_object
from encode.records.account import Account
from encode.records.reading import read_records
from encode.records.stream import read_lines

IMAGE = {
    "license": 3,
    "coco_url": "http://x.org/1.jpg",
    "height": 4,
    "width": 5,
    "date_captured": "2013",
}
IMAGES = [{"id": n, "file_name": f"{n}.jpg", **IMAGE} for n in (1, 2)]
ANNOTATIONS = [
    {"id": 10, "image_id": 2, "caption": "A dog."},
    {"id": 11, "image_id": 1, "caption": "A cat."},
    {"id": 12, "image_id": 2, "caption": "A pet."},
]
INFO = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "CC"}]}


def read(path: Path, value: Any, indent: int | None = None) -> tuple[list[Any], Account]:
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
    account = Account(name="coco")
    lines = list(read_lines(path, account))
    for line in lines:
        if line.length:
            read = json.loads(path.read_bytes()[line.offset : line.offset + line.length])
            assert read.items() <= line.value.items()
    return lines, account


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("order", [["images", "annotations"], ["annotations", "images"]])
def test_captions_are_grouped_by_image(
    tmp_path: Path, indent: int | None, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_window, "BLOCK", 50)
    lists = {"images": IMAGES, "annotations": ANNOTATIONS}
    value = INFO | {name: lists[name] for name in order}
    lines, account = read(tmp_path / "captions.json", value, indent)
    assert [line.value["captions"] for line in lines] == [["A cat."], ["A dog.", "A pet."]]
    records = [read_records(line.value, account) for line in lines]
    assert [len(record.answers) for (record,) in records] == [0, 1]
    assert [record.media[0].text for (record,) in records] == ["1.jpg", "2.jpg"]
    assert account.lines == {"captions": 2} and not account.faults
    assert account.ignored == {
        **dict.fromkeys(("info", "licenses"), 1),
        **dict.fromkeys(("id", *IMAGE), 2),
        "annotations.id": 3,
    }
    text = (tmp_path / "captions.json").read_text().splitlines()
    for line in lines:
        number = int(line.where.rpartition(":")[2])
        assert indent is None or (text[number - 1].strip() == "{" and '"id"' in text[number])


def test_an_image_without_captions_stays(tmp_path: Path) -> None:
    lines, account = read(tmp_path / "a.json", {"images": IMAGES, "annotations": ANNOTATIONS[:1]})
    assert [line.value["captions"] for line in lines] == [None, ["A dog."]]
    (record,) = read_records(lines[0].value, account)
    assert record.format == "image alone"


@pytest.mark.parametrize(
    ("images", "annotations", "why"),
    [
        (
            IMAGES,
            [{"image_id": 9, "caption": "A cow."}],
            "no image with the id 9 for the caption 'A cow.'",
        ),
        (
            IMAGES,
            [{"image_id": 1, "bbox": [1, 2], "category_id": 3}],
            "annotation without a caption",
        ),
        (
            IMAGES,
            [{"image_id": 1, "caption": "x", "caption_2": "y"}],
            "unknown key 'annotations.caption_2'",
        ),
        (IMAGES, [{"caption": "x"}], "image_id: expected the id of an image, found None"),
        (IMAGES, [{"image_id": [1], "caption": "x"}], "image_id: expected the id of an image"),
        (IMAGES, ["x"], "expected an object"),
        ([IMAGES[0], IMAGES[0]], [], "two images with the id 1"),
        ([{"file_name": "1.jpg"}], [], "id: expected the id of an image"),
        ([IMAGES[0] | {"captions": ["x"]}], [], "unknown key 'captions' of an image"),
    ],
)
def test_what_does_not_fit_is_a_fault(
    tmp_path: Path, images: list[Any], annotations: list[Any], why: str
) -> None:
    value = {"images": images, "annotations": annotations}
    lines, account = read(tmp_path / "a.json", value, indent=0)
    assert sum(account.faults.values()) == 1 and why in account.first_faults[0]
    assert len(lines) == len({json.dumps(image) for image in images if "license" in image}) or (
        "captions" in images[0]
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"images": ["a.jpg"], "messages": [{"role": "user", "content": "x"}]}',
        '{"images": ["a.jpg"], "annotations": [{"bbox": [1]}], "caption": "x"}',
        '{"images": [], "annotations": "x"}',
        '{"images": []}\n{"annotations": []}',
        '{"images": [], "annotations": []}\n{"image": "a.jpg"}',
    ],
)
def test_other_files_with_such_keys_are_read_as_records(tmp_path: Path, text: str) -> None:
    lines, _ = read(tmp_path / "a.jsonl", text)
    assert [line.value for line in lines] == [json.loads(line) for line in text.split("\n")]


def test_a_broken_file_is_a_fault(tmp_path: Path) -> None:
    text = json.dumps({"images": IMAGES, "annotations": ANNOTATIONS}, indent=1)
    lines, account = read(tmp_path / "a.json", text[:-30])
    assert not lines and sum(account.faults.values()) == 1


WRAPPED: list[Any] = [
    {"data": [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "y"}]},
    {"version": "1.0", "description": "Cats.", "url": "http://x.org", "annotations": [{"a": 1}]},
    {"info": {"year": 1}, "licenses": [], "tags": ["x"], "train": [{"text": "x"}, {"text": "y"}]},
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", WRAPPED)
def test_the_only_list_of_records_in_an_object_is_read(
    tmp_path: Path, value: dict[str, Any], indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_window, "BLOCK", 50)
    lines, account = read(tmp_path / "a.json", value, indent)
    *_, (key, records) = value.items()
    assert [line.value for line in lines] == records
    assert account.ignored == dict.fromkeys(set(value) - {key}, 1) and not account.faults


def test_a_broken_record_in_a_wrapped_list_is_one_fault(tmp_path: Path) -> None:
    text = '{"data": [\n {"text": "x"},\n {"text": "y" "z"},\n {"text": NaN},\n {"text": "w"}\n]}\n'
    lines, account = read(tmp_path / "a.json", text)
    assert [line.value for line in lines] == [{"text": "x"}, {"text": "w"}]
    assert [fault.split(": ")[0][-2:] for fault in account.first_faults] == [":3", ":4"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": [{"text": "x"}], "val": [{"text": "x"}]}, "2 lists of records (train, val): "),
        ({str(n): {"image": "a.jpg", "caption": "x"} for n in range(9)}, "9 objects (0, 1, 2, 3, "),
    ],
)
def test_an_object_that_is_no_list_says_what_it_contains(
    tmp_path: Path, value: dict[str, Any], message: str
) -> None:
    lines, account = read(tmp_path / "a.json", value, 1)
    assert not lines and account.faults == {"one object instead of a list": 1}
    assert message in account.first_faults[0]


@pytest.mark.parametrize(
    "value",
    [
        {"image": "a.jpg", "caption": "x", "regions": [{"x": 1}]},
        {"image": "a.jpg", "objects": [{"caption": "x"}]},
        {"id": 1, "messages": [{"role": "user", "content": "x"}], "data": [{"text": "x"}]},
        {"objects": [{"caption": "x"}]},
        {"images": [{"path": "a.jpg"}], "data": [{"text": "x"}]},
        {"metadata": {"x": 1}, "n": 3},
    ],
)
def test_one_record_is_one_line(tmp_path: Path, value: dict[str, Any]) -> None:
    lines, account = read(tmp_path / "a.json", value, 1)
    assert [line.value for line in lines] == [value] and not account.faults


def test_a_key_twice_is_a_fault(tmp_path: Path) -> None:
    lines, account = read(tmp_path / "a.json", '{"data": [{"text": "x"}], "data": [{"text": "y"}]}')
    assert not lines and account.faults == {"duplicate key": 1}


def test_an_object_of_very_many_objects_is_not_read_whole(tmp_path: Path) -> None:
    value = {
        str(n): {"image": "a.jpg", "caption": "x"} for n in range(one_object.MOST_SECTIONS + 9)
    }
    lines, account = read(tmp_path / "a.json", value)
    assert not lines and "contains 1,000 or more objects (0, 1," in account.first_faults[0]
    lines, _ = read(tmp_path / "a.json", value | {"0": 1})
    assert len(lines) == 1
