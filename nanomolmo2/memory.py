"""Memory for the rows of batches, used again: new pages cost more than reading rows into them.

    rows = empty_rows(64, row_bytes)        # (64, row_bytes) uint8, uninitialised

Memory that nothing refers to any more serves a later batch. In a worker of a DataLoader it is shared, so a
batch is handed over without a copy: the worker pickles `Handover.of(rows)`, the trainer calls `.rows()` of
what arrives. A counter in the shared memory tells the worker when the trainer has let go of it.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

Bytes = npt.NDArray[np.uint8]

KEPT = 2
"""Batches that nothing refers to any more, whose memory is kept where no worker reads."""
LEAST_BYTES = 1 << 20
"""Bytes from which memory is kept. What is smaller, the allocator keeps anyway."""
SEGMENTS = 8
"""Pieces of shared memory that a worker keeps: those read ahead, and those the trainer holds."""
MAPPED = 64
"""Pieces of shared memory of all workers that a trainer keeps mapped."""
HEADER = 64
"""Bytes before the rows in shared memory: the counter, and the rest of a cache line."""

_free: deque[Bytes] = deque(maxlen=KEPT)
_segments: list[_Segment] = []
_mapped: OrderedDict[int, tuple[int, torch.UntypedStorage]] = OrderedDict()


def empty_rows(rows: int, row_bytes: int) -> torch.Tensor:
    """Return an uninitialised (rows, row_bytes) uint8 tensor; in a DataLoader's worker, in shared memory."""
    nbytes = rows * row_bytes
    if get_worker_info() is None or nbytes < LEAST_BYTES:
        memory = _own_memory(nbytes)
        return _lease(memory, (rows, row_bytes), lambda: _keep(memory))
    segment = _free_segment(nbytes)
    segment.held += 1
    return _lease(segment.memory[HEADER:], (rows, row_bytes), segment.let_go)


# ---- within one process


def _own_memory(nbytes: int) -> Bytes:
    memory: Bytes = np.empty(0, np.uint8)
    with contextlib.suppress(IndexError):  # none is left
        while memory.nbytes < nbytes:
            memory = _free.popleft()  # a smaller one is given up
    # numpy asks the kernel for huge pages, torch does not: a fifth of the time for 40 MB.
    return memory if memory.nbytes >= nbytes else np.empty(nbytes, np.uint8)


def _keep(memory: Bytes) -> None:
    if memory.nbytes >= LEAST_BYTES:
        _free.append(memory)


class _Lease:
    """The first bytes of some memory. numpy and torch keep this object as long as an array has it."""

    def __init__(self, memory: Bytes, shape: tuple[int, int], done: Callable[[], None]) -> None:
        self._memory, self._shape, self._done = memory, shape, done

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {**self._memory.__array_interface__, "shape": self._shape, "strides": None}

    def __del__(self) -> None:
        self._done()


def _lease(memory: Bytes, shape: tuple[int, int], done: Callable[[], None]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(_Lease(memory, shape, done)))


# ---- from a worker to the trainer


class _Segment:
    """Shared memory of a worker. It is free when the worker and every receiver have let go of it."""

    def __init__(self, nbytes: int) -> None:
        self.storage = torch.UntypedStorage._new_shared(HEADER + nbytes)  # type: ignore[no-untyped-call]
        self.memory = _bytes_of(self.storage)
        self.released = self.memory[:8].view(np.uint64)  # counted by the receiver alone
        self.released[0] = 0
        self.sent = 0
        self.held = 0

    @property
    def is_free(self) -> bool:
        return not self.held and int(self.released[0]) == self.sent

    def let_go(self) -> None:
        self.held -= 1


def _free_segment(nbytes: int) -> _Segment:
    free = [segment for segment in _segments if segment.is_free]
    for segment in free:
        if segment.memory.nbytes - HEADER >= nbytes:
            return segment
    for segment in free:  # too small for the batches of now
        _segments.remove(segment)
    segment = _Segment(nbytes + nbytes // 4)  # batches differ in size
    if len(_segments) < SEGMENTS:
        _segments.append(segment)
    return segment


def _bytes_of(storage: torch.UntypedStorage) -> Bytes:
    memory: Bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return memory


@dataclass(frozen=True)
class Handover:
    """Rows on their way from a worker to the trainer. Pickling it for another process shares the memory."""

    storage: torch.UntypedStorage
    """The whole piece of shared memory, from its header on."""
    shape: tuple[int, int]
    """Rows, and bytes of a row."""
    sender: int
    """The worker's process id."""

    @classmethod
    def of(cls, rows: torch.Tensor) -> Handover | None:
        """Return the hand-over of what `empty_rows` returned in this worker; None for other tensors."""
        start = rows.data_ptr() - HEADER
        for segment in _segments:
            if segment.storage.data_ptr() == start and rows.dim() == 2 and rows.is_contiguous():
                segment.sent += 1
                return cls(segment.storage, (rows.shape[0], rows.shape[1]), os.getpid())
        return None

    def rows(self) -> torch.Tensor:
        """Return the rows in the process that received them."""
        _drop_ended_workers()
        address = self.storage.data_ptr()
        # torch maps a piece of memory that arrives again only if the last mapping is gone.
        _mapped[address] = self.sender, self.storage
        _mapped.move_to_end(address)
        if len(_mapped) > MAPPED:
            _mapped.popitem(last=False)
        memory = _bytes_of(self.storage)

        def let_go() -> None:
            memory[:8].view(np.uint64)[0] += 1

        return _lease(memory[HEADER:], self.shape, let_go)


def _drop_ended_workers() -> None:
    for worker in {sender for sender, _ in _mapped.values()}:
        try:
            os.kill(worker, 0)
        except OSError:  # it has ended; its number may be another user's process now
            for address in [a for a, (sender, _) in _mapped.items() if sender == worker]:
                del _mapped[address]
