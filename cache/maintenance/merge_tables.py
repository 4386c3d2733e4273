"""Compare the tables of two caches, and copy the media records and samples that `cache.merge` takes over.

M rows of a media table, one for each source.
"""

from __future__ import annotations

import mmap
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CacheError
from cache.format.checksums import check_seal
from cache.format.gate import open_file
from cache.store.files import new_file
from cache.store.ledger import append_media_table, media_table
from cache.store.paths import CacheRoot
from cache.store.samples import (
    Sample,
    check_samples,
    dataset_names,
    read_origin,
    read_samples,
    samples_digest,
    write_samples,
)

SHOWN = 5
"""Number of conflicting sources that are printed."""

Samples = Literal["ours", "theirs", "both"]


# ---- media


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaPlan:
    """Media records to copy from another cache."""

    table: pa.Table
    """Rows to append, with the columns of MediaRecord."""
    new: int
    """Number of rows whose source is unknown here."""
    came: int
    """Number of rows whose source failed here and succeeded there."""
    conflicts: list[tuple[str, str, str]]
    """(source, key here, key there) of sources that gave different bytes in the two caches."""

    def text(self) -> str:
        """Return the plan in one line, and more lines for conflicting sources."""
        newer = len(self.table) - self.new - self.came
        line = (
            f"{self.new:,} new; {self.came:,} that failed here and came there; "
            f"{newer:,} newer failures"
        )
        if not self.conflicts:
            return line
        said = "the records here are kept, and samples that mention these sources use them"
        lines = [f"{line}; {len(self.conflicts):,} gave other bytes there: {said}"]
        for source, ours, theirs in self.conflicts[:SHOWN]:
            lines.append(f"    {source}: {ours[:12]}... here, {theirs[:12]}... there")
        if len(self.conflicts) > SHOWN:
            lines.append(f"    and {len(self.conflicts) - SHOWN:,} more")
        return "\n".join(lines)


def plan_media(root: CacheRoot, other: CacheRoot) -> MediaPlan:
    """Return what the media table of `other` adds to that of `root`. An equal table adds nothing."""
    ours, theirs = media_table(root, stamped=True), media_table(other, stamped=True)
    at = pc.index_in(theirs["source"], ours["source"].combine_chunks())
    known = np.asarray(pc.is_valid(at), bool)
    here = ours.take(at)  # for each row of theirs, ours; nulls where there is none

    def both(name: str) -> Sequence[Any]:
        """Return the values of a column, ours and theirs, (M,) each."""
        return [np.array(table[name].to_pylist(), object) for table in (here, theirs)]

    our_key, their_key = both("key")
    our_status, their_status = both("status")
    our_kind, their_kind = both("kind")
    our_ns, their_ns = both("ns")
    keyed = (our_key != None) & (their_key != None)  # noqa: E711 - elementwise
    conflict = known & keyed & (our_key != their_key)
    open_ = known & ~conflict & (our_kind == their_kind) & (our_status == "failed")
    came = open_ & (their_status == "ok")
    newer = open_ & (their_status == "failed")
    newer[newer] = (their_ns[newer] > our_ns[newer]).astype(bool)
    # A failure that an earlier merge copied in the other direction is not a newer one.
    newer &= np.logical_or.reduce(
        [np.not_equal(*both(name)) for name in ("stage", "error", "attempts")]
    )
    take = ~known | came | newer
    sources = theirs["source"].filter(pa.array(conflict)).to_pylist()
    return MediaPlan(
        table=theirs.filter(pa.array(take)).drop_columns(["ns"]),
        new=int((~known).sum()),
        came=int(came.sum()),
        conflicts=list(zip(sources, our_key[conflict], their_key[conflict], strict=True)),
    )


def append_planned_media(root: CacheRoot, plan: MediaPlan) -> None:
    """Append the planned rows to the media table, as one part."""
    if len(plan.table):
        append_media_table(root, plan.table, f"merge-{secrets.token_hex(4)}")


# ---- samples


@dataclass(frozen=True, kw_only=True)
class SamplesPlan:
    """What happens to one data set of the other cache."""

    dataset: str
    """Name of the data set."""
    what: str
    """What happens, in words."""
    take: Samples
    """ours: nothing is copied; theirs: all samples are; both: samples that only theirs has are appended."""

    @property
    def copies(self) -> bool:
        """Whether anything is written."""
        return self.take != "ours"


def plan_samples(root: CacheRoot, other: CacheRoot, choice: Samples | None) -> list[SamplesPlan]:
    """Return what happens to each data set of `other`.

    Raises:
        CacheError: data sets with one name differ, and `choice` is None.
    """
    ours = set(dataset_names(root))
    found, unclear = [], []
    for name in dataset_names(other):
        if name not in ours:
            found.append(SamplesPlan(dataset=name, what="new", take="theirs"))
        elif samples_digest(root, name) == samples_digest(other, name):
            found.append(SamplesPlan(dataset=name, what="the same", take="ours"))
        elif choice is None:
            unclear.append(name)
        elif choice == "both" and not any(True for _ in _others(root, other, name)):
            found.append(SamplesPlan(dataset=name, what="all of them are here", take="ours"))
        else:
            what = {
                "ours": "differs, ours is kept",
                "theirs": "differs, theirs is taken",
                "both": "differs, samples that only theirs has are added",
            }[choice]
            found.append(SamplesPlan(dataset=name, what=what, take=choice))
    if unclear:
        raise CacheError(
            f"{', '.join(unclear)}: the samples under {other.path} are not those under {root.path}; "
            "choose: --samples ours | theirs | both (both: ours, and those of theirs with other ids)"
        )
    return found


def copy_samples(root: CacheRoot, other: CacheRoot, plan: Sequence[SamplesPlan]) -> None:
    """Copy samples as planned, each data set atomically.

    Raises:
        CorruptError: a file of the other cache is damaged. The data set here is unchanged.
    """
    for one in plan:
        if one.take == "both":
            theirs = _others(root, other, one.dataset)
            samples = chain(read_samples(root, one.dataset), theirs)
            origin = read_origin(root, one.dataset)
            if origin is not None:
                said = f"{origin.said}; and samples of {other.path}"
                origin = replace(origin, said=said)
            write_samples(root, one.dataset, samples, origin)
        elif one.take == "theirs":
            path = other.samples(one.dataset)
            check_samples(path, other)  # all of it, before it becomes a file of ours
            target = root.samples(one.dataset)
            with open_file(path, other.path) as source, new_file(target, root=root.path) as file:
                shutil.copyfileobj(source, file)
                file.flush()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    check_seal(data, path)


def tables_bytes(samples: Sequence[SamplesPlan], media: MediaPlan, other: CacheRoot) -> int:
    """Return about how many bytes the copied tables need."""
    sizes = [other.samples(one.dataset).stat().st_size for one in samples if one.copies]
    return 2 * sum(sizes) + int(media.table.nbytes)


def _others(root: CacheRoot, other: CacheRoot, dataset: str) -> Iterator[Sample]:
    """Yield the samples of `other` whose id no sample here has."""
    ids = {sample.id for sample in read_samples(root, dataset)}
    return (sample for sample in read_samples(other, dataset) if sample.id not in ids)
