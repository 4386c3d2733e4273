"""The distinct media that samples mention, as columns: what a plan is made of.

    counter = MediaCounter()
    write_samples(root, "pets", counter.count(samples))
    counter.media                   # Media: n sources with their kinds and stated hashes, in order

    Media.of({"/a.jpg": Mention("image")})

A job takes `MOST_SOURCES` at a time. Where samples mention more, the counter keeps one part of them: those
whose hashes begin with the same bits. It has read everything once, so it has this part whole, and
`parts` says how many there are. A second pass over the samples, by another counter, takes the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cache.format.spec import ARRAY_OF
from cache.store.commits import KEY_BYTES
from cache.store.samples import MediaRef, Sample
from encode.plan.numbering import AT_ONCE, Column, Digests, Ints, Mask, Numbers, Texts, digests

MOST_SOURCES = 10_000_000
"""Distinct sources that are planned together. They take at most 1 GB."""

KINDS = tuple(ARRAY_OF)
"""Media kinds. Columns have their numbers."""


class Mention(NamedTuple):
    """What the samples say about a source."""

    kind: str
    """image or video."""
    sha256: str | None = None
    """The sha256 of its bytes, if a data set states one."""


class Part(NamedTuple):
    """Which sources a job takes: those whose hash begins with `bits` bits that are `number`."""

    number: int = 0
    bits: int = 0

    @property
    def parts(self) -> int:
        """Number of parts in all."""
        return 1 << self.bits

    def has(self, hashes: Digests) -> Mask:
        """Return which hashes (n, 2) belong to this part."""
        if not self.bits:
            return np.ones(len(hashes), bool)
        return np.asarray(hashes[:, 0] >> np.uint64(64 - self.bits) == self.number)


class Media:
    """n distinct sources, numbered in the order of their first mention."""

    def __init__(self) -> None:
        self.sources = Texts()
        """(n,) URL, path, or name of embedded media."""
        self._numbers: Numbers | None = Numbers()
        self._kinds = Column(np.uint8)
        self._stated = Column(np.bool_)
        self._keys: Column | None = None  # 32 bytes for each source, once one has a stated hash

    @classmethod
    def of(cls, mentions: Mapping[str, Mention]) -> Self:
        """Return the media of a dict."""
        media = cls()
        refs = [MediaRef(source=s, kind=m.kind, sha256=m.sha256) for s, m in mentions.items()]
        media.add(refs, digests(list(mentions)))
        return media

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """(n,) number in KINDS."""
        return self._kinds.values

    @property
    def stated(self) -> Mask:
        """(n,) whether a data set states the sha256."""
        return self._stated.values

    def keys(self, numbers: Ints) -> npt.NDArray[np.uint8]:
        """Return the stated sha256 (k, 32) of sources (k,); zeros where there is none."""
        if self._keys is None:
            return np.zeros((len(numbers), KEY_BYTES), np.uint8)
        return np.asarray(self._keys.values[numbers])

    @property
    def numbers(self) -> Numbers:
        """Source -> number."""
        assert self._numbers is not None, "they are forgotten"
        return self._numbers

    def forget_numbers(self) -> None:
        """Free the memory of `numbers`. Nothing can be added or found after that."""
        self._numbers = None

    def mention(self, number: int) -> Mention:
        """Return what is known of one source."""
        sha256 = self.keys(np.array([number]))[0].tobytes().hex() if self.stated[number] else None
        return Mention(KINDS[self.kinds[number]], sha256)

    def add(self, refs: list[MediaRef], hashes: Digests) -> None:
        """Add the sources of references; `hashes` (k, 2) are those of their sources.

        The first sha256 that a reference states for a source counts, and with it that reference's kind.
        """
        before = len(self)
        at = self.numbers.add_digests(hashes)
        kinds = np.array([KINDS.index(ref.kind) for ref in refs], np.uint8)
        first = np.unique(at, return_index=True)[1]
        new = np.sort(first[at[first] >= before])  # numbers are in the order of first mention
        self.sources.extend([refs[i].source for i in new.tolist()])
        self._kinds.extend(kinds[new])
        self._stated.extend(np.zeros(len(new), bool))
        if self._keys is not None:
            self._keys.extend(np.zeros((len(new), KEY_BYTES), np.uint8))
        says = np.flatnonzero([ref.sha256 is not None for ref in refs])
        says = says[~self.stated[at[says]]]
        says = says[np.unique(at[says], return_index=True)[1]]
        if not len(says):
            return
        if self._keys is None:
            self._keys = Column(np.uint8, KEY_BYTES)
            self._keys.extend(np.zeros((len(self), KEY_BYTES), np.uint8))
        hexes = "".join(refs[i].sha256 or "" for i in says.tolist())
        keys = np.frombuffer(bytes.fromhex(hexes), np.uint8).reshape(-1, KEY_BYTES)
        self._keys.values[at[says]] = keys
        self.stated[at[says]] = True
        self.kinds[at[says]] = kinds[says]

    def only(self, part: Part) -> Media:
        """Return those of these media that belong to a part."""
        kept, number = Media(), 0
        for block in self.sources.blocks():
            hashes = digests(block)
            chosen = np.flatnonzero(part.has(hashes))
            refs = []
            for i in chosen.tolist():
                kind, sha256 = self.mention(number + i)
                refs.append(MediaRef(source=block[i], kind=kind, sha256=sha256))
            kept.add(refs, hashes[chosen])
            number += len(block)
        return kept


class MediaCounter:
    """Collects the distinct media that samples mention, in order: all of them, or one part."""

    def __init__(self, part: Part | None = None) -> None:
        """Start with nothing.

        Args:
            part: the part to take; None: the first one, of as many parts as are needed for MOST_SOURCES in
                each.
        """
        self.samples = 0
        """Number of samples."""
        self._part, self._fixed = part or Part(), part is not None
        self._media = Media()
        self._waiting: list[MediaRef] = []
        self._last: MediaRef | None = None

    def count(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield `samples`, and count each with its media."""
        for sample in samples:
            self.samples += 1
            for ref in sample.media:
                self.add(ref)
            yield sample

    def add(self, ref: MediaRef) -> None:
        """Count one mention."""
        if ref == self._last:  # annotations of one image are often adjacent
            return
        self._last = ref
        self._waiting.append(ref)
        if len(self._waiting) == AT_ONCE:
            self._flush()

    @property
    def media(self) -> Media:
        """The media counted so far, of the counter's part."""
        self._flush()
        return self._media

    @property
    def part(self) -> Part:
        """The part that this counter has."""
        self._flush()
        return self._part

    def _flush(self) -> None:
        refs, self._waiting = self._waiting, []
        if not refs:
            return
        hashes = digests([ref.source for ref in refs])
        if self._part.bits:
            chosen = np.flatnonzero(self._part.has(hashes))
            refs, hashes = [refs[i] for i in chosen.tolist()], hashes[chosen]
        self._media.add(refs, hashes)
        while len(self._media) > MOST_SOURCES and not self._fixed:
            self._part = Part(0, self._part.bits + 1)
            self._media = self._media.only(self._part)
