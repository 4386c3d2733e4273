"""One sample of every format and source, as the model is trained on it: `train.run --inspect` after encoding.

python -m encode.run --dataset folder:photos --encoder demo
python -m train.run --datasets photos --inspect

The expected output is in formats.txt: text that is supervised, and where each image and video is. Files are
written byte by byte here, so the keys of the media are those of the golden file everywhere.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from encode import run as encode
from tests.support.photos import heic_file
from train import run as train

GOLDEN = Path(__file__).parent / "formats.txt"


def picture(number: int, side: int = 24) -> bytes:
    """Return a BMP of one colour."""
    pixels = bytes((number * 40 % 256, number * 90 % 256, 200)) * (side * side)
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + head + pixels


def film(frames: int, side: int = 16) -> bytes:
    """Return a video of two frames a second."""
    head = f"YUV4MPEG2 W{side} H{side} F2:1 Ip A1:1 C420jpeg\n".encode()
    planes = [
        bytes([40 * n]) * (side * side) + b"\x80" * (side * side // 2) for n in range(1, frames + 1)
    ]
    return head + b"".join(b"FRAME\n" + plane for plane in planes)


A, B, V = picture(1), picture(2), film(2)
MEDIA = {"a.bmp": A, "b.bmp": B, "v.y4m": V}


def lines(*records: Mapping[str, Any]) -> str:
    """Return JSON Lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def talk(
    *turns: tuple[str, str], keys: tuple[str, str] = ("role", "content")
) -> list[dict[str, Any]]:
    """Return turns under the given keys."""
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


def one(record: Mapping[str, Any]) -> dict[str, str | bytes]:
    """Return a folder with the media and one line of metadata."""
    return {**MEDIA, "metadata.jsonl": lines(record)}


URI = "data:image/bmp;base64," + base64.b64encode(A).decode()
LLAVA = ("from", "value")
COCO = {
    "images": [{"id": 7, "file_name": "b.bmp", "width": 24, "height": 24}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A square."},
        {"id": 2, "image_id": 7, "caption": "Some colour."},
    ],
}

FOLDERS: dict[str, dict[str, str | bytes]] = {
    # ours
    "caption": one({"file": "a.bmp", "caption": "A square."}),
    "video-caption": one({"file": "v.y4m", "caption": "It grows brighter."}),
    "question": one({"file": "a.bmp", "question": "Which colour?", "answer": "Blue."}),
    "several-answers": one({"file": "a.bmp", "question": "Colour?", "answers": ["Blue.", "Dark."]}),
    "messages": one(
        {
            "files": ["a.bmp", "b.bmp"],
            "messages": talk(
                ("system", "Be brief."),
                ("user", "<image> or <image>?"),
                ("assistant", "The first. <image> is a mark."),
            ),
        }
    ),
    # LLaVA, ShareGPT
    "llava": one(
        {
            "id": 1,
            "image": "a.bmp",
            "conversations": talk(
                ("human", "<image>\nWhat is it?"),
                ("gpt", "A square."),
                ("human", "Sure?"),
                ("gpt", "Yes."),
                keys=LLAVA,
            ),
        }
    ),
    "llava-video": one(
        {
            "video": "v.y4m",
            "conversations": talk(("human", "<video>\nWhat?"), ("gpt", "Light."), keys=LLAVA),
        }
    ),
    "llava-no-mark": one(
        {
            "image": ["a.bmp", "b.bmp"],
            "conversations": talk(("human", "Compare."), ("gpt", "Two."), keys=LLAVA),
        }
    ),
    "sharegpt": one(
        {
            "images": ["a.bmp"],
            "videos": ["v.y4m"],
            "conversations": talk(
                ("system", "Be brief."),
                ("user", "Is <video> like <image>?"),
                ("assistant", "No."),
                keys=LLAVA,
            ),
        }
    ),
    # OpenAI
    "openai-parts": one(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "First "},
                        {"type": "image_url", "image_url": {"url": "a.bmp"}},
                        {"type": "text", "text": " then "},
                        {"type": "video", "video": "v.y4m"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
            ]
        }
    ),
    # pairs
    "prompt-response": one({"image": "a.bmp", "prompt": "What?", "response": "A square."}),
    "query-response": one({"images": ["a.bmp"], "query": "<image>What?", "response": "A square."}),
    "instruction": one(
        {"image": "b.bmp", "instruction": "Name it.", "input": "In a word.", "output": "Square"}
    ),
    "description": one({"image": "b.bmp", "description": "A square of one colour."}),
    # Hugging Face ImageFolder, COCO, tables
    "imagefolder": one({"file_name": "a.bmp", "text": "A square."}),
    "imagefolder-csv": {**MEDIA, "metadata.csv": 'file_name,text\na.bmp,"A square, blue."\n'},
    "tsv": {**MEDIA, "metadata.tsv": "image\tquestion\tanswer\nb.bmp\tWhat?\tA square.\n"},
    "coco": {**MEDIA, "metadata.json": json.dumps(COCO)},
    "json-array": {
        **MEDIA,
        "metadata.json": json.dumps([{"image": "a.bmp", "caption": "Größe."}], indent=2),
    },
    # texts beside media, and in subfolders
    "txt-beside": {"a.bmp": A, "a.txt": "A square.\n"},
    "subfolders": {
        "one/a.bmp": A,
        "one/metadata.jsonl": lines({"file": "a.bmp", "caption": "Inside."}),
    },
    "data-uri": {"metadata.jsonl": lines({"image": URI, "caption": "A square in the line."})},
    # text alone
    "text-only": {
        "metadata.jsonl": lines(
            {"messages": talk(("user", "An SVG <image> tag?"), ("assistant", "<image href='x'/>"))}
        )
    },
}
"""Name of a data set -> its files."""

