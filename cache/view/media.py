"""What is known of the media a page shows: sizes, sources, what is said of them, and a small image.

An image comes from a local path of the media table, or from the folder of kept downloads; nothing is
fetched, and bytes that are not those that were encoded are never shown. Videos are not decoded here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from cache.format.spec import FeatureSpec
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from cache.store.references import read_references
from cache.store.samples import dataset_names
from cache.view.thumbnails import decode, read_file

THUMBNAIL = 336
"""Longer side of an image in the page, pixels."""

SAID_CHARACTERS = 160
"""Of the text under an image."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """What the tables say of one media."""

    sources: tuple[str, ...] = ()
    """Where it was found: paths and URLs."""
    width: int = 0
    """Pixels; 0 where nobody knows."""
    height: int = 0
    """Pixels."""
    nbytes: int = 0
    """Of the file."""
    duration_s: float | None = None
    """Of a video."""
    note: str | None = None
    """What was odd about it."""
    datasets: tuple[str, ...] = ()
    """Which mention it."""
    asked: str = ""
    """A question about it: of the first sample that shows it and nothing else."""
    said: str = ""
    """The answer to that, or a caption."""


_Mentions = dict[str, list[tuple[str, dict[str, Any]]]]
"""Source -> (data set, what is asked and said there) of each data set that shows it."""


def look_up(root: CacheRoot, keys: Sequence[str]) -> dict[str, Medium]:
    """Key (64 hex) -> what the tables say of it; every key has an entry."""
    table = media_table(root)
    wanted = pc.is_in(table["key"], value_set=pa.array(sorted(set(keys)), pa.string()))
    by_key: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
    for row in table.filter(wanted).to_pylist():
        by_key[row["key"]].append(row)
    mentions = _mentions(root, table, np.asarray(wanted, bool))
    return {key: _medium(found, mentions) for key, found in by_key.items()}


def _medium(rows: list[dict[str, Any]], mentions: _Mentions) -> Medium:
    if not rows:
        return Medium()
    best = max(rows, key=lambda row: (row["status"] == "ok", row["width"]))
    mentioned = [found for row in rows for found in mentions.get(row["source"], [])]
    return Medium(
        sources=tuple(row["source"] for row in rows),
        width=best["width"],
        height=best["height"],
        nbytes=best["bytes"],
        duration_s=best["duration_s"],
        note=best["note"],
        datasets=tuple(dict.fromkeys(name for name, _ in mentioned)),
        **next((said for _, said in mentioned if said), {}),
    )


def _mentions(root: CacheRoot, table: pa.Table, wanted: npt.NDArray[np.bool_]) -> _Mentions:
    """Find who mentions the wanted rows (M,) of the media table.

    What is said of one is from the first sample that shows it alone. Samples that state another sha256 than
    its bytes have are about something else.
    """
    found: _Mentions = {}
    for name in dataset_names(root):
        references = read_references(root, name, table)
        hits = np.flatnonzero(references.look_up(wanted, False) & ~references.mismatch)
        alone = references.counts == 1
        first: dict[int, int] = {}
        samples = references.sample[hits].tolist()
        for row, sample in zip(references.source[hits].tolist(), samples, strict=True):
            if row not in first or (alone[sample] and not alone[first[row]]):
                first[row] = sample
        texts = _texts(root.samples(name), [n for n in first.values() if alone[n]])
        for row, sample in first.items():
            source = table["source"][row].as_py()
            found.setdefault(source, []).append((name, texts.get(sample, {})))
    return found


def _texts(path: Path, samples: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Number of a sample -> what is asked and said in it. Reads only the row groups those are in."""
    texts: dict[int, dict[str, Any]] = {}
    with pq.ParquetFile(path) as file:
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            here = sorted(number for number in samples if start <= number < stop)
            if here:
                messages = file.read_row_group(group, ["messages"])["messages"]
                texts |= {number: _exchange(messages[number - start].as_py()) for number in here}
            start = stop
    return texts


def _exchange(messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first answer of a conversation, and the question before it."""
    found = {}
    for message in messages:
        text = " ".join(message["content"].replace("<image>", " ").split())
        if len(text) > SAID_CHARACTERS:
            text = text[: SAID_CHARACTERS - 1] + "…"
        found["said" if message["role"] == "assistant" else "asked"] = text
        if message["role"] == "assistant":
            break
    return found if "said" in found else {}


# ---- small images


def thumbnail(
    medium: Medium, key: str, spec: FeatureSpec, keep: Path | None
) -> tuple[Image.Image | None, str]:
    """The image as the encoder saw it, small, RGB; or None, and why there is none."""
    candidates = [Path(source) for source in medium.sources if source.startswith("/")]
    if keep is not None:
        candidates.append(keep / key[:2] / key)  # as encode.keep names them
    reason = "not on this machine" if candidates else "came from the web and was not kept"
    for path in candidates:
        data = read_file(path)
        if data is None:
            continue
        if hashlib.sha256(data).hexdigest() != key:
            reason = "has changed since it was encoded"
            continue
        try:
            return _as_seen(decode(data, 2 * THUMBNAIL), spec), ""
        except Exception:  # PIL's decoders raise whatever the bytes lead them to
            reason = "cannot be read"
    return None, reason


def _as_seen(image: Image.Image, spec: FeatureSpec) -> Image.Image:
    """What the patch grid covers: `squash` the whole image, `pad` with its margins, `crop` the middle."""
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    side = min(image.size)
    if spec.fit == "crop":
        image = ImageOps.fit(image, (side, side))
    elif spec.fit == "pad":
        colour = tuple(int(value * 255) for value in spec.mean)
        longer = max(image.size)
        image = ImageOps.pad(image, (longer, longer), color=colour)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
