"""Load packed micro-batches with their feature rows, a few ahead of their use.

    with FeatureLoader(schedule, reader, max_tokens=8192, start=0, stop=1000) as loader:
        for micro in loader:      # the order is that of the schedule, whatever the threads' timing
            ...

Threads, not processes, read the rows: `preadv` and the checksum release the GIL, and nothing is copied
between address spaces. Rows are read directly into a ring of reused buffers (page-locked for CUDA). Each
distinct row of a micro-batch is read once; the rows of a video are neighbours on disk and take one read.

Every rank has equally many micro-batches in a step, because a sharded model gathers its weights in each:
ranks with fewer get micro-batches of one token that predicts nothing.

R distinct rows of a micro-batch in one array (images or frames), N feature tokens in its sequence.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.reader import FeatureReader
from cache.store.references import MEDIA_KINDS, within
from model.attention.batch import PackedBatch
from train.data.message_trees import TreeSlice
from train.data.packing import (
    TokenTree,
    TreeLayout,
    assemble,
    build_token_tree,
    first_fit,
    nothing,
)
from train.data.sample_list import Ints, SampleList
from train.data.schedule import Schedule, SinglePass, Step, split_by_rank

STOP_POLL_S = 0.2
"""Seconds between looks whether to stop, while a micro-batch is awaited."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """The input of one forward and backward pass."""

    packed: PackedBatch
    """The sequence, T tokens."""
    codes: dict[str, Tensor]
    """Array name -> (R, row_bytes) uint8 stored rows. Overwritten once the next micro-batch is requested."""
    order: Tensor
    """(N,) int64 feature token for each image slot, counting the tokens of all rows of all arrays in turn. In
    a space with a tail, these are the tokens behind it."""
    step: int
    """Number of the optimizer step."""
    index: int
    """Number of the micro-batch within the step, on this rank."""
    last: bool
    """Whether this is the rank's last micro-batch of the step."""
    step_weight: float
    """Sum of the loss weights of the whole step, all ranks: the divisor of the loss sum."""
    samples: int
    """Number of samples in this micro-batch; 0 in one that makes the ranks' numbers equal."""
    tokens: int
    """Length of the sequence, or 0 without samples."""
    wait_s: float
    """Seconds the trainer waited for this micro-batch."""
    layouts: tuple[TreeLayout, ...]
    """Positions of each tree in the sequence."""
    slot: _Slot
    """The buffers that `codes` is a view of."""

    @property
    def sample_numbers(self) -> tuple[int, ...]:
        """Positions in the sample list of every sample of the micro-batch."""
        return tuple(sample for tree in self.layouts for _, _, sample in tree.branches)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the micro-batch on `device`.

        The copy to a GPU is asynchronous; the buffers are not reused before it ends.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self
        moved = replace(
            self,
            packed=self.packed.to(device),
            codes={k: c.to(device, non_blocking=True) for k, c in self.codes.items()},
            order=self.order.to(device, non_blocking=True),
        )
        if device.type == "cuda":
            self.slot.copied = torch.cuda.Event()
            self.slot.copied.record(torch.cuda.current_stream(device))
        return moved


class _Slot:
    """Reused buffers for the rows of one micro-batch, one for each array."""

    def __init__(self, shapes: dict[str, tuple[int, int]], pin: bool) -> None:
        self.codes = {
            array: torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
            for array, shape in shapes.items()
        }
        self.copied: torch.cuda.Event | None = None

    def read(self, reader: FeatureReader, array: str, rows: Ints) -> Tensor:
        """Read rows of one array in this order; return the part of the buffer that has them."""
        codes = self.codes[array][: len(rows)]
        if len(rows):
            reader.read_into(array, rows, codes.numpy())
        return codes


@dataclass(frozen=True)
class _Job:
    """A micro-batch to make; without slices, one that predicts nothing."""

    step: Step
    index: int
    last: bool
    slices: list[TreeSlice]


class StoppedWaitingError(Exception):
    """A micro-batch was not ready, and the caller wants to stop."""


