"""Samples that share their images and every word before the last of them: one message tree.

The shared part (the prefix) stands once in a sequence, the rest of each sample is a branch. Branches see
the prefix and themselves, not each other, so each is trained on exactly as if it stood alone. A tree
never crosses data sets: the mix counts each on its own.

S samples, N of them trainable, T trees, K distinct media. Tokens are counted as packed: an image is its
features, a video its frames' features with their times, and what follows a sample's last prediction is none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.store.references import VIDEO
from configs import UserError
from train.data.placeholders import Placeholders
from train.data.sample_list import Join
from train.data.tokens import TokenStore

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """The branches of one tree that a step takes: all of them, but at the edge of an epoch."""

    members: Ints
    """Positions in the join's sample list, one a branch."""
    prefix: int
    """Tokens the branches share, 0 when there is nothing to share."""
    tokens: int
    """Tokens it occupies once packed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trees:
    """All trees of a join as flat arrays, in the order of their first samples."""

    join: Join
    """The samples."""
    names: tuple[str, ...]
    """Data sets that have trees."""
    mix: tuple[float, ...] | None
    """Share of each of `names`, or None: by size."""
    members: Ints
    """(N,) positions in the join's list, tree after tree."""
    starts: Ints
    """(T + 1,) tree t holds members[starts[t]:starts[t + 1]]."""
    dataset: npt.NDArray[np.int16]
    """(T,) which of `names`."""
    prefix: npt.NDArray[np.int32]
    """(T,) tokens the branches share; 0 for a tree of one sample."""
    first_row: Ints
    """(T,) row of the first image or frame, -1 without one: what is near on disk."""
    length: npt.NDArray[np.int32]
    """(S,) tokens of each sample standing alone."""
    loss_weight: npt.NDArray[np.float64]
    """(S,) sum of each sample's loss weights."""
    places: Placeholders
    """What stands for an image or video."""
    max_tokens: int
    """The window every tree fits into."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def largest(self) -> int:
        """Samples in the largest tree."""
        return int(np.diff(self.starts).max())

    def sizes(self, trees: Ints) -> Ints:
        """Samples in each of the trees."""
        return self.starts[trees + 1] - self.starts[trees]

    def piece(self, tree: int, low: int = 0, high: int | None = None) -> Piece:
        """Branches [low, high) of one tree."""
        first, end = self.starts[tree], self.starts[tree + 1]
        members = self.members[first + low : end if high is None else first + high]
        prefix = int(self.prefix[tree]) if len(members) > 1 else 0
        tokens = int(self.length[members].sum()) - prefix * (len(members) - 1)
        return Piece(members=members, prefix=prefix, tokens=tokens)

    def describe(self) -> str:
        """Sizes, for the log."""
        apart = int(self.length[self.members].sum(dtype=np.int64))
        saved = int((self.prefix * (np.diff(self.starts) - 1)).sum(dtype=np.int64))
        return (
            f"{len(self.members):,} samples in {len(self):,} trees; {apart - saved:,} tokens a pass "
            f"({apart:,} if each sample stood alone); longest sample "
            f"{int(self.length[self.members].max()):,} of {self.max_tokens:,} tokens"
        )


def grow_trees(
    join: Join, tokens: TokenStore, *, max_tokens: int, max_branches: int, places: Placeholders
) -> Trees:
    """Group the samples of `join` into trees.

    Args:
        join: the samples.
        tokens: their tokenised text, opened for `join.names`.
        max_tokens: no tree is longer, in tokens; one that would be is split, and its prefix repeated.
        max_branches: no tree has more samples. At most the samples of a step.
        places: what stands for an image or video.

    Raises:
        UserError: a sample longer than max_tokens (none is ever cut or dropped for its length), or
            nothing to learn from.
    """
    if max_branches < 1:
        raise ValueError(f"max_branches {max_branches} is less than 1")
    # An image or video is one token of the text; this many it is more.
    of_media = places.lengths(join)
    more = _sums(of_media[join.media] - 1, join.offsets)
    length = tokens.lengths(join.dataset, join.index) + more
    loss_weight = tokens.loss_weights(join.dataset, join.index) * join.weight
    use = _supervised(join, loss_weight)
    _check_window(join, use, length, of_media, max_tokens)

    has_media = (np.diff(join.offsets) > 0)[use]
    shared = tokens.prefixes(join.dataset, join.index)
    prefix = shared.length + more  # both 0 without media
    group = _group_hash(join, shared.hash)[use]
    order = np.lexsort((use, group, join.dataset[use]))
    members = use[order]
    starts_group = np.ones(len(members), dtype=bool)
    starts_group[1:] = (
        (group[order][1:] != group[order][:-1])
        | (join.dataset[members][1:] != join.dataset[members][:-1])
        | ~has_media[order][1:]
    )
    starts = _split(starts_group, length[members], prefix[members], max_tokens, max_branches)
    # Trees in the order of their first samples, so that a pass without shuffling follows the list.
    by_first = np.argsort(members[starts], kind="stable")
    ends = np.append(starts[1:], len(members))
    sizes = (ends - starts)[by_first]
    edges = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(len(members)) - np.repeat(edges[:-1], sizes)
    members = members[np.repeat(starts[by_first], sizes) + within]
    first = members[edges[:-1]]
    assert _same_media(join, members, np.repeat(first, sizes)), "two image lists with one hash"
    names, mix, dataset = _renumber(join, first)
    return Trees(
        join=join,
        names=names,
        mix=mix,
        members=members,
        starts=edges,
        dataset=dataset,
        prefix=np.where(sizes > 1, prefix[first], 0).astype(np.int32),
        first_row=_first_row(join, first),
        length=length.astype(np.int32),
        loss_weight=loss_weight,
        places=places,
        max_tokens=max_tokens,
    )


def _supervised(join: Join, loss_weight: npt.NDArray[np.float64]) -> Ints:
    """Samples with something to learn; the others are counted and named, not dropped silently."""
    use = np.flatnonzero(loss_weight > 0)
    idle = np.flatnonzero(loss_weight <= 0)
    if len(idle):
        log.warning(
            "%s samples have no assistant words with a weight above 0 and are left out, first %s",
            f"{len(idle):,}",
            join.name_of(int(idle[0])),
        )
    if not len(use):
        raise UserError(
            f"{', '.join(join.names)}: no sample has assistant words to learn from; "
            "give them captions, answers or messages (folder:PATH takes a metadata.jsonl)"
        )
    return use


def _sums(values: Ints, offsets: Ints) -> Ints:
    """Sum of each list values[offsets[i]:offsets[i + 1]]; 0 of an empty one."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(total[offsets[1:]] - total[offsets[:-1]], dtype=np.int64)


