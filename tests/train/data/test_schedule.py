"""Schedules: every sample once an epoch, exact quotas, and steps that do not depend on earlier ones.

schedule = TrainingSchedule(trees, samples_per_step=32, seed=0)
schedule.step(1000).slices
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.choices import Choices
from train.data.message_trees import MessageTrees, TreeSlice
from train.data.schedule import (
    Schedule,
    SinglePass,
    TrainingSchedule,
    quotas,
    split_by_rank,
)


def some_trees(
    sizes: Sequence[Sequence[int]],
    mix: tuple[float, ...] | None = None,
    names: Sequence[str] | None = None,
) -> MessageTrees:
    """Return data sets of trees with the given numbers of samples; sample i has i + 1 tokens."""
    flat = np.array([n for data_set in sizes for n in data_set], dtype=np.int64)
    count = int(flat.sum())
    names = tuple(names or (f"set{i}" for i in range(len(sizes))))
    everything = np.arange(count)
    dataset = np.repeat(np.arange(len(sizes)), [len(s) for s in sizes]).astype(np.int16)
    nothing: Any = None  # a schedule needs no texts and no media
    starts = np.concatenate([[0], np.cumsum(flat)])
    return MessageTrees(
        samples=nothing,
        tokens=nothing,
        names=names,
        mix=mix,
        members=everything,
        choices=Choices.none(),
        starts=starts,
        dataset=dataset,
        prefix=np.zeros(len(flat), np.int32),
        first_row=np.arange(len(flat))[::-1].copy(),
        length=(everything % 100 + 1).astype(np.int32),
        loss_weight=np.ones(count),
        placeholders=nothing,
        max_tokens=10**9,
    )


def stream(schedule: Schedule, steps: int, start: int = 0) -> list[int]:
    return [
        int(m)
        for number in range(start, start + steps)
        for p in schedule.step(number).slices
        for m in p.members
    ]


def steps_of(schedule: TrainingSchedule, epochs: int) -> int:
    return -(-schedule.samples_per_epoch * epochs // schedule.samples_per_step)


tree_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=12)
orders = st.sampled_from(["random", "blocks"])


@given(st.lists(tree_sizes, min_size=1, max_size=3), st.integers(4, 9), st.integers(0, 3), orders)
@settings(deadline=None)
def test_without_a_mix_an_epoch_has_every_sample_once(
    sizes: list[list[int]], batch: int, seed: int, order: str
) -> None:
    trees = some_trees(sizes)
    schedule = TrainingSchedule(trees, batch, seed=seed, order=order)  # type: ignore[arg-type]
    samples = stream(schedule, steps_of(schedule, 3))
    total = len(trees.members)
    assert schedule.samples_per_epoch == total
    for epoch in range(3):
        assert sorted(samples[epoch * total : (epoch + 1) * total]) == list(range(total))


@given(
    st.lists(tree_sizes, min_size=2, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.integers(4, 9),
    orders,
)
@settings(deadline=None)
def test_with_a_mix_every_epoch_has_the_exact_quotas(
    sizes: list[list[int]], weights: list[float], batch: int, order: str
) -> None:
    mix = tuple(w / sum(weights[: len(sizes)]) for w in weights[: len(sizes)])
    trees = some_trees(sizes, mix)
    schedule = TrainingSchedule(trees, batch, seed=1, order=order)  # type: ignore[arg-type]
    samples = np.array(stream(schedule, steps_of(schedule, 6)))
    dataset = np.repeat(trees.dataset, np.diff(trees.starts))
    length = schedule.samples_per_epoch
    for epoch in range(6):
        there = np.bincount(dataset[samples[epoch * length :][:length]], minlength=len(sizes))
        assert tuple(there) == schedule.quotas
    # Six quotas are the beginning of a data set's endless stream, so counts differ by at most one.
    for number, _ in enumerate(sizes):
        own = samples[: 6 * length][dataset[samples[: 6 * length]] == number]
        times = np.bincount(own, minlength=len(dataset))[dataset == number]
        assert times.max() - times.min() <= 1


@given(st.lists(tree_sizes, min_size=1, max_size=3), st.integers(4, 9), st.integers(0, 40))
@settings(deadline=None)
def test_a_step_does_not_depend_on_the_step_that_a_run_starts_at(
    sizes: list[list[int]], batch: int, start: int
) -> None:
    trees = some_trees(sizes)
    uninterrupted = TrainingSchedule(trees, batch, seed=3)
    whole = [stream(uninterrupted, 1, number) for number in range(start + 5)]
    resumed = TrainingSchedule(trees, batch, seed=3)
    assert [stream(resumed, 1, number) for number in range(start, start + 5)] == whole[start:]


@given(st.lists(tree_sizes, min_size=1, max_size=3), st.integers(4, 9))
@settings(deadline=None)
def test_a_step_has_samples_per_step_give_or_take_a_tree(
    sizes: list[list[int]], batch: int
) -> None:
    trees = some_trees(sizes)
    schedule = TrainingSchedule(trees, batch, seed=0)
    for number in range(25):
        step = schedule.step(number)
        assert step.samples == sum(len(p.members) for p in step.slices) > 0
        assert abs(step.samples - batch) < trees.largest
        assert step.weight == step.samples  # every weight is 1


def with_answers(trees: MessageTrees, answers: Sequence[int]) -> MessageTrees:
    """Return trees in which member i has answers[i] answers: itself, and others after all members."""
    count = len(trees.members)
    slots = np.flatnonzero(np.array(answers) > 1)
    more = iter(range(count, count + sum(answers)))
    of = [[int(slot), *(next(more) for _ in range(answers[slot] - 1))] for slot in slots]
    every = np.array([a for group in of for a in group], dtype=np.int64)
    total = count + len(every)
    return replace(
        trees,
        choices=Choices(
            slots=slots,
            starts=np.concatenate([[0], np.cumsum([len(group) for group in of])]).astype(np.int64),
            answers=every,
            keys=slots.astype(np.uint64),
        ),
        length=(np.arange(total) % 100 + 1).astype(np.int32),
        loss_weight=np.arange(total) + 1.0,
    )


@given(
    st.lists(tree_sizes, min_size=1, max_size=2),
    st.lists(st.integers(1, 4), min_size=96),
    st.integers(4, 9),
    orders,
    st.integers(0, 30),
)
@settings(deadline=None)
def test_an_epoch_has_one_answer_to_each_question_and_all_of_them_in_turn(
    sizes: list[list[int]], answers: list[int], batch: int, order: str, start: int
) -> None:
    plain = some_trees(sizes)
    count = len(plain.members)
    trees = with_answers(plain, answers[:count])
    choices = trees.choices
    question = np.arange(int(choices.answers.max(initial=count - 1)) + 1)
    for c, slot in enumerate(choices.slots.tolist()):
        question[choices.answers[choices.starts[c] : choices.starts[c + 1]]] = slot
    schedule = TrainingSchedule(trees, batch, seed=2, order=order)  # type: ignore[arg-type]
    passes = 12  # a multiple of 1, 2, 3 and 4
    samples = np.array(stream(schedule, steps_of(schedule, passes)))[: passes * count]
    for epoch in range(passes):  # one sample a question
        assert sorted(question[samples[epoch * count :][:count]]) == list(range(count))
    drawn = Counter(samples.tolist())
    for slot, of in enumerate(answers[:count]):  # all answers equally often
        assert {n for s, n in drawn.items() if question[s] == slot} == {passes // of}
    # The same steps in a resumed run, and whatever answers are drawn, in the same order of questions.
    resumed = TrainingSchedule(trees, batch, seed=2, order=order)  # type: ignore[arg-type]
    assert stream(resumed, 3, start) == stream(schedule, 3, start)
    without = TrainingSchedule(plain, batch, seed=2, order=order)  # type: ignore[arg-type]
    assert question[stream(schedule, 3, start)].tolist() == stream(without, 3, start)
    for number in range(3):
        step = schedule.step(number)
        members = [int(m) for p in step.slices for m in p.members]
        assert step.weight == trees.loss_weight[members].sum()
        assert sum(p.tokens for p in step.slices) == trees.length[members].sum()


def test_a_single_pass_takes_the_first_answer() -> None:
    trees = with_answers(some_trees([[2, 1], [3]]), [3, 1, 2, 1, 4, 2])
    single_pass = SinglePass(trees, 2)
    assert stream(single_pass, len(single_pass)) == [0, 1, 2, 3, 4, 5]


def test_a_tree_larger_than_a_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_branches of at most 3"):
        TrainingSchedule(some_trees([[4, 1]]), 3, seed=0)


@given(st.lists(tree_sizes, min_size=1, max_size=2), st.integers(4, 20), st.integers(2, 4))
@settings(deadline=None)
def test_ranks_split_the_slices_of_a_step_and_balance_tokens(
    sizes: list[list[int]], batch: int, world: int
) -> None:
    schedule = TrainingSchedule(some_trees(sizes), batch, seed=5)
    for number in range(6):
        slices = schedule.step(number).slices
        ranks = split_by_rank(slices, world)
        assert split_by_rank(slices, 1) == [list(slices)]
        split = Counter(tuple(p.members) for rank in ranks for p in rank)
        assert split == Counter(tuple(p.members) for p in slices)
        loads = [sum(p.tokens for p in rank) for rank in ranks]
        assert max(loads) - min(loads) <= max(p.tokens for p in slices)


def test_the_split_balances_tokens_not_slices() -> None:
    slices = [
        TreeSlice(members=np.array([i]), prefix=0, tokens=t) for i, t in enumerate((10, 1, 1, 8))
    ]
    ranks = split_by_rank(slices, 2)
    assert [[p.tokens for p in rank] for rank in ranks] == [[10], [1, 1, 8]]


def test_the_order_depends_on_seed_epoch_and_data_set_name_alone() -> None:
    sizes = [[1] * 50, [1] * 50]
    first = stream(TrainingSchedule(some_trees(sizes), 10, seed=0), 20)
    assert first == stream(TrainingSchedule(some_trees(sizes), 10, seed=0), 20)
    assert first != stream(TrainingSchedule(some_trees(sizes), 10, seed=1), 20)
    alone = stream(TrainingSchedule(some_trees([[1] * 50], names=["set0"]), 10, seed=0), 10)
    assert alone[:50] != alone[50:]  # the second epoch has another order
    other = stream(TrainingSchedule(some_trees([[1] * 50], names=["other"]), 10, seed=0), 10)
    assert alone != other


def test_samples_per_step_do_not_change_the_order() -> None:
    trees = some_trees([[1, 2, 3] * 10, [1] * 9])
    assert stream(TrainingSchedule(trees, 3, seed=2), 100) == stream(
        TrainingSchedule(trees, 12, seed=2), 25
    )


def test_order_blocks_keeps_neighbouring_rows_near_in_time() -> None:
    """A step reads rows of few blocks of 512, for disks that seek slowly."""
    trees = some_trees([[1] * 40_000])
    touched = {}
    for order in ("random", "blocks"):
        schedule = TrainingSchedule(trees, 2000, seed=0, order=order)  # type: ignore[arg-type]
        rows = trees.first_row[stream(schedule, 1)]
        touched[order] = len(np.unique(rows // 512))
    assert touched["random"] == 79  # all blocks
    assert touched["blocks"] <= 17


@given(st.lists(tree_sizes, min_size=1, max_size=3), st.integers(1, 9))
@settings(deadline=None)
def test_a_single_pass_has_every_sample_once_in_order(sizes: list[list[int]], batch: int) -> None:
    trees = some_trees(sizes)
    single_pass = SinglePass(trees, batch)
    assert stream(single_pass, len(single_pass)) == list(range(len(trees.members)))


@given(
    st.lists(st.tuples(st.integers(1, 10**7), st.floats(0.01, 1)), min_size=1, max_size=6),
)
def test_quotas_are_the_shares_of_the_largest_epoch_without_repeats(
    sets: list[tuple[int, float]],
) -> None:
    sizes, weights = [n for n, _ in sets], [w for _, w in sets]
    found = quotas(sizes, weights)
    total = min(n / (w / sum(weights)) for n, w in sets)
    for quota, size, weight in zip(found, sizes, weights, strict=True):
        assert 1 <= quota <= size
        assert quota == 1 or abs(quota - weight / sum(weights) * total) <= 1


def test_quotas_worked_out_by_hand() -> None:
    assert quotas([100, 1000], None) == (100, 1000)
    assert quotas([100, 1000], [0.5, 0.5]) == (100, 100)
    assert quotas([600, 300, 100], [0.6, 0.3, 0.1]) == (600, 300, 100)
    assert quotas([10, 10**6], [0.999, 0.001]) == (10, 1)  # at least one


@pytest.mark.slow
def test_ten_million_samples_are_scheduled_in_seconds() -> None:
    trees = some_trees([[1] * 10_000_000])
    started = time.process_time()
    schedule = TrainingSchedule(trees, 512, seed=0)
    step = schedule.step(1_000_000)  # about 50 epochs in; the steps before are not computed
    assert step.samples == 512
    assert time.process_time() - started < 10
