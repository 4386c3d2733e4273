"""Group samples into message trees: a shared prefix, and one branch for each sample.

Samples of one data set share a tree if they have equal media and equal tokens up to the last image or video.
The prefix (those tokens) occurs once in a sequence; the rest of each sample is a branch. A branch attends to
the prefix and to itself, not to other branches, so training on a tree equals training on its samples one by
one. A tree never spans two data sets, because the mix counts each data set separately.

    trees = build_message_trees(
        samples, tokens, max_tokens=4096, max_branches=16, placeholders=placeholders
    )
    trees.slice(0).members     # positions in `samples` of the first tree's branches

S samples, N of them with a supervised token, T trees, K media items. Token counts are those of the packed
sequence: an image counts its feature tokens, a video its frames' feature tokens and timestamps, and the
tokens after a sample's last prediction are not counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.format.checksums import GOLDEN, mix64
from cache.store.references import VIDEO, edges_of, within
from configs import UserError
from train.data.placeholders import Placeholders
from train.data.sample_list import Ints, SampleList
from train.data.tokens import TokenStore

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
    """The samples the trees are made of."""
    tokens: TokenStore
    """Their tokenised text."""
    names: tuple[str, ...]
    """Data sets that have trees."""
    mix: tuple[float, ...] | None
    """Share of each of `names`, sum 1; None: each data set counts by its size."""
    members: Ints
    """(N,) positions in the sample list, tree after tree."""
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
    """The tokens that stand for images and videos."""
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

    def slice(self, tree: int, low: int = 0, high: int | None = None) -> TreeSlice:
        """Return branches [low, high) of one tree; without limits, the whole tree."""
        first, end = self.starts[tree], self.starts[tree + 1]
        members = self.members[first + low : end if high is None else first + high]
        prefix = int(self.prefix[tree]) if len(members) > 1 else 0
        tokens = int(self.length[members].sum()) - prefix * (len(members) - 1)
        return TreeSlice(members=members, prefix=prefix, tokens=tokens)

    def describe(self) -> str:
        """Return the counts of samples, trees and tokens as one line for the log."""
        unshared = int(self.length[self.members].sum(dtype=np.int64))
        saved = int((self.prefix * (np.diff(self.starts) - 1)).sum(dtype=np.int64))
        return (
            f"{len(self.members):,} samples in {len(self):,} trees; {unshared - saved:,} tokens per pass "
            f"({unshared:,} if each sample stood alone); longest sample "
            f"{int(self.length[self.members].max()):,} of {self.max_tokens:,} tokens"
        )


def build_message_trees(
    samples: SampleList,
    tokens: TokenStore,
    *,
    max_tokens: int,
    max_branches: int,
    placeholders: Placeholders,
) -> MessageTrees:
    """Group `samples` into trees.

    Args:
        samples: the samples to group.
        tokens: their tokenised text, opened for `samples.names`.
        max_tokens: length limit of a tree, in tokens. A longer group is split, each part with the prefix.
        max_branches: most samples of one tree; at most the number of samples of a step.
        placeholders: the tokens that stand for images and videos.

    Raises:
        UserError: a sample is longer than `max_tokens` (samples are never cut, nor dropped for their
            length), or no sample has a supervised token.
    """
    media_tokens = placeholders.lengths(samples)
    # The token store counts one token for each image or video.
    added = np.diff(edges_of(media_tokens[samples.media] - 1)[samples.offsets])
    length = tokens.field("used", samples.dataset, samples.index) + added
    loss_weight = tokens.field("loss_weight", samples.dataset, samples.index) * samples.weight
    use = _supervised(samples, loss_weight)
    _check_window(samples, use, length, media_tokens, max_tokens)

    has_media = (np.diff(samples.offsets) > 0)[use]
    # Both are 0 for a sample without media.
    prefix = tokens.field("prefix", samples.dataset, samples.index) + added
    prefix_hash = tokens.field("prefix_hash", samples.dataset, samples.index)
    group = _group_hash(samples, prefix_hash)[use]
    order = np.lexsort((use, group, samples.dataset[use]))
    members = use[order]
    starts_group = np.ones(len(members), dtype=bool)
    starts_group[1:] = (
        (group[order][1:] != group[order][:-1])
        | (samples.dataset[members][1:] != samples.dataset[members][:-1])
        | ~has_media[order][1:]
    )
    starts = _split(starts_group, length[members], prefix[members], max_tokens, max_branches)
    # Trees are ordered by their first samples, so a pass without shuffling follows the sample list.
    by_first = np.argsort(members[starts], kind="stable")
    sizes = np.diff(np.append(starts, len(members)))[by_first]
    edges = edges_of(sizes)
    members = members[within(starts[by_first], sizes)]
    first = members[edges[:-1]]
    assert _same_media(samples, members, np.repeat(first, sizes)), "two media lists have one hash"
    names, mix, dataset = _renumber(samples, first)
    return MessageTrees(
        samples=samples,
        tokens=tokens,
        names=names,
        mix=mix,
        members=members,
        starts=edges,
        dataset=dataset,
        prefix=np.where(sizes > 1, prefix[first], 0).astype(np.int32),
        first_row=_first_row(samples, first),
        length=length.astype(np.int32),
        loss_weight=loss_weight,
        placeholders=placeholders,
        max_tokens=max_tokens,
    )


def _supervised(samples: SampleList, loss_weight: npt.NDArray[np.float64]) -> Ints:
    """Return the samples that have a supervised token; log how many have none, and the first of those."""
    use = np.flatnonzero(loss_weight > 0)
    without = np.flatnonzero(loss_weight <= 0)
    if len(without):
        log.warning(
            "%s samples have no assistant words with a weight above 0 and are left out, first %s",
            f"{len(without):,}",
            samples.name_of(int(without[0])),
        )
    if not len(use):
        raise UserError(
            f"{', '.join(samples.names)}: no sample has assistant words to learn from; "
            "give them captions, answers or messages (folder:PATH takes a metadata.jsonl)"
        )
    return use


def _check_window(
    samples: SampleList, use: Ints, length: Ints, media_tokens: Ints, max_tokens: int
) -> None:
    """Raise UserError if a sample of `use` is longer than `max_tokens`."""
    longest = int(use[np.argmax(length[use])])
    if length[longest] <= max_tokens:
        return
    too_long = int((length[use] > max_tokens).sum())
    media = samples.media_of(longest)
    videos = media[samples.kinds[media] == VIDEO]
    images = media[samples.kinds[media] != VIDEO]
    parts, ways = [], ["encode with more pooling (encode.run --pool 2)"]
    if len(images) or not len(media):
        each = f" x {int(media_tokens[images[0]]):,}" if len(images) else ""
        parts.append(f"{len(images)}{each} for images")
    if len(videos):
        frames = int(np.diff(samples.starts)[videos].sum())
        parts.append(f"{int(media_tokens[videos].sum()):,} for {frames:,} frames of videos")
        ways = ["take fewer frames (--max-frames, here and in encode.run)", *ways]
    text = int(length[longest] - media_tokens[media].sum())
    raise UserError(
        f"sample {samples.name_of(longest)} is {length[longest]:,} tokens long ({', '.join(parts)}, "
        f"{text:,} of text) and the window is {max_tokens:,}; "
        f"{too_long:,} of {len(use):,} samples do not fit. Raise "
        f"--max-sequence-length to {length[longest]:,}, {', '.join(ways)}, or leave those samples out "
        "of the data set"
    )


def _group_hash(samples: SampleList, prefix_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """(S,) hashes, equal for samples with equal media in equal order and equal prefixes."""
    count = np.diff(samples.offsets)
    place = within(np.zeros_like(count), count).astype(np.uint64)
    one = mix64(samples.media.astype(np.uint64) + (place << np.uint64(32)) + GOLDEN)
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(one, dtype=np.uint64)])
    # The sums and their differences wrap around at 2**64; equal lists still get equal hashes.
    media = total[samples.offsets[1:]] - total[samples.offsets[:-1]]
    return mix64(media + GOLDEN) ^ prefix_hash


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
