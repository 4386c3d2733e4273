"""Data sets of the Hugging Face hub: rows of Parquet and Arrow files with images inside become samples.

python -m encode.run --dataset hf:HuggingFaceM4/the_cauldron:ai2d --source copies
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cache.format.embedded.names import read_embedded
from cache.store.samples import Sample
from configs import UserError
from encode.records.account import Account
from encode.sources.tables import PROBATION, TableDataset

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXT = pa.string()


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(out, "png")
    return out.getvalue()


def image(number: int, path: str | None = None) -> dict[str, Any]:
    return {"bytes": png(number), "path": path}


def write(path: Path, columns: Mapping[str, tuple[Any, list[Any]]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(cells, type_) for name, (type_, cells) in columns.items()})
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


def read(path: Path, *, leave_out: bool = False, **options: Any) -> tuple[list[Sample], Account]:
    account = Account(name="set", leave_out=leave_out)
    dataset = TableDataset(name="set", folder=path.parent, files=(path,), **options)
    return list(dataset.samples(account=account)), account


def said(sample: Sample) -> list[str]:
    return [f"{message.role[0]}: {message.content}" for message in sample.messages]


def images_of(sample: Sample) -> list[bytes]:
    return [read_embedded(ref.source, 1 << 20) for ref in sample.media]


# ---- the data sets that people name


FINEVISION = {
    "images": (pa.list_(IMAGE), [[image(1)], [image(2), image(3)], [], [image(4)]]),
    "texts": (
        pa.list_(pa.struct({"user": TEXT, "assistant": TEXT})),
        [
            [{"user": "What?", "assistant": "A cat."}, {"user": "Why?", "assistant": "So."}],
            [{"user": "Compare.", "assistant": "Equal."}],
            [{"user": "Hello", "assistant": "Hi."}],
            [{"user": "Where?", "assistant": "Here."}, {"user": "And?", "assistant": "No."}],
        ],
    ),
    "source": (TEXT, ["a", "b", "c", "d"]),
    "relevance_ratings": (pa.list_(pa.int64()), [[5, 2], [4], [None], [1, 3]]),
    "relevance_min": (pa.int64(), [2, 4, None, 1]),
    "visual_dependency_ratings": (pa.list_(pa.int64()), [[5, 2], [4], [None], [1, 3]]),
    "visual_dependency_min": (pa.int64(), [2, 4, None, 1]),
    "image_correspondence_ratings": (pa.list_(pa.int64()), [[5, 2], [4], [None], [1, 3]]),
    "image_correspondence_min": (pa.int64(), [2, 4, None, 1]),
    "formatting_ratings": (pa.list_(pa.int64()), [[5, 5], [4], [3], [1, 3]]),
    "formatting_min": (pa.int64(), [5, 4, 3, 1]),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_finevision(tmp_path: Path, suffix: str) -> None:
    samples, account = read(write(tmp_path / f"train-00000-of-00001{suffix}", FINEVISION))
    assert [said(sample) for sample in samples] == [
        ["u: <image>What?", "a: A cat.", "u: Why?", "a: So."],
        ["u: <image><image>Compare.", "a: Equal."],
        ["u: Hello", "a: Hi."],
        ["u: <image>Where?", "a: Here.", "u: And?", "a: No."],
    ]
    assert [images_of(sample) for sample in samples] == [
        [png(1)],
        [png(2), png(3)],
        [],
        [png(4)],
    ]
    assert [sample.id for sample in samples] == [f"train-00000-of-00001#{n}" for n in range(4)]
    assert account.lines == {"texts": 4}
    assert account.columns == {"images": 1}
    assert {key for key, n in account.ignored.items() if n == 4} >= {"source", "formatting_min"}


def test_a_rating_of_each_turn_leaves_out_turns_and_a_rating_of_the_row_leaves_out_rows(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.parquet", FINEVISION)
    samples, account = read(path, where=("relevance_ratings >= 3",))
    assert [said(sample) for sample in samples] == [
        ["u: <image>What?", "a: A cat."],
        ["u: <image><image>Compare.", "a: Equal."],
        ["u: <image>And?", "a: No."],
    ]
    assert [sample.id for sample in samples] == ["a#0", "a#1", "a#3"]
    assert account.left_out == {
        "turn that `where` excludes": 3,
        "row without a turn that `where` keeps": 1,
    }
    samples, account = read(path, where=("formatting_min > 3", "relevance_ratings == 5"))
    assert [said(sample) for sample in samples] == [["u: <image>What?", "a: A cat."]]
    assert account.left_out["row that `where` excludes"] == 2
    samples, _ = read(path, where=("source != b", "source <= 'c'"))
    assert [sample.id for sample in samples] == ["a#0", "a#2"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("relevance", "'relevance' is no condition; write a column, one of"),
        ("relevance_mean > 3", "no column 'relevance_mean'.*nearest: relevance_min"),
        ("source > 3", "'source' is string, so 'source > 3' cannot be decided"),
        ("relevance_min == good", "'relevance_min' is int64"),
        ("relevance_min == true", "'relevance_min' is int64"),
        ("texts == 1", "'texts' is list<"),
        ("__import__('os') > 1", "no column"),
    ],
)
def test_a_condition_that_cannot_be_decided_is_one_line(
    tmp_path: Path, condition: str, message: str
) -> None:
    path = write(tmp_path / "a.parquet", FINEVISION)
    with pytest.raises(UserError, match=message) as found:
        read(path, where=(condition,))
    assert "\n" not in str(found.value)


def test_the_cauldron(tmp_path: Path) -> None:
    turn = pa.struct({"user": TEXT, "assistant": TEXT, "source": TEXT})
    turns = [[{"user": f"Q{n}?", "assistant": f"A{n}.", "source": "AI2D"}] for n in range(3)]
    columns = {
        "images": (pa.list_(IMAGE), [[image(n)] for n in range(3)]),
        "texts": (pa.list_(turn), turns),
    }
    samples, account = read(write(tmp_path / "train-00000.parquet", columns, row_group_size=2))
    assert [said(sample) for sample in samples] == [
        [f"u: <image>Q{n}?", f"a: A{n}."] for n in range(3)
    ]
    assert [images_of(sample) for sample in samples] == [[png(n)] for n in range(3)]
    assert account.ignored == {"texts.source": 3}


def test_llava_onevision_data(tmp_path: Path) -> None:
    turn = pa.struct({"from": TEXT, "value": TEXT})
    columns = {
        "id": (TEXT, ["x", "y"]),
        "image": (IMAGE, [image(1, "1.png"), None]),
        "conversations": (
            pa.list_(turn),
            [
                [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "One."},
                ],
                [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "Two."}],
            ],
        ),
        "data_source": (TEXT, ["d", "d"]),
    }
    samples, account = read(write(tmp_path / "train.parquet", columns))
    assert [said(sample) for sample in samples] == [
        ["u: <image>\nWhat?", "a: One."],
        ["u: Add.", "a: Two."],
    ]
    assert [images_of(sample) for sample in samples] == [[png(1)], []]
    assert account.lines == {"LLaVA": 2}
    assert account.ignored == {"id": 2, "data_source": 2}


@pytest.mark.parametrize("listed", [True, False])
def test_pixmo_docs(tmp_path: Path, listed: bool) -> None:
    if listed:
        pairs = [{"question": "How many?", "answer": "3"}, {"question": "Which?", "answer": "B"}]
        type_ = pa.list_(pa.struct({"question": TEXT, "answer": TEXT}))
        cell: Any = pairs
    else:  # a Sequence of dictionaries is a struct of lists in Parquet
        type_ = pa.struct({"question": pa.list_(TEXT), "answer": pa.list_(TEXT)})
        cell = {"question": ["How many?", "Which?"], "answer": ["3", "B"]}
    columns = {
        "image": (IMAGE, [image(1)]),
        "image_id": (TEXT, ["abc"]),
        "questions": (type_, [cell]),
    }
    samples, _ = read(write(tmp_path / "train.parquet", columns))
    assert [said(sample) for sample in samples] == [
        ["u: <image>How many?", "a: 3"],
        ["u: <image>Which?", "a: B"],
    ]
    assert [sample.id for sample in samples] == ["train#0.q0", "train#0.q1"]
    assert images_of(samples[0]) == images_of(samples[1]) == [png(1)]


POINT = pa.struct({"x": pa.float64(), "y": pa.float64()})
LISTS = pa.struct({"x": pa.list_(pa.float64()), "y": pa.list_(pa.float64())})


@pytest.mark.parametrize("form", ["lists of points", "points of lists"])
def test_cosyn_point(tmp_path: Path, form: str) -> None:
    listed = [[{"x": 50.0, "y": 10.0}, {"x": 5.25, "y": 90.0}], [{"x": 100.0, "y": 0.0}]]
    type_ = pa.list_(pa.list_(POINT))
    cell: Any = listed
    if form == "points of lists":
        type_ = pa.list_(LISTS)
        cell = [{"x": [p["x"] for p in one], "y": [p["y"] for p in one]} for one in listed]
    columns = {
        "id": (TEXT, ["a", "b"]),
        "image": (IMAGE, [image(1), image(2)]),
        "questions": (pa.list_(TEXT), [["Where is A?", "The corner?"], ["Lost?"]]),
        "answer_points": (type_, [cell, [None]]),
        "names": (pa.list_(TEXT), [["A", "the corner"], []]),
    }
    samples, account = read(write(tmp_path / "train.parquet", columns), leave_out=True)
    assert [said(sample) for sample in samples] == [
        ["u: <image>Where is A?", 'a: <points coords="1 1 052 900 2 500 100">A</points>'],
        ["u: <image>The corner?", 'a: <points coords="1 1 1000 000">the corner</points>'],
    ]
    assert [sample.messages[1].weight for sample in samples] == [0.2, 0.2]
    assert [sample.id for sample in samples] == ["train#0.q0", "train#0.q1"]
    assert account.lines == {"points": 1}
    assert sum(account.faults.values()) == 1
    assert account.ignored == {"id": 1}


def test_points_outside_the_image_are_faults(tmp_path: Path) -> None:
    columns = {
        "image": (IMAGE, [image(1)]),
        "questions": (pa.list_(TEXT), [["Where?"]]),
        "answer_points": (pa.list_(POINT), [[{"x": 120.0, "y": 10.0}]]),
        "names": (pa.list_(TEXT), [["A"]]),
    }
    with pytest.raises(UserError, match=r"row 0: .*a point outside the image"):
        read(write(tmp_path / "train.parquet", columns))


def test_tulu_3_has_text_alone(tmp_path: Path) -> None:
    turn = pa.struct({"content": TEXT, "role": TEXT})
    columns = {
        "id": (TEXT, ["a"]),
        "messages": (
            pa.list_(turn),
            [
                [
                    {"content": "Be short.", "role": "system"},
                    {"content": "Write <image> in HTML.", "role": "user"},
                    {"content": "<img>", "role": "assistant"},
                ]
            ],
        ),
        "source": (TEXT, ["s"]),
    }
    samples, account = read(write(tmp_path / "train.parquet", columns))
    assert [said(sample) for sample in samples] == [
        ["s: Be short.", "u: Write <image> in HTML.", "a: <img>"]
    ]
    assert samples[0].media == () and not account.columns


# ---- columns


def test_media_in_each_kind_of_column(tmp_path: Path) -> None:
    text = base64.b64encode(png(3)).decode()
    video = b"\0\0\0\x18ftypmp42" + bytes(40)
    for name, type_, cell, wanted in (
        ("image", pa.binary(), png(1), [png(1)]),
        ("jpg", pa.large_binary(), png(1), [png(1)]),
        ("picture", IMAGE, image(2), [png(2)]),
        ("images", pa.list_(pa.binary()), [png(1), png(2)], [png(1), png(2)]),
        ("image", TEXT, text, [png(3)]),
        ("image", TEXT, f"data:image/png;base64,{text}", [png(3)]),
        ("images", pa.list_(TEXT), [text, text], [png(3), png(3)]),
        ("video", pa.binary(), video, [video]),
        ("mp4", pa.binary(), video, [video]),
    ):
        path = write(tmp_path / "a.parquet", {name: (type_, [cell]), "caption": (TEXT, ["Hello."])})
        (sample,), account = read(path)
        assert images_of(sample) == wanted, name
        kind = "video" if wanted == [video] else "image"
        assert {ref.kind for ref in sample.media} == {kind}, name
        asked = "Describe this video." if kind == "video" else "Describe this image."
        assert sample.messages[0].content == "<image>" * len(wanted) + asked
        assert not account.ignored


def test_an_image_without_bytes_is_read_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    columns = {
        "image": (IMAGE, [{"bytes": None, "path": "1.png"}, image(2, "2.png"), None]),
        "question": (TEXT, ["Which?", "Which?", "Which?"]),
        "answer": (TEXT, ["One.", "Two.", "None."]),
    }
    path = write(tmp_path / "a.parquet", columns)
    samples, _ = read(path)
    assert [ref.source for ref in samples[0].media] == [str(tmp_path / "1.png")]
    assert images_of(samples[1]) == [png(2)]
    assert samples[2].media == ()
    (tmp_path / "1.png").unlink()
    samples, account = read(path)  # one of several is missing: the ledger records it
    assert len(samples) == 3 and account.notes == {"no such file": 1}
    columns["image"] = (IMAGE, [{"bytes": None, "path": "1.png"}, None, None])
    with pytest.raises(UserError, match="name their folder: --media DIR"):
        read(write(tmp_path / "a.parquet", columns))
    columns["image"] = (IMAGE, [{"bytes": None, "path": "../1.png"}, image(2), None])
    with pytest.raises(UserError, match=r"row 0: '../1.png' is outside"):
        read(write(tmp_path / "a.parquet", columns))
    columns["image"] = (IMAGE, [{"bytes": None, "path": None}, image(2), None])
    with pytest.raises(UserError, match="row 0: image: neither bytes nor a path"):
        read(write(tmp_path / "a.parquet", columns))


def test_a_text_never_names_bytes_in_another_file(tmp_path: Path) -> None:
    other = write(tmp_path / "other" / "secret.parquet", {"image": (IMAGE, [image(1)])})
    source = f"parquet:{other}#image:0"
    columns = {"image": (TEXT, [source]), "caption": (TEXT, ["A text."])}
    with pytest.raises(UserError):
        read(write(tmp_path / "here" / "a.parquet", columns))


def test_numbered_columns_are_the_images_of_a_row(tmp_path: Path) -> None:
    columns = {
        "id": (TEXT, ["a"]),
        **{f"image_{n}": (IMAGE, [None if n == 3 else image(n)]) for n in (10, 2, 1, 3)},
        "question": (TEXT, ["What do <image 1> and <image 2> show?"]),
        "answer": (TEXT, ["Colours."]),
    }
    (sample,), account = read(write(tmp_path / "a.parquet", columns))
    assert images_of(sample) == [png(1), png(2), png(10)]
    assert sample.messages[0].content == "<image>" * 3 + "What do <image 1> and <image 2> show?"
    assert account.columns == {f"image_{n} as images": 1 for n in (10, 2, 1, 3)}


def test_a_tar_that_the_hub_converted(tmp_path: Path) -> None:
    json_type = pa.struct({"caption": TEXT, "url": TEXT, "status": TEXT, "width": pa.int64()})
    columns = {
        "jpg": (IMAGE, [image(1)]),
        "txt": (TEXT, ["A cat."]),
        "json": (
            json_type,
            [{"caption": "A cat.", "url": "https://a.org/1.jpg", "status": "ok", "width": 4}],
        ),
        "__key__": (TEXT, ["0001"]),
        "__url__": (TEXT, ["0000.tar"]),
    }
    (sample,), account = read(write(tmp_path / "a.parquet", columns))
    assert said(sample) == ["u: <image>Describe this image.", "a: A cat."]
    assert images_of(sample) == [png(1)] and account.columns == {"jpg as image": 1}


def test_turns_as_json_and_texts_as_bytes(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Wörter?"}, {"from": "gpt", "value": "Ja."}]
    columns = {
        "image": (IMAGE, [image(1)]),
        "conversations": (TEXT, [json.dumps(turns)]),
    }
    (sample,), _ = read(write(tmp_path / "a.parquet", columns))
    assert said(sample) == ["u: <image>Wörter?", "a: Ja."]
    columns["conversations"] = (TEXT, ['[{"from": "human", "from": "gpt"}]'])
    with pytest.raises(UserError, match=r"row 0: .*from"):
        read(write(tmp_path / "a.parquet", columns))
    columns = {
        "image": (IMAGE, [image(1)] * 2),
        "caption": (pa.binary(), ["Ein Öl.".encode(), b"\xff\xfe"]),
    }
    (sample,), account = read(write(tmp_path / "a.parquet", columns), leave_out=True)
    assert said(sample)[1] == "a: Ein Öl." and account.faults == {"not UTF-8": 1}


def test_bytes_that_are_nothing_known_are_refused_by_name(tmp_path: Path) -> None:
    columns = {
        "jpg": (IMAGE, [image(1)]),
        "caption": (TEXT, ["A text."]),
        "embedding": (pa.binary(), [bytes(range(200, 256))]),
    }
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=r"row 0: unknown key 'embedding': .* would be lost"):
        read(path)
    account = Account(name="set", ignore_keys=frozenset({"embedding"}))
    dataset = TableDataset(name="set", folder=tmp_path, files=(path,))
    (sample,) = dataset.samples(account=account)
    assert images_of(sample) == [png(1)] and account.ignored == {"embedding": 1}


def test_columns_are_named_where_they_are_not_detected(tmp_path: Path) -> None:
    columns = {
        "left": (IMAGE, [image(1)]),
        "right": (IMAGE, [image(2)]),
        "q": (TEXT, ["What?"]),
        "a": (TEXT, ["That."]),
        "note": (TEXT, ["A note of more than four words."]),
    }
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(
        UserError, match=r"the columns left, right have media; .*columns: \{image: left"
    ):
        read(path)
    account = Account(name="set", ignore_keys=frozenset({"left", "q", "a", "note"}))
    dataset = TableDataset(name="set", folder=tmp_path, files=(path,))
    (sample,) = dataset.samples(account=account)
    assert images_of(sample) == [png(2)] and account.columns == {"left": 1, "right as image": 1}
    (sample,), account = read(path, columns={"image": "right", "question": "q", "answer": "a"})
    assert said(sample) == ["u: <image>What?", "a: That."]
    assert images_of(sample) == [png(2)]
    assert account.ignored == {"left": 1, "note": 1}
    assert "columns of media: right as image" in account.text()
    with pytest.raises(UserError, match=r"no column 'reight'.*nearest: right"):
        read(path, columns={"image": "reight"})
    with pytest.raises(UserError, match="'imgae' is no key of a record; nearest: image"):
        read(path, columns={"imgae": "right"})


def test_sound_and_text_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    sound = pa.struct({"bytes": pa.binary(), "path": TEXT})
    wave = {"bytes": b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "path": "a.wav"}
    columns = {
        "image": (IMAGE, [image(1)]),
        "caption": (TEXT, ["A bell."]),
        "audio": (sound, [wave]),
    }
    with pytest.raises(UserError, match="row 0: unknown key 'audio'"):
        read(write(tmp_path / "a.parquet", columns))
    columns["audio"] = (TEXT, ["What is said in the clip."])
    with pytest.raises(UserError, match="row 0: unknown key 'audio'"):
        read(write(tmp_path / "a.parquet", columns))


# ---- damage


def test_a_row_that_cannot_be_used_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    bad = pa.array([b"A cat.", b"\xff\xfe", b"A dog."]).cast(pa.binary())
    table = pa.table({"image": pa.array([image(n) for n in range(3)], IMAGE)})
    text = pa.StringArray.from_buffers(3, bad.buffers()[1], bad.buffers()[2])
    pq.write_table(table.append_column("caption", text), path := tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 1: a text that is not UTF-8"):
        read(path)
    samples, account = read(path, leave_out=True)
    assert [sample.id for sample in samples] == ["a#0", "a#2"]
    assert account.faults == {"not UTF-8": 1}


def test_damaged_files_and_row_groups_are_named_and_the_others_are_used(tmp_path: Path) -> None:
    columns = {
        "image": (IMAGE, [image(n) for n in range(90)]),
        "caption": (TEXT, [f"Image number {n}, with a text of its own." for n in range(90)]),
    }
    whole = write(
        tmp_path / "a.parquet",
        columns,
        row_group_size=30,
        write_page_checksum=True,
        compression="none",
    )
    data = bytearray(whole.read_bytes())
    at = data.index(b"Image number 45")
    data[at - 300 : at + 300] = bytes(600)
    damaged = tmp_path / "b.parquet"
    damaged.write_bytes(data)
    (tmp_path / "c.parquet").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "d.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    (tmp_path / "e.arrow").write_bytes(b"")
    files = tuple(sorted(tmp_path.iterdir()))
    dataset = TableDataset(name="set", folder=tmp_path, files=files)
    account = Account(name="set", leave_out=True)
    samples = list(dataset.samples(account=account))
    assert len(samples) == 90 + 60
    faults = "\n".join(account.first_faults)
    assert "b.parquet: rows 30 to 59 (row group 1): damaged" in faults
    assert "c.parquet: damaged" in faults and "download it again" in faults
    assert "d.parquet: a Git LFS pointer, not the data: fetch it with git lfs pull" in faults
    assert "e.arrow: damaged" in faults
    assert account.faults == {"damaged row group": 1, "damaged file": 3}
    with pytest.raises(UserError, match="4 lines cannot be used"):
        list(dataset.samples())


def test_a_table_of_nothing_known_is_refused_early(tmp_path: Path) -> None:
    rows = 3 * PROBATION
    columns = {"essay": (TEXT, ["Some words that would be lost here."] * rows)}
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=f"{PROBATION:,} lines cannot be used"):
        read(path)
    empty = write(tmp_path / "b.parquet", {"caption": (TEXT, [])})
    with pytest.raises(UserError, match=r"no row of .* is usable"):
        read(empty)


def test_a_declared_type_counts_more_than_the_first_bytes(tmp_path: Path) -> None:
    features = {"info": {"features": {"shot": {"_type": "Image"}, "caption": {"_type": "Value"}}}}
    table = pa.table(
        {"shot": pa.array([{"bytes": b"unknown", "path": None}], IMAGE), "caption": ["A text."]}
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path := tmp_path / "a.parquet")
    (sample,), account = read(path)
    assert [ref.kind for ref in sample.media] == ["image"]
    assert account.columns == {"shot as image": 1}


def test_files_of_equal_names_have_different_ids(tmp_path: Path) -> None:
    columns = {"image": (IMAGE, [image(1)]), "caption": (TEXT, ["A text."])}
    files = tuple(write(tmp_path / part / "train.parquet", columns) for part in ("a", "b"))
    dataset = TableDataset(name="set", folder=tmp_path, files=files)
    assert [sample.id for sample in dataset.samples()] == ["a/train#0", "b/train#0"]
