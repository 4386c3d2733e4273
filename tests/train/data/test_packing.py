"""Packing: a packed batch has exactly the tokens, positions and targets of its samples unpacked.

batch, layouts = assemble([build_token_tree(...), ...])
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.batch import PackedBatch
from model.language.chat_template import TokenizedSample
from train.data.packing import TokenTree, assemble, build_token_tree, first_fit

IMAGE_ID = 9
CONTENTS = [
    np.array(ids, np.int32)
    for ids in (
        [IMAGE_ID] * 3,  # an image
        [7, IMAGE_ID, IMAGE_ID, 8, 7, IMAGE_ID, IMAGE_ID],  # a video of two frames with their times
        [7, IMAGE_ID, IMAGE_ID],
        [IMAGE_ID] * 3,
        [8, 8, 8, IMAGE_ID],
        [IMAGE_ID],
    )
]
"""The tokens that represent each media item."""
WEIGHTS = [0.0, 0.2, 1.0]

words = st.lists(st.integers(0, 8), max_size=6)


@dataclass(frozen=True)
class Family:
    """Samples with equal images and equal beginnings."""

    samples: list[TokenizedSample]
    factors: list[float]
    media: list[int]


@st.composite
def families(draw: st.DrawFn) -> Family:
    images = draw(st.integers(0, 2))
    start: list[int] = []
    for _ in range(images):
        start += [*draw(words), IMAGE_ID]
    branches = draw(st.integers(1, 4)) if images else 1
    samples = []
    for _ in range(branches):
        ids = [*start, draw(st.integers(0, 8)), *draw(words)]
        weights = draw(st.lists(st.sampled_from(WEIGHTS), min_size=len(ids), max_size=len(ids)))
        samples.append(
            TokenizedSample(ids=np.array(ids, np.int32), weights=np.array(weights, np.float32))
        )
    factors = draw(st.lists(st.sampled_from([0.5, 1.0]), min_size=branches, max_size=branches))
    return Family(samples, factors, [draw(st.integers(0, 5)) for _ in range(images)])


def tree_of(family: Family, first_number: int = 0) -> TokenTree:
    return build_token_tree(
        family.samples,
        sample_numbers=range(first_number, first_number + len(family.samples)),
        factors=family.factors,
        media=family.media,
        contents=[CONTENTS[m] for m in family.media],
        image_token_id=IMAGE_ID,
    )


def expanded(sample: TokenizedSample, media: list[int]) -> tuple[list[int], list[float]]:
    """Return a sample's tokens with those of its media, which have weight 0, and their weights."""
    following = iter(media)
    ids: list[int] = []
    weights: list[float] = []
    for token, weight in zip(sample.ids.tolist(), sample.weights.tolist(), strict=True):
        new = CONTENTS[next(following)].tolist() if token == IMAGE_ID else [token]
        ids += new
        weights += [0.0 if token == IMAGE_ID else weight] * len(new)
    return ids, weights


def kept(sample: TokenizedSample, media: list[int]) -> list[int]:
    """Return those of them up to the last one that predicts a target, or to the end of the last media."""
    ids, weights = expanded(sample, media)
    predictors = [k - 1 for k in range(1, len(ids)) if weights[k] > 0]
    places = [k for k, i in enumerate(ids) if i == IMAGE_ID]
    return ids[: max(predictors + places) + 1] if predictors else ids


def triples_of(
    sample: TokenizedSample, factor: float, media: list[int]
) -> Counter[tuple[int, int, float]]:
    """Count the (position, target, weight) triples of one sample, worked out token by token."""
    triples: Counter[tuple[int, int, float]] = Counter()
    ids, weights = expanded(sample, media)
    for k in range(1, len(ids)):
        if weights[k] > 0:
            triples[k - 1, ids[k], float(np.float32(weights[k]) * np.float32(factor))] += 1
    return triples


def pack(trees: list[TokenTree], max_tokens: int) -> list[PackedBatch]:
    """Pack trees into micro-batches of at most `max_tokens`, as the loader does."""
    bins = first_fit([tree.tokens for tree in trees], max_tokens)
    return [assemble([trees[i] for i in chosen])[0] for chosen in bins]


def visible(batch: PackedBatch) -> list[list[int]]:
    """Return for each token the positions it attends to, in order, as `units` define them."""
    seen: list[list[int]] = [[] for _ in batch.input_ids]
    for q0, q1, p0, p1 in batch.units.tolist():
        for q in range(q0, q1):
            seen[q] += [*range(p0, p1), *range(q0, q + 1)]
    return seen


