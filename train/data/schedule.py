"""Which trees a step trains on: a pure function of (seed, step), so that resuming costs nothing.

Every data set is an endless stream of its own permutations. An epoch takes an exact quota of samples
from each (everything once when no mix weights are given), shuffles them together, and epochs follow
each other without a seam: step s holds the trees whose first sample stands at a position in
[s * B, (s + 1) * B) of that stream. Nothing depends on the steps before, and no step is short.

B samples a step (all ranks together), N samples an epoch. A tree counts as many samples as it has.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from train.data.message_trees import Piece, Trees

Ints = npt.NDArray[np.int64]

BLOCK_TREES = 512
"""Order `blocks`: this many trees whose rows are neighbours on disk stay together (about a shard)."""
BLOCKS_MIXED = 16
"""Order `blocks`: this many blocks are shuffled into each other."""
EPOCHS_KEPT = 2
"""A step may straddle two epochs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What one optimizer step learns from, all ranks together."""

    number: int
    pieces: tuple[Piece, ...]
    samples: int
    """Samples in `pieces`: B on average."""
    weight: float
    """Sum of the loss weights of every supervised token."""


class Plan(Protocol):
    """What a loader follows."""

    trees: Trees
    steps: int | None
    """How many there are; None: no end."""

    def step(self, number: int) -> Step:
        """The trees of step `number`."""


class StepPlan:
    """Endless training steps over `trees`.

    Args:
        trees: from `train.data.message_trees.grow_trees`; none may hold more samples than a step.
        samples_per_step: B, over all ranks and accumulated micro-batches.
        seed: another seed, another order; the sample list stays.
        order: `random`, or `blocks` for disks that seek slowly: neighbouring rows stay near in time.
    """

    def __init__(
        self,
        trees: Trees,
        samples_per_step: int,
        *,
        seed: int,
        order: Literal["random", "blocks"] = "random",
    ) -> None:
        if samples_per_step < 1:
            raise ValueError(f"samples_per_step {samples_per_step} is less than 1")
        if trees.largest > samples_per_step:
            raise ValueError(
                f"a tree holds {trees.largest} samples, more than the {samples_per_step} of a step: "
                f"grow_trees with max_branches of at most {samples_per_step}"
            )
        self.trees = trees
        self.steps: int | None = None
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.order = order
        self._first_tree = np.searchsorted(trees.dataset, np.arange(len(trees.names) + 1))
        sample_edges = trees.starts[self._first_tree]
        self.sizes: tuple[int, ...] = tuple(int(n) for n in np.diff(sample_edges))
        self.quotas = quotas(self.sizes, trees.mix)
        self.samples_per_epoch = sum(self.quotas)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def epoch(self, number: int) -> float:
        """Epochs finished when step `number` starts."""
        return number * self.samples_per_step / self.samples_per_epoch

    def step(self, number: int) -> Step:
        """The trees of step `number`: O(log N) once the epoch is laid out."""
        size, length = self.samples_per_step, self.samples_per_epoch
        low, high = number * size, (number + 1) * size
        pieces: list[Piece] = []
        for index in range(low // length, (high - 1) // length + 1):
            epoch = self._epoch(index)
            edges = np.array([low, high]) - index * length
            first, last = np.searchsorted(epoch.starts, edges)
            pieces += (
                self.trees.piece(int(epoch.tree[i]), int(epoch.low[i]), int(epoch.high[i]))
                for i in range(first, last)
            )
        return make_step(number, pieces, self.trees)

    def describe(self) -> str:
        """Quotas of an epoch, for the log."""
        parts = ", ".join(
            f"{name} {quota:,} of {size:,}"
            for name, quota, size in zip(self.trees.names, self.quotas, self.sizes, strict=True)
        )
        return (
            f"an epoch is {self.samples_per_epoch:,} samples ({parts}), "
            f"{self.samples_per_epoch / self.samples_per_step:,.1f} steps"
        )

    def _epoch(self, index: int) -> _Epoch:
        if index not in self._epochs:
            self._epochs[index] = self._lay_out(index)
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(index)
        return self._epochs[index]

    def _lay_out(self, index: int) -> _Epoch:
        """Every tree of epoch `index`, in order, with the branches of it that belong there."""
        parts = [
            part
            for dataset, quota in enumerate(self.quotas)
            for part in self._take(dataset, index * quota, (index + 1) * quota)
        ]
        tree = np.concatenate([p[0] for p in parts])
        low = np.concatenate([p[1] for p in parts])
        high = np.concatenate([p[2] for p in parts])
        if len(self.quotas) > 1:
            mixed = self._mix(np.array([len(p[0]) for p in parts]), index)
            tree, low, high = tree[mixed], low[mixed], high[mixed]
        sizes = high - low
        return _Epoch(tree=tree, low=low, high=high, starts=np.cumsum(sizes) - sizes)

    def _take(self, dataset: int, low: int, high: int) -> list[tuple[Ints, Ints, Ints]]:
        """Samples [low, high) of a data set's stream as (tree, first branch, last branch) arrays.

        A tree that stands across an edge is cut there: its other branches belong to the neighbour.
        """
        taken: list[tuple[Ints, Ints, Ints]] = []
        size = self.sizes[dataset]
        for number in range(low // size, (high - 1) // size + 1) if high > low else ():
            trees = self._pass(dataset, number)
            counts = self.trees.sizes(trees)
            ends = np.cumsum(counts) + number * size
            first = int(np.searchsorted(ends, low, side="right"))
            last = int(np.searchsorted(ends - counts, high, side="left"))
            starts = (ends - counts)[first:last]
            counts = counts[first:last]
            taken.append(
                (
                    trees[first:last],
                    np.maximum(low - starts, 0),
                    np.minimum(high - starts, counts),
                )
            )
        return taken

    def _pass(self, dataset: int, number: int) -> Ints:
        """All trees of a data set once, in the order of its pass `number`."""
        first, last = self._first_tree[dataset], self._first_tree[dataset + 1]
        count = int(last - first)
        # Streams are keyed by name: another data set joining the mix leaves this one's order alone.
        key = (self.seed, "pass", self.trees.names[dataset], number)
        if self.order == "random":
            return first + shuffled(count, *key)
        neighbours = np.argsort(self.trees.first_row[first:last], kind="stable")
        blocks = shuffled(-(-count // BLOCK_TREES), *key)
        index = np.arange(count)
        near = neighbours[np.argsort(np.argsort(blocks)[index // BLOCK_TREES], kind="stable")]
        groups = index // (BLOCK_TREES * BLOCKS_MIXED)
        return first + near[np.lexsort((shuffled(count, *key, "within"), groups))]

    def _mix(self, counts: Ints, index: int) -> Ints:
        """The order in which an epoch interleaves its data sets' parts."""
        total = int(counts.sum())
        order = shuffled(total, self.seed, "mix", index)
        if self.order == "random":
            return order
        # Blocks must survive: advance through all parts at the same pace, with a little jitter.
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        jitter = order / total
        return np.argsort((within + jitter) / np.repeat(counts, counts), kind="stable")


