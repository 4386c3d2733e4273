"""Packed micro-batches with their features, read by threads a few batches ahead.

Threads, not processes: `preadv` and the checksum release the GIL, and nothing is copied between address
spaces. Rows go straight into a ring of reused buffers (pinned for CUDA), each distinct row of a
micro-batch once; a video's rows are neighbours on disk and one read. The order never depends on timing:
batches are delivered as the plan lists them.

R distinct rows of a micro-batch in one array (images; frames), N places of feature tokens in its sequence.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.references import MEDIA_KINDS, within
from model.attention.batch import PackedBatch
from train.data.message_trees import Piece
from train.data.packing import PlacedTree, Tree, assemble, build_tree, first_fit
from train.data.sample_list import Join
from train.data.schedule import Plan, Step, deal
from train.data.tokens import TokenStore


class RowReader(Protocol):
    """The part of a FeatureReader a loader needs."""

    spec: FeatureSpec

    def read_into(self, kind: str, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """Stored bytes of the rows, checked."""


@runtime_checkable
class Interruptible(Protocol):
    """A reader whose reads may take minutes, as one over a network that is down."""

    def give_up(self) -> None:
        """Let reads that are under way end: nobody waits for them any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What one forward and backward pass works on."""

    packed: PackedBatch
    """The sequence."""
    codes: dict[str, Tensor]
    """Array -> (R, row_bytes) uint8 stored rows. Valid until the next micro-batch is asked for."""
    order: Tensor
    """(N,) int64 which feature stands at each place, counting the tokens of all rows of all arrays."""
    step: int
    """The optimizer step it belongs to."""
    index: int
    """Its number within the step, on this rank."""
    last: bool
    """Whether the step is whole after it."""
    step_weight: float
    """Sum of the loss weights of the whole step, all ranks: what to divide the loss sum by."""
    step_samples: int
    """Samples of the whole step, all ranks."""
    samples: int
    """Samples in this micro-batch."""
    tokens: int
    """Length of the sequence."""
    wait_s: float
    """How long the trainer waited for it."""
    read_s: float
    """How long a thread worked on it."""
    placed: tuple[PlacedTree, ...]
    """What stands where."""
    slot: _Slot
    """The buffer `codes` is a view of."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The batch on `device`. The copy may still run; its buffer is not reused before it ends."""
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
    """Reused buffers for the rows of one micro-batch."""

    def __init__(self, shapes: dict[str, tuple[int, int]], pin: bool) -> None:
        self.codes = {
            array: torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
            for array, shape in shapes.items()
        }
        self.copied: torch.cuda.Event | None = None

    def read(self, reader: RowReader, array: str, rows: npt.NDArray[np.int64]) -> Tensor:
        """Rows of one array, in this order."""
        codes = self.codes[array][: len(rows)]
        if len(rows):
            reader.read_into(array, rows, codes.numpy())
        return codes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """One micro-batch to be made."""

    step: Step
    index: int
    last: bool
    pieces: tuple[Piece, ...]