BYTES_A, BYTES_B = {"bytes": A, "path": "a.bmp"}, {"bytes": B, "path": None}
ROWS: dict[str, dict[str, Any]] = {
    "the-cauldron": {
        "images": [BYTES_A, BYTES_B],
        "texts": [{"user": "Which is first?", "assistant": "The dark one.", "source": "me"}],
    },
    "llava-onevision": {
        "id": "7",
        "image": BYTES_A,
        "conversations": talk(("human", "<image>\nWhat?"), ("gpt", "A square."), keys=LLAVA),
        "data_source": "me",
    },
    "hub-messages": {
        "images": [BYTES_B],
        "messages": talk(("user", "What is <image>?"), ("assistant", "A square.")),
    },
    "hub-answers": {"image": BYTES_A, "question": "Colour?", "answers": ["Blue.", "Dark."]},
    "hub-caption": {"image": BYTES_B, "caption": "A square."},
    "tulu": {"messages": talk(("user", "Is <video> a tag?"), ("assistant", "Yes."))},
    "saved-to-disk": {"image": BYTES_A, "caption": "From an Arrow file."},
}
"""Name of a data set in a table with bytes -> its row."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Encode one data set of each format and source; return the cache and their names."""
    folder = tmp_path_factory.mktemp("formats")
    words: list[str] = []
    for name, files in FOLDERS.items():
        for path, content in files.items():
            file = folder / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        words.append(f"folder:{folder / name}")
    table = pa.Table.from_pylist([{"file_name": "a.bmp", "text": "From a table."}])
    (folder / "parquet").mkdir()
    (folder / "parquet" / "a.bmp").write_bytes(A)
    pq.write_table(table, folder / "parquet" / "metadata.parquet")
    words.append(f"folder:{folder / 'parquet'}")

    record = {"image": "messages/b.bmp", "caption": "Named by a file elsewhere."}
    (folder / "records.jsonl").write_text(lines(record))
    words.append(f"records=json:{folder / 'records.jsonl'}")

    for name, row in ROWS.items():
        (folder / name).mkdir()
        table = pa.Table.from_pylist([row])
        if name == "saved-to-disk":
            with pa.ipc.new_stream(
                folder / name / "data-00000-of-00001.arrow", table.schema
            ) as out:
                out.write_table(table)
        else:
            pq.write_table(table, folder / name / "train-00000-of-00001.parquet")
        words.append(f"{name}=hf:{folder / name}")

    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for path, content in {"000000001.bmp": A, "000000001.txt": b"Found on the web."}.items():
            (member := tarfile.TarInfo(path)).size = len(content)
            tar.addfile(member, io.BytesIO(content))
    words.append(f"tars=webdataset:{folder / 'tars'}/*.tar")
    cache = folder / "cache"
    command = ["--dataset", *words, "--encoder", "demo", "--workers", "0", "--features", str(cache)]
    assert encode.main(command) == 0
    return cache, [word.split("=")[0].rsplit("/", 1)[-1] for word in words]


Shown = Callable[..., str]


@pytest.fixture
def shown(
    made: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Shown:
    """Return a function that returns what `--inspect` prints about the sample of a data set."""

    def inspect(name: str, features: Path = made[0]) -> str:
        capsys.readouterr()
        words = ["--llm", "random:qwen3-tiny", "--hardware", "cpu", "--held-out", "0", "--inspect"]
        words += ["--features", str(features), "--datasets", name, "--run", str(tmp_path / "run")]
        assert train.main([*words, "--batch-size", "1"]) == 0
        head, *rest = capsys.readouterr().out.splitlines()
        assert head.startswith("step 0, micro-batch 0: ")
        return "\n".join(line for line in rest if line.startswith("  "))

    return inspect


def test_every_format_is_trained_as_the_golden_file_says(
    made: tuple[Path, list[str]], shown: Shown
) -> None:
    _, names = made
    assert len(names) == len(FOLDERS) + len(ROWS) + 3
    found = "".join(f"== {name}\n{shown(name)}\n" for name in names)
    expected = GOLDEN.read_text(encoding="utf-8")
    assert found.splitlines() == expected.splitlines()


def test_a_heic_file_is_trained_like_any_image(shown: Shown, tmp_path: Path) -> None:
    """The bytes of an encoder of HEIC differ between its versions, so the key is not compared."""
    folder = tmp_path / "heic"
    folder.mkdir()
    (folder / "a.heic").write_bytes(heic_file(Image.new("RGB", (32, 24), "teal")))
    (folder / "metadata.jsonl").write_text(lines({"image": "a.heic", "caption": "A photo."}))
    cache = tmp_path / "cache"
    command = ["--dataset", f"folder:{folder}", "--encoder", "demo", "--workers", "0"]
    assert encode.main([*command, "--features", str(cache)]) == 0
    text = re.sub(r"\[image [0-9a-f]{12}\.\.", "[image KEY..", shown("heic", cache))
    assert "user\\n[image KEY.. x9 tokens]Describe this image.<|im_end|>" in text
    assert "«A photo.»«<|im_end|>»" in text
