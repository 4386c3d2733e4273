"""One sample of each format and source, encoded and rendered as training text, equals a golden file.

python -m tests.integration.train.test_inspect_formats FOLDER     # writes the golden file again
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.server
import io
import json
import re
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pillow_heif
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import encode.run
import train.run
import train.training
from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from tests.support.pixmo_lists import write_pixmo

GOLDEN = Path(__file__).parent / "inspect_formats.txt"
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}
ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
CHAT = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]


def png(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), COLORS[name]).save(file, "PNG")
    return file.getvalue()


def heic() -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), COLORS["blue"])).save(file, quality=90)
    return file.getvalue()


MEDIA = {
    "red.png": png("red"),
    "green.png": png("green"),
    "clip.y4m": draw_video(DemoWorld(images=9, side=24, video_frames=3), 0),
    "photo.HEIC": heic(),
}
RED = f"data:image/png;base64,{base64.b64encode(MEDIA['red.png']).decode()}"


def sheet(rows: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(rows), file)
    return file.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def coco() -> dict[str, Any]:
    image = {"id": 5, "file_name": "red.png", "width": 32, "height": 24, "license": 1}
    captions = [{"id": n, "image_id": 5, "caption": f"Caption {n}."} for n in (1, 2)]
    return {"info": {"year": 2014}, "licenses": [], "images": [image], "annotations": captions}


FOLDERS: dict[str, dict[str, Any]] = {
    "ours-caption": {"metadata.jsonl": {"file": "red.png", "caption": "A red field."}},
    "ours-video": {"metadata.jsonl": {"file": "clip.y4m", "caption": "Shapes move."}},
    "ours-messages": {
        "metadata.jsonl": {
            "files": ["red.png", "green.png"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Is <image> warmer than <image>?"},
                {"role": "assistant", "content": "Yes.", "weight": 0.5},
            ],
        }
    },
    "image-folder-csv": {"metadata.csv": b"file_name,text\nred.png,A red field.\n"},
    "image-folder-jsonl": {"metadata.jsonl": {"file_name": "red.png", "text": "A red field."}},
    "image-folder-parquet": {
        "metadata.parquet": sheet({"file_name": ["red.png"], "text": ["A red field."]})
    },
    "in-subfolders": {
        "one/metadata.jsonl": {"image": "../red.png", "caption": "From one."},
        "two/metadata.csv": b"image,question,answer\n../green.png,Which?,From two.\n",
    },
    "caption-beside": {"red.txt": b"A red field.\n"},
    "record-beside": {"clip.json": {"conversations": ASKED}},
    "heic": {"metadata.jsonl": {"file": "photo.HEIC", "caption": "A blue field."}},
}
"""Name -> files of a folder, beside MEDIA."""

FILES: dict[str, tuple[str, Any]] = {
    "llava": (".json", [{"id": "1", "image": "red.png", "conversations": ASKED}]),
    "llava-pretty": (".json", [{"image": ["green.png"], "conversations": ASKED}]),
    "llava-images": (
        ".jsonl",
        {
            "image": ["red.png", "green.png"],
            "conversations": [{"from": "human", "value": "<image><image>\nSame?"}, ASKED[1]],
        },
    ),
    "llava-video": (
        ".jsonl",
        {
            "video": "clip.y4m",
            "conversations": [{"from": "human", "value": "<video>\nWhat?"}, ASKED[1]],
        },
    ),
    "sharegpt": (
        ".json",
        [
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "user", "value": "Look."},
                    {"from": "assistant", "value": "Yes?"},
                    *ASKED,
                ],
                "images": ["red.png"],
            }
        ],
    ),
    "llama-factory": (
        ".json",
        [
            {
                "messages": [{"role": "user", "content": "<video><image>Which is still?"}, CHAT[1]],
                "images": ["red.png"],
                "videos": ["clip.y4m"],
            }
        ],
    ),
    "ms-swift": (
        ".jsonl",
        {
            "query": "<image>And now?",
            "response": "Red.",
            "history": [["Hi.", "Hello."]],
            "images": ["red.png"],
        },
    ),
    "openai-parts": (
        ".jsonl",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Compare "},
                        {"type": "image_url", "image_url": {"url": RED}},
                        {"type": "text", "text": " and "},
                        {"type": "image", "image": "green.png"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Both plain."}]},
            ]
        },
    ),
    "data-uri": (".jsonl", {"image": RED, "question": "Which colour?", "answer": "Red."}),
    "question": (".csv", b"image,question,answer\nred.png,Which colour?,Red.\n"),
    "answers": (".jsonl", {"image": "red.png", "question": "Colour?", "answers": ["Red.", "Red!"]}),
    "prompt": (".tsv", b"image\tprompt\tresponse\nred.png\tWhich colour?\tRed.\n"),
    "instruction": (
        ".json",
        [{"image": "red.png", "instruction": "Name it.", "input": "In German.", "output": "Rot."}],
    ),
    "caption": (".csv", b"image_path,caption\nred.png,A red field.\n"),
    "description": (".parquet", sheet({"image": ["red.png"], "description": ["A red field."]})),
    "coco": (".json", coco()),
    "text-only": (".jsonl", {"messages": CHAT}),
    "tag-as-text": (
        ".jsonl",
        {
            "messages": [
                {"role": "user", "content": "What does <image> do in SVG?"},
                {"role": "assistant", "content": "<image> embeds a bitmap."},
            ]
        },
    ),
    "url": (".jsonl", {"image": "http://127.0.0.1:PORT/red.png", "caption": "From the web."}),
}
"""Name -> suffix and content of a file of records; its media are in another folder."""


TABLES: dict[str, dict[str, list[Any]]] = {
    "cauldron": {
        "images": [[{"bytes": MEDIA["red.png"], "path": None}]],
        "texts": [[{"user": "What?", "assistant": "Red.", "source": "vqa"}] * 2],
    },
    "onevision": {
        "id": ["7"],
        "image": [{"bytes": MEDIA["green.png"], "path": "7.png"}],
        "conversations": [ASKED],
        "data_source": ["mine"],
    },
    "tulu": {"id": ["t1"], "messages": [CHAT], "source": ["ai2"]},
}
"""Name -> columns of a data set as the Hugging Face hub has it, with the bytes of its images."""

TARS = {
    "img2dataset": {
        "000000000.png": MEDIA["red.png"],
        "000000000.txt": b"A red field.",
        "000000000.json": json.dumps(
            {"url": "https://example.org/0.png", "caption": "A red field.", "status": "success"}
        ).encode(),
        "000000001.y4m": MEDIA["clip.y4m"],
        "000000001.txt": b"Shapes move.",
    },
}
"""Name -> members of a tar."""


def arrow(columns: dict[str, list[Any]]) -> bytes:
    """Return a file as `save_to_disk` of the library `datasets` writes it."""
    table, file = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return file.getvalue()


SAVED = {"image": [{"bytes": MEDIA["red.png"], "path": None}], "caption": ["From an Arrow file."]}
"""Columns of a data set in an Arrow file."""
PIXMO = "pixmo-cap", "pixmo-points", "pixmo-count", "pixmo-cap-qa", "pixmo-ask-model-anything"


def put(path: Path, content: Any, port: int = 0, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=indent).replace("PORT", str(port)).encode()
    path.write_bytes(content)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serve a folder on the loopback address; yield the port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def rendered(top: Path) -> str:
    """Encode all formats, and return their training text with the accounts of the data sets."""
    for name, files in FOLDERS.items():
        for path, content in (MEDIA | files).items():
            put(top / name / path, content)
    for path, content in MEDIA.items():
        put(top / "media" / path, content)
    words = [f"folder:{top / name}" for name in FOLDERS]
    for name, columns in TABLES.items():
        put(top / name / "data" / "train-00000-of-00001.parquet", sheet(columns))
        words.append(f"hf:{top / name}")
    for name, members in TARS.items():
        put(top / name / "00000.tar", tar(members))
        words.append(f"webdataset:{top / name}/*.tar")
    put(top / "saved" / "data-00000-of-00001.arrow", arrow(SAVED))
    words += [f"hf:{top / 'saved'}", "pixmo"]
    with served(top / "media") as port:
        write_pixmo(top / "lists", [(f"http://127.0.0.1:{port}/green.png", None)])
        for name, (suffix, content) in FILES.items():
            put(top / f"{name}{suffix}", content, port, 2 if name == "llava-pretty" else None)
            words.append(f"json:{top / name}{suffix}")
        features = ["--features", str(top / "cache")]
        options = ["--media", str(top / "media"), "--encoder", "demo", "--workers", "0"]
        options += ["--source", str(top / "lists")]
        encoded = output(
            encode.run.main, ["--dataset", *words, *options, "--allow-private", *features]
        )
        # The loader goes on until there are 100 samples: each answer of a question is drawn.
        trained = output(
            train.run.main,
            [
                *("--inspect", "--llm", "random:qwen3-tiny", "--hardware", "cpu", *features),
                *("--batch-size", "100", "--max-steps", "1", "--held-out", "0"),
                *("--run", str(top / "run")),
            ],
        )
    names = (*FOLDERS, *FILES, *TABLES, *TARS, "saved", *PIXMO)
    accounts = [line for line in encoded.splitlines() if line.split(":")[0] in names]
    text = "\n".join([*accounts, "", *sorted(set(sample_texts(trained)))]) + "\n"
    for name, data in MEDIA.items():
        key = hashlib.sha256(data).hexdigest()[:12]
        text = text.replace(f"{key}..", name)
    return text.replace(str(top), "TOP").replace(f":{port}/", ":PORT/")


def output(main: Any, words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    return out.getvalue()


def sample_texts(trained: str) -> Iterator[str]:
    """Yield each sample with what it shares with others, without positions in the batch."""
    shared = ""
    for line in trained.splitlines():
        if line.startswith("sequence"):
            shared = ""
        elif found := re.match(r"  shared \d+-\d+: (.*)", line):
            shared = found[1]
        elif found := re.match(r"  (\S.*?) \d+-\d+ \(positions \d+-\d+\): (.*)", line):
            yield f"{found[1]}: {shared}{found[2]}"


@pytest.mark.slow
def test_each_format_is_trained_on_as_the_golden_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.training, "INSPECTED", 1000)
    assert rendered(tmp_path) == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    train.training.INSPECTED = 1000
    GOLDEN.write_text(rendered(Path(sys.argv[1])), encoding="utf-8")
