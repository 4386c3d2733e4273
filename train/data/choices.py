"""Several answers to one question: which samples they are, and which one an epoch takes.

    first = first_answers(samples.choice, samples.media_hash())    # (S,) the first answer of each question
    choices.draw(slot, seed=0, number=3)                           # the answer of the fourth epoch

The answer is a pure function of the seed, the question and the number of the pass over its data set, so a
resumed run and every process draw alike. Of k answers, k passes in a row take each one once.

S samples, N questions (a sample without alternatives is one), C of them with several answers, A answers of
those.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.format.checksums import GOLDEN, mix64

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """The questions that have several answers."""

    slots: Ints
    """(C,) their numbers among the N questions, ascending."""
    starts: Ints
    """(C + 1,) question c has answers[starts[c]:starts[c + 1]]."""
    answers: Ints
    """(A,) positions in the sample list; the first answer of a question first."""
    keys: npt.NDArray[np.uint64]
    """(C,) a number that identifies the question: equal in every run with an equal sample list."""

    @staticmethod
    def none() -> Choices:
        """Return the choices of samples that have no alternatives."""
        empty = np.zeros(0, dtype=np.int64)
        keys = np.zeros(0, dtype=np.uint64)
        return Choices(slots=empty, starts=np.zeros(1, np.int64), answers=empty, keys=keys)

    def count(self, sample: int) -> int:
        """Return how many answers the question of a sample has, itself included."""
        place = np.flatnonzero(self.answers == sample)
        if not len(place):
            return 1
        c = int(np.searchsorted(self.starts, place[0], side="right")) - 1
        return int(self.starts[c + 1] - self.starts[c])

    def draw(self, members: Ints, first: int, *, seed: int, number: int) -> Ints:
        """Return the answers that pass `number` takes for questions [first, first + n).

        Args:
            members: (n,) the first answer of each of the questions.
            first: number of the first of them.
            seed: of the run.
            number: passes over the data set before this one.
        """
        low, high = np.searchsorted(self.slots, [first, first + len(members)]).tolist()
        if low == high:
            return members
        members = members.copy()
        for c in range(low, high):
            answers = self.answers[self.starts[c] : self.starts[c + 1]]
            round_, place = divmod(number, len(answers))
            order = shuffled(len(answers), seed, "answer", int(self.keys[c]), round_)
            members[self.slots[c] - first] = answers[order[place]]
        return members


def first_answers(choice: npt.NDArray[np.int32], *same: npt.NDArray[Any]) -> Ints:
    """Return for each sample the position of the first one that answers the same question: (S,).

    Args:
        choice: (S,) equal for answers to one question; -1: the sample is the only answer.
        same: (S,) values that must be equal too.
    """
    first = np.arange(len(choice))
    several = np.flatnonzero(choice >= 0)
    if len(several):
        keys = [values[several] for values in (choice, *same)]
        order = np.lexsort((several, *keys))
        new = np.ones(len(several), dtype=bool)
        new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
        leaders = several[order][new]
        first[several[order]] = leaders[np.cumsum(new) - 1]
    return first


def shuffled(count: int, *key: int | str) -> Ints:
    """Return a permutation of range(count) that depends on `key` alone.

    It sorts the outputs of splitmix64. They are all different, so every numpy version and every sorting
    algorithm gives the same permutation; numpy's own random streams may change between versions.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    x = np.arange(count, dtype=np.uint64) * GOLDEN
    x += np.frombuffer(digest[:8], dtype="<u8")
    return np.argsort(mix64(x)).astype(np.int64, copy=False)
