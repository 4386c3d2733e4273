"""Look up what the tables say of images and videos: sources, sizes, captions; and make thumbnails of images.

An image is read from a local file in the media table, or from the folder of kept downloads. Nothing is
fetched, and a file is shown only if `LocalMedia` opens it and its sha256 is the one that was encoded. Videos
are not decoded: the cache may not import `model.media.video`, and a second decoder for files from strangers
is not worth a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from cache.format.media_marks import split_at_marks
from cache.format.spec import FeatureSpec
from cache.maintenance.local_media import LocalMedia, MediaFileError, NotAllowedError, is_web
from cache.store.ledger import MediaRecord, media_table
from cache.store.paths import CacheRoot
from cache.store.references import read_references
from cache.store.samples import Message, dataset_names, samples_at
from cache.view.thumbnails import MAX_FILE_BYTES, decode

THUMBNAIL = 336
"""Longer side of an image on the page, pixels."""

MAX_CHARACTERS = 160
"""Characters of a question or a caption on the page; longer ones are cut."""


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """What the tables say of one image or video."""

    sources: tuple[str, ...] = ()
    """Paths and URLs where it was found."""
    record: MediaRecord | None = None
    """Its entry in the media table, of the source with the largest size; None if there is none."""
    datasets: tuple[str, ...] = ()
    """Data sets with samples that mention it."""
    question: str = ""
    """A question about it, from the first sample that shows it and nothing else."""
    answer: str = ""
    """The answer to that question, or a caption."""


Mention = tuple[str, dict[str, str]]
"""A data set; `question` and `answer` of its first sample that shows an item alone, empty if none does."""


def look_up(root: CacheRoot, keys: Sequence[str]) -> dict[str, MediaItem]:
    """Return key (64 hex digits) -> what the tables say of it, for every key."""
    table = media_table(root)
    value_set = pa.array(sorted(set(keys)), pa.string())
    wanted = np.asarray(pc.is_in(table["key"], value_set=value_set), bool)
    mentions = _mentions(root, table, wanted)
    rows = np.flatnonzero(wanted)
    known = zip(rows.tolist(), table.take(pa.array(rows)).to_pylist(), strict=True)
    records = {row: MediaRecord(**record) for row, record in known}
    items = {}
    for key in keys:
        found = {row: record for row, record in records.items() if record.key == key}
        said = [mention for row in found for mention in mentions.get(row, [])]
        items[key] = MediaItem(
            sources=tuple(record.source for record in found.values()),
            record=max(found.values(), key=lambda r: (r.status == "ok", r.width), default=None),
            datasets=tuple(dict.fromkeys(dataset for dataset, _ in said)),
            **next((texts for _, texts in said if texts), {}),
        )
    return items


def _mentions(
    root: CacheRoot, table: pa.Table, wanted: npt.NDArray[np.bool_]
) -> dict[int, list[Mention]]:
    """Find the data sets that mention the wanted rows (M,) of the media table.

    A sample that states another sha256 than the source has is about something else and does not count.
    """
    found: dict[int, list[Mention]] = {}
    for dataset in dataset_names(root):
        references = read_references(root, dataset, table)
        hits = np.flatnonzero(references.look_up(wanted, False) & ~references.mismatch)
        sample = references.sample
        alone = hits[references.counts[sample[hits]] == 1]
        rows, at = np.unique(references.source[alone], return_index=True)
        first = dict(zip(rows.tolist(), sample[alone[at]].tolist(), strict=True))
        numbers = np.unique(list(first.values())).astype(np.int64)
        said = zip(numbers.tolist(), samples_at(root, dataset, numbers), strict=True)
        texts = {number: _exchange(sample.messages) for number, sample in said}
        for row in np.unique(references.source[hits]).tolist():
            found.setdefault(row, []).append((dataset, texts.get(first.get(row, -1), {})))
    return found


def _exchange(messages: Sequence[Message]) -> dict[str, str]:
    """Return the first answer of a conversation as `answer`, and the message before it as `question`.

    The sample has one media item; its mark is left out.
    """
    found = {}
    try:
        turns = split_at_marks([(m.role, m.content) for m in messages], 1)
    except ValueError:  # no user turn
        turns = [[m.content] for m in messages]
    for message, texts in zip(messages, turns, strict=True):
        text = " ".join(" ".join(texts).split())
        if len(text) > MAX_CHARACTERS:
            text = text[: MAX_CHARACTERS - 1] + "…"
        found["answer" if message.role == "assistant" else "question"] = text
        if "answer" in found:
            return found
    return {}


# ---- thumbnails


def thumbnail(
    sources: Sequence[str], key: str, spec: FeatureSpec, local: LocalMedia, keep: Path | None = None
) -> tuple[Image.Image | None, str]:
    """Return an image as the encoder saw it, small, RGB; or None and why it is not shown.

    Args:
        sources: paths to try, names of media inside files, and URLs.
        key: sha256 (hex) that the file must have.
        spec: says how the encoder fits an image into its square.
        local: which files are opened.
        keep: folder of kept downloads, one of those that `local` opens.
    """
    # The first as encode.download.media_store names its files.
    candidates = [str(keep.absolute() / key[:2] / key)] if keep is not None else []
    candidates += [source for source in sources if not is_web(source)]
    absent, refused = "image came from the web and was not kept", ""
    for source in candidates:
        try:
            data = local.read(source, key, most=MAX_FILE_BYTES)
            return _fitted(decode(data, 2 * THUMBNAIL), spec), ""
        except NotAllowedError as error:
            refused = refused or error.reason
        except MediaFileError as error:
            absent = f"image {error.reason}"
    return None, refused or absent


def _middle(side: int, seen: int) -> tuple[int, int, int, int]:
    """Return the box of the middle `seen` x `seen` pixels of a square."""
    start = (side - seen) // 2
    return start, start, start + seen, start + seen


def _fitted(image: Image.Image, spec: FeatureSpec) -> Image.Image:
    """Return what the patch grid covers: all (`squash`), all with margins (`pad`), the middle (`crop`)."""
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    side = min(image.size)
    if spec.fit == "crop":
        seen = round(side * spec.image_size / spec.shorter_side)
        image = ImageOps.fit(image, (side, side)).crop(_middle(side, seen))
    elif spec.fit == "pad":
        colour = tuple(int(value * 255) for value in spec.mean)
        longer = max(image.size)
        image = ImageOps.pad(image, (longer, longer), color=colour)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
