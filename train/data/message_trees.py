"""Group samples into message trees: a shared prefix, and one branch for each sample.

Samples of one data set share a tree if they have equal media and equal tokens up to the last image or video.
The prefix (those tokens) occurs once in a sequence; the rest of each sample is a branch. A branch attends to
the prefix and to itself, not to other branches, so training on a tree equals training on its samples one by
one. A tree never spans two data sets, because the mix counts each data set separately.

    trees = build_message_trees(
        samples, tokens, max_tokens=4096, max_branches=16, placeholders=placeholders
    )
    trees.slices(np.array([0]))[0].members    # positions in `samples` of the first tree's branches

Several answers to one question are one member of a tree: one of them is drawn when a step takes the tree.
They have equal media and an equal beginning, and a tree has room for the longest.

S samples that can be trained on, N questions (a sample that is the only answer is one), T trees. Token counts
are those of the packed sequence: an image counts its feature tokens, a video its frames' feature tokens and
timestamps, and the tokens after a sample's last prediction are not counted.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.format.checksums import GOLDEN, mix64
from cache.store.references import VIDEO, edges_of, within
from train.data.choices import Choices, first_answers
from train.data.placeholders import Placeholders
from train.data.sample_list import Ints, SampleList
from train.data.tokens import TokenStore
from train.data.usable import OverLong, added_tokens, fit_window, learnable

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeSlice:
    """The consecutive branches of one tree that belong to one step: all of them, except at an epoch's end."""

    members: Ints
    """Positions in the sample list, one for each branch."""
    prefix: int
    """Tokens of the shared prefix; 0 for a single branch, which shares nothing."""
    tokens: int
    """Tokens of the packed slice: the prefix once, and every branch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MessageTrees:
    """All trees of a sample list as flat arrays, ordered by the first sample of each tree."""

    samples: SampleList
    """The samples the trees are made of: those of the list given that can be trained on, or parts of them."""
    tokens: TokenStore
    """Their tokenised text."""
    names: tuple[str, ...]
    """Data sets that have trees."""
    mix: tuple[float, ...] | None
    """Share of each of `names`, sum 1; None: each data set counts by its size."""
    members: Ints
    """(N,) positions in the sample list, tree after tree; of several answers to a question the first one."""
    choices: Choices
    """Which of the N have other answers."""
    starts: Ints
    """(T + 1,) tree t has members[starts[t]:starts[t + 1]]."""
    dataset: npt.NDArray[np.int16]
    """(T,) index into `names`."""
    prefix: npt.NDArray[np.int32]
    """(T,) tokens of the shared prefix; 0 for a tree of one sample."""
    first_row: Ints
    """(T,) feature row of the first image or frame, -1 without media; near rows are near on disk."""
    length: npt.NDArray[np.int32]
    """(S,) tokens of each sample in a tree of its own."""
    loss_weight: npt.NDArray[np.float64]
    """(S,) sum of each sample's token loss weights, times the weight of the sample."""
    placeholders: Placeholders
    """The tokens that represent images and videos."""
    max_tokens: int
    """Length limit of every tree, in tokens."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def largest(self) -> int:
        """Number of samples in the largest tree."""
        return int(np.diff(self.starts).max())

    def sizes(self, trees: Ints) -> Ints:
        """Return the number of samples of each of `trees`."""
        return self.starts[trees + 1] - self.starts[trees]

    def slices(
        self,
        trees: Ints,
        low: Ints | None = None,
        high: Ints | None = None,
        *,
        seed: int = 0,
        passes: npt.NDArray[np.int32] | None = None,
    ) -> list[TreeSlice]:
        """Return branches [low, high) of some trees. Every rank asks for those of all ranks.

        Args:
            trees: (n,) the trees.
            low: (n,) the first branch of each; None: 0.
            high: (n,) the branch behind its last one; None: all branches.
            seed: of the run.
            passes: (n,) passes over the data set before this one. With the seed, they decide which of several
                answers to a question is taken; None: the first.
        """
        low = np.zeros_like(trees) if low is None else low
        counts = (self.sizes(trees) if high is None else high) - low
        first, edges = self.starts[trees] + low, edges_of(counts)
        members = self.members[within(first, counts)]
        if passes is not None:
            begin, end = (np.searchsorted(self.choices.slots, at) for at in (first, first + counts))
            for i in np.flatnonzero(begin < end).tolist():
                part = slice(edges[i], edges[i + 1])
                members[part] = self.choices.draw(
                    members[part], int(first[i]), seed=seed, number=int(passes[i])
                )
        prefix = np.where(counts > 1, self.prefix[trees], 0)
        tokens = np.diff(edges_of(self.length[members])[edges]) - prefix * (counts - 1)
        columns = (edges[:-1], edges[1:], prefix, tokens)
        return [
            TreeSlice(members=members[start:end], prefix=shared, tokens=total)
            for start, end, shared, total in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def describe(self) -> str:
        """Return the counts of samples, trees and tokens as one line for the log."""
        several = len(self.choices.slots)
        answers = (
            f" ({len(self.choices.answers):,} answers to {several:,} of them, one an epoch)"
            if several
            else ""
        )
        unshared = int(self.length[self.members].sum(dtype=np.int64))
        saved = int((self.prefix * (np.diff(self.starts) - 1)).sum(dtype=np.int64))
        return (
            f"{len(self.members):,} samples{answers} in {len(self):,} trees; {unshared - saved:,} tokens per "
            f"pass ({unshared:,} if each sample stood alone); longest sample "
            f"{int(self.length.max()):,} of {self.max_tokens:,} tokens"
        )


def build_message_trees(
    samples: SampleList,
    tokens: TokenStore,
    *,
    max_tokens: int,
    max_branches: int,
    placeholders: Placeholders,
    over_long: OverLong = "refuse",
) -> MessageTrees:
    """Group `samples` into trees, without those that have no text to learn.

    Args:
        samples: the samples to group.
        tokens: their tokenised text, opened for `samples.names`.
        max_tokens: length limit of a tree, in tokens. A longer group is split, each part with the prefix.
        max_branches: most samples of one tree; at most the number of samples of a step.
        placeholders: the tokens that represent images and videos.
        over_long: what becomes of samples longer than `max_tokens`.

    Raises:
        NothingToLearnError: no sample has text to learn, or none is left that fits.
        UserError: a sample is longer than `max_tokens` and `over_long` is `refuse`.
    """
    samples = learnable(samples, tokens)
    samples = fit_window(samples, tokens, placeholders, max_tokens=max_tokens, over_long=over_long)
    added = added_tokens(samples, placeholders.lengths(samples))
    records = tokens.measure(samples)
    length = records["used"] + added
    # Both are 0 for a sample without media.
    prefix = records["prefix"] + added
    group = samples.media_hash() ^ records["prefix_hash"]

    answers = first_answers(samples.choice, samples.first_turn, samples.dataset, group)
    use = np.flatnonzero(answers == np.arange(samples.size))
    longest = length.copy()  # of all answers to a question, because any of them may be drawn
    np.maximum.at(longest, answers, length)
    order = np.lexsort((use, group[use], samples.dataset[use]))
    members = use[order]
    starts_group = np.ones(len(members), dtype=bool)
    starts_group[1:] = (
        (group[members][1:] != group[members][:-1])
        | (samples.dataset[members][1:] != samples.dataset[members][:-1])
        | (np.diff(samples.offsets)[members][1:] == 0)
    )
    starts = _split(starts_group, longest[members], prefix[members], max_tokens, max_branches)
    # Trees are ordered by their first samples, so a pass without shuffling follows the sample list.
    by_first = np.argsort(members[starts], kind="stable")
    sizes = np.diff(np.append(starts, len(members)))[by_first]
    edges = edges_of(sizes)
    members = members[within(starts[by_first], sizes)]
    first = members[edges[:-1]]
    assert _same_media(samples, members, np.repeat(first, sizes)), "two media lists have one hash"
    assert _same_media(samples, np.arange(samples.size), answers), "two media lists have one hash"
    names, mix, dataset = _renumber(samples, first)
    return MessageTrees(
        samples=samples,
        tokens=tokens,
        names=names,
        mix=mix,
        members=members,
        choices=_choices(samples, answers, members),
        starts=edges,
        dataset=dataset,
        prefix=np.where(sizes > 1, prefix[first], 0).astype(np.int32),
        first_row=_first_row(samples, first),
        length=length.astype(np.int32),
        loss_weight=records["loss_weight"] * samples.weight,
        placeholders=placeholders,
        max_tokens=max_tokens,
    )


def _choices(samples: SampleList, answers: Ints, members: Ints) -> Choices:
    """Return which members have alternatives.

    Args:
        samples: the list.
        answers: (S,) position of the first answer to each sample's question.
        members: (N,) positions of the first answers, in their order in the trees.
    """
    count = np.bincount(answers, minlength=samples.size)
    slots = np.flatnonzero(count[members] > 1)
    first = members[slots]
    by_question = np.argsort(answers, kind="stable")
    digests = [hashlib.sha256(name.encode()).digest() for name in samples.names]
    of_name = np.array([int.from_bytes(digest[:8]) for digest in digests], dtype=np.uint64)
    place = samples.index.astype(np.uint64) + (
        samples.first_turn.astype(np.uint64) << np.uint64(40)
    )
    return Choices(
        slots=slots,
        starts=edges_of(count[first]),
        answers=by_question[within(edges_of(count)[first], count[first])],
        keys=mix64(place[first] + GOLDEN) ^ of_name[samples.dataset[first]],
    )


def _split(
    starts_group: npt.NDArray[np.bool_],
    length: Ints,
    prefix: Ints,
    max_tokens: int,
    max_branches: int,
) -> Ints:
    """Return where trees start: at each group, after `max_branches` samples, and where one gets too long."""
    group_start = np.flatnonzero(starts_group)
    place = np.arange(len(length)) - group_start[np.cumsum(starts_group) - 1]
    tree_start = place % max_branches == 0
    starts = np.flatnonzero(tree_start)
    sizes = np.diff(np.append(starts, len(length)))
    total = np.add.reduceat(length, starts) - prefix[starts] * (sizes - 1)
    for tree in np.flatnonzero(total > max_tokens):  # a loop, because few trees are too long
        filled = 0
        for i in range(starts[tree], starts[tree] + sizes[tree]):
            branch = int(length[i] - prefix[i])
            if filled == 0 or filled + branch > max_tokens:
                tree_start[i] = True
                filled = int(prefix[i])
            filled += branch
    return np.flatnonzero(tree_start)


def _same_media(samples: SampleList, one: Ints, other: Ints) -> bool:
    """Whether samples one[i] and other[i] have equal media lists, for every i."""
    count = np.diff(samples.offsets)
    if not np.array_equal(count[one], count[other]):
        return False
    a, b = (samples.media[within(samples.offsets[s], count[s])] for s in (one, other))
    return np.array_equal(a, b)


def _renumber(
    samples: SampleList, first: Ints
) -> tuple[tuple[str, ...], tuple[float, ...] | None, npt.NDArray[np.int16]]:
    """Return the data sets that have trees, their mix, and each tree's index among them.

    A data set without trees leaves the mix, with a warning that names it.
    """
    here, dataset = np.unique(samples.dataset[first], return_inverse=True)
    absent = sorted(set(range(len(samples.names))) - set(here.tolist()))
    if absent:
        log.warning(
            "no %s samples, so not in the mix: %s",
            samples.split,
            ", ".join(samples.names[i] for i in absent),
        )
    mix = None
    if samples.mix is not None:
        shares = [samples.mix[i] for i in here]
        mix = tuple(share / sum(shares) for share in shares)
    return tuple(samples.names[i] for i in here), mix, dataset.astype(np.int16)


def _first_row(samples: SampleList, chosen: Ints) -> Ints:
    """Return the row of each chosen sample's first image or frame, -1 without media.

    Frames are in another array than images; their rows are numbered after all image rows.
    """
    has = samples.offsets[chosen + 1] > samples.offsets[chosen]
    result = np.full(len(chosen), -1, dtype=np.int64)
    first = samples.media[samples.offsets[chosen[has]]]
    after_images = int(samples.rows.max(initial=0)) + 1
    result[has] = samples.rows[samples.starts[first]] + after_images * (
        samples.kinds[first] == VIDEO
    )
    return result
