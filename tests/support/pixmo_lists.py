"""Write small PixMo data sets: Parquet files as on the hub, about images at given URLs.

The types are those of the repositories' cards (allenai/pixmo-*, read in 2026). Points are a list of structs
of doubles in pixmo-points, and a struct of lists of floats in pixmo-count, which also has other splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TRAIN = "train-00000-of-00001"
HELD_OUT = "never read"
"""Label of every row in validation and test splits."""

_URL = {"image_url": pa.string()}
_IMAGE = {**_URL, "image_sha256": pa.string()}
_ASKED = {"question": pa.string(), "answer": pa.string()}

SCHEMAS: dict[str, dict[str, Any]] = {
    "pixmo-cap": {**_URL, "caption": pa.string(), "transcripts": pa.list_(pa.string())},
    "pixmo-points": {
        **_IMAGE,
        "points": pa.list_(pa.struct({"x": pa.float64(), "y": pa.float64()})),
        "count": pa.int64(),
        "label": pa.string(),
        "collection_method": pa.string(),
    },
    "pixmo-count": {
        **_IMAGE,
        "count": pa.int32(),
        "points": pa.struct({"x": pa.list_(pa.float32()), "y": pa.list_(pa.float32())}),
        "label": pa.string(),
    },
    "pixmo-cap-qa": {**_URL, **_ASKED, "messages": pa.list_(pa.string())},
    "pixmo-ask-model-anything": {**_IMAGE, **_ASKED},
}


def write_table(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    stem: str = TRAIN,
    types: Mapping[str, Any] | None = None,
    row_group: int = 2,
) -> Path:
    """Write one file of the data set `name` where `hf download` puts it; missing values are null."""
    path = folder / name / "data" / f"{stem}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({**SCHEMAS[name], **(types or {})})
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=row_group)
    return path


def write_pixmo(folder: Path, urls: Sequence[tuple[str, str | None]]) -> Path:
    """Write all five data sets about images.

    Each image has a caption and one or two transcripts, two pointing rows (one for something absent), a
    count of 0 to 3, a conversation of one or two questions, and a question.

    Args:
        folder: where to write; returned.
        urls: URL and sha256 (None: unknown) of each image.
    """
    numbered = list(enumerate(urls))
    write_table(folder, "pixmo-cap", [_caption(n, url) for n, (url, _) in numbered])
    pointings = [row for n, image in numbered for row in _pointings(n, *image)]
    write_table(folder, "pixmo-points", pointings)
    write_table(folder, "pixmo-count", [_count(n, *image) for n, image in numbered])
    for split in ("validation", "test"):
        rows = [
            {**_count(n, *image), "label": HELD_OUT, "points": {"x": [], "y": []}}
            for n, image in numbered
        ]
        write_table(folder, "pixmo-count", rows, stem=f"{split}-00000-of-00001")
    write_table(folder, "pixmo-cap-qa", [_conversation(n, url) for n, (url, _) in numbered])
    questions = [
        {
            "image_url": url,
            "image_sha256": sha,
            "question": f"What is {n}?",
            "answer": f"It is {n}.",
        }
        for n, (url, sha) in numbered
    ]
    write_table(folder, "pixmo-ask-model-anything", questions)
    return folder


def _caption(n: int, url: str) -> dict[str, Any]:
    said = [f"So this is image {n}, um, number {i}." for i in range(1 + n % 2)]
    return {"image_url": url, "caption": f"Image {n}, in detail.", "transcripts": said}


def _pointings(n: int, url: str, sha256: str | None) -> list[dict[str, Any]]:
    points = [{"x": 10.0 * (i + 1), "y": 50.0 + i} for i in range(1 + n % 3)]
    common = {"image_url": url, "image_sha256": sha256, "collection_method": "pointing"}
    return [
        {**common, "points": points, "count": len(points), "label": "bright spots"},
        {**common, "points": [], "count": 0, "label": "unicorns"},
    ]


def _count(n: int, url: str, sha256: str | None) -> dict[str, Any]:
    places = [0.25 * (i + 1) for i in range(n % 4)]  # pixels: inside an image of one pixel
    return {
        "image_url": url,
        "image_sha256": sha256,
        "count": len(places),
        "points": {"x": places, "y": places},
        "label": "things",
    }


def _conversation(n: int, url: str) -> dict[str, Any]:
    turns = [f"What is in image {n}?", f"Number {n}.", "Sure?", "Yes."][: 2 + 2 * (n % 2)]
    tags = ("[USER]", "[ASSISTANT]")
    tagged = " ".join(f"{tags[i % 2]} {turn}" for i, turn in enumerate(turns[:-1]))
    return {
        "image_url": url,
        "question": f"{tagged} [ASSISTANT]",
        "answer": turns[-1],
        "messages": turns,
    }
