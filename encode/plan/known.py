"""What the media table says about the sources of a job, as columns.

    known = Known(media, present, space="clip-int8", max_frames=128)
    for table in MediaRows(root):
        known.read(table)                       # of rows with the same source, the last one counts
    known.in_space, known.failed, ...           # (n,) for the n sources of `media`

A row about an image says nothing about a video: rows of another kind than the samples mention do not count.
A source that is gone keeps the key that it had when it was last read: see `cache.store.ledger.media_table`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.format.checksums import GOLDEN, mix64
from cache.store.commits import KEY_BYTES
from cache.store.ledger import note_subjects
from cache.store.space import Present
from encode.plan.media import KINDS, Media
from encode.plan.numbering import Column, Ints, Mask
from encode.worker.messages import OWN_STAGES

OWN_ATTEMPTS = 3
"""Jobs that try a source on which our own code fails, before it counts as a known failure."""

VIDEOS_AT_ONCE = 2048
"""Videos whose frames are looked up together: it bounds the memory of the names of their views."""

MOST_ATTEMPTS = np.iinfo(np.uint16).max

# Bits of `_bits`: about the latest row,
_HERE, _FAILED, _FETCH, _FINAL, _KEYED, _GONE = (1 << bit for bit in range(6))
# and about the latest row that has a key.
_HAS_KEY, _SAME_KIND, _IN_SPACE, _DIFFERS, _TIMED = (1 << bit for bit in range(6, 11))
_OF_ROW = np.uint16(_HERE | _FAILED | _FETCH | _FINAL | _KEYED | _GONE)

_STAMPS = ("size", "mtime_ns", "ctime_ns", "inode")


def stamp_of(identities: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return identities of files, (k, 4) integers, as one number each, (k,); never 0."""
    mixed = np.full(len(identities), GOLDEN, np.uint64)
    for column in range(identities.shape[1]):
        mixed = mix64(mixed ^ identities[:, column].astype(np.uint64)) + GOLDEN
    return np.where(mixed == 0, np.uint64(1), mixed)