class FeatureLoader:
    """Iterate over the micro-batches of steps [start, stop) of a schedule. A context manager.

    Args:
        schedule: which samples each step takes.
        reader: a reader of the space that the sample list was made with.
        max_tokens: length limit of a micro-batch; changes memory and speed, not what a step learns.
        start: first step.
        stop: first step not loaded; None: all steps of the schedule.
        rank: the rank whose part of each step to load.
        world_size: number of ranks.
        threads: micro-batches made at the same time.
        ahead: micro-batches made before they are requested.
        pin: use page-locked buffers, for CUDA.
        stopping: returns True when waiting for a micro-batch should end.

    Raises:
        StoppedWaitingError: from iteration, when `stopping` says so.
        ValueError: `max_tokens` is below the length limit of the trees.
        CorruptError: from iteration, if a stored row is damaged.
    """

    def __init__(
        self,
        schedule: Schedule,
        reader: FeatureReader,
        *,
        max_tokens: int,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        ahead: int = 4,
        pin: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        if max_tokens < schedule.trees.max_tokens:
            raise ValueError(
                f"max_tokens {max_tokens} is less than the window of {schedule.trees.max_tokens} tokens"
            )
        self._schedule, self._reader = schedule, reader
        self._samples = schedule.trees.samples
        self._max_tokens = max_tokens
        self._rank, self._world_size = rank, world_size
        jobs = self._all_jobs(start, stop)
        shapes = {}
        for kind, array in enumerate(ARRAY_OF.values()):
            have = int(np.diff(self._samples.starts)[self._samples.kinds == kind].sum())
            most = min(max_tokens // reader.spec.seen.tokens(array), have)
            shapes[array] = (most, reader.spec.row_bytes(array))
        self._free = [_Slot(shapes, pin) for _ in range(ahead + 1)]
        self._queue: deque[Future[MicroBatch]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="features")
        # A step is divided among all ranks on each of them: milliseconds, which pass during the step before.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="features-schedule")
        self._plan = lambda: self._planner.submit(next, jobs, None)
        self._job = self._plan()
        self._closed = False
        self._stopping = stopping

    def __iter__(self) -> FeatureLoader:
        return self

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        if self._closed:
            raise StopIteration
        try:
            self._fill()
            if not self._queue:
                self.close()
                raise StopIteration
            while not wait([self._queue[0]], STOP_POLL_S).done:
                if self._stopping():
                    raise StoppedWaitingError
            micro = self._queue.popleft().result()
        except BaseException:
            self.close()
            raise
        self._free.append(micro.slot)  # the next call fills it again
        return replace(micro, wait_s=time.perf_counter() - started)

    def __enter__(self) -> FeatureLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and discard what they have read ahead. Closing twice is allowed."""
        self._closed = True
        if any(not f.done() for f in self._queue):
            self._reader.cancel_reads()
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()
        self._free.clear()

    def _fill(self) -> None:
        """Start a job for each free slot. Only the consumer's thread touches slots and queue."""
        while self._free and (job := self._job.result()) is not None:
            self._job = self._plan()
            self._queue.append(self._pool.submit(self._make, job, self._free.pop(0)))

    def _all_jobs(self, start: int, stop: int | None) -> Iterator[_Job]:
        if stop is None and isinstance(self._schedule, SinglePass):
            stop = len(self._schedule)
        for number in itertools.count(start) if stop is None else range(start, stop):
            step = self._schedule.step(number)
            shares = split_by_rank(step.slices, self._world_size)
            bins = [
                first_fit([part.tokens for part in share], self._max_tokens) for share in shares
            ]
            own, chosen = shares[self._rank], bins[self._rank]
            count = max(map(len, bins))  # every rank computes it, so they need not ask each other
            for index in range(count):
                members = chosen[index] if index < len(chosen) else []
                yield _Job(step, index, index == count - 1, [own[i] for i in members])

    def _make(self, job: _Job, slot: _Slot) -> MicroBatch:
        """Make one micro-batch, in a thread: pack its text, then read its rows."""
        trees = [self._tree(part) for part in job.slices]
        packed, layouts = assemble(trees) if trees else (nothing(), ())
        media = np.array([m for tree in layouts for m in tree.media], dtype=np.int64)
        rows, order = feature_order(self._samples, media, self._reader.spec.seen)
        if slot.copied is not None:  # the GPU may still be copying the previous rows
            slot.copied.synchronize()
            slot.copied = None
        return MicroBatch(
            packed=packed,
            codes={array: slot.read(self._reader, array, of) for array, of in rows.items()},
            order=torch.from_numpy(order),
            step=job.step.number,
            index=job.index,
            last=job.last,
            step_weight=job.step.weight,
            samples=sum(len(part.members) for part in job.slices),
            tokens=sum(part.tokens for part in job.slices),
            wait_s=0.0,
            layouts=layouts,
            slot=slot,
        )

    def _tree(self, part: TreeSlice) -> TokenTree:
        samples, tokens = self._samples, self._schedule.trees.tokens
        members = part.members.tolist()
        media = samples.media_of(members[0]).tolist()
        tree = build_token_tree(
            [tokens.of(samples, m) for m in members],
            sample_numbers=members,
            factors=samples.weight[members].tolist(),
            media=media,
            contents=self._schedule.trees.placeholders.contents(samples, media),
            image_token_id=tokens.image_token_id,
        )
        assert tree.tokens == part.tokens, "the schedule counted other tokens than the text has"
        return tree


def feature_order(
    samples: SampleList, media: Ints, spec: FeatureSpec
) -> tuple[dict[str, Ints], Ints]:
    """Return which rows a list of media needs, and the order of their feature tokens in the sequence.

    Args:
        samples: the sample list that has the media's rows.
        media: (n,) media items in the order of the sequence; the rows of a repeated one are read once.
        spec: decides the tokens of a row: of a space with a tail, its `seen`.

    Returns:
        Array name -> (R,) distinct rows, ascending; and for each feature token of `media` in turn, (N,), its
        number among the tokens of all those rows, array after array.
    """
    counts = np.diff(samples.starts)[media]
    rows = samples.rows[within(samples.starts[media], counts)]
    kinds = np.repeat(samples.kinds[media], counts)
    first, tokens = np.empty_like(rows), np.empty_like(rows)  # of each row's feature tokens
    needed: dict[str, Ints] = {}
    before = 0
    for kind, name in enumerate(MEDIA_KINDS):
        array, here = ARRAY_OF[name], kinds == kind
        needed[array], rank = np.unique(rows[here], return_inverse=True)
        tokens[here] = size = spec.tokens(array)
        first[here] = before + rank * size
        before += len(needed[array]) * size
    return needed, within(first, tokens)
