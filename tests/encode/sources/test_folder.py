"""A folder as a data set: exact samples, each file used or counted, an error with file and line for faults.

(dataset,) = open_datasets(["folder:photos"], Path("cache"))
samples = list(dataset.samples())
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import configs
from cache.store.samples import MediaRef, Message, Sample
from configs import UserError
from encode.records.account import Account
from encode.records.record import CAPTION_PROMPT, VIDEO_PROMPT
from encode.sources.catalogue import open_datasets, read_catalogue

JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(20)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
WEBP = b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20)
MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(20)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(20)
JP2 = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20)
HTML = b"<!DOCTYPE html><title>404</title>"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    put(folder, {"a.jpg": JPEG, "b.png": PNG, "sub/c.webp": WEBP})
    return folder


def put(folder: Path, files: dict[str, Any]) -> None:
    """Write files: bytes, text, or values as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(folder: Path, *, leave_out: bool = False) -> tuple[list[Sample], Account]:
    """Return the samples of a folder, and what became of its lines and files."""
    (dataset,) = open_datasets([f"folder:{folder}"], folder.parent / "cache")
    account = Account(name=dataset.name, leave_out=leave_out)
    return list(account.watch(dataset.samples(account=account))), account


def samples(folder: Path, *lines: Any) -> list[Sample]:
    """Return the samples of `folder` with these lines of metadata."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    if lines:
        (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return read(folder)[0]


def sample(name: str, *messages: Message, **fields: Any) -> Sample:
    return Sample(id=name, dataset="photos", messages=messages, **fields)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str, weight: float = 1.0) -> Message:
    return Message(role="assistant", content=content, weight=weight)


def ids(found: list[Sample]) -> list[str]:
    return [one.id for one in found]


def answers(found: list[Sample]) -> list[str]:
    return [one.messages[-1].content for one in found if one.messages]


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


# ---- metadata


def test_captions_questions_and_conversations_become_messages(photos: Path) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Compare."},
        {"role": "assistant", "content": "Both grey.", "weight": 0.5},
    ]
    found = samples(
        photos,
        {"file": "a.jpg", "caption": "A cat."},
        {"file": "a.jpg", "question": "Which animal?", "answer": "A cat.", "weight": 2},
        {"files": ["b.png", "sub/c.webp"], "messages": chat},
        {"file": "b.png"},
        {"messages": HELLO},
    )
    a, b, c = (MediaRef(source=str(photos / n)) for n in ("a.jpg", "b.png", "sub/c.webp"))
    question = (user("<image>Which animal?"), assistant("A cat."))
    compare = (user("<image><image>Compare."), assistant("Both grey.", 0.5))
    brief = Message(role="system", content="Be brief.")
    assert found == [
        sample(
            "a.jpg#0",
            user(f"<image>{CAPTION_PROMPT}"),
            assistant("A cat."),
            media=(a,),
            task="caption",
        ),
        sample("a.jpg#1", *question, media=(a,), weight=2.0, task="question"),
        sample("b.png#0", brief, *compare, media=(b, c), task="chat"),
        sample("b.png#1", media=(b,)),
        sample("#0", user("Hi"), assistant("Hello"), task="chat"),
    ]
    assert len({one.id for one in found}) == len(found)


def test_formats_of_others_are_read(photos: Path) -> None:
    put(photos, {"a.mp4": MP4})
    llava = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    found = samples(
        photos,
        {"images": ["a.jpg"], "messages": HELLO},
        {"file": "b.png", "conversations": [{**llava[0], "value": "<image>\nWhat?"}, llava[1]]},
        {"videos": ["a.mp4"], "conversations": llava},
        {"file_name": "https://example.org/0.jpg", "text": "A sea."},
        {"messages": [HELLO[0], {"role": "assistant", "content": "The <image> element."}]},
        {"image": "a.mp4", "caption": "A cat wakes up."},
    )
    assert [[ref.kind for ref in one.media] for one in found] == [
        ["image"],
        ["image"],
        ["video"],
        ["image"],
        [],
        ["video"],
    ]
    marks = [len(re.findall("<image>|<video>", one.messages[0].content)) for one in found]
    assert marks == [1, 1, 1, 1, 0, 1]
    assert found[3].media[0].source == "https://example.org/0.jpg"
    assert answers(found)[4] == "The <image> element."
    assert found[5].messages[0].content == f"<image>{VIDEO_PROMPT}"


METADATA = {
    "metadata.json": json.dumps([{"file_name": "a.jpg", "text": "A cat."}], indent=2).encode(),
    "metadata.jsonl": b'{"file_name": "a.jpg", "text": "A cat."}\n',
    "metadata.csv": b"file_name,text\na.jpg,A cat.\n",
    "metadata.tsv": b"file_name\ttext\na.jpg\tA cat.\n",
    "METADATA.CSV": b"\xef\xbb\xbffile_name,text\r\na.jpg,A cat.\r\n",
}


@pytest.mark.parametrize("name", [*METADATA, "metadata.parquet"])
def test_each_kind_of_metadata_file(photos: Path, name: str) -> None:
    if name.endswith(".parquet"):
        rows = pa.table({"file_name": ["a.jpg"], "text": ["A cat."]})
        pq.write_table(rows, photos / name)
    else:
        put(photos, {name: METADATA[name]})
    found, account = read(photos)
    assert (ids(found), answers(found)) == (["a.jpg#0"], ["A cat."])
    assert account.left_out == {"media without a line of metadata": 2}
    assert account.lines == {"captions": 1}


def test_two_files_of_metadata_in_one_folder_are_refused(photos: Path) -> None:
    put(photos, {name: METADATA[name] for name in ("metadata.csv", "metadata.jsonl")})
    with pytest.raises(UserError, match=r"metadata\.csv and metadata\.jsonl are both metadata"):
        read(photos)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("metadata.csv", b"PK\x03\x04", "a ZIP archive, not a file of records"),
        ("metadata.json", HTML, "an HTML page, not a file of records"),
        ("metadata.parquet", b"file_name,text", "a text, not a file of records"),
        ("metadata.parquet", b"PAR1", "not Parquet"),
    ],
)
def test_metadata_that_is_something_else_is_refused_in_one_line(
    photos: Path, name: str, content: bytes, expected: str
) -> None:
    put(photos, {name: content})
    with pytest.raises(UserError) as refused:
        read(photos)
    assert expected in str(refused.value)
    assert str(refused.value).startswith(f"{photos}/{name}: ")
    assert "\n" not in str(refused.value)


def test_metadata_that_is_a_link_out_of_the_folder_is_refused(photos: Path) -> None:
    put(photos.parent, {"elsewhere.jsonl": {"file": "a.jpg", "caption": "A cat."}})
    (photos / "metadata.jsonl").symlink_to(photos.parent / "elsewhere.jsonl")
    with pytest.raises(UserError) as refused:
        read(photos)
    words = f"--dataset json:{photos}/metadata.jsonl --media {photos}"
    assert str(refused.value).endswith(words)
    (dataset,) = open_datasets([f"json:{photos}/metadata.jsonl"], photos / "cache", media=photos)
    assert answers(list(dataset.samples())) == ["A cat."]
    (photos / "metadata.jsonl").unlink()
    (photos / "metadata.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match="broken link"):
        read(photos)


def test_metadata_in_subfolders_is_relative_to_them(photos: Path) -> None:
    line = {"file_name": "c.webp", "text": "One."}
    put(
        photos,
        {"sub/metadata.jsonl": line, "other/metadata.csv": "file_name,text\n../b.png,Two.\n"},
    )
    put(photos, {"metadata.jsonl": {"file_name": "sub/c.webp", "text": "Three."}})
    found, account = read(photos)
    assert answers(found) == ["Three.", "Two.", "One."]
    assert ids(found) == ["sub/c.webp#0", "other/../b.png#0", "sub/c.webp#1"]
    assert [one.media[0].source for one in found] == [
        str(photos / name) for name in ("sub/c.webp", "b.png", "sub/c.webp")
    ]
    assert account.left_out == {"media without a line of metadata": 1}


def test_lines_that_are_appended_change_no_id(photos: Path) -> None:
    lines = [{"file": name, "caption": "x"} for name in ("a.jpg", "b.png", "a.jpg")]
    before = samples(photos, *lines)
    assert samples(photos, *lines, lines[0], {"messages": HELLO})[:3] == before


def test_blank_lines_a_byte_order_mark_and_harmless_keys_are_accepted(photos: Path) -> None:
    line = '\ufeff{"file": "a.jpg", "caption": "Ä 猫.", "width": 3, "height": 4, "license": "x"}'
    found = samples(photos, line, "", "   ")
    assert answers(found) == ["Ä 猫."]
    assert read(photos)[1].ignored == {"width": 1, "height": 1, "license": 1}


def test_a_sample_keeps_a_missing_image_and_the_account_says_so(photos: Path) -> None:
    lines = [{"file": name, "caption": "It was here."} for name in ("a.jpg", "gone.jpg", "x/y.mp4")]
    found = samples(photos, *lines)
    assert found[1].media == (MediaRef(source=str(photos / "gone.jpg")),)
    assert found[2].media[0].kind == "video"
    assert read(photos)[1].notes == {"no such file": 2}


def test_images_that_are_all_missing_mean_wrong_paths(photos: Path) -> None:
    with pytest.raises(UserError) as refused:
        samples(photos, *({"file": f"train/{n}.jpg", "caption": "x"} for n in range(3)))
    assert str(refused.value) == (
        f"{photos}/metadata.jsonl: none of the 3 files it names exists (first: {photos}/train/0.jpg); "
        "paths are relative to the folder of that file"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file": "a.jpg", "caption": ', "not JSON"),
        ('["a.jpg"]', "expected an object"),
        ({"caption": "A cat."}, "a caption of no image or video"),
        ({"file": 3, "caption": "x"}, "file: expected the name of a file"),
        ({"file": "../other.jpg", "caption": "x"}, "'../other.jpg' is outside"),
        ({"file": "/etc/passwd", "caption": "x"}, "/photos/metadata.jsonl --media /etc"),
        ({"file": "link.jpg", "caption": "x"}, "is outside"),
        ({"file": "A.jpg", "caption": "x"}, "'A.jpg': no such file; there is 'a.jpg'"),
        ({"file": "sub", "caption": "x"}, "'sub' is a folder"),
        ({"file": "s3://b/a.jpg", "caption": "x"}, "only http and https are downloaded"),
        ({"file": "data:image/png;base64,%%%", "caption": "x"}, "damaged base64"),
        ({"file": "a.jpg", "caption": ""}, "caption"),
        ({"file": "a.jpg", "captoin": "x"}, "unknown key 'captoin'"),
        ({"file": "a.jpg", "question": "?"}, "question and answer go together"),
        ({"files": ["a.jpg", "b.png"], "question": "<image>?", "answer": "!"}, "1"),
        ({}, "names no file"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(photos: Path, line: Any, expected: str) -> None:
    (photos / "link.jpg").symlink_to("/etc/hostname")
    good = {"file": "a.jpg", "caption": "A cat."}
    with pytest.raises(UserError) as refused:
        samples(photos, good, "", line, good)
    first, total = str(refused.value).split("\n")
    assert first.startswith(f"{photos / 'metadata.jsonl'}:3: ")
    assert expected in first
    assert total.endswith("--bad-lines leave-out")
    found, account = read(photos, leave_out=True)
    assert (ids(found), account.faults.total()) == (["a.jpg#0", "a.jpg#1"], 1)


def test_the_first_faults_are_shown_and_all_are_counted(photos: Path) -> None:
    with pytest.raises(UserError) as refused:
        samples(photos, *({"file": "a.jpg", "captoin": str(n)} for n in range(50)))
    lines = str(refused.value).split("\n")
    assert [line.split(":")[1] for line in lines[:20]] == [str(n + 1) for n in range(20)]
    assert lines[20] == "... and 30 more"
    assert "50 lines cannot be used (unknown key: 50)" in lines[21]


def test_a_data_uri_is_media_at_its_place_in_the_file(photos: Path) -> None:
    uri = "data:image/png;base64,iVBORw0KGgoAAAAA"
    found = samples(photos, {"messages": HELLO}, {"images": ["a.jpg", uri], "caption": "x"})
    offset = len(json.dumps({"messages": HELLO})) + 1
    file = photos / "metadata.jsonl"
    length = file.stat().st_size - offset - 1
    assert found[1].media[1] == MediaRef(source=f"json:{file}#{offset}+{length}:0")
    assert found[1].id == "a.jpg#0"


# ---- files without metadata


def test_a_folder_without_metadata_gives_its_images_in_order(photos: Path) -> None:
    put(photos, {"Z.JPEG": JPEG, "sub/d.gif": b"GIF89a" + bytes(20)})
    found, account = read(photos)
    assert ids(found) == ["Z.JPEG", "a.jpg", "b.png", "sub/c.webp", "sub/d.gif"]
    assert all(s.messages == () and s.dataset == "photos" for s in found)
    assert [s.media[0].source for s in found] == [str(photos / s.id) for s in found]
    assert samples(photos) == found, "the same each time"
    assert account.text() == "photos: 5 images"


def test_content_decides_and_not_the_name(photos: Path) -> None:
    put(photos, {"clip.jpg": MP4, "photo.mp4": JPEG, "no-suffix": PNG, "notes.txt": WEBP})
    put(photos, {"page.jpg": HTML, "movie.mp4": b"%PDF-1.7"})
    found, account = read(photos)
    kinds = {one.id: one.media[0].kind for one in found}
    assert kinds == {
        "a.jpg": "image",
        "b.png": "image",
        "sub/c.webp": "image",
        "clip.jpg": "video",
        "photo.mp4": "image",
        "no-suffix": "image",
        "notes.txt": "image",
    }
    assert account.left_out == {
        ".jpg (HTML page)": 1,
        ".mp4 (PDF document; convert it to PNG or JPEG)": 1,
    }


def test_damaged_media_are_kept_for_the_ledger(photos: Path) -> None:
    put(
        photos,
        {
            "cut.jpg": b"",
            "text.png": "Not found",
            "noise.mp4": bytes(range(128, 200)),
            "noise.bin": b"\0\1\2",
        },
    )
    found, account = read(photos)
    kinds = {one.id: one.media[0].kind for one in found}
    assert [kinds[n] for n in ("cut.jpg", "text.png", "noise.mp4")] == ["image", "image", "video"]
    assert account.left_out == {".bin": 1}


def test_files_that_are_not_used_are_counted_by_their_reason(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.media.kinds.can_decode_heic", lambda: False)
    put(photos, {f"IMG_{n}.HEIC": HEIC for n in range(4)} | {"scan.jp2": JP2, "notes.txt": "x"})
    put(photos, {".DS_Store": b"x", ".git/x.png": PNG, "__MACOSX/._a.jpg": JPEG, "LICENSE": "x"})
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    os.mkfifo(photos / "pipe.jpg")
    found, account = read(photos)
    assert len(found) == 3
    assert account.left_out == {
        ".heic (HEIC; install its reader: pip install 'nanomolmo2[heic]')": 4,
        ".jp2 (JPEG 2000; convert it to PNG or JPEG)": 1,
        ".txt": 1,
        "without a suffix": 1,
        "hidden": 3,
        "linked folder": 1,
        "broken link": 1,
        "a FIFO, not a file": 1,
    }
    assert account.text().startswith(
        "photos: 3 images; left out: 4 .heic (HEIC; install its reader"
    )


def test_records_under_another_name_are_pointed_out(photos: Path) -> None:
    put(
        photos,
        {"train.json": [{"image": "a.jpg"}], "x.jsonl": "{}", "y.jsonl": "{}", "z.csv": "a,b"},
    )
    assert read(photos)[1].left_out == {
        f".json (records? --dataset json:{photos}/train.json)": 1,
        f".jsonl (records? --dataset json:{photos}/x.jsonl)": 2,
        f".csv (records? --dataset json:{photos}/z.csv)": 1,
    }
    put(photos, {"x y.parquet": b"PAR1", "0.tar": b"0" * 257 + b"ustar", "notes.yaml": "a: 1"})
    reasons = read(photos)[1].left_out
    assert reasons[f".parquet (records? --dataset 'hf:{photos}/x y.parquet')"] == 1
    assert reasons[f".tar (records? --dataset webdataset:{photos}/0.tar)"] == 1
    assert reasons[".yaml"] == 1


def test_media_that_metadata_does_not_name_are_counted(photos: Path) -> None:
    put(photos, {".thumbs/t.png": PNG, "clip.mp4": MP4, "notes.md": "x"})
    found = samples(photos, {"files": ["a.jpg", ".thumbs/t.png"], "caption": "x"})
    assert len(found) == 1
    assert read(photos)[1].left_out == {"media without a line of metadata": 3, ".md": 1}


def test_the_cache_inside_a_folder_is_ignored(photos: Path) -> None:
    put(photos, {"cache/demo/drawing.png": PNG})
    (dataset,) = open_datasets([f"folder:{photos}"], photos / "cache")
    account = Account(name="photos")
    assert ids(list(dataset.samples(account=account))) == ["a.jpg", "b.png", "sub/c.webp"]
    assert not account.left_out


def test_a_link_to_a_file_outside_is_left_out_and_counted(photos: Path) -> None:
    (photos / "again.jpg").symlink_to(photos / "a.jpg")
    assert "again.jpg" in ids(read(photos)[0])
    (photos.parent / "secret.jpg").write_bytes(JPEG)
    (photos / "out.jpg").symlink_to(photos.parent / "secret.jpg")
    found, account = read(photos)
    assert "out.jpg" not in ids(found)
    assert account.left_out["link to a file outside the folder"] == 1


def test_a_name_that_is_not_utf8_is_a_fault(photos: Path) -> None:
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.jpg")).write_bytes(JPEG)
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.txt")).write_bytes(b"x")
    with pytest.raises(UserError) as refused:
        read(photos)
    assert "caf\\udce9.jpg': the name is not UTF-8; rename the file" in str(refused.value)
    found, account = read(photos, leave_out=True)
    assert (len(found), account.faults, account.left_out) == (
        3,
        {"name that is not UTF-8": 1},
        {".txt": 1},
    )


def test_names_that_look_like_urls_are_files(photos: Path) -> None:
    put(photos, {"data:x,y.jpg": JPEG, "https:/example.org/a.jpg": JPEG, "100%41.png": PNG})
    put(photos, {"data:x,y.txt": "A comma.", " a .jpg": JPEG})
    found = {one.id: one for one in read(photos)[0]}
    for name in ("data:x,y.jpg", "https:/example.org/a.jpg", "100%41.png", " a .jpg"):
        assert found[name].media[0].source == f"{photos}/{name}"
    assert found["data:x,y.jpg"].messages[1].content == "A comma."


def test_a_folder_with_nothing_to_encode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_datasets([f"folder:{tmp_path / 'nowhere'}"], tmp_path / "cache")
    put(tmp_path, {"file.jsonl": "{}"})
    for name, content, word in (
        ("file.jsonl", b"{}", "json:.*/file.jsonl"),
        ("file.jpg", JPEG, f"folder:{tmp_path}"),
        ("file.tar", b"0" * 257 + b"ustar", "webdataset:.*/file.tar"),
    ):
        put(tmp_path, {name: content})
        with pytest.raises(UserError, match=f"it is a file: --dataset {word}"):
            open_datasets([f"folder:{tmp_path / name}"], tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images, videos or records"):
        read(tmp_path / "empty")
    put(tmp_path, {"empty/a.jpg": HTML, "empty/b.jpg": HTML})
    with pytest.raises(UserError, match=r"left out: 2 \.jpg \(HTML page\)"):
        read(tmp_path / "empty")
    put(tmp_path, {"empty/metadata.jsonl": "\n"})
    with pytest.raises(UserError, match="no lines"):
        read(tmp_path / "empty")


# ---- texts beside a media file


def test_texts_beside_media_are_their_captions(photos: Path) -> None:
    put(
        photos,
        {
            "a.txt": "\ufeffA cat.\n",
            "sub/c.caption": "A sea.",
            "clip.mp4": MP4,
            "clip.txt": "It runs.",
        },
    )
    put(photos, {"notes.txt": "not a caption", "b.txt": " \n", "d.png": PNG})
    put(photos, {"d.txt": "0 0.5 0.5 0.25 0.1\n3 0.1 0.2 1e-2 0.1\n"})
    found, account = read(photos)
    assert {one.id: answers([one]) for one in found} == {
        "a.jpg": ["A cat."],
        "b.png": [],
        "clip.mp4": ["It runs."],
        "d.png": [],
        "sub/c.webp": ["A sea."],
    }
    assert found[2].messages[0].content == f"<image>{VIDEO_PROMPT}"
    assert account.lines == {"captions": 3}
    assert account.left_out == {
        ".txt": 1,
        ".txt (empty)": 1,
        ".txt (numbers, not a caption)": 1,
    }


def test_records_beside_media_are_read(photos: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
    put(
        photos,
        {"a.jpg.json": {"caption": "A cat.", "width": 3, "url": "https://example.org/a.jpg"}},
    )
    put(photos, {"b.json": {"image": "images/b.png", "conversations": turns}})
    put(photos, {"sub/c.json": {"boxes": [1, 2], "imagePath": "c.webp"}})
    found, account = read(photos)
    assert {one.id: answers([one]) for one in found} == {
        "a.jpg": ["A cat."],
        "b.png": ["A dog."],
        "sub/c.webp": [],
    }
    assert [one.media[0].source for one in found] == [str(photos / one.id) for one in found]
    assert account.left_out == {f".json (records? --dataset json:{photos}/sub/c.json)": 1}


def test_a_caption_and_a_record_of_img2dataset_are_one_text(photos: Path) -> None:
    record = {
        "url": "https://example.org/a.jpg",
        "caption": "A cat.",
        "key": "000000001",
        "exif": "{}",
    }
    record |= {
        "status": "success",
        "error_message": None,
        "width": 3,
        "height": 4,
        "sha256": "0" * 64,
    }
    put(photos, {"a.txt": "A cat.", "a.json": record})
    found, account = read(photos)
    assert answers(found) == ["A cat."]
    assert not account.left_out
    put(photos, {"a.txt": "A dog."})
    with pytest.raises(UserError, match=r"a\.json: .*use one of them"):
        read(photos)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", {"captoin": "A cat."}, r"a\.json: unknown key 'captoin'"),
        ("a.json", '{"caption": "A', r"a\.json: not JSON"),
        ("a.json", '{"caption": "A", "caption": "B"}', r"a\.json: .*given twice"),
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8"),
        ("a.txt", "x" * (1 << 21), r"a\.txt: a caption of more than 1 MiB"),
    ],
)
def test_a_text_beside_media_that_cannot_be_read_is_a_fault(
    photos: Path, name: str, content: Any, expected: str
) -> None:
    put(photos, {name: content})
    with pytest.raises(UserError, match=expected):
        read(photos)
    found, account = read(photos, leave_out=True)
    assert answers(found) == []
    assert account.faults.total() == 1


def test_texts_beside_media_with_metadata(photos: Path) -> None:
    put(
        photos,
        {"a.txt": "Beside.", "b.txt": "Beside.", "metadata.csv": "file_name,text\na.jpg,Named.\n"},
    )
    found, account = read(photos)
    assert {one.id: answers([one]) for one in found} == {
        "a.jpg#0": ["Named."],
        "b.png": ["Beside."],
    }
    assert account.left_out == {
        ".txt (beside media that metadata names)": 1,
        "media without a line of metadata": 1,
    }


# ---- every file


BAD = b'{"files": ["a.jpg", "../x"], "caption": "<number>"}\n{"file": "b.jpg", "caption": "x"}\n'
CONTENTS = {
    "jpeg": JPEG,
    "png": PNG,
    "mp4": MP4,
    "jp2": JP2,
    "html": HTML + b"<number>",
    "empty": b"",
    "noise": bytes(range(128, 220)),
    "text": b"<number>",
    "record": b'{"caption": "<number>"}',
    "object": b'{"boxes": ["<number>"]}',
    "lines": b'{"file": "a.jpg", "caption": "<number>"}\n{"file": "b/a.png", "caption": "x"}\n',
    "a bad line": BAD,
}
SUFFIXES = st.sampled_from(["", ".jpg", ".png", ".mp4", ".txt", ".json", ".jsonl", ".HEIC"])
NAMES = st.builds(
    "{}{}".format, st.sampled_from(["a", "b", "metadata", ".h", "ü", "c d"]), SUFFIXES
)
FOLDERS = st.sampled_from(["", "sub/", "sub/x/", ".git/", "cache/"])
TREES = st.dictionaries(
    st.builds("{}{}".format, FOLDERS, NAMES), st.sampled_from(sorted(CONTENTS)), max_size=12
)
LINKS = st.dictionaries(
    NAMES, st.sampled_from(["real/x.png", "real", "nowhere", "../outside.jpg"]), max_size=2
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, LINKS)
@example({"a.jpg": "jpeg", "a.json": "record", "a.txt": "text"}, {})
@example({"a.jpg": "jpeg", "a.jpg.json": "record", "a.json": "record", "b.txt": "text"}, {})
def test_every_file_is_used_or_counted(tree: dict[str, str], links: dict[str, str]) -> None:
    top = Path(tempfile.mkdtemp())
    try:
        folder = top / "photos"
        put(top, {"outside.jpg": JPEG, "photos/real/x.png": PNG})
        for number, (name, content) in enumerate(tree.items()):
            put(folder, {name: CONTENTS[content].replace(b"<number>", b"<%d>" % number)})
        for name, target in links.items():
            if name not in tree:
                (folder / name).symlink_to(target)
        (dataset,) = open_datasets([f"folder:{folder}"], folder / "cache")
        account = Account(name="photos", leave_out=True)
        try:
            found = list(account.watch(dataset.samples(account=account)))
        except UserError as error:
            # Refused as a whole: two files of metadata, wrong paths in it, or nothing to use.
            refused = (
                "both metadata|it names (exists|does)|: no (lines|images)|not a file of records|"
                r"metadata\.jsonl?: (broken link|link to)"
            )
            assert re.search(refused, str(error))
            return
        files = {name for name in tree if not name.startswith("cache/")}
        files |= {name for name in links if name not in tree} | {"real/x.png"}
        media = {os.path.relpath(ref.source, folder) for one in found for ref in one.media} & files
        said = " ".join(message.content for one in found for message in one.messages)
        texts = {name for number, name in enumerate(tree) if f"<{number}>" in said} & files - media
        metadata = {
            name
            for name in files
            if Path(name).name in ("metadata.json", "metadata.jsonl") and name[:4] != ".git"
        }
        metadata = {name for name in metadata if (folder / name).is_file()}
        in_metadata = [f for f in account.first_faults if "/metadata.json" in f]
        faults_of_files = account.faults.total() - len(in_metadata)
        used = len(media | texts | metadata)
        assert used + account.left_out.total() + faults_of_files == len(files), account
        assert "outside.jpg" not in " ".join(ref.source for one in found for ref in one.media)
    finally:
        shutil.rmtree(top)


def test_many_files_are_read_quickly(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    for part in range(20):
        (folder / str(part)).mkdir(parents=True)
        for number in range(500):
            (folder / str(part) / f"{number}.jpg").write_bytes(JPEG)
    start = time.process_time()
    assert len(read(folder)[0]) == 10_000
    assert time.process_time() - start < 4, "0.35 s of one core, 2026-11-26"


# ---- names


def test_a_folder_has_its_own_name_or_a_given_one(photos: Path) -> None:
    cache = photos.parent / "cache"
    odd = photos.rename(photos.parent / "My photos (2024)")
    assert [d.name for d in open_datasets([f"folder:{odd}"], cache)] == ["My-photos-2024"]
    assert [d.name for d in open_datasets([f"trip=folder:{odd}"], cache)] == ["trip"]


def test_two_folders_with_one_name_are_refused(tmp_path: Path) -> None:
    for side in ("left", "right"):
        (tmp_path / side / "train").mkdir(parents=True)
    left, right = f"folder:{tmp_path / 'left/train'}", f"folder:{tmp_path / 'right/train'}"
    with pytest.raises(UserError, match=r"would both be the data set 'train'"):
        open_datasets([left, right], tmp_path / "cache")
    assert len(open_datasets([left, left], tmp_path / "cache")) == 1
    named = open_datasets([left, f"other={right}"], tmp_path / "cache")
    assert [d.name for d in named] == ["train", "other"]


def test_a_folder_with_the_name_of_a_known_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match="the name 'demo' belongs to"):
        open_datasets([f"folder:{tmp_path / 'demo'}"], tmp_path / "cache")


def test_an_unknown_name_is_answered_with_the_known_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are demo.*; nearest: demo"):
        open_datasets(["dmeo"], tmp_path)
    with pytest.raises(UserError, match=f"--dataset folder:{tmp_path}"):
        open_datasets([str(tmp_path)], tmp_path)


def test_the_catalogue_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    yaml = tmp_path / "datasets.yaml"
    (tmp_path / "p").mkdir()
    yaml.write_text(
        f"datasets:\n  cats: {{source: folder, path: {tmp_path / 'p'}}}\n"
        f"  dogs: {{source: folder, path: {tmp_path / 'p'}}}\ngroups: {{pets: [cats, dogs]}}\n"
    )
    assert [d.name for d in open_datasets(["pets"], tmp_path)] == ["cats", "dogs"]
    yaml.write_text("datasets: {cats: {source: folder, path: /p}}\ngroups: {pets: [cast]}\n")
    with pytest.raises(UserError, match=r"group pets names 'cast'.*nearest: cats"):
        read_catalogue()
    yaml.write_text("datasets: {cats: {source: folder}}\n")
    with pytest.raises(UserError, match="cats: source: folder needs path"):
        read_catalogue()
