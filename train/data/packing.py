"""Pack message trees into one flat sequence of tokens, in which no sample attends to another.

    tree = build_token_tree(texts, sample_numbers=[4, 7], factors=[1.0, 1.0], media=[2], ...)
    bins = first_fit([tree.tokens for tree in trees], max_tokens)
    batch, layouts = assemble([trees[i] for i in bins[0]])

A tree's shared prefix occurs once. Each branch attends to the prefix and to itself, at the positions it has
in a sequence of its own, so a packed batch has exactly the (position, target, weight) triples of its samples
unpacked. Only tokens that predict a target are kept: a branch ends before its end mark.

T tokens of a micro-batch, U attention units, S supervised predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.attention.batch import PackedBatch
from model.language.chat_template import TokenizedSample, fill_placeholders
from train.data.sample_list import Ints
from train.data.tokens import used_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """The part of a tree that belongs to one sample."""

    ids: npt.NDArray[np.int32]
    """(b,) tokens after the prefix, up to the last one that predicts a target."""
    sources: Ints
    """(s,) positions in the sample that predict a target, counted from the sample's first token."""
    targets: npt.NDArray[np.int32]
    """(s,) tokens to predict; the last one may be absent from the sequence."""
    weights: npt.NDArray[np.float32]
    """(s,) loss weights of the predictions, times the factor of the sample."""
    sample: int
    """Position in the sample list."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTree:
    """The tokens of one message tree."""

    prefix: npt.NDArray[np.int32]
    """(p,) tokens that all branches begin with; empty for one sample."""
    branches: tuple[Branch, ...]
    """One for each sample, at least one."""
    media: tuple[int, ...]
    """The images and videos in the order of their tokens, as indices of the list's media items."""
    image_token_id: int
    """Id of the token at every position that receives a feature."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the packed tree."""
        return len(self.prefix) + sum(len(b.ids) for b in self.branches)


@dataclass(frozen=True, kw_only=True)
class TreeLayout:
    """The positions of one tree in a packed batch."""

    prefix: tuple[int, int]
    """[first, end) of the shared prefix; empty for one sample."""
    branches: tuple[tuple[int, int, int], ...]
    """(first, end, position in the sample list) of each branch."""
    media: tuple[int, ...]
    """The images and videos in order, as indices of the list's media items."""


def build_token_tree(
    samples: Sequence[TokenizedSample],
    *,
    sample_numbers: Sequence[int],
    factors: Sequence[float],
    media: Sequence[int],
    contents: Sequence[npt.NDArray[np.int32]],
    image_token_id: int,
) -> TokenTree:
    """Build the tree of samples with equal media and equal tokens up to the last media item.

    Args:
        samples: tokens and weights, with one image token for each image or video.
        sample_numbers: positions of the samples in the sample list.
        factors: factor on each sample's loss weights.
        media: the images and videos that every one of the samples has.
        contents: the tokens that represent each of `media`; each ends with an image token.
        image_token_id: id of the token at every position that receives a feature.
    """
    assert len(media) == len(contents), f"{len(media)} media, {len(contents)} contents"
    expanded = [_expand(s, contents, image_token_id) for s in samples]
    ids, _, shared = expanded[0]
    prefix = shared if len(samples) > 1 else 0
    for other, _, end in expanded[1:]:
        assert end == shared, "an image after the shared prefix"
        assert np.array_equal(other[:prefix], ids[:prefix]), "branches of different beginnings"
    return TokenTree(
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
    """Replace each image token by the tokens of its media item; return ids, weights and the last one's end.

    The tokens of media get weight 0, so the model does not learn to predict images or timestamps.
    """
    is_image = sample.ids == image_token_id
    ids, counts = fill_placeholders(sample.ids, image_token_id, contents)
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
    """Return the branch of a sample after `prefix` tokens; its last media item ends at token `shared`."""
    used = used_tokens(weights, shared)
    own = weights * np.float32(factor)
    # Token k of the sample is predicted by token k - 1; no token predicts the first one.
    predicted = np.flatnonzero(own[1:] > 0) + 1
    return Branch(
        ids=ids[prefix:used],
        sources=predicted - 1,
        targets=ids[predicted],
        weights=own[predicted],
        sample=sample,
    )


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put the indices of `lengths` into bins of at most `capacity`, by first-fit decreasing.

    The result is deterministic: equal lengths are placed in the order of their indices.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        assert length <= capacity, "a sequence longer than the window must be refused at the start"
        at = next((b for b, free in enumerate(room) if free >= length), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(capacity)
        bins[at].append(index)
        room[at] -= length
    return bins


def assemble(trees: Sequence[TokenTree]) -> tuple[PackedBatch, tuple[TreeLayout, ...]]:
    """Return one micro-batch of all `trees` in this order, and the positions of each tree in it."""
    total = sum(tree.tokens for tree in trees)
    ids = np.empty(total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    units: list[tuple[int, int, int, int]] = []
    sources: list[Ints] = []
    targets: list[Ints] = []
    weights: list[npt.NDArray[np.float32]] = []
    layouts: list[TreeLayout] = []
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
            # A supervised prefix (an answer before the last image) is predicted once for each branch,
            # as it is if the samples are not packed.
            moved = np.where(branch.sources < shared, first, at - shared)
            sources.append(moved + branch.sources)
            targets.append(branch.targets.astype(np.int64))
            weights.append(branch.weights)
            branches.append((at, end, branch.sample))
            at = end
        layouts.append(
            TreeLayout(prefix=(first, first + shared), branches=tuple(branches), media=tree.media)
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
    return batch, tuple(layouts)


def nothing() -> PackedBatch:
    """Return a micro-batch of one token that predicts nothing: its loss is 0, and so is every gradient."""
    one = torch.zeros(1, dtype=torch.int64)
    return PackedBatch.one_sample(one, torch.zeros(1), image=-1)
