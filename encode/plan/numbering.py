"""Number texts, and hold many of them in little memory: the columns of ten million sources.

    numbers = Numbers()
    numbers.add(["/a", "/b", "/a"])     # [0, 1, 0]
    numbers.find(["/b", "/c"])          # [1, -1]
    texts = Texts()
    texts.extend(["/a", "/b"])
    texts[1]                            # /b

`Numbers` stores 128 bits of a hash of each text and its number: 20 bytes, and no text. `Texts` compresses
blocks of texts, which for URLs and paths takes a third of their bytes or less. `TextMap` is a dict from texts
to small integers for readers that look up one text at a time.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Digests = npt.NDArray[np.uint64]
"""(n, 2): the 128 bits by which texts are known."""

AT_ONCE = 1 << 16
"""Texts that callers collect before they add them: the cost of a call is spread over them."""

BLOCK = 128
"""Texts that are compressed together: 40 us to read one of them."""

BLOCKS_OPEN = 64
"""Blocks that stay uncompressed, the last ones that were read."""

GROWTH = 1.25
"""Factor by which a full column grows."""


def digests(texts: Sequence[str]) -> Digests:
    """Return the hashes (n, 2) of n texts."""
    parts = [_digest(text) for text in texts]
    return np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 2)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


class Column:
    """A column of n values that grows at its end."""

    def __init__(self, dtype: npt.DTypeLike, width: int = 0):
        """Start empty; `width` is the number of values in a row, 0 for a column of single values."""
        self._values: npt.NDArray[Any] = np.zeros((0, width) if width else 0, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> npt.NDArray[Any]:
        """The values (n,) or (n, width). Writing into them changes the column, until it grows."""
        return self._values[: self._length]

    def extend(self, values: npt.NDArray[Any]) -> None:
        """Append values (m,) or (m, width)."""
        end = self._length + len(values)
        if end > len(self._values):
            rows = max(end, int(GROWTH * len(self._values)))
            # In place: a copy would double the memory for a moment.
            self._values.resize((rows, *self._values.shape[1:]), refcheck=False)
        self._values[self._length : end] = values
        self._length = end


class Numbers:
    """Numbers n distinct texts 0, 1, 2, ... in the order in which they are first added."""

    def __init__(self) -> None:
        # Each run is sorted by the first word of the hash, and at most half as long as the one before.
        self._runs: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]] = []
        self._second = Column(np.uint64)  # second word of the hash, by number

    def __len__(self) -> int:
        return len(self._second)

    def add(self, texts: Sequence[str]) -> Ints:
        """Number texts that are new; return the numbers (k,) of all of them."""
        return self.add_digests(digests(texts))

    def find(self, texts: Sequence[str]) -> Ints:
        """Return the numbers (k,) of texts; -1 where a text was not added."""
        return self.find_digests(digests(texts))

    def add_digests(self, wanted: Digests) -> Ints:
        """Do what `add` does, for hashes (k, 2)."""
        found = self.find_digests(wanted)
        new = np.flatnonzero(found < 0)
        if not len(new):
            return found
        first, second = wanted[new, 0], wanted[new, 1]
        order = np.lexsort((second, first))  # stable: of equal texts, the first is first
        begins = np.ones(len(new), bool)
        begins[1:] = (first[order][1:] != first[order][:-1]) | (
            second[order][1:] != second[order][:-1]
        )
        firsts = np.sort(order[begins])  # of each distinct text, in the order of the texts
        rank = np.empty(len(new), np.int64)
        rank[firsts] = np.arange(len(firsts))
        rank[order] = rank[order[begins]][np.cumsum(begins) - 1]
        start = len(self)
        found[new] = start + rank
        self._second.extend(second[firsts])
        by_hash = np.argsort(first[firsts], kind="stable")
        self._append(first[firsts][by_hash], (start + by_hash).astype(np.uint32))
        return found

    def _append(self, hashes: npt.NDArray[np.uint64], numbers: npt.NDArray[np.uint32]) -> None:
        self._runs.append((hashes, numbers))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            (some, of_some), (more, of_more) = self._runs.pop(-2), self._runs.pop()
            at = np.searchsorted(some, more, side="right")
            self._runs.append((np.insert(some, at, more), np.insert(of_some, at, of_more)))

    def find_digests(self, wanted: Digests) -> Ints:
        """Do what `find` does, for hashes (k, 2)."""
        found = np.full(len(wanted), -1, np.int64)
        second = self._second.values
        order = np.argsort(wanted[:, 0])  # in hash order, neighbours are in the processor's cache
        for hashes, numbers in self._runs:
            open_ = order[found[order] < 0]
            at = np.searchsorted(hashes, wanted[open_, 0])
            while len(open_):  # a second round only where two texts share 64 bits
                inside = at < len(hashes)
                open_, at = open_[inside], at[inside]
                same = hashes[at] == wanted[open_, 0]
                open_, at = open_[same], at[same]
                number = numbers[at]
                hit = second[number] == wanted[open_, 1]
                found[open_[hit]] = number[hit]
                open_, at = open_[~hit], at[~hit] + 1
        return found

    def find_one(self, text: str) -> int:
        """Return the number of one text, or -1: 5 microseconds, where `find` takes 100 for a single text."""
        digest = _digest(text)
        first = int.from_bytes(digest[:8], "little")
        second = int.from_bytes(digest[8:], "little")
        for hashes, numbers in self._runs:
            at = bisect.bisect_left(hashes.data, first)
            while at < len(hashes) and hashes[at] == first:
                if int(self._second.values[numbers[at]]) == second:
                    return int(numbers[at])
                at += 1
        return -1


class Texts(Sequence[str]):
    """A list of texts in compressed blocks. It grows at its end."""

    def __init__(self) -> None:
        self._blocks: list[tuple[bytes, int]] = []  # compressed bytes, and their size before
        self._last: list[str] = []
        self._open: OrderedDict[int, list[str]] = OrderedDict()

    def __len__(self) -> int:
        return BLOCK * len(self._blocks) + len(self._last)

    def extend(self, texts: Sequence[str]) -> None:
        """Append texts."""
        self._last.extend(texts)
        whole = len(self._last) // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            self._blocks.append(_compressed(self._last[at : at + BLOCK]))
        del self._last[:whole]

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        block, place = divmod(int(at) % len(self), BLOCK)
        return self._block(block)[place]

    def __iter__(self) -> Iterator[str]:
        for block in self.blocks():
            yield from block

    def blocks(self) -> Iterator[list[str]]:
        """Yield the texts in order, some hundred at a time."""
        for compressed, nbytes in self._blocks:
            yield _uncompressed(compressed, nbytes)
        if self._last:
            yield list(self._last)

    def _block(self, number: int) -> list[str]:
        if number == len(self._blocks):
            return self._last
        found = self._open.pop(number, None) or _uncompressed(*self._blocks[number])
        self._open[number] = found
        if len(self._open) > BLOCKS_OPEN:
            self._open.popitem(last=False)
        return found


_CODEC = "zstd"


def _compressed(texts: Sequence[str]) -> tuple[bytes, int]:
    encoded = [text.encode(errors="surrogatepass") for text in texts]
    lengths = np.array([len(one) for one in encoded], np.uint32)
    data = lengths.tobytes() + b"".join(encoded)
    return pa.compress(data, codec=_CODEC, asbytes=True), len(data)


def _uncompressed(compressed: bytes, nbytes: int) -> list[str]:
    data = pa.decompress(compressed, nbytes, codec=_CODEC, asbytes=True)
    head = 4 * BLOCK
    ends = (head + np.cumsum(np.frombuffer(data, np.uint32, BLOCK))).tolist()
    begins = [head, *ends[:-1]]
    return [
        data[begin:end].decode(errors="surrogatepass")
        for begin, end in zip(begins, ends, strict=True)
    ]


class TextMap:
    """A dict from texts to integers of 32 bits, in 24 bytes for each, once there are many."""

    def __init__(self) -> None:
        self._recent: dict[str, int] = {}
        self._numbers = Numbers()
        self._values = Column(np.int32)
        self._new = 0  # texts in `_recent` only

    def __len__(self) -> int:
        return len(self._numbers) + self._new

    def __contains__(self, text: str) -> bool:
        return self.get(text) is not None

    def get(self, text: str) -> int | None:
        """Return the integer of a text; None if it has none."""
        if (found := self._recent.get(text)) is not None:
            return found
        number = self._numbers.find_one(text) if len(self._numbers) else -1
        return int(self._values.values[number]) if number >= 0 else None

    def __setitem__(self, text: str, value: int) -> None:
        if text not in self._recent:
            self._new += not (len(self._numbers) and self._numbers.find_one(text) >= 0)
        self._recent[text] = value
        if len(self._recent) == AT_ONCE:
            before = len(self._numbers)
            at = self._numbers.add(list(self._recent))
            self._values.extend(np.zeros(len(self._numbers) - before, np.int32))
            self._values.values[at] = list(self._recent.values())
            self._recent.clear()
            self._new = 0


class TextSet:
    """A set of texts, in 24 bytes for each, once there are many."""

    def __init__(self) -> None:
        self._texts = TextMap()

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, text: str) -> bool:
        return text in self._texts

    def add(self, text: str) -> None:
        """Add a text."""
        self._texts[text] = 1

    def update(self, texts: Iterable[str]) -> None:
        """Add texts."""
        for text in texts:
            self.add(text)
