"""Samples become one flat sequence of tokens, many side by side, none seeing another.

A tree's shared prefix stands once; each branch sees the prefix and itself, at the positions it would have
alone. So a packed batch has exactly the (position, target, weight) triples of its samples unpacked.

T tokens of a micro-batch, U attention units, S supervised positions, M tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.language import TokenizedSample
from model.packed import PackedBatch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One sample's own part of a tree."""

    ids: npt.NDArray[np.int32]
    """(b,) tokens after the prefix."""
    weights: npt.NDArray[np.float32]
    """(p + b,) loss weights of prefix and branch, the sample's factor included."""
    sample: int
    """Position in the join's list."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """Samples with a common beginning."""

    prefix: npt.NDArray[np.int32]
    """(p,) tokens all branches begin with; empty for one sample."""
    branches: tuple[Branch, ...]
    """At least one."""
    media: tuple[int, ...]
    """The pictures, in the order of their places (indices of the join's distinct media)."""
    image_token_id: int
    """What stands at every one of a picture's M places."""

    @property
    def tokens(self) -> int:
        """Tokens it occupies once packed."""
        return len(self.prefix) + sum(len(b.ids) for b in self.branches)


@dataclass(frozen=True, kw_only=True)
class PlacedTree:
    """Where a tree stands in a packed batch."""

    prefix: tuple[int, int]
    """[first, end) of the shared part; empty for one sample."""
    branches: tuple[tuple[int, int, int], ...]
    """(first, end, sample) of each branch."""
    media: tuple[int, ...]
    """Its pictures, in order."""


def build_tree(
    samples: Sequence[TokenizedSample],
    *,
    sample_numbers: Sequence[int],
    factors: Sequence[float],
    media: Sequence[int],
    picture_tokens: int,
    image_token_id: int,
) -> Tree:
    """A tree of samples with the same pictures and the same tokens up to the last of them.

    Args:
        samples: tokens with one image token a picture.
        sample_numbers: what to call each of them afterwards.
        factors: factor on each sample's loss weights.
        media: the pictures of every one of them.
        picture_tokens: M.
        image_token_id: the token to repeat.
    """
    expanded = [_expand(s, picture_tokens, image_token_id) for s in samples]
    ids = expanded[0][0]
    places = np.flatnonzero(ids == image_token_id)
    assert len(places) == len(media) * picture_tokens, "picture places and pictures differ"
    shared = int(places[-1]) + 1 if len(samples) > 1 else 0
    for other, _ in expanded[1:]:
        assert np.array_equal(other[:shared], ids[:shared]), "branches of different beginnings"
        assert not np.any(other[shared:] == image_token_id), "a picture after the shared part"
    return Tree(
        prefix=ids[:shared],
        branches=tuple(
            Branch(ids=own[shared:], weights=weights * np.float32(factor), sample=number)
            for (own, weights), factor, number in zip(
                expanded, factors, sample_numbers, strict=True
            )
        ),
        media=tuple(media),
        image_token_id=image_token_id,
    )


def _expand(
    sample: TokenizedSample, picture_tokens: int, image_token_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Every image token M times. Nothing learns to say a picture, so its places weigh nothing."""
    is_image = sample.ids == image_token_id
    times = np.where(is_image, picture_tokens, 1)
    weights = np.where(is_image, np.float32(0), sample.weights)
    return np.repeat(sample.ids, times), np.repeat(weights, times)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` in bins of at most `capacity`. Deterministic."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= capacity, "longer than the window: refused before training starts"
        at = next((b for b, free in enumerate(room) if free >= length), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(index)
        room[at] -= length
    return bins


def pack(trees: Sequence[Tree], max_tokens: int) -> list[PackedBatch]:
    """Trees in micro-batches of at most `max_tokens`."""
    bins = first_fit([tree.tokens for tree in trees], max_tokens)
    return [assemble([trees[i] for i in chosen])[0] for chosen in bins]


def assemble(trees: Sequence[Tree]) -> tuple[PackedBatch, tuple[PlacedTree, ...]]:
    """One micro-batch of all `trees`, in this order, and where each of them went."""
    total = sum(tree.tokens for tree in trees)
    ids = np.empty(total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    units: list[tuple[int, int, int, int]] = []
    sources: list[Ints] = []
    targets: list[Ints] = []
    weights: list[npt.NDArray[np.float32]] = []
    placed: list[PlacedTree] = []
    at = 0
    for tree in trees:
        first, shared = at, len(tree.prefix)
        ids[first : first + shared] = tree.prefix
        positions[first : first + shared] = np.arange(shared)
        if shared:
            units.append((first, first + shared, first, first))
        at += shared
        branches: list[tuple[int, int, int]] = []
        for branch in tree.branches:
            end = at + len(branch.ids)
            ids[at:end] = branch.ids
            positions[at:end] = np.arange(shared, shared + len(branch.ids))
            if end > at:
                units.append((at, end, first, first + shared))
            _supervise(tree, branch, first, at, sources, targets, weights)
            branches.append((at, end, branch.sample))
            at = end
        placed.append(
            PlacedTree(prefix=(first, first + shared), branches=tuple(branches), media=tree.media)
        )
    image = trees[0].image_token_id
    batch = PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        image_slots=torch.from_numpy(np.flatnonzero(ids == image)),
        loss_positions=torch.from_numpy(np.concatenate(sources)),
        targets=torch.from_numpy(np.concatenate(targets)),
        loss_weights=torch.from_numpy(np.concatenate(weights)),
        units=torch.from_numpy(np.array(units, dtype=np.int64).reshape(-1, 4)),
    )
    return batch, tuple(placed)


def _supervise(
    tree: Tree,
    branch: Branch,
    prefix_at: int,
    branch_at: int,
    sources: list[Ints],
    targets: list[Ints],
    weights: list[npt.NDArray[np.float32]],
) -> None:
    """Append the triples (position that predicts, target, weight) of one branch and its prefix.

    Where the prefix itself is supervised (an answer before the last picture), its positions appear once
    for each branch, as they would if the samples stood apart.
    """
    shared = len(tree.prefix)
    # Token k of the sample is predicted from token k - 1; the first from nothing.
    predicted = np.flatnonzero(branch.weights[1:] > 0) + 1
    before = predicted - 1
    sources.append(np.where(before < shared, prefix_at, branch_at - shared) + before)
    whole = np.concatenate([tree.prefix, branch.ids]).astype(np.int64)
    targets.append(whole[predicted])
    weights.append(branch.weights[predicted])
