"""The tasks of a plan, and its records for the ledger: columns, from which objects are made one at a time.

A job of ten million sources would hold 5 GB of tasks. Here a task takes 8 bytes beside what `Media` and
`Known` have, and is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cache.store.ledger import MediaRecord
from encode.plan.known import Known
from encode.plan.media import KINDS, Media
from encode.plan.numbering import Ints, Mask
from encode.worker.local_files import why_no_file
from encode.worker.messages import Outcome, SourceTask
from model.media.images import Failure

Item = TypeVar("Item")


class Lazy(Sequence[Item]):
    """A sequence whose items are made one at a time. It equals a sequence of equal items."""

    def _item(self, at: int) -> Item:
        raise NotImplementedError

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self._item(i) for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._item(int(at) % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Tasks(Lazy[SourceTask]):
    """The sources to do, in the order in which they are done."""

    def __init__(self, media: Media, known: Known, numbers: Ints, *, unchanged: Mask, web: Mask):
        """Take the sources `numbers` (k,) of `media`.

        Args:
            media: all sources.
            known: what the ledger says about them.
            numbers: those to do, in order.
            unchanged: (k,) whether what the ledger says is still valid.
            web: (k,) whether they are URLs.
        """
        self._media, self._numbers = media, numbers.astype(np.uint32)
        self._attempts = np.where(unchanged, known.attempts[numbers], 0).astype(np.uint16)
        # The key that the ledger has for a URL: where a hash is stated, the media store is asked for that.
        keyed = unchanged & web & known.keyed[numbers] & ~media.stated[numbers]
        self._keyed = np.flatnonzero(keyed)
        self._keys = known.keys(numbers[self._keyed])

    def __len__(self) -> int:
        return len(self._numbers)

    def _item(self, at: int) -> SourceTask:
        number = int(self._numbers[at])
        mention = self._media.mention(number)
        place = int(np.searchsorted(self._keyed, at))
        key = None
        if place < len(self._keyed) and self._keyed[place] == at:
            key = self._keys[place].tobytes().hex()
        return SourceTask(
            source=self._media.sources[number],
            kind=mention.kind,
            attempts=int(self._attempts[at]),
            sha256=mention.sha256,
            key=key,
        )

    def kinds(self) -> npt.NDArray[np.uint8]:
        """Return the kinds (k,), numbers in KINDS."""
        return np.asarray(self._media.kinds[self._numbers])


class MissingFiles(Lazy[MediaRecord]):
    """The ledger's records of sources that are no files, made one at a time."""

    def __init__(self, media: Media, numbers: Ints, attempts: npt.NDArray[Any]):
        """Take the sources `numbers` (k,), which failed `attempts` (k,) times before."""
        self._media, self._numbers, self._attempts = media, numbers, attempts

    def __len__(self) -> int:
        return len(self._numbers)

    def _item(self, at: int) -> MediaRecord:
        number = int(self._numbers[at])
        source, kind = self._media.sources[number], KINDS[self._media.kinds[number]]
        task = SourceTask(source=source, kind=kind, attempts=int(self._attempts[at]))
        blank = MediaRecord(source=source, kind=kind)
        why = Failure("fetch", why_no_file(source))
        return Outcome(task=task, record=blank, result="failed", failure=why).failed_record()


class Recognised(Lazy[MediaRecord]):
    """The ledger's records of new URLs whose stated sha256 is in the space, made one at a time."""

    def __init__(self, media: Media, numbers: Ints, twins: Mapping[tuple[str, str], MediaRecord]):
        """Take the sources `numbers` (k,); `twins` has a record for each (kind, stated sha256)."""
        self._media, self._numbers, self._twins = media, numbers, twins

    def __len__(self) -> int:
        return len(self._numbers)

    def _item(self, at: int) -> MediaRecord:
        number = int(self._numbers[at])
        kind, sha256 = self._media.mention(number)
        assert sha256 is not None, "it is recognised by it"
        return replace(self._twins[kind, sha256], source=self._media.sources[number], attempts=1)


class Hosts:
    """Numbers the hosts of URLs."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, url: str) -> int:
        """Return the number of a URL's host, as it is written."""
        host = url.split("/", 3)[2]
        return self._numbers.setdefault(host, len(self._numbers))

    def __len__(self) -> int:
        return len(self._numbers)


def spread(hosts: npt.NDArray[np.int32]) -> Ints:
    """Return an order of k tasks with those of each host far apart: a host takes few requests at a time.

    Files stay in their order, since files that are adjacent on disk are read faster.

    Args:
        hosts: (k,) number of the host of a URL; -1 for files.
    """
    turns = np.arange(len(hosts), dtype=np.int32)
    web = np.flatnonzero(hosts >= 0).astype(np.int32)
    if not len(web):
        return turns.astype(np.int64)
    by_host = web[np.argsort(hosts[web], kind="stable")]
    of_host = hosts[by_host]
    begins = np.flatnonzero(np.diff(of_host, prepend=-1))
    lengths = np.diff(begins, append=len(of_host))
    turns[by_host] = np.arange(len(by_host), dtype=np.int32)
    turns[by_host] -= np.repeat(begins.astype(np.int32), lengths)
    del web, by_host, of_host  # 40 bytes a source in all
    return np.argsort(turns, kind="stable")
