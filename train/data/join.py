"""Select the samples of a training: those whose media all have features, of one split.

    samples = join(
        root, reader, {"demo": 0.6, "more": 0.4}, split="train", held_out=0.05, min_coverage=0.95
    )

Samples, media and rows are joined when a training starts, and nothing is stored beside the features. So
captions can be edited and data sets added without touching a feature. The split is decided by the keys of the
media (`cache.store.references.split_samples`), so no image is in two splits, whichever data sets have it.

S samples, R media references of all samples together, K media items. A media item is the bytes of one key,
used as an image or as a video.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import command_line
from cache.format.frame_sampling import MAX_FRAMES
from cache.maintenance.encode_command import encode_command
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.references import (
    MEDIA_KINDS,
    UNKNOWN_KIND,
    MediaItems,
    MediaRows,
    SampleRows,
    edges_of,
    join_samples,
    within,
)
from cache.store.samples import SPLITS, Split, content_digest, dataset_names, samples_table
from configs import UserError, load
from train.data.sample_list import (
    Coverage,
    Ints,
    SampleList,
    check_frozen,
    digest_of,
    read_frozen,
)

log = logging.getLogger(__name__)

FAILURES_SHOWN = 5
"""Failures of the ledger that an error about coverage quotes."""


class EmptySplitError(UserError):
    """The split has no sample; a few images may all be in the others."""


def join(
    root: CacheRoot,
    reader: FeatureReader,
    datasets: Mapping[str, float | None],
    *,
    split: Split,
    held_out: float,
    min_coverage: float,
    max_frames: int = MAX_FRAMES,
    frozen: Path | None = None,
) -> SampleList:
    """Return the samples of `datasets` that have all their features and are in one split.

    Args:
        root: the cache.
        reader: a reader of the space that has the features.
        datasets: name -> share of the mix; or None for all of them, then each counts by its size.
        split: `train`, `val` or `test`.
        held_out: share of media in `val`, and the same share in `test`, see `split_samples`.
        min_coverage: least share of samples with features, not counting samples with failed media.
        max_frames: most frames of one video; with its duration, it decides which frames are needed.
        frozen: a list written by `SampleList.freeze`; the result has exactly its samples.

    Raises:
        UserError: no data set is in the cache, or features are missing.
        ChangedSamplesError: the frozen list has changed.
        EmptySplitError: the split has no sample.
    """
    shares = _find_datasets(root, datasets)
    names = tuple(shares)
    ledger = media_table(root)
    parts = [_read_part(root, name) for name in names]
    media, found, joined = join_samples(
        [part.table for part in parts], ledger, reader, held_out=held_out, max_frames=max_frames
    )
    kept: list[Ints] = []
    counts: list[Coverage] = []
    chosen = read_frozen(frozen, names) if frozen is not None else None
    for name, one in zip(names, joined, strict=True):
        _check_kinds(root, name, one)
        counts.append(
            Coverage(
                dataset=name,
                samples=len(one.present),
                present=int(one.present.sum()),
                failed=int(one.failed.sum()),
                missing=int((~one.present & ~one.failed).sum()),
            )
        )
        use = one.present & (one.split == SPLITS.index(split))
        if chosen is not None:
            use &= np.unpackbits(chosen[name], count=len(use)).astype(bool)
        kept.append(np.flatnonzero(use))
    result = _assemble(root, split, names, shares, parts, joined, kept, media, found, counts)
    _check_coverage(result, reader, min_coverage, ledger, found.partial, max_frames)
    if frozen is not None:
        check_frozen(result, frozen)
    elif not result.size:
        raise EmptySplitError(
            f"{', '.join(names)}: no sample is in the {split} split; change --held-out or encode more"
        )
    return result


def _find_datasets(
    root: CacheRoot, datasets: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Return the data sets in the cache with their shares; log a warning that names the others."""
    here = set(dataset_names(root))
    given = [share for share in datasets.values() if share is not None]
    if given and len(given) < len(datasets):
        raise UserError(
            "mix: give every data set a share, or none of them (then they count by size): "
            + ", ".join(f"{k}={v}" for k, v in datasets.items())
        )
    if any(share <= 0 for share in given):
        raise UserError(f"mix: shares must be above 0; found {dict(datasets)}")
    absent = [name for name in datasets if name not in here]
    if len(absent) == len(datasets):
        raise UserError(
            f"none of the data sets {', '.join(datasets)} is under {root.path}/samples "
            f"(there: {', '.join(sorted(here)) or 'none'}). "
            "Make them (of your own files: --dataset NAME=folder:PATH): "
            + encode_command(root, next(iter(datasets), "demo"), None, load("encoders"))
        )
    if absent:
        log.warning("not in %s, so not in the mix: %s", root.path, ", ".join(absent))
    return {name: share for name, share in datasets.items() if name in here}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One data set with all its samples, without their texts."""

    digest: str
    """Hash of its texts."""
    ids: pa.ChunkedArray
    """(S,) strings."""
    weight: npt.NDArray[np.float32]
    """(S,) factors on the loss."""
    task: pa.ChunkedArray
    """(S,) strings, question types."""
    choice: npt.NDArray[np.int32]
    """(S,) number of the question that has several answers; -1: the sample is the only answer."""
    choices: int
    """Number of such questions."""
    table: pa.Table
    """(S,) what `join_samples` takes."""


def _check_kinds(root: CacheRoot, name: str, one: SampleRows) -> None:
    """Raise UserError if a data set has media that are neither images nor videos."""
    if (one.references.kind == UNKNOWN_KIND).any():
        media = samples_table(root, name, ["media"])["media"]
        kinds = pc.unique(pc.struct_field(pc.list_flatten(media), "kind")).to_pylist()
        raise UserError(
            f"data set {name}: holds {', '.join(sorted({*map(str, kinds)} - {*MEDIA_KINDS}))} media; "
            "only images and videos can be trained on: "
            f"{encode_command(root, name, None, load('encoders'))} writes it again"
        )


def _read_part(root: CacheRoot, name: str) -> _Part:
    """Read a data set, without its texts."""
    table = samples_table(root, name, ["id", "media", "weight", "task", "choice"])
    ids = table["id"].combine_chunks()
    choice = table["choice"].combine_chunks()
    several = pc.not_equal(choice, "")
    coded = pc.if_else(several, choice, None).dictionary_encode()
    return _Part(
        digest=content_digest(table),
        ids=ids,
        weight=np.asarray(table["weight"], dtype=np.float32),
        task=table["task"].combine_chunks(),
        choice=np.asarray(pc.fill_null(coded.indices, -1), dtype=np.int32),
        choices=len(coded.dictionary),
        table=table.select(["id", "media", "choice"]),
    )


def _assemble(
    root: CacheRoot,
    split: Split,
    names: tuple[str, ...],
    shares: Mapping[str, float | None],
    parts: list[_Part],
    joined: list[SampleRows],
    kept: list[Ints],
    known: MediaItems,
    found: MediaRows,
    counts: list[Coverage],
) -> SampleList:
    """Return the kept samples of all parts as one list, with media numbered by first appearance."""
    lists = [one.references.counts for one in joined]
    media = np.concatenate(
        [
            one.items[within(edges_of(counts)[k], counts[k])]
            for one, counts, k in zip(joined, lists, kept, strict=True)
        ]
    )
    lengths = np.concatenate([counts[k] for counts, k in zip(lists, kept, strict=True)])
    first = np.full(len(known.keys), len(media))  # position of first appearance; the end: none
    first[media[::-1]] = np.arange(len(media))[::-1]
    used = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(media))]
    rank = np.empty(len(known.keys), dtype=np.int32)
    rank[used] = np.arange(len(used))
    rows = found.take(used)
    dataset = np.repeat(np.arange(len(names)), [len(k) for k in kept]).astype(np.int16)
    tasks = pa.chunked_array(
        [p.task.take(pa.array(k)) for p, k in zip(parts, kept, strict=True)], pa.string()
    )
    choices: list[npt.NDArray[np.int32]] = []
    before = 0  # questions of the data sets before this one
    for p, k in zip(parts, kept, strict=True):
        choices.append(np.where(p.choice[k] >= 0, p.choice[k] + np.int32(before), np.int32(-1)))
        before += p.choices
    given = [share for share in shares.values() if share is not None]
    coded = tasks.combine_chunks().dictionary_encode()
    result = SampleList(
        root=root,
        split=split,
        names=names,
        mix=tuple(share / sum(given) for share in given) if given else None,
        dataset=dataset,
        index=np.concatenate(kept),
        weight=np.concatenate([p.weight[k] for p, k in zip(parts, kept, strict=True)]),
        task=np.asarray(coded.indices, dtype=np.int32),
        tasks=tuple(coded.dictionary.to_pylist()),
        choice=np.concatenate(choices),
        first_turn=np.zeros(len(dataset), dtype=np.int32),
        end_turn=np.zeros(len(dataset), dtype=np.int32),
        offsets=edges_of(lengths),
        media=rank[media],
        keys=known.keys[used],
        kinds=known.kinds[used],
        starts=rows.starts,
        rows=rows.rows,
        times=rows.times,
        ids=tuple(p.ids for p in parts),
        counts=tuple(counts),
        samples_digests=tuple(p.digest for p in parts),
        digest="",
    )
    return replace(result, digest=digest_of(result))


def _check_coverage(
    samples: SampleList,
    reader: FeatureReader,
    min_coverage: float,
    ledger: pa.Table,
    partial: int,
    max_frames: int,
) -> None:
    """Raise UserError if too many samples lack features, or if the list is empty.

    `partial` videos have some of the frames that `max_frames` asks for, but not all.
    """
    root, presets = samples.root, load("encoders")
    encode = encode_command(root, samples.names[0], reader, presets)
    reason = (
        f"({samples.missing:,} samples miss some; {samples.failed:,} more have failed "
        f"media{_failures(ledger)}). Encode the rest: {encode}"
    )
    if partial:
        reason = (
            f"{partial:,} videos have some of their frames and not those for at most {max_frames}: encoded "
            f"with another limit. Encode them again: {encode} --max-frames {max_frames}"
        )
    if samples.coverage < min_coverage:
        raise UserError(
            f"{reader.path}: features for {samples.coverage:.1%} of the samples whose media could be had, "
            f"less than min_coverage {min_coverage:.1%}{':' if partial else ''} {reason}, or lower "
            "--min-coverage"
        )
    if partial:
        log.warning("%s: left out: %s", reader.path.name, reason)
    if not sum(c.present for c in samples.counts):
        raise UserError(
            f"{reader.path}: no sample of {', '.join(samples.names)} has all its features: "
            f"{samples.failed:,} have failed media{_failures(ledger)}; "
            f"see {command_line('cache.ls', '--failures', '--features', root.path)}"
        )


def _failures(ledger: pa.Table) -> str:
    """Return the first failures of the ledger as text."""
    failed = ledger.filter(pc.equal(ledger["status"], "failed")).slice(0, FAILURES_SHOWN)
    texts = [f"{r['source']}: {r['stage']}: {r['error']}" for r in failed.to_pylist()]
    return f": {'; '.join(texts)}" if texts else ""
