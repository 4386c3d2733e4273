"""Decide which message trees each training step takes.

A step is a pure function of (seed, step number), so a resumed run computes its next step directly.

    schedule = TrainingSchedule(trees, samples_per_step=32, seed=0)
    schedule.step(1000).slices     # the trees of step 1000, for all ranks together

Each data set is an endless stream: permutation after permutation of its samples. Several answers to one
question count as one sample, and each permutation takes another one of them. An epoch takes an exact
quota from each stream (every sample once when the mix has no weights) and shuffles the quotas together.
Epochs follow each other without a gap: step s holds the trees whose first sample is at a position in
[s * B, (s + 1) * B) of the sequence of epochs. No step depends on an earlier one, and none is cut short.

B samples per step, all ranks together; N samples per epoch. A tree counts as the number of its samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cache.store.references import within
from train.data.choices import shuffled
from train.data.message_trees import MessageTrees, TreeSlice
from train.data.sample_list import Ints

BLOCK_TREES = 512
"""Order `blocks`: this many trees whose rows are neighbours on disk stay together (about one shard)."""
BLOCKS_MIXED = 16
"""Order `blocks`: the trees of this many blocks are shuffled together."""
_Taken = tuple[Ints, Ints, Ints, npt.NDArray[np.int32]]
EPOCHS_KEPT = 2
"""Epochs kept in memory: a step may extend over the end of an epoch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """The content of one optimizer step, for all ranks together."""

    number: int
    """Counted from 0."""
    slices: tuple[TreeSlice, ...]
    """The trees, or parts of trees, in order."""
    samples: int
    """Samples in `slices`: B on average, because a tree belongs to the step of its first sample."""
    weight: float
    """Sum of the loss weights of every supervised token."""


class TrainingSchedule:
    """Endless, shuffled training steps.

    Args:
        trees: the trees to draw from; none may have more samples than a step.
        samples_per_step: B, over all ranks and accumulated micro-batches.
        seed: decides the order of the samples.
        order: `random`; or `blocks`, which keeps neighbouring rows near in time, for disks that seek slowly.

    Raises:
        ValueError: `samples_per_step` is smaller than a tree.
    """

    def __init__(
        self,
        trees: MessageTrees,
        samples_per_step: int,
        *,
        seed: int,
        order: Literal["random", "blocks"] = "random",
    ) -> None:
        if trees.largest > samples_per_step:
            raise ValueError(
                f"a tree holds {trees.largest} samples, more than the {samples_per_step} of a step: "
                f"build_message_trees with max_branches of at most {samples_per_step}"
            )
        self.trees = trees
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.order = order
        self._first_tree = np.searchsorted(trees.dataset, np.arange(len(trees.names) + 1))
        self.sizes: tuple[int, ...] = tuple(np.diff(trees.starts[self._first_tree]).tolist())
        self.quotas = quotas(self.sizes, trees.mix)
        self.samples_per_epoch = sum(self.quotas)
        self._epoch = functools.lru_cache(EPOCHS_KEPT)(self._build_epoch)

    def epoch(self, number: int) -> float:
        """Return the number of epochs finished when step `number` starts."""
        return number * self.samples_per_step / self.samples_per_epoch

    def step(self, number: int) -> Step:
        """Return the content of step `number`: O(log N) once its epoch is in memory."""
        size, length = self.samples_per_step, self.samples_per_epoch
        low, high = number * size, (number + 1) * size
        slices: list[TreeSlice] = []
        for index in range(low // length, (high - 1) // length + 1):
            epoch = self._epoch(index)
            edges = np.array([low, high]) - index * length
            part = slice(*np.searchsorted(epoch.starts, edges))
            slices += self.trees.slices(
                epoch.tree[part],
                epoch.low[part],
                epoch.high[part],
                seed=self.seed,
                passes=epoch.number[part],
            )
        return make_step(number, slices, self.trees)

    def describe(self) -> str:
        """Return the quotas of an epoch as one line for the log."""
        parts = ", ".join(
            f"{name} {quota:,} of {size:,}"
            for name, quota, size in zip(self.trees.names, self.quotas, self.sizes, strict=True)
        )
        return (
            f"an epoch is {self.samples_per_epoch:,} samples ({parts}), "
            f"{self.samples_per_epoch / self.samples_per_step:,.1f} steps"
        )

    def _build_epoch(self, index: int) -> _Epoch:
        """Return the trees of epoch `index` in order, each with the branches that belong to the epoch."""
        parts = [
            part
            for dataset, quota in enumerate(self.quotas)
            for part in self._take(dataset, index * quota, (index + 1) * quota)
        ]
        tree, low, high, number = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(self.quotas) > 1:
            mixed = self._mix(np.array([len(p[0]) for p in parts]), index)
            tree, low, high, number = tree[mixed], low[mixed], high[mixed], number[mixed]
        sizes = high - low
        starts = np.cumsum(sizes) - sizes
        return _Epoch(tree=tree, low=low, high=high, number=number, starts=starts)

    def _take(self, dataset: int, low: int, high: int) -> list[_Taken]:
        """Return samples [low, high) of a data set's stream: tree, first and last branch, permutation.

        A tree that extends over an edge is cut there; its other branches belong to the next epoch.
        """
        taken: list[_Taken] = []
        size = self.sizes[dataset]
        for number in range(low // size, (high - 1) // size + 1) if high > low else ():
            trees = self._permutation(dataset, number)
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
                    np.full(len(counts), number, dtype=np.int32),
                )
            )
        return taken

    def _permutation(self, dataset: int, number: int) -> Ints:
        """Return all trees of a data set in the order of permutation `number` of its stream."""
        first, last = self._first_tree[dataset], self._first_tree[dataset + 1]
        count = int(last - first)
        # The key has the data set's name, so adding a data set to the mix does not reorder this one.
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
        """Return the order in which epoch `index` interleaves parts of `counts` trees."""
        total = int(counts.sum())
        order = shuffled(total, self.seed, "mix", index)
        if self.order == "random":
            return order
        # Keep the blocks together: advance through all parts at one relative pace, with a little jitter.
        place = within(np.zeros_like(counts), counts) + order / total
        return np.argsort(place / np.repeat(counts, counts), kind="stable")