class OnePass:
    """Every sample exactly once, in the order of the sample list: for evaluation and inspection."""

    def __init__(self, trees: Trees, samples_per_step: int) -> None:
        self.trees = trees
        group = trees.starts[:-1] // samples_per_step
        self._edges = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group))
        self.steps: int | None = len(self._edges) - 1

    def __len__(self) -> int:
        return len(self._edges) - 1

    def step(self, number: int) -> Step:
        """The trees of step `number` of `len(self)`."""
        pieces = [
            self.trees.piece(tree) for tree in range(self._edges[number], self._edges[number + 1])
        ]
        return make_step(number, pieces, self.trees)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch:
    tree: Ints
    low: Ints
    high: Ints
    starts: Ints
    """Samples of the epoch before each entry."""


def make_step(number: int, pieces: Sequence[Piece], trees: Trees) -> Step:
    """A step with its sums."""
    members = np.concatenate([p.members for p in pieces])
    return Step(
        number=number,
        pieces=tuple(pieces),
        samples=len(members),
        weight=float(trees.loss_weight[members].sum()),
    )


def quotas(sizes: Sequence[int], mix: Sequence[float] | None) -> tuple[int, ...]:
    """Samples of each data set in an epoch.

    Without weights every sample once. With them, the largest epoch in which no data set is seen more
    than once and each has exactly its share (to the nearest whole sample, at least one).
    """
    if mix is None:
        return tuple(sizes)
    shares = np.asarray(mix, dtype=np.float64) / sum(mix)
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    exact = shares * total
    whole = np.floor(exact + 1e-9).astype(np.int64)  # n/w*w may land a hair below n
    rest = round(total) - int(whole.sum())
    by_remainder = np.argsort(whole - exact, kind="stable")
    whole[by_remainder[: max(rest, 0)]] += 1
    return tuple(int(n) for n in np.clip(whole, 1, sizes))


def deal(pieces: Sequence[Piece], world: int) -> list[list[Piece]]:
    """Share a step's pieces among `world` ranks so that tokens balance: longest first, to the idlest.

    The same on every rank; within a rank the step's order is kept. With fewer pieces than ranks, some
    get none.
    """
    loads = [0] * world
    hands: list[list[int]] = [[] for _ in range(world)]
    for index in sorted(range(len(pieces)), key=lambda i: (-pieces[i].tokens, i)):
        rank = loads.index(min(loads))
        loads[rank] += pieces[index].tokens
        hands[rank].append(index)
    return [[pieces[i] for i in sorted(hand)] for hand in hands]


def shuffled(count: int, *key: int | str) -> Ints:
    """A permutation of range(count) decided by `key` alone.

    It sorts the outputs of splitmix64, which are all different, so the result is the same for every
    numpy version and sort; numpy's own streams may change between versions.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.frombuffer(digest[:8], dtype="<u8")
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.argsort(x).astype(np.int64, copy=False)
