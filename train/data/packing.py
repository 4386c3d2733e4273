"""Samples become one flat sequence of tokens, many side by side, none seeing another.

A tree's shared prefix stands once; each branch sees the prefix and itself, at the positions it would have
alone. So a packed batch has exactly the (position, target, weight) triples of its samples unpacked. Of a
branch only that is read which predicts something: not its end mark, nor what follows.

T tokens of a micro-batch, U attention units, S supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.attention.batch import PackedBatch
from model.language.chat_template import TokenizedSample, fill_places
from train.data.tokens import used_tokens

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One sample's own part of a tree."""

    ids: npt.NDArray[np.int32]
    """(b,) tokens after the prefix, up to the last one that predicts something."""
    sources: Ints
    """(s,) positions in the sample that predict something, counted from its beginning."""
    targets: npt.NDArray[np.int32]
    """(s,) what they are to predict; the last of them need not stand in the sequence."""
    weights: npt.NDArray[np.float32]
    """(s,) loss weights of the predictions, the sample's factor included."""
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
    """The images and videos, in the order of their places (indices of the join's distinct media)."""
    image_token_id: int
    """What stands at every place of a feature."""

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
    """Its images and videos, in order."""


def build_tree(
    samples: Sequence[TokenizedSample],
    *,
    sample_numbers: Sequence[int],
    factors: Sequence[float],
    media: Sequence[int],
    contents: Sequence[npt.NDArray[np.int32]],
    image_token_id: int,
) -> Tree:
    """A tree of samples with the same media and the same tokens up to the last of them.

    Args:
        samples: tokens with one image token an image or video.
        sample_numbers: what to call each of them afterwards.
        factors: factor on each sample's loss weights.
        media: the images and videos of every one of them.
        contents: the tokens that stand for each of those, ending with an image token.
        image_token_id: the token that stands where a feature goes.
    """
    assert len(media) == len(contents), "media and what stands for them differ in number"
    expanded = [_expand(s, contents, image_token_id) for s in samples]
    ids, _, shared = expanded[0]
    prefix = shared if len(samples) > 1 else 0
    for other, _, end in expanded[1:]:
        assert end == shared, "an image after the shared part"
        assert np.array_equal(other[:prefix], ids[:prefix]), "branches of different beginnings"
    return Tree(
        prefix=ids[:prefix],
        branches=tuple(
            _branch(own, weights, prefix, shared, factor, number)
            for (own, weights, _), factor, number in zip(
                expanded, factors, sample_numbers, strict=True
            )
        ),
        media=tuple(media),
        image_token_id=image_token_id,
    )


def _expand(
    sample: TokenizedSample, contents: Sequence[npt.NDArray[np.int32]], image_token_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], int]:
    """Every medium's tokens at its place, and where the last of them ends.

    Nothing learns to say an image or the time of a frame, so their places weigh nothing.
    """
    is_image = sample.ids == image_token_id
    ids, counts = fill_places(sample.ids, image_token_id, contents)
    weights = np.repeat(np.where(is_image, np.float32(0), sample.weights), counts)
    last = np.flatnonzero(is_image)[-1:]
    return ids, weights, int(counts[: int(last[0]) + 1].sum()) if len(last) else 0


def _branch(
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    prefix: int,
    shared: int,
    factor: float,
    sample: int,
) -> Branch:
    """What is a sample's own, behind `prefix` tokens; `shared` is where its last medium ends."""
    used = used_tokens(weights, shared)
    own = weights * np.float32(factor)
    # Token k of the sample is predicted from token k - 1; the first from nothing.
    predicted = np.flatnonzero(own[1:] > 0) + 1
    return Branch(
        ids=ids[prefix:used],
        sources=predicted - 1,
        targets=ids[predicted],
        weights=own[predicted],
        sample=sample,
    )


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
            # Where the prefix itself is supervised (an answer before the last image), its positions
            # appear once for each branch, as they would if the samples stood apart.
            moved = np.where(branch.sources < shared, first, at - shared)
            sources.append(moved + branch.sources)
            targets.append(branch.targets.astype(np.int64))
            weights.append(branch.weights)
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