class SinglePass:
    """Every sample exactly once, in the order of the sample list: for evaluation.

    Of several answers to a question it takes the first.
    """

    def __init__(self, trees: MessageTrees, samples_per_step: int) -> None:
        self.trees = trees
        group = trees.starts[:-1] // samples_per_step
        self._edges = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(group))

    def __len__(self) -> int:
        return len(self._edges) - 1

    def step(self, number: int) -> Step:
        """Return the content of step `number`, of `len(self)` steps."""
        trees = np.arange(self._edges[number], self._edges[number + 1])
        return make_step(number, self.trees.slices(trees), self.trees)


Schedule = TrainingSchedule | SinglePass
"""Says which trees each step takes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Epoch:
    """The trees of one epoch in order; entry i is branches [low[i], high[i]) of tree[i]."""

    tree: Ints
    low: Ints
    high: Ints
    number: npt.NDArray[np.int32]
    """The permutation of the data set that each entry belongs to."""
    starts: Ints
    """Samples of the epoch before each entry."""


def make_step(number: int, slices: Sequence[TreeSlice], trees: MessageTrees) -> Step:
    """Return a step with the number of its samples and their loss weight."""
    members = np.concatenate([s.members for s in slices])
    return Step(
        number=number,
        slices=tuple(slices),
        samples=len(members),
        weight=float(trees.loss_weight[members].sum()),
    )


def quotas(sizes: Sequence[int], mix: Sequence[float] | None) -> tuple[int, ...]:
    """Return the number of samples of each data set in an epoch.

    Without a mix, an epoch has every sample once. With a mix, it is the largest epoch in which no sample
    repeats and each data set has its share, rounded to a whole sample and at least one.
    """
    if mix is None:
        return tuple(sizes)
    shares = np.asarray(mix, dtype=np.float64) / sum(mix)
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    exact = shares * total
    whole = np.floor(exact + 1e-9).astype(np.int64)  # n / w * w may round to slightly less than n
    rest = round(total) - int(whole.sum())
    by_remainder = np.argsort(whole - exact, kind="stable")
    whole[by_remainder[: max(rest, 0)]] += 1
    return tuple(np.clip(whole, 1, sizes).tolist())


def split_by_rank(slices: Sequence[TreeSlice], world_size: int) -> list[list[TreeSlice]]:
    """Split a step's slices among ranks so that tokens balance: longest first, to the least loaded rank.

    Every rank computes the same split. Within a rank, slices keep their order. If there are fewer slices
    than ranks, some ranks get none.
    """
    loads = [0] * world_size
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(slices)), key=lambda i: (-slices[i].tokens, i)):
        rank = loads.index(min(loads))
        loads[rank] += slices[index].tokens
        assigned[rank].append(index)
    return [[slices[i] for i in sorted(indices)] for indices in assigned]
