"""A folder as a data set: exact samples, and an error with file and line for every bad line.

(dataset,) = open_datasets(["folder:photos"], Path("cache"))
samples = list(dataset.samples())
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import configs
from cache.store.samples import MediaRef, Message, Sample
from configs import UserError
from encode.sources.catalogue import open_datasets, read_catalogue
from encode.sources.folder import CAPTION_PROMPT

PNG = b"never decoded here"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.png", "sub/c.webp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def samples(folder: Path, *lines: Any) -> list[Sample]:
    """Return the samples of `folder` with these lines of metadata."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    if lines:
        (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (dataset,) = open_datasets([f"folder:{folder}"], folder.parent / "cache")
    return list(dataset.samples())


def sample(name: str, *messages: Message, **fields: Any) -> Sample:
    return Sample(id=name, dataset="photos", messages=messages, **fields)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str, weight: float = 1.0) -> Message:
    return Message(role="assistant", content=content, weight=weight)


ASKED = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


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


def test_placeholders_keep_their_places(photos: Path) -> None:
    turns = [{"role": "user", "content": "First <image>, then <image>?"}, HELLO[1]]
    (found,) = samples(photos, {"files": ["a.jpg", "b.png"], "messages": turns})
    assert found.messages[0].content == "First <image>, then <image>?"


def test_a_folder_without_metadata_gives_its_images_in_order(photos: Path) -> None:
    for name in ("Z.JPEG", ".hidden.png", "notes.txt", ".git/x.png", "sub/d.gif"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(PNG)
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    found = samples(photos)
    assert [s.id for s in found] == ["Z.JPEG", "a.jpg", "b.png", "sub/c.webp", "sub/d.gif"]
    assert all(s.messages == () and s.dataset == "photos" for s in found)
    assert [s.media[0].source for s in found] == [str(photos / s.id) for s in found]
    assert samples(photos) == found, "the same each time"


def test_the_cache_inside_a_folder_is_ignored(photos: Path) -> None:
    (photos / "cache" / "demo").mkdir(parents=True)
    (photos / "cache" / "demo" / "drawing.png").write_bytes(PNG)
    (dataset,) = open_datasets([f"folder:{photos}"], photos / "cache")
    assert [s.id for s in dataset.samples()] == ["a.jpg", "b.png", "sub/c.webp"]


def test_blank_lines_a_byte_order_mark_and_unknown_keys_are_accepted(photos: Path) -> None:
    line = '\ufeff{"file": "a.jpg", "caption": "Ä 猫.", "width": 3, "height": 4, "license": "x"}'
    (found,) = samples(photos, line, "", "   ")
    assert found.messages[1].content == "Ä 猫."


def test_a_sample_keeps_a_missing_image(photos: Path) -> None:
    (found,) = samples(photos, {"file": "gone.jpg", "caption": "It was here."})
    assert found.media == (MediaRef(source=str(photos / "gone.jpg")),)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file": "a.jpg", "caption": ', "not JSON"),
        ('["a.jpg"]', "expected an object"),
        ({"caption": "A cat."}, 'no "file"'),
        ({"file_name": "a.jpg", "caption": "A cat."}, "file_name is called file here"),
        ({"file": "a.jpg", "files": ["b.png"], "caption": "x"}, "has file and files"),
        ({"files": "a.jpg", "caption": "x"}, "files: expected a list"),
        ({"file": 3, "caption": "x"}, "3 is not a file name"),
        ({"file": "a\0.jpg", "caption": "x"}, "is not a file name"),
        ({"file": "../other.jpg", "caption": "x"}, "'../other.jpg' is outside"),
        ({"file": "/etc/passwd", "caption": "x"}, "is outside"),
        ({"file": "sub/../../x.jpg", "caption": "x"}, "is outside"),
        ({"file": ".", "caption": "x"}, "is outside"),
        ({"file": "link.jpg", "caption": "x"}, "is outside"),
        ({"file": "a.jpg", "caption": ""}, "caption: expected text"),
        ({"file": "a.jpg", "caption": ["x"]}, "caption: expected text"),
        ('{"file": "a.jpg", "caption": "\\ud800"}', "half a surrogate pair"),
        ({"file": "a.jpg", "captoin": "x"}, "unknown key 'captoin'; keys of texts are caption"),
        ({"file": "a.jpg", "text": "x"}, "unknown key 'text'"),
        ({"file": "a.jpg", "caption": "x", "messages": HELLO}, "caption and messages; use one"),
        ({"file": "a.jpg", "question": "?"}, "question and answer go together"),
        ({"file": "a.jpg", "answer": "!"}, "question and answer go together"),
        ({"file": "a.jpg", "caption": "an <image> here"}, "caption contains <image>"),
        ({"file": "a.jpg", "question": "<image>?", "answer": "!"}, "question contains <image>"),
        ({"file": "a.jpg", "question": "?", "answer": "<image>"}, "answer contains <image>"),
        ({"file": "a.jpg", "messages": []}, "messages: expected a list of turns"),
        ({"file": "a.jpg", "messages": ["hi"]}, "messages: turn 1: expected role and content"),
        (
            {"file": "a.jpg", "messages": [{"role": "usr", "content": "?"}]},
            "turn 1: role 'usr' is none of system, user, assistant; nearest: user",
        ),
        ({"file": "a.jpg", "messages": HELLO[:1]}, "no turn of the assistant"),
        ({"file": "a.jpg", "messages": HELLO[1:]}, "no turn of the user"),
        ({"files": ["a.jpg", "b.png"], "messages": ASKED}, "1 <image> for 2 files"),
        ({"messages": ASKED}, "1 <image> for 0 files"),
        (
            {"file": "a.jpg", "messages": [HELLO[0], {"role": "assistant", "content": "<image>"}]},
            "turn 2: <image> in a message of the assistant",
        ),
        ({"file": "a.jpg", "caption": "x", "weight": "much"}, "weight: 'much' is not a factor"),
        ({"file": "a.jpg", "caption": "x", "weight": -1}, "weight: -1 is not a factor"),
        ({}, 'no "file"'),
        ({"files": []}, "neither a file nor messages"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(photos: Path, line: Any, expected: str) -> None:
    (photos / "link.jpg").symlink_to("/etc/hostname")
    good = {"file": "a.jpg", "caption": "A cat."}
    with pytest.raises(UserError) as refused:
        samples(photos, good, "", line, good)
    message = str(refused.value)
    assert message.startswith(f"{photos / 'metadata.jsonl'}:3: ")
    assert expected in message
    assert "\n" not in message


def test_a_line_that_is_not_utf8_is_named(photos: Path) -> None:
    (photos / "metadata.jsonl").write_bytes(b'{"file": "a.jpg"}\n{"file": "\xff.jpg"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl:2: not UTF-8"):
        samples(photos)


def test_a_link_to_a_file_outside_is_refused(photos: Path) -> None:
    (photos / "again.jpg").symlink_to(photos / "a.jpg")
    assert "again.jpg" in {s.id for s in samples(photos)}
    (photos / "out.jpg").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"out\.jpg: .*is outside"):
        samples(photos)


def test_a_folder_with_nothing_to_encode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_datasets([f"folder:{tmp_path / 'nowhere'}"], tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no media"):
        samples(tmp_path / "empty")
    (tmp_path / "empty" / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no lines"):
        samples(tmp_path / "empty")


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
