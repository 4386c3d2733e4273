"""The functions of the task: what lmms-eval shows, asks and accepts. It loads this file beside the YAML."""

import json
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
Doc = dict[str, Any]


def messages(doc: Doc) -> list[dict[str, Any]]:
    """Return the conversation up to the last user turn, with its images."""
    return [
        {"role": turn["role"], "content": [_part(part) for part in turn["content"]]}
        for turn in json.loads(doc["messages"])
    ]


def _part(part: dict[str, str]) -> dict[str, Any]:
    if "text" in part:
        return {"type": "text", "text": part["text"]}
    return {"type": "image", "url": _image(part["image"])}


def images(doc: Doc) -> list[Image.Image]:
    """Return the images of a question in their order."""
    parts = [part for turn in json.loads(doc["messages"]) for part in turn["content"]]
    return [_image(part["image"]) for part in parts if "image" in part]


def _image(key: str) -> Image.Image:
    return Image.open(HERE / "images" / f"{key}.png").convert("RGB")


def prompt(doc: Doc) -> str:
    """Return the texts of the last user turn; lmms-eval logs them."""
    last = json.loads(doc["messages"])[-1]
    return "".join(part.get("text", "<image>") for part in last["content"])


def target(doc: Doc) -> str:
    """Return the first right answer."""
    return str(doc["answers"][0])


def score(doc: Doc, results: list[str]) -> dict[str, float]:
    """Return exact match with any right answer, as train.evaluate defines it."""
    right = {_normalized(answer) for answer in doc["answers"]}
    return {"exact_match": float(_normalized(results[0]) in right)}


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().removesuffix(".").strip().casefold()