class FeatureLoader:
    """Iterates over the micro-batches of steps [start, stop) of a plan. A context manager.

    Args:
        plan: which samples each step takes.
        tokens: their text.
        reader: of the space the plan's join was made with.
        max_tokens: length of a micro-batch; changes memory and speed, never what a step learns.
        start: first step.
        stop: step not reached any more; None: as far as the plan goes.
        rank: which hand of each step's pieces to take.
        world: how many there are.
        threads: micro-batches in the making at the same time.
        ahead: micro-batches ready or in the making before they are asked for.
        pin: page-locked buffers, for CUDA.
    """

    def __init__(
        self,
        plan: Plan,
        tokens: TokenStore,
        reader: RowReader,
        *,
        max_tokens: int,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        ahead: int = 4,
        pin: bool = False,
    ) -> None:
        if max_tokens < plan.trees.max_tokens:
            raise ValueError(
                f"max_tokens {max_tokens} is less than the window of {plan.trees.max_tokens} tokens"
            )
        self._plan, self._tokens, self._reader = plan, tokens, reader
        self._join = plan.trees.join
        self._max_tokens = max_tokens
        self._rank, self._world = rank, world
        self._ahead = ahead
        self._jobs = self._plan_jobs(start, stop)
        shapes = {}
        for kind, array in enumerate(ARRAY_OF.values()):
            have = int(np.diff(self._join.starts)[self._join.kinds == kind].sum())
            most = min(max_tokens // reader.spec.tokens(array), have)
            shapes[array] = (most, reader.spec.row_bytes(array))
        self._free = [_Slot(shapes, pin) for _ in range(ahead + 1)]
        self._queue: deque[Future[MicroBatch]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="features")
        self._closed = False

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
            micro = self._queue.popleft().result()
        except BaseException:
            self.close()
            raise
        self._free.append(micro.slot)  # filled again at the next call, not before
        return replace(micro, wait_s=time.perf_counter() - started)

    def __enter__(self) -> FeatureLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; what they read ahead is given up. More than once is harmless."""
        self._closed = True
        if isinstance(self._reader, Interruptible) and any(not f.done() for f in self._queue):
            self._reader.give_up()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()
        self._free.clear()

    def _fill(self) -> None:
        """Keep `ahead` micro-batches in the making. All bookkeeping is here, in one thread."""
        while self._free and len(self._queue) < self._ahead + 1:
            job = next(self._jobs, None)
            if job is None:
                return
            slot = self._free.pop(0)
            self._queue.append(self._pool.submit(self._make, job, slot))

    def _plan_jobs(self, start: int, stop: int | None) -> Iterator[_Job]:
        number = start
        stop = self._plan.steps if stop is None else stop
        while stop is None or number < stop:
            step = self._plan.step(number)
            hand = deal(step.pieces, self._world)[self._rank]
            bins = first_fit([piece.tokens for piece in hand], self._max_tokens)
            for index, chosen in enumerate(bins):
                pieces = tuple(hand[i] for i in chosen)
                yield _Job(step=step, index=index, last=index == len(bins) - 1, pieces=pieces)
            number += 1

    def _make(self, job: _Job, slot: _Slot) -> MicroBatch:
        """Runs in a thread: text from the store, rows from the disk."""
        started = time.perf_counter()
        packed, placed = assemble([self._tree(piece) for piece in job.pieces])
        media = np.array([m for tree in placed for m in tree.media], dtype=np.int64)
        rows, order = feature_order(self._join, media, self._reader.spec)
        if slot.copied is not None:
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
            step_samples=job.step.samples,
            samples=sum(len(piece.members) for piece in job.pieces),
            tokens=len(packed.input_ids),
            wait_s=0.0,
            read_s=time.perf_counter() - started,
            placed=placed,
            slot=slot,
        )

    def _tree(self, piece: Piece) -> Tree:
        join = self._join
        members = [int(m) for m in piece.members]
        media = [int(m) for m in join.media_of(members[0])]
        tree = build_tree(
            [self._tokens.sample(int(join.dataset[m]), int(join.index[m])) for m in members],
            sample_numbers=members,
            factors=[float(join.weight[m]) for m in members],
            media=media,
            contents=self._plan.trees.places.contents(join, media),
            image_token_id=self._tokens.image_token_id,
        )
        assert tree.tokens == piece.tokens, "the plan counted other tokens than the text has"
        return tree


def feature_order(
    join: Join, media: npt.NDArray[np.int64], spec: FeatureSpec
) -> tuple[dict[str, npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Which rows a list of media needs, and how their features come to stand in its order.

    Args:
        join: where the rows are.
        media: (n,) distinct media of the join, one a place; repeats are read once.
        spec: of the space.

    Returns:
        Array -> (R,) distinct rows, ascending; and (N,) for every feature token of the media in turn its
        number, when the tokens of all those rows stand one after the other, array after array.
    """
    counts = np.diff(join.starts)[media]
    rows = join.rows[within(join.starts[media], counts)]
    kinds = np.repeat(join.kinds[media], counts)
    first, tokens = np.empty_like(rows), np.empty_like(rows)  # of each row's feature tokens
    needed: dict[str, npt.NDArray[np.int64]] = {}
    before = 0
    for kind, name in enumerate(MEDIA_KINDS):
        array, here = ARRAY_OF[name], kinds == kind
        needed[array], rank = np.unique(rows[here], return_inverse=True)
        tokens[here] = size = spec.tokens(array)
        first[here] = before + rank * size
        before += len(needed[array]) * size
    return needed, within(first, tokens)