@given(st.lists(families(), min_size=1, max_size=5))
@settings(deadline=None)
def test_every_sample_has_its_own_tokens_positions_and_attention(many: list[Family]) -> None:
    numbers = np.cumsum([0, *(len(f.samples) for f in many)])
    trees = [tree_of(f, int(n)) for f, n in zip(many, numbers, strict=False)]
    batch, layouts = assemble(trees)
    ids, positions = batch.input_ids.tolist(), batch.position_ids.tolist()
    seen = visible(batch)
    samples = [kept(s, f.media) for f in many for s in f.samples]
    found = []
    for tree in layouts:
        for first, end, number in tree.branches:
            own = samples[number]
            places = [*range(*tree.prefix), *range(first, end)]
            assert [ids[p] for p in places] == own
            assert [positions[p] for p in places] == list(range(len(own)))
            for k, place in enumerate(places):
                assert seen[place] == places[: k + 1]  # itself and its own past only
            found.append(number)
    assert sorted(found) == list(range(len(samples)))
    assert len(ids) == sum(t.tokens for t in trees)  # and no other token


@given(st.lists(families(), min_size=1, max_size=5))
@settings(deadline=None)
def test_targets_and_weights_are_those_of_the_samples(many: list[Family]) -> None:
    expected: Counter[tuple[int, int, float]] = Counter()
    for family in many:
        for sample, factor in zip(family.samples, family.factors, strict=True):
            expected += triples_of(sample, factor, family.media)
    batch, _ = assemble([tree_of(f) for f in many])
    positions = batch.position_ids[batch.loss_positions].tolist()
    found = zip(positions, batch.targets.tolist(), batch.loss_weights.tolist(), strict=True)
    assert Counter(found) == expected


@given(st.lists(families(), min_size=1, max_size=12))
@settings(deadline=None)
def test_packing_keeps_every_token_within_the_window_and_is_deterministic(
    many: list[Family],
) -> None:
    trees = [tree_of(f) for f in many]
    window = max(t.tokens for t in trees) + 5
    batches = pack(trees, window)
    assert all(len(b.input_ids) <= window for b in batches)
    packed_ids = Counter(i for b in batches for i in b.input_ids.tolist())
    assert packed_ids == Counter(
        i for t in trees for part in (t.prefix, *(b.ids for b in t.branches)) for i in part.tolist()
    )
    again = pack(trees, window)
    assert [b.input_ids.tolist() for b in batches] == [b.input_ids.tolist() for b in again]


@given(st.lists(families(), min_size=1, max_size=5))
@settings(deadline=None)
def test_image_slots_are_in_the_order_of_the_images(many: list[Family]) -> None:
    batch, layouts = assemble([tree_of(f) for f in many])
    images = [m for tree in layouts for m in tree.media]
    assert images == [m for f in many for m in f.media]
    assert (batch.input_ids[batch.image_slots] == IMAGE_ID).all()
    slots = iter(batch.image_slots.tolist())
    ids = batch.input_ids.tolist()
    for m in images:  # in one piece, with the timestamps between frames
        first = None
        for offset, token in enumerate(CONTENTS[m].tolist()):
            if token == IMAGE_ID:
                slot = next(slots)
                first = slot - offset if first is None else first
        assert first is not None
        assert ids[first : first + len(CONTENTS[m])] == CONTENTS[m].tolist()
    assert next(slots, None) is None


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 90))
@settings(deadline=None)
def test_first_fit_is_a_partition_without_two_bins_that_fit_in_one(
    lengths: list[int], capacity: int
) -> None:
    bins = first_fit(lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert all(load <= capacity for load in loads)
    # The first item of a later bin does not fit into an earlier bin.
    for early in range(len(bins)):
        for late in range(early + 1, len(bins)):
            assert loads[early] + lengths[bins[late][0]] > capacity


def test_first_fit_places_the_longest_first() -> None:
    assert first_fit([2, 5, 3, 5], 8) == [[1, 2], [3, 0]]


def test_a_target_right_after_the_prefix_is_predicted_once_for_each_branch() -> None:
    """The last image token occurs once, and predicts the first token of every branch."""
    samples = [
        TokenizedSample(ids=np.array([1, IMAGE_ID, t], np.int32), weights=np.ones(3, np.float32))
        for t in (4, 5)
    ]
    batch, _ = assemble([tree_of(Family(samples, [1.0, 0.5], [0]))])
    # No branch has tokens of its own: the image predicts their only targets.
    assert batch.input_ids.tolist() == [1, IMAGE_ID, IMAGE_ID, IMAGE_ID]
    assert batch.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.loss_positions.tolist() == [3, 3]
    assert batch.targets.tolist() == [4, 5]
    assert batch.loss_weights.tolist() == [1.0, 0.5]
    assert batch.units.tolist() == [[0, 4, 0, 0]]


def test_branches_of_different_beginnings_are_an_error() -> None:
    samples = [
        TokenizedSample(ids=np.array([t, IMAGE_ID, 4], np.int32), weights=np.ones(3, np.float32))
        for t in (1, 2)
    ]
    with pytest.raises(AssertionError, match="different beginnings"):
        tree_of(Family(samples, [1.0, 1.0], [0]))
