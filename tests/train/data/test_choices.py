"""Several answers to one question: an epoch takes one, and all of them in turn.

choices.draw(members, 0, seed=0, number=3)    # the members that the fourth pass takes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.choices import Choices, first_answers, shuffled


def some_choices(answers: Sequence[int]) -> tuple[Choices, np.ndarray]:
    """Return questions with the given numbers of answers, and the first answer of each."""
    ends = np.cumsum(answers)
    first = ends - answers
    slots = np.flatnonzero(np.array(answers) > 1)
    of = [np.arange(first[s], ends[s]) for s in slots]
    choices = Choices(
        slots=slots,
        starts=np.concatenate([[0], np.cumsum([len(a) for a in of])]).astype(np.int64),
        answers=np.concatenate([*of, np.zeros(0, np.int64)]).astype(np.int64),
        keys=slots.astype(np.uint64) * np.uint64(7919),
    )
    return choices, first


questions = st.lists(st.integers(1, 5), min_size=1, max_size=9)


@given(questions, st.integers(0, 3), st.integers(0, 50))
@settings(deadline=None)
def test_consecutive_passes_take_every_answer_equally_often(
    answers: list[int], seed: int, block: int
) -> None:
    choices, first = some_choices(answers)
    for slot, count in enumerate(answers):
        passes = range(block * count, (block + 1) * count)
        drawn = [int(choices.draw(first, 0, seed=seed, number=n)[slot]) for n in passes]
        assert sorted(drawn) == list(range(first[slot], first[slot] + count))


@given(questions, st.integers(0, 20), st.data())
@settings(deadline=None)
def test_a_part_of_the_questions_has_the_answers_that_all_have(
    answers: list[int], number: int, data: st.DataObject
) -> None:
    choices, first = some_choices(answers)
    low = data.draw(st.integers(0, len(answers)))
    high = data.draw(st.integers(low, len(answers)))
    every = choices.draw(first, 0, seed=1, number=number)
    some = choices.draw(first[low:high], low, seed=1, number=number)
    assert some.tolist() == every[low:high].tolist()
    assert first.tolist() == (np.cumsum(answers) - answers).tolist()  # unchanged


def test_the_answer_depends_on_the_seed_and_the_question() -> None:
    choices, first = some_choices([6] * 40)
    one = choices.draw(first, 0, seed=0, number=0) - first
    assert len(set(one.tolist())) > 1
    assert (one != choices.draw(first, 0, seed=1, number=0) - first).any()
    drawn = Counter(
        int(place) for n in range(60) for place in choices.draw(first, 0, seed=0, number=n) - first
    )
    assert set(drawn.values()) == {400}  # of 2,400 draws, each of 6 places as often


def test_first_answers_need_every_value_to_be_equal() -> None:
    choice = np.array([-1, 3, 3, -1, 5, 3, 5], np.int32)
    assert first_answers(choice).tolist() == [0, 1, 1, 3, 4, 1, 4]
    media = np.array([9, 1, 2, 9, 1, 1, 1])
    assert first_answers(choice, media).tolist() == [0, 1, 2, 3, 4, 1, 4]
    assert first_answers(np.full(3, -1, np.int32), np.zeros(3)).tolist() == [0, 1, 2]
    assert first_answers(np.zeros(0, np.int32)).tolist() == []


def test_shuffled_is_a_fixed_permutation() -> None:
    assert sorted(shuffled(1000, 0, "pass", "x", 1)) == list(range(1000))
    # A resumed run needs this permutation with every version of numpy.
    assert shuffled(10, 0, "pass", "demo", 0).tolist() == [3, 8, 2, 0, 7, 1, 6, 9, 5, 4]
    positions = np.array([int(np.flatnonzero(shuffled(8, s) == 0)[0]) for s in range(4000)])
    assert np.bincount(positions).min() > 400  # 500 expected at each of 8 positions
