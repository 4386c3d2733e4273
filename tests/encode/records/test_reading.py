"""One record of each format as conversations, and no record that loses text in silence.

read_records({"image": "a.jpg", "caption": "A cat."}, Account(name="photos"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError
from encode.records.account import MOST_KEYS, SHOWN, Account, FaultError
from encode.records.keys import CHANGES, KNOWN_KEYS
from encode.records.reading import read_records
from encode.records.record import MediaName, Record
from encode.records.turns import ROLES
from tests.support import ROOT

HUMAN = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
PLAIN = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]


def read(value: Mapping[str, Any]) -> tuple[Record, ...]:
    return read_records(value, Account(name="photos"))


def spoken(record: Record) -> list[str]:
    return [f"{message.role}: {message.content}" for message in record.messages]


def golden(value: Mapping[str, Any]) -> list[str]:
    """Return what a record says, as lines."""
    lines = []
    for record in read(value):
        name = f"{record.format}, {record.task}" if record.task else record.format
        lines += [f"[{name}{', ' + record.suffix if record.suffix else ''}]", *spoken(record)]
        lines += [f"or: {answer}" for answer in record.answers]
        lines += [f"{media.kind or 'file'} {media.text}" for media in record.media]
        lines += [f"weight {record.weight:g}"] * (record.weight != 1.0)
    return lines


ASKED = ["user: <image>What?", "assistant: A cat."]
NAMED = {"type": "image", "image": "a.jpg"}

GOLDEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ours, a caption": (
        {"file": "a.jpg", "caption": "A cat.", "weight": 2},
        [
            "[captions, caption]",
            "user: <image>Describe this image.",
            "assistant: A cat.",
            "file a.jpg",
            "weight 2",
        ],
    ),
    "ours, several files": (
        {"files": ["a.jpg", "b.mp4"], "messages": PLAIN},
        [
            "[messages, chat]",
            "user: <image><image>What?",
            "assistant: A cat.",
            "file a.jpg",
            "file b.mp4",
        ],
    ),
    "LLaVA": (
        {"id": "000", "image": "coco/a.jpg", "conversations": HUMAN},
        ["[LLaVA, chat]", "user: <image>\nWhat?", "assistant: A cat.", "image coco/a.jpg"],
    ),
    "LLaVA without an image": (
        {"id": "000", "conversations": [{**HUMAN[0], "value": "What?"}, HUMAN[1]]},
        ["[LLaVA, chat]", "user: What?", "assistant: A cat."],
    ),
    "ShareGPT with a video and a system": (
        {
            "videos": ["v.mp4"],
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "What <video>?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        [
            "[LLaVA, chat]",
            "system: Be brief.",
            "user: What <video>?",
            "assistant: A cat.",
            "video v.mp4",
        ],
    ),
    "images and videos by their marks": (
        {
            "images": ["a.jpg", "b.jpg"],
            "videos": ["v.mp4"],
            "messages": [
                {"role": "user", "content": "<image> <video> <image>?"},
                {"role": "assistant", "content": "x"},
            ],
        },
        [
            "[messages, chat]",
            "user: <image> <video> <image>?",
            "assistant: x",
            "image a.jpg",
            "video v.mp4",
            "image b.jpg",
        ],
    ),
    "OpenAI's parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Is "},
                        {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}},
                        {"type": "text", "text": " a cat?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            ]
        },
        [
            "[messages, chat]",
            "user: Is <image> a cat?",
            "assistant: Yes.",
            "image https://x.org/a.jpg",
        ],
    ),
    "Qwen's parts with a video": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": "v.mp4", "fps": 2.0}, {"text": "What?"}],
                },
                PLAIN[1],
            ]
        },
        ["[messages, chat]", "user: <video>What?", "assistant: A cat.", "video v.mp4"],
    ),
    "parts that are marks of a list": (
        {
            "images": ["a.jpg"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "What?"},
                    ],
                },
                PLAIN[1],
            ],
        },
        ["[messages, chat]", *ASKED, "image a.jpg"],
    ),
    "images of a turn": (
        {
            "messages": [
                PLAIN[0] | {"images": ["a.jpg"]},
                PLAIN[1],
                {"role": "user", "content": "And <image> or <image>?", "images": ["b", "c"]},
                PLAIN[1],
            ]
        },
        [
            "[messages, chat]",
            *ASKED,
            "user: And <image> or <image>?",
            "assistant: A cat.",
            "image a.jpg",
            "image b",
            "image c",
        ],
    ),
    "one question, several answers": (
        {"image": "a.jpg", "question": "What?", "answers": ["A cat.", "A pet.", 3]},
        ["[questions, question]", *ASKED, "or: A pet.", "or: 3", "image a.jpg"],
    ),
    "VQA": (
        {
            "image": "a.jpg",
            "question": "What?",
            "question_id": 7,
            "multiple_choice_answer": "cat",
            "answers": [
                {"answer": "A cat.", "answer_confidence": "yes", "answer_id": 1},
                {"answer": "dog", "answer_confidence": "maybe", "answer_id": 2},
            ],
        },
        ["[questions, question]", *ASKED, "or: dog", "image a.jpg"],
    ),
    "prompt and response": (
        {"image": "a.jpg", "prompt": "What?", "response": "A cat."},
        ["[questions, question]", *ASKED, "image a.jpg"],
    ),
    "ms-swift with its history": (
        {
            "images": ["a.jpg"],
            "system": "S",
            "history": [["<image>Where?", "Here."]],
            "query": "What?",
            "response": "A cat.",
        },
        [
            "[questions, chat]",
            "system: S",
            "user: <image>Where?",
            "assistant: Here.",
            "user: What?",
            "assistant: A cat.",
            "image a.jpg",
        ],
    ),
    "TRL's prompt and completion": (
        {"images": ["a.jpg"], "prompt": PLAIN[:1], "completion": PLAIN[1:]},
        ["[questions, question]", *ASKED, "image a.jpg"],
    ),
    "Alpaca": (
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        ["[questions, question]", "user: Translate.\nchat", "assistant: cat"],
    ),
    "Alpaca without an input": (
        {"instruction": "Say cat.", "input": "", "output": "cat"},
        ["[questions, question]", "user: Say cat.", "assistant: cat"],
    ),
    "input and output": (
        {"input": "chat", "output": "cat"},
        ["[questions, question]", "user: chat", "assistant: cat"],
    ),
    "PaliGemma": (
        {"image": "a.jpg", "prefix": "What?", "suffix": "A cat."},
        ["[questions, question]", *ASKED, "image a.jpg"],
    ),
    "Hugging Face's image folder": (
        {"file_name": "0001.png", "text": "A cat.", "label": 3},
        [
            "[captions, caption]",
            "user: <image>Describe this image.",
            "assistant: A cat.",
            "file 0001.png",
        ],
    ),
    "a column of an image folder": (
        {"photo_file_name": "0001.png", "description": "A cat."},
        [
            "[captions, caption]",
            "user: <image>Describe this image.",
            "assistant: A cat.",
            "file 0001.png",
        ],
    ),
    "captions as COCO's": (
        {"file_name": "1.jpg", "id": 1, "captions": ["A cat.", "A pet."]},
        [
            "[captions, caption]",
            "user: <image>Describe this image.",
            "assistant: A cat.",
            "or: A pet.",
            "file 1.jpg",
        ],
    ),
    "FineVision": (
        {
            "images": [MediaName(text="parquet:/x.parquet#images:7:0")],
            "texts": [
                {"user": "What?", "assistant": "A cat.", "source": "vqa"},
                {"user": "Where?", "assistant": "Here.", "source": "vqa"},
            ],
            "source": "vqa",
            "relevance_ratings": [4, 5],
            "relevance_min": 4,
        },
        [
            "[texts, chat]",
            *ASKED,
            "user: Where?",
            "assistant: Here.",
            "image parquet:/x.parquet#images:7:0",
        ],
    ),
    "pixmo-docs": (
        {
            "image": MediaName(text="parquet:/x.parquet#image:7"),
            "image_id": "x",
            "questions": {"question": ["What?", "Where?"], "answer": ["A cat.", "Here."]},
        },
        [
            "[questions, question, .q0]",
            *ASKED,
            "image parquet:/x.parquet#image:7",
            "[questions, question, .q1]",
            "user: <image>Where?",
            "assistant: Here.",
            "image parquet:/x.parquet#image:7",
        ],
    ),
    "a list of questions": (
        {"image": "a.jpg", "questions": [{"question": "What?", "answer": "A cat."}]},
        ["[questions, question, .q0]", *ASKED, "image a.jpg"],
    ),
    "questions beside answers": (
        {"image": "a.jpg", "questions": ["What?"], "answers": ["A cat."]},
        ["[questions, question, .q0]", *ASKED, "image a.jpg"],
    ),
    "CoSyn-point": (
        {
            "image": "a.jpg",
            "questions": ["Where is the cat?"],
            "answer_points": [{"x": [91.1, 4.2], "y": [80.0, 40.0]}],
            "names": ["cat"],
        },
        [
            "[points, point, .q0]",
            "user: <image>Where is the cat?",
            'assistant: <points coords="1 1 042 400 2 911 800">cat</points>',
            "image a.jpg",
        ],
    ),
    "img2dataset's URL": (
        {"url": "https://x.org/a", "caption": "A cat.", "status": "success", "sha256": "00"},
        [
            "[captions, caption]",
            "user: <image>Describe this image.",
            "assistant: A cat.",
            "file https://x.org/a",
        ],
    ),
    "an image alone": ({"image": "a.jpg", "width": 3}, ["[image alone]", "image a.jpg"]),
    "text without media": (
        {"messages": PLAIN, "source": "tulu"},
        ["[messages, chat]", "user: What?", "assistant: A cat."],
    ),
    "marks without media are text": (
        {
            "messages": [
                {"role": "user", "content": "What is <image> in SVG?"},
                {"role": "assistant", "content": "<image href='x'> shows x."},
            ]
        },
        [
            "[messages, chat]",
            "user: What is <image> in SVG?",
            "assistant: <image href='x'> shows x.",
        ],
    ),
    "a turn of the user at the end": (
        {"messages": [*PLAIN, {"role": "user", "content": "Thanks."}]},
        ["[messages, chat]", "user: What?", "assistant: A cat.", "user: Thanks."],
    ),
    "nothing to learn": (
        {"image": "a.jpg", "messages": PLAIN[:1]},
        ["[messages without an answer, chat]", "user: <image>What?", "image a.jpg"],
    ),
    "turns as JSON in a text": (
        {"image": "a.jpg", "conversations": json.dumps(HUMAN)},
        ["[LLaVA, chat]", "user: <image>\nWhat?", "assistant: A cat.", "image a.jpg"],
    ),
    "a struct of lists, as Hugging Face stores turns": (
        {
            "image": "a.jpg",
            "conversations": {"from": ["human", "gpt"], "value": ["<image>\nWhat?", "A cat."]},
        },
        ["[LLaVA, chat]", "user: <image>\nWhat?", "assistant: A cat.", "image a.jpg"],
    ),
    "conversations of user and assistant": (
        {"path": "a.jpg", "conversations": [{"user": "What?", "assistant": "A cat."}]},
        ["[texts, question]", *ASKED, "file a.jpg"],
    ),
    "an image twice": (
        {
            "image": "a.jpg",
            "images": ["a.jpg"],
            "messages": [PLAIN[0] | {"content": [NAMED, "What?"]}],
        },
        ["[messages without an answer, chat]", "user: <image>What?", "image a.jpg"],
    ),
    "nulls": (
        {
            "image": "a.jpg",
            "video": None,
            "caption": "A cat.",
            "conversations": None,
            "weight": None,
        },
        [
            "[captions, caption]",
            "user: <image>Describe this image.",
            "assistant: A cat.",
            "image a.jpg",
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_each_format_becomes_conversations(name: str) -> None:
    value, expected = GOLDEN[name]
    assert golden(value) == expected


def test_the_account_counts_formats_and_ignored_keys() -> None:
    account = Account(name="photos")
    read_records({"id": 7, "image": "a.jpg", "conversations": HUMAN, "split": "train"}, account)
    read_records({"image": "a.jpg", "url": "https://x.org/a.jpg", "caption": "A cat."}, account)
    part = {"type": "image_url", "image_url": {"url": "https://x.org/a", "detail": "low"}}
    turn = {"role": "user", "content": [part], "name": "Eve"}
    read_records({"messages": [turn, PLAIN[1]]}, account)
    assert account.lines == {"LLaVA": 1, "captions": 1, "messages": 1}
    assert account.ignored == {
        "id": 1,
        "split": 1,
        "url": 1,
        "messages.name": 1,
        "messages.content.image_url.detail": 1,
    }


def test_keys_that_differ_in_each_line_are_counted_together() -> None:
    account = Account(name="photos")
    for number in range(1000):
        read_records({"image": "a.jpg", f"k{number}": number, "id": number}, account)
    assert len(account.ignored) == MOST_KEYS + 1 and account.ignored["id"] == 1000
    assert sum(account.ignored.values()) == 2000
    assert "keys ignored: id (1,000), other keys (801), " in account.text()
    assert account.text().endswith(f" and {MOST_KEYS + 1 - SHOWN} more")


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({}, "names no file .* and has no text; keys: none"),
    ({"id": 3}, "keys: id"),
    ({"image": "a.jpg", "captoin": "A cat."}, "unknown key 'captoin'; did you mean 'caption'"),
    ({"image": "a.jpg", "Caption": "A cat."}, "unknown key 'Caption'; did you mean 'caption'"),
    ({"image": "a.jpg", "question": "What?"}, "question without an answer"),
    ({"image": "a.jpg", "question": "What?", "anwser": "x"}, "did you mean 'answer' by 'anwser'"),
    ({"image": "a.jpg", "answer": "x"}, "answer without a question"),
    ({"image": "a.jpg", "question": "What?", "answer": ""}, "expected text, found none"),
    ({"image": "a.jpg", "question": "What?", "answer": True}, "expected text, found True"),
    ({"image": "a.jpg", "question": "What?", "answers": []}, "answers: an empty list"),
    ({"image": "a.jpg", "question": "?", "prompt": "?", "answer": "x"}, "question and prompt"),
    ({"image": "a.jpg", "caption": " "}, "caption: expected text, found none"),
    ({"image": "a.jpg", "caption": 3.5, "conversations": HUMAN}, "has conversations and caption"),
    ({"image": "a.jpg", "caption": "A", "conversations": HUMAN}, "has conversations and caption"),
    ({"prompt": PLAIN[:1], "completion": "x"}, "prompt: expected text, found a list"),
    (
        {"prompt": PLAIN[:1], "completion": PLAIN[1:], "history": [["a", "b"]]},
        "'history' is not used",
    ),
    (
        {"image": "a.jpg", "qa_pairs": {"question": ["?"], "explanation": ["x"], "answer": ["a"]}},
        "'qa_p",
    ),
    ({"problem": "?", "solution": "x", "answer": "y"}, "has answer and solution; use one of them"),
    ({"conversations": {"from": ["human"], "value": []}}, "lists of equal length"),
    ({"conversations": {"from": "human"}}, "lists of equal length"),
    ({"conversations": {}}, "lists of equal length"),
    ({"image": "a.jpg", "caption": "A", "text": "B"}, "has caption and text"),
    ({"caption": "A cat."}, "a caption of no image"),
    ({"image": "a.jpg", "caption": "A", "history": [["a", "b"]]}, "'history' is not used"),
    ({"image": "a.jpg", "system": "Be brief."}, "'system' is not used"),
    ({"image": "a.jpg", "caption": "A", "wieght": 2}, "'wieght'; did you mean 'weight'"),
    ({"image": "a.jpg", "caption": "A", "loss_weight": 2}, "'loss_weight' changes what is learned"),
    ({"image": "a.jpg", "caption": "A", "weight": "heavy"}, "is not a factor of the loss"),
    ({"image": "a.jpg", "caption": "A", "weight": -1}, "is not a factor of the loss"),
    ({"image": "a.jpg", "caption": "A", "weight": True}, "is not a factor of the loss"),
    ({"image": "a.jpg", "caption": "A", "weight": 10**400}, "is not a factor of the loss"),
    ({"image": "a.jpg", "blurb": "A red barn"}, "unknown key 'blurb': 'A red barn' would be lost"),
    ({"image": "a.jpg", "caption": "A", "blurb": "one two three four five"}, "'blurb'"),
    ({"image": "a.jpg", "caption": "A", "blurb": "一只红色的谷仓在田野里"}, "'blurb'"),
    ({"image": "a.jpg", "caption": "A", "depth": "b.png"}, "'depth': 'b.png' would be lost"),
    ({"image": "a.jpg", "caption": "A", "image_2": "b"}, "'image_2'"),
    ({"image": "a.jpg", "caption": "A", "short_caption": "B"}, "'short_caption'"),
    ({"image": "a.jpg", "caption": "A", "choices": ["x"]}, "'choices': a list would be lost"),
    ({"image": "a.jpg", "caption": "A", "x": {"y": ["z"]}}, "'x': an object would be lost"),
    ({"image": "a.jpg", "question": "?", "answer": "B", "A": "cat"}, "unknown key 'A'"),
    ({"photo_url": "https://x.org/a.jpg", "question": "?", "answer": "x"}, "'photo_url'"),
    (
        {"image": "a.jpg", "caption": "A", "label": "a b c d e"},
        "'label': 'a b c d e' would be lost",
    ),
    ({"question": "?", "answer": "x", "id": "coco/a.jpg"}, "'id': 'coco/a.jpg' would be lost"),
    ({"messages": PLAIN, "metadata": {"photo": "a.png"}}, "'metadata': an object would be lost"),
    ({"name": "a.jpg"}, "'name': 'a.jpg' would be lost"),
    ({"image": "a.jpg", "caption": "A", "num_shots": "a b c d e"}, "'num_shots'"),
    ({"image": "a.jpg", "caption": "A", "tags": ["data:image/png;base64,AA"]}, "'tags'"),
    ({"image": "a.jpg", "audio": "a.wav", "caption": "A"}, "'audio'"),
    ({"image": "a.jpg", "video_file_name": "b.mp4"}, "video_file_name names other media"),
    ({"image": "a.jpg", "img": "b.jpg"}, "img names other media than 'a.jpg'"),
    ({"image": "a.jpg", "file": "b.jpg"}, "file names other media than 'a.jpg'"),
    ({"image": "a.jpg", "file_name": "b.jpg"}, "file_name names other media"),
    ({"image": ["a.jpg", ["b.jpg"]]}, "a list in a list"),
    ({"image": {"bytes": "AAAA", "path": None}}, "bytes in a record"),
    ({"image": {"path": "a.jpg", "url": "https://x.org/a"}}, "expected one path or url, found 2"),
    ({"image": {"width": 3}}, "expected one path or url, found 0"),
    ({"image": 7}, "image: expected the name of a file, found 7"),
    ({"image": ""}, "'' is not a file name"),
    ({"image": "a\0.jpg"}, "is not a file name"),
    ({"image": "a" * 5000}, "a name of 5,000 characters"),
    ({"image": ["a.jpg", "b.jpg"], "conversations": HUMAN}, "1 mark .* for 2 media"),
    (
        {"image": "a.jpg", "question": "<image> or <video>?", "answer": "x"},
        "2 marks .* for 1 media",
    ),
    ({"messages": [PLAIN[0] | {"content": [{"type": "image"}, "?"]}, PLAIN[1]]}, "1 mark .* for 0"),
    (
        {"messages": [PLAIN[0] | {"content": [NAMED, "<image>"]}, PLAIN[1]]},
        "2 marks .* for 1 media",
    ),
    ({"messages": [PLAIN[0], PLAIN[1] | {"content": [NAMED]}]}, "media in a turn of the assistant"),
    ({"messages": [PLAIN[0], PLAIN[1] | {"image": "a.jpg"}]}, "media in a turn of the assistant"),
    (
        {"messages": [PLAIN[0] | {"images": ["a", "b"], "content": "<image>"}]},
        "1 mark .* for 2 media",
    ),
    (
        {"messages": [PLAIN[0] | {"content": [{"type": "audio", "audio": "a.wav"}]}]},
        "part of type 'au",
    ),
    (
        {"messages": [PLAIN[0] | {"content": [NAMED | {"source": {"data": "data:x"}}]}]},
        "'messages.cont",
    ),
    ({"image": "a.jpg", "messages": PLAIN[1:]}, "no turn of the user"),
    ({"messages": []}, "expected a list of turns"),
    ({"messages": ["hi"]}, "expected turns of role and content, found 'hi'"),
    ({"messages": [{"content": "x"}]}, "turn 1: no role"),
    ({"messages": [{"role": "user", "from": "human", "content": "x"}]}, "role and from"),
    ({"messages": [{"role": "usr", "content": "x"}]}, "role 'usr' is none of .* nearest: user"),
    ({"messages": [{"role": "user", "content": "x", "value": "y"}]}, "content and value"),
    ({"messages": [*PLAIN, {"role": "tool", "content": "x"}]}, "the role 'tool' is not supported"),
    ({"messages": [PLAIN[0], PLAIN[1] | {"weight": 2, "loss": False}]}, "'messages.loss' changes"),
    ({"messages": [PLAIN[0], PLAIN[1] | {"contents": "more"}]}, "'messages.contents'"),
    (
        {"messages": [PLAIN[0], {"role": "assistant", "content": ""}]},
        "turn 2: content: expected text",
    ),
    ({"messages": [PLAIN[0], {"role": "assistant"}]}, "turn 2: content: expected text, found none"),
    (
        {"messages": [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}]},
        "'messages.tool_calls' changes",
    ),
    (
        {"system": "A", "messages": [{"role": "system", "content": "B"}, *PLAIN]},
        "system and a turn of the system",
    ),
    ({"texts": []}, "expected a list of turns"),
    ({"texts": [{"user": "a"}]}, "texts: turn 1: assistant: expected text, found none"),
    ({"image": "a", "questions": {"question": ["a"], "answer": []}}, "lists of equal length"),
    ({"image": "a", "questions": [{"question": "a"}]}, "questions 1: question without an answer"),
    ({"query": "a", "response": "b", "history": [["a"]]}, "history: expected pairs"),
    (
        {"image": "a", "questions": ["a"], "answer_points": [{"x": [101], "y": [300]}]},
        "a point outside the image",
    ),
]


@pytest.mark.parametrize(("value", "why"), FAULTS, ids=[why[:40] for _, why in FAULTS])
def test_what_would_be_lost_is_a_fault_that_names_it(value: dict[str, Any], why: str) -> None:
    account = Account(name="photos")
    with pytest.raises(FaultError, match=why) as caught:
        read_records(value, account)
    assert account == Account(name="photos"), "a fault counts nothing"
    assert "\n" not in str(caught.value) and 0 < len(caught.value.kind) < 40


@pytest.mark.parametrize("key", sorted(CHANGES))
def test_fields_that_change_the_meaning_are_refused_unless_they_are_empty(key: str) -> None:
    for value in ({"a": 1}, "x", [1], True):
        for record in (
            {"messages": PLAIN, key: value},
            {"messages": [PLAIN[0], PLAIN[1] | {key: value}]},
        ):
            with pytest.raises(FaultError, match=f"{key}' changes what is learned"):
                read(record)
    for empty in (None, [], {}, ""):
        account = Account(name="photos")
        read_records({"messages": [PLAIN[0], PLAIN[1] | {key: empty}], key: empty}, account)
        assert account.ignored == {key: 1, f"messages.{key}": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"label": "golden retriever", "tags": ["cat", "pet"], "species": "Felis catus"},
        {"coco_url": "https://x.org/a.jpg", "thumbnail_url": "https://x.org/b.jpg", "url": "x.org"},
        {
            "width": 3,
            "height": 4,
            "score": 0.5,
            "is_safe": True,
            "ratings": [1, 2],
            "bbox": [0, 1, 2, 3],
        },
        {"objects": {"bbox": [[0, 1, 2, 3]], "categories": [0]}, "metadata": {"a": "b c d e f g"}},
        {"id": "a.jpg", "name": "b.jpg", "metadata": {"photo": "c.png"}},
        {"source": "a b c d e f g h", "split": "train", "caption_id": "x", "blurb": "two words"},
        {"context": None, "tools": [], "images": [], "system": "", "history": []},
    ],
)
def test_harmless_keys_are_counted(more: dict[str, Any]) -> None:
    account = Account(name="photos")
    read_records({"image": "a.jpg", "caption": "A cat."} | more, account)
    taken = {"images", "system"}  # empty lists of media and an empty system are what they say
    assert account.ignored == dict.fromkeys(more.keys() - taken, 1)


def test_a_key_can_be_left_out_by_name_and_the_error_says_how() -> None:
    turns = [PLAIN[0], PLAIN[1] | {"reasoning_content": "Hm."}]
    value = {"image": "a", "my blurb": "A b c d e f", "messages": turns}
    names: list[str] = []
    while len(names) < 2:
        account = Account(name="photos", ignore_keys=frozenset(names))
        with pytest.raises(FaultError) as caught:
            read_records(value, account)
        account.fault("a.jsonl:1", caught.value)
        names.append(caught.value.key)
        with pytest.raises(UserError, match=f"without these keys: --ignore-keys '?{names[-1]}'?$"):
            account.close()
    assert names == ["messages.reasoning_content", "my blurb"]
    account = Account(name="photos", ignore_keys=frozenset([*names, "image"]))
    (record,) = read_records(value, account)
    assert spoken(record) == ["user: What?", "assistant: A cat."] and record.media == ()
    assert account.ignored == {"my blurb": 1, "image": 1, "messages.reasoning_content": 1}


def test_a_text_that_repeats_a_turn_is_no_second_text() -> None:
    account = Account(name="photos")
    (record,) = read_records({"prompt": "What?", "messages": PLAIN}, account)
    assert spoken(record) == ["user: What?", "assistant: A cat."]
    assert account.ignored == {"prompt": 1}


def test_an_embedded_image_may_have_a_name_beside_it() -> None:
    account = Account(name="photos")
    image = MediaName(text="tar:/x.tar#512+99:0001.jpg")
    value = {
        "image": image,
        "file_name": "cat.jpg",
        "url": "https://x.org/cat.jpg",
        "caption": "A cat.",
    }
    (record,) = read_records(value, account)
    assert [name.text for name in record.media] == [image.text]
    assert account.ignored == {"file_name": 1, "url": 1}


def test_a_url_has_the_sha256_that_the_record_states() -> None:
    value = {"image_url": "https://x.org/a.jpg", "image_sha256": "AB" * 32, "caption": "A cat."}
    (record,) = read(value)
    assert record.media[0].sha256 == "ab" * 32
    with pytest.raises(FaultError, match="64 hex digits"):
        read(value | {"image_sha256": "ab"})


def test_the_guide_names_every_key() -> None:
    guide = (ROOT / "docs" / "FEATURE_CACHE.md").read_text()
    section = guide.split("## Data of your own")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w*]+)(?:\(s\))?`", section))
    named |= {f"{name}s" for name in re.findall(r"`([\w*]+)\(s\)`", section)}
    assert sorted(KNOWN_KEYS - named) == []
    assert sorted(set(ROLES) - set(re.findall(r"\w+", section))) == []


# ---- no text and no number is lost: it is in the records, counted, or the record is refused

WORD = st.text("abcdefg", min_size=1, max_size=6)
TURN_WORDS = ("from", "value", "role", "content", "type", "text", "image", "hint", "id", "weight")
KEYS = st.sampled_from([*sorted(KNOWN_KEYS), "user", "assistant", *TURN_WORDS]) | WORD
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(2, 9999)
    | WORD.map(lambda word: f"{word}!")
    | st.lists(WORD, min_size=5, max_size=7).map(" ".join)
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": LEAVES},
        optional={"weight": st.integers(0, 3), "name": LEAVES, "hint": LEAVES, "image": LEAVES},
    )
    | st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt"]), "value": LEAVES}, optional={"id": LEAVES}
    ),
    max_size=4,
)
PAIRS = st.lists(
    st.fixed_dictionaries(
        {"user": LEAVES, "assistant": LEAVES}, optional={"source": LEAVES, "x": LEAVES}
    ),
    max_size=3,
)
VALUES = st.recursive(
    LEAVES | TURNS | PAIRS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=5)
SAID = WORD | st.lists(WORD, min_size=5, max_size=7).map(" ".join)
PART = st.fixed_dictionaries({"text": SAID}, optional={"type": st.just("text"), "x": LEAVES}) | (
    st.fixed_dictionaries({"type": st.just("image"), "image": WORD}, optional={"detail": LEAVES})
)
EXTRA = {"name": LEAVES, "hint": LEAVES, "weight": st.integers(0, 3), "id": LEAVES}


def turn(role: str, name: str, text: str, of: str) -> st.SearchStrategy[Any]:
    content = SAID | st.lists(PART, min_size=1, max_size=3) if of == "user" else SAID
    return st.fixed_dictionaries({role: st.just(name), text: content}, optional=EXTRA)


CHAT = st.tuples(turn("role", "user", "content", "user"), turn("role", "assistant", "content", ""))
LLAVA = st.tuples(turn("from", "human", "value", "user"), turn("from", "gpt", "value", ""))
TEXTS = st.one_of(
    st.fixed_dictionaries({"messages": CHAT.map(list)}),
    st.fixed_dictionaries({"conversations": LLAVA.map(list)}),
    st.fixed_dictionaries(
        {"texts": st.lists(st.fixed_dictionaries({"user": SAID, "assistant": SAID}))}
    ),
    st.fixed_dictionaries({"question": SAID, "answer": LEAVES}),
    st.fixed_dictionaries({"question": SAID, "answers": st.lists(SAID, min_size=1)}),
    st.fixed_dictionaries({"instruction": SAID, "input": SAID, "output": SAID}),
    st.fixed_dictionaries({"query": SAID, "response": SAID, "history": st.just([["a", "b"]])}),
    st.fixed_dictionaries({"caption": SAID | st.lists(SAID, min_size=1, max_size=3)}),
    st.just({}),
)
MEDIA = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"image": WORD}, optional={"url": WORD, "file_name": WORD}),
    st.fixed_dictionaries({"images": st.lists(WORD | WORD.map(lambda word: {"path": word}))}),
    st.fixed_dictionaries({"image": WORD, "video": WORD}),
    st.fixed_dictionaries({"file_name": WORD}),
)
MORE = st.dictionaries(KEYS, LEAVES, max_size=2)
USUAL = st.builds(lambda media, text, more: more | media | text, MEDIA, TEXTS, MORE)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    elif value is not None and not isinstance(value, bool):
        yield path, value


def outcome(records: tuple[Record, ...]) -> str:
    """Return everything that records say, in which each leaf must be found."""
    said = [
        [message.content, f"{message.role} {message.weight:g}"]
        for record in records
        for message in record.messages
    ]
    more = [
        [*record.answers, *(name.text for name in record.media), f"{record.weight:g}"]
        for record in records
    ]
    return json.dumps([said, more])


@settings(deadline=None)
@given(value=OBJECTS | USUAL | USUAL)
def test_every_leaf_of_an_object_is_used_counted_or_refused(value: dict[str, Any]) -> None:
    account = Account(name="photos")
    try:
        records = read_records(value, account)
    except FaultError as fault:
        assert account == Account(name="photos")
        assert fault.kind and str(fault).isprintable()
        return
    assert sum(account.lines.values()) == 1
    said = outcome(records)
    for path, leaf in leaves(value):
        ignored = any(".".join(path[:n]) in account.ignored for n in range(1, len(path) + 1))
        named = path[-1] in ("role", "from", "type")
        assert ignored or named or json.dumps(str(leaf))[1:-1] in said, (path, leaf)