class Known:
    """The latest rows of the media table about n sources. All columns are (n,)."""

    def __init__(self, media: Media, present: Present, *, space: str, max_frames: int):
        """Know nothing yet.

        Args:
            media: the sources.
            present: the rows of the space.
            space: the name of the space.
            max_frames: frames of one video, at most.
        """
        self._media, self._present, self._space = media, present, space
        self._max_frames = max_frames
        n = len(media)
        # Of zeros, only what is written takes memory.
        self._bits = np.zeros(n, np.uint16)
        self.stamps = np.zeros(n, np.uint64)
        """Identity of the file, as `stamp_of` gives it; 0: none."""
        self.attempts = np.zeros(n, np.uint16)
        """Attempts that failed; 0 for a source that did not fail."""
        self.new_rows = np.zeros(n, np.int32)
        """Views of a video that are not in the space, if its duration is known."""
        self._notes = np.zeros(n, np.uint16)
        self._subjects: list[tuple[str, ...]] = [()]
        # Keys of sources for which no hash is stated, and 1 + the place of each among them.
        self._keys, self._key_at = Column(np.uint8, KEY_BYTES), np.zeros(n, np.uint32)

    # ---- the columns

    def _has(self, bit: int) -> Mask:
        return np.asarray(self._bits & np.uint16(bit) != 0)

    @property
    def here(self) -> Mask:
        """Whether there is a row about the source, of its kind."""
        return self._has(_HERE)

    @property
    def failed(self) -> Mask:
        """Whether it failed."""
        return self._has(_FAILED)

    @property
    def failed_at_fetch(self) -> Mask:
        """Whether it failed at stage fetch."""
        return self._has(_FETCH)

    @property
    def final(self) -> Mask:
        """Whether its failure is final: the media's own always, ours after OWN_ATTEMPTS for this space."""
        return self._has(_FINAL)

    @property
    def keyed(self) -> Mask:
        """Whether its key is known."""
        kept = self._has(_GONE) & self._has(_HAS_KEY) & self._has(_SAME_KIND)
        return self.here & (self._has(_KEYED) | kept)

    @property
    def in_space(self) -> Mask:
        """Whether every view of it is in the space."""
        return self.keyed & self._has(_IN_SPACE)

    @property
    def differs(self) -> Mask:
        """Whether its key is not the sha256 that a data set states."""
        return self.keyed & self._has(_DIFFERS)

    @property
    def timed(self) -> Mask:
        """Whether `new_rows` is known."""
        return self.keyed & self._has(_TIMED)

    def keys(self, numbers: Ints) -> npt.NDArray[np.uint8]:
        """Return the keys (k, 32) of sources (k,) that are keyed and for which no hash is stated."""
        return np.asarray(self._keys.values[self._key_at[numbers].astype(np.int64) - 1])

    def part(self, start: int, stop: int) -> Known:
        """Return the rows about the sources from `start` to `stop`, for reading."""
        part = copy.copy(self)
        for name in ("_bits", "stamps", "attempts", "new_rows", "_notes", "_key_at"):
            setattr(part, name, getattr(self, name)[start:stop])
        return part

    def subjects(self, numbers: Ints) -> dict[str, int]:
        """Return subject -> how many of these sources have a note about it."""
        counts: dict[str, int] = {}
        times = np.bincount(self._notes[numbers], minlength=len(self._subjects)).tolist()
        for subjects, number in zip(self._subjects, times, strict=True):
            for subject in subjects if number else ():
                counts[subject] = counts.get(subject, 0) + number
        return counts

    # ---- reading

    def read(self, table: pa.Table) -> None:
        """Take in rows of the media table, which are later than those before."""
        at = self._media.numbers.find(table["source"].to_pylist())
        rows = np.flatnonzero(at >= 0)
        while len(rows):  # a second time only if a source has two rows here
            first = np.sort(np.unique(at[rows], return_index=True)[1])
            self._read(table.take(pa.array(rows[first])), at[rows[first]])
            rows = np.delete(rows, first)

    def _read(self, table: pa.Table, at: Ints) -> None:
        """Take in rows (k,) about the distinct sources `at` (k,)."""
        table = table.combine_chunks()
        kinds = np.asarray(pc.index_in(table["kind"], pa.array(KINDS)).fill_null(len(KINDS)))
        same_kind = kinds == self._media.kinds[at]
        failed = _mask(pc.equal(table["status"], "failed"))
        fetch = _mask(pc.equal(table["stage"], "fetch"))
        ours = _mask(pc.is_in(table["stage"], pa.array(OWN_STAGES)))
        of_space = _mask(pc.starts_with(table["error"], f"{self._space}: "))
        tried = np.asarray(table["attempts"])
        keyed = _mask(pc.is_valid(table["key"]))
        gone = fetch & ~keyed & _mask(pc.is_null(table["inode"]))
        final = failed & (~ours | (of_space & (tried >= OWN_ATTEMPTS)))
        bits = np.zeros(len(at), np.uint16)
        for bit, where in (
            (_HERE, same_kind),
            (_FAILED, failed & same_kind),
            (_FETCH, fetch & same_kind),
            (_FINAL, final & same_kind),
            (_KEYED, keyed),
            (_GONE, gone),
        ):
            bits[where] |= np.uint16(bit)
        self._bits[at] = self._bits[at] & ~_OF_ROW | bits
        self._write(
            self.attempts, at, np.where(failed & same_kind, np.minimum(tried, MOST_ATTEMPTS), 0)
        )
        self._write(self.stamps, at, _stamps(table))
        if keyed.any():
            rows = np.flatnonzero(keyed)
            self._read_keys(table.take(pa.array(rows)), at[rows], same_kind[rows])

    def _read_keys(self, table: pa.Table, at: Ints, same_kind: Mask) -> None:
        """Take in rows that have a key."""
        keys = np.frombuffer(bytes.fromhex("".join(table["key"].to_pylist())), np.uint8)
        keys = keys.reshape(-1, KEY_BYTES)
        durations = np.asarray(table["duration_s"].fill_null(np.nan), np.float64)
        stated = self._media.stated[at]
        differs = np.zeros(len(at), bool)
        differs[stated] = (self._media.keys(at[stated]) != keys[stated]).any(axis=1)
        self._put_keys(at[~stated], keys[~stated])
        images = np.flatnonzero(same_kind & (self._media.kinds[at] == KINDS.index("image")))
        in_space = np.zeros(len(at), bool)
        in_space[images] = self._present.have_images(keys[images])
        is_video = self._media.kinds[at] == KINDS.index("video")
        videos = np.flatnonzero(same_kind & is_video & ~np.isnan(durations))
        for start in range(0, len(videos), VIDEOS_AT_ONCE):
            some = videos[start : start + VIDEOS_AT_ONCE]
            missing = self._present.count_missing(keys[some], durations[some])
            self.new_rows[at[some]] = missing
            in_space[some] = missing == 0
        timed = np.zeros(len(at), bool)
        timed[videos] = True
        bits = np.full(len(at), _HAS_KEY, np.uint16)
        for bit, where in (
            (_SAME_KIND, same_kind),
            (_IN_SPACE, in_space),
            (_DIFFERS, differs),
            (_TIMED, timed),
        ):
            bits[where] |= np.uint16(bit)
        self._bits[at] = self._bits[at] & _OF_ROW | bits
        self._write(self._notes, at, self._note_numbers(table))

    def _put_keys(self, at: Ints, keys: npt.NDArray[np.uint8]) -> None:
        """Remember the keys (k, 32) of sources `at` (k,)."""
        new = self._key_at[at] == 0
        self._key_at[at[new]] = len(self._keys) + 1 + np.arange(new.sum())
        self._keys.extend(keys[new])
        self._keys.values[self._key_at[at[~new]].astype(np.int64) - 1] = keys[~new]

    def _note_numbers(self, table: pa.Table) -> Ints:
        """Return a number in `_subjects` for the note of each row."""
        coded = table["note"].combine_chunks().dictionary_encode()
        numbers = []
        for note in coded.dictionary.to_pylist():
            subjects = tuple(note_subjects(note))
            if subjects not in self._subjects:
                self._subjects.append(subjects)
            numbers.append(self._subjects.index(subjects))
        return np.append(np.array(numbers, np.int64), 0)[
            np.asarray(coded.indices.fill_null(len(numbers)), np.int64)
        ]

    @staticmethod
    def _write(column: npt.NDArray[Any], at: Ints, values: npt.NDArray[Any]) -> None:
        """Write values, but not zeros over zeros: a page of zeros that is not written takes no memory."""
        change = (values != 0) | (column[at] != 0)
        column[at[change]] = values[change]


def _stamps(table: pa.Table) -> npt.NDArray[np.uint64]:
    """Return the identity that each row recorded, as `stamp_of` gives it; 0 where it has none."""
    columns = [table[name] for name in _STAMPS]
    there = np.all([_mask(pc.is_valid(column)) for column in columns], axis=0)
    values = np.stack([np.asarray(column.fill_null(0), np.int64) for column in columns], axis=1)
    return np.where(there, stamp_of(values), np.uint64(0))


def _mask(values: pa.ChunkedArray) -> Mask:
    return np.asarray(values.fill_null(False), bool)
