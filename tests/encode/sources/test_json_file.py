"""A file of records as a data set.

(dataset,) = open_datasets(["json:llava.json"], Path("cache"), media=Path("images"))
samples = list(dataset.samples())
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.format.embedded.names import read_embedded
from cache.store.samples import Sample
from configs import UserError
from encode.records.account import Account
from encode.sources.catalogue import open_datasets

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(20)


def llava(image: Any, answer: str = "A cat.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"id": "same for all", "image": image, "conversations": turns}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a.jpg", "images/a.jpg", "images/sub/b.png", "images/c.mp4"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(MP4 if name.endswith("4") else PNG)
    return tmp_path / "data"


def read(
    file: Path, media: Path | None = None, *, leave_out: bool = False
) -> tuple[list[Sample], Account]:
    (dataset,) = open_datasets([f"json:{file}"], Path("cache"), media=media)
    account = Account(name=dataset.name, leave_out=leave_out)
    return list(account.watch(dataset.samples(account=account))), account


def write(file: Path, value: Any, **options: Any) -> Path:
    file.write_text(json.dumps(value, **options), encoding="utf-8")
    return file


def sources(found: list[Sample], below: Path) -> list[str]:
    return [Path(one.media[0].source).relative_to(below).as_posix() for one in found]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_llava_with_media_elsewhere(data: Path, indent: int | None) -> None:
    records = [llava("a.jpg"), llava("sub/b.png", "A dog."), llava("a.jpg", "A cat again.")]
    found, account = read(write(data / "train.json", records, indent=indent), data / "images")
    assert sources(found, data / "images") == ["a.jpg", "sub/b.png", "a.jpg"]
    assert [one.id for one in found] == ["a.jpg#0", "sub/b.png#0", "a.jpg#1"]
    assert {one.dataset for one in found} == {"train"}
    assert account.text() == "train: 3 lines (LLaVA), 2 images; keys ignored: id (3)"
    assert read(data / "train.json", data / "images")[0] == found, "the same each time"


def test_paths_are_relative_to_the_file_or_absolute_below_a_named_folder(data: Path) -> None:
    file = write(data / "x.json", [llava("images/a.jpg"), llava(str(data / "images" / "c.mp4"))])
    found, _ = read(file)
    assert sources(found, data) == ["images/a.jpg", "images/c.mp4"]
    assert [one.media[0].kind for one in found] == ["image", "video"]
    found, _ = read(write(file, [llava("a.jpg"), llava(str(data / "a.jpg"))]), data / "images")
    assert sources(found, data) == ["images/a.jpg", "a.jpg"]
    with pytest.raises(UserError, match=rf"x\.json:1: '\.\./a\.jpg' is outside .*--media {data}"):
        read(write(data / "images" / "x.json", [llava("../a.jpg")]))


def test_a_linked_folder_of_images_is_read_if_it_is_named(data: Path, tmp_path: Path) -> None:
    (data / "images").rename(tmp_path / "elsewhere")
    (data / "images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    file = write(data / "x.json", [llava("images/a.jpg")])
    with pytest.raises(
        UserError, match=f"'images/a.jpg' is outside .*--media {tmp_path}/elsewhere"
    ):
        read(file)
    for named in (data / "images", tmp_path / "elsewhere"):
        found, account = read(file, named)
        assert sources(found, data) == ["images/a.jpg"]
        assert account.notes == {"path relative to another named folder": 1}


def test_lines_rows_and_coco_are_read(data: Path) -> None:
    (data / "x.jsonl").write_text("".join(json.dumps(llava(n)) + "\n" for n in ("a.jpg",) * 2))
    assert len(read(data / "x.jsonl")[0]) == 2
    (data / "x.csv").write_text("image,caption\na.jpg,A cat.\nimages/c.mp4,A film.\n")
    assert [one.media[0].kind for one in read(data / "x.csv")[0]] == ["image", "video"]
    (data / "x.tsv").write_text("image\tquestion\tanswer\na.jpg\tWhat?\tA cat.\n")
    assert read(data / "x.tsv")[0][0].messages[0].content == "<image>What?"
    rows = {"image": ["a.jpg"], "question": ["What?"], "answers": [["A cat.", "A pet."]]}
    pq.write_table(pa.table(rows), data / "x.parquet")
    found, _ = read(data / "x.parquet")
    assert [one.id for one in found] == ["a.jpg#0.a0", "a.jpg#0.a1"]
    assert {one.choice for one in found} == {"a.jpg#0"}
    coco = {
        "info": {},
        "images": [{"id": 7, "file_name": "a.jpg", "width": 3, "height": 4, "coco_url": "x"}],
        "annotations": [{"id": n, "image_id": 7, "caption": f"A cat {n}."} for n in (1, 2)],
    }
    found, _ = read(write(data / "captions.json", coco), data / "images")
    assert [one.messages[-1].content for one in found] == ["A cat 1.", "A cat 2."]
    assert sources(found, data) == ["images/a.jpg"] * 2


def test_text_alone_needs_no_media(data: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    found, account = read(write(data / "tulu.json", [{"messages": turns}] * 2))
    assert [(one.id, one.media) for one in found] == [("#0", ()), ("#1", ())]
    assert account.text() == "tulu: 2 lines (messages)"


@pytest.mark.parametrize("lines", [True, False])
def test_data_uris_are_read_again_from_their_place(data: Path, lines: bool) -> None:
    uris = [
        f"data:image/png;base64,{base64.b64encode(PNG + bytes([n])).decode()}" for n in range(3)
    ]
    part = {"type": "image_url", "image_url": {"url": uris[2]}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "ü What?"}, part]},
        {"role": "assistant", "content": "A cat."},
    ]
    records = [llava("a.jpg"), {"images": uris[:2], "caption": "Two."}, {"messages": turns}]
    file = data / "x.json"
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    file.write_text(f"\ufeff{text}", encoding="utf-8")
    found, account = read(file)
    bytes_of = [read_embedded(ref.source, 1 << 20) for one in found[1:] for ref in one.media]
    assert bytes_of == [PNG + bytes([n]) for n in range(3)]
    assert [one.id for one in found] == ["a.jpg#0", "data#0", "data#1"]
    assert account.media == {"image": 4}


def test_a_data_uri_in_a_table_is_refused(data: Path) -> None:
    (data / "x.csv").write_text('image,caption\n"data:image/png;base64,iVBORw0KGgo=",A cat.\n')
    with pytest.raises(UserError, match=r"x\.csv:2: data: URIs are read from \.json and \.jsonl"):
        read(data / "x.csv")


def test_urls_are_for_the_downloader(data: Path) -> None:
    url = "https://example.org/a%20b.jpg?x=1"
    other = {"url": "https://example.org/v.mp4", "caption": "A film."}
    found, account = read(write(data / "x.json", [llava(url), other]))
    assert [(one.media[0].source, one.media[0].kind) for one in found] == [
        (url, "image"),
        ("https://example.org/v.mp4", "video"),
    ]
    assert not account.notes
    with pytest.raises(UserError, match=r"x\.json:1: .*invalid URL"):
        read(write(data / "x.json", [llava("https://[x/a.jpg")]))


def test_a_wrong_folder_is_told_with_the_right_one(data: Path) -> None:
    file = write(data / "x.json", [llava("sub/b.png"), llava("sub/gone.png")])
    with pytest.raises(UserError) as refused:
        read(file)
    assert str(refused.value) == (
        f"{file}: none of the 2 files it names exists (first: {data}/sub/b.png); "
        f"there is {data}/images/sub/b.png: --media {data}/images"
    )
    found, account = read(file, data / "images")
    assert (len(found), account.notes) == (2, {"no such file": 1})
    with pytest.raises(UserError, match="name the folder of the media: --media DIR"):
        read(write(file, [llava("x/1.jpg")]))
    with pytest.raises(UserError, match="name another folder of the media: --media DIR"):
        read(file, data / "images")


def test_faults_are_named_by_file_and_line_and_may_be_left_out(data: Path) -> None:
    records = [llava("a.jpg"), {"image": "a.jpg", "captoin": "x"}, llava("A.jpg"), llava("a.jpg")]
    file = write(data / "x.json", records, indent=1)
    with pytest.raises(UserError) as refused:
        read(file)
    first, second, total = str(refused.value).split("\n")
    assert first.startswith(f"{file}:16: unknown key 'captoin'")
    assert second.startswith(f"{file}:20: 'A.jpg': no such file; there is 'a.jpg'")
    assert "2 lines cannot be used" in total
    with pytest.raises(UserError) as refused:
        read(write(data / "one.json", [llava("A.jpg")]), leave_out=True)
    assert str(refused.value) == (
        f"{data}/one.json: no lines that can be used (one: nothing; left out: 1 line (name of a "
        "file that differs: 1))"
    )
    found, account = read(file, leave_out=True)
    assert [one.id for one in found] == ["a.jpg#0", "a.jpg#1"]
    assert account.lines == {"LLaVA": 2}
    assert account.faults.total() == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"\n\n", "no lines"),
        (b"[]", "no lines"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (PNG, "a PNG image, not a file of records"),
        (b"PK\x03\x04", "a ZIP archive, not a file of records; unpack it"),
        (b"PAR1", "a Parquet table, not a file of records"),
        (b"<!doctype html><title>404</title>", "an HTML page, not a file of records"),
    ],
)
def test_what_is_no_file_of_records_is_refused_in_one_line(
    data: Path, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (data / "x.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read(data / "x.json")
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_table_with_bytes_is_answered_with_the_kind_that_reads_them(data: Path) -> None:
    image = pa.array([{"bytes": PNG, "path": "a.png"}])
    pq.write_table(pa.table({"image": image, "caption": ["A cat."]}), data / "x.parquet")
    with pytest.raises(
        UserError, match=f"'image' has bytes of media; --dataset hf:{data}/x.parquet"
    ):
        read(data / "x.parquet")
    whole = (data / "x.parquet").read_bytes()
    (data / "x.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"x\.parquet: not Parquet"):
        read(data / "x.parquet")


def test_a_folder_is_answered_with_its_word(data: Path) -> None:
    with pytest.raises(UserError, match=f"--dataset folder:{data}"):
        read(data)
    with pytest.raises(UserError, match=f"--media {data}/x: no such folder"):
        read(write(data / "x.json", []), data / "x")


def test_long_names_give_bounded_ids(data: Path) -> None:
    urls = [f"https://example.org/{'x' * 3000}{n}.jpg" for n in range(2)]
    found, _ = read(write(data / "x.json", [llava(url) for url in urls]))
    assert len({one.id for one in found}) == 2
    assert all(len(one.id) < 600 for one in found)