def _check_window(join: Join, use: Ints, length: Ints, of_media: Ints, max_tokens: int) -> None:
    longest = int(use[np.argmax(length[use])])
    if length[longest] <= max_tokens:
        return
    too_long = int((length[use] > max_tokens).sum())
    media = join.media_of(longest)
    videos = media[join.kinds[media] == VIDEO]
    images = media[join.kinds[media] != VIDEO]
    parts, ways = [], ["encode with more pooling (encode.run --pool 2)"]
    if len(images) or not len(media):
        each = f" x {int(of_media[images[0]]):,}" if len(images) else ""
        parts.append(f"{len(images)}{each} for images")
    if len(videos):
        frames = int(np.diff(join.starts)[videos].sum())
        parts.append(f"{int(of_media[videos].sum()):,} for {frames:,} frames of videos")
        ways = ["take fewer frames (--max-frames, here and in encode.run)", *ways]
    text = int(length[longest] - of_media[media].sum())
    raise UserError(
        f"sample {join.name_of(longest)} is {length[longest]:,} tokens long ({', '.join(parts)}, "
        f"{text:,} of text) and the window is {max_tokens:,}; "
        f"{too_long:,} of {len(use):,} samples do not fit. Raise "
        f"--max-sequence-length to {length[longest]:,}, {', '.join(ways)}, or leave those samples out "
        "of the data set"
    )


def _group_hash(join: Join, prefix_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """(S,) equal for samples with the same images in the same order and the same prefix."""
    count = np.diff(join.offsets)
    place = (np.arange(len(join.media)) - np.repeat(join.offsets[:-1], count)).astype(np.uint64)
    one = _mix64(join.media.astype(np.uint64) + (place << np.uint64(32)))
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(one, dtype=np.uint64)])
    media = total[join.offsets[1:]] - total[join.offsets[:-1]]  # modulo 2**64, as meant
    return _mix64(media) ^ prefix_hash


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: one bit in, half the bits out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _split(
    starts_group: npt.NDArray[np.bool_],
    length: Ints,
    prefix: Ints,
    max_tokens: int,
    max_branches: int,
) -> Ints:
    """Where trees start: at every group, after max_branches, and where the window is full."""
    index = np.arange(len(length))
    group_start = np.flatnonzero(starts_group)
    rank = index - group_start[np.cumsum(starts_group) - 1]
    tree_start = rank % max_branches == 0
    starts = np.flatnonzero(tree_start)
    sizes = np.diff(np.append(starts, len(length)))
    total = np.add.reduceat(length, starts) - prefix[starts] * (sizes - 1)
    for tree in np.flatnonzero(total > max_tokens):  # few: only those need the walk
        filled = 0
        for i in range(starts[tree], starts[tree] + sizes[tree]):
            branch = int(length[i] - prefix[i])
            if filled == 0 or filled + branch > max_tokens:
                tree_start[i] = True
                filled = int(prefix[i])
            filled += branch
    return np.flatnonzero(tree_start)


def _same_media(join: Join, one: Ints, other: Ints) -> bool:
    """Whether the samples mention the same media, pair by pair: hashes are not taken on trust."""
    count = np.diff(join.offsets)
    if not np.array_equal(count[one], count[other]):
        return False
    within = np.arange(int(count[one].sum()))
    within -= np.repeat(np.cumsum(count[one]) - count[one], count[one])
    a = join.media[np.repeat(join.offsets[one], count[one]) + within]
    b = join.media[np.repeat(join.offsets[other], count[other]) + within]
    return np.array_equal(a, b)


def _renumber(
    join: Join, first: Ints
) -> tuple[tuple[str, ...], tuple[float, ...] | None, npt.NDArray[np.int16]]:
    """Data sets that have trees. One that has none leaves the mix, by name."""
    here, dataset = np.unique(join.dataset[first], return_inverse=True)
    gone = sorted(set(range(len(join.names))) - set(here.tolist()))
    if gone:
        log.warning(
            "no %s samples, so not in the mix: %s",
            join.split,
            ", ".join(join.names[i] for i in gone),
        )
    mix = None
    if join.mix is not None:
        shares = [join.mix[i] for i in here]
        mix = tuple(share / sum(shares) for share in shares)
    return tuple(join.names[i] for i in here), mix, dataset.astype(np.int16)


def _first_row(join: Join, samples: Ints) -> Ints:
    """Row of each sample's first image or frame, -1 without one; frames come after all images."""
    has = join.offsets[samples + 1] > join.offsets[samples]
    result = np.full(len(samples), -1, dtype=np.int64)
    first = join.media[join.offsets[samples[has]]]
    behind = int(join.rows.max(initial=0)) + 1
    result[has] = join.rows[join.starts[first]] + behind * (join.kinds[first] == VIDEO)
    return result
