"""The questions of an evaluation: stored samples with their texts, and the media to look at.

for question in questions(root, samples):
    question.prompt, question.media    # what the model gets
    question.expected                  # the answer to compare with
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache.format.media_marks import split_at_marks
from cache.store.paths import CacheRoot
from cache.store.samples import Sample, samples_at
from train.data.choices import first_answers
from train.data.sample_list import SampleList
from train.data.tokens import messages_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A sample whose last answer the model is to give."""

    sample: Sample
    """The sample as stored."""
    media: tuple[int, ...]
    """The images and videos of its prompt in order, as indices of the list's media items."""
    others: tuple[str, ...] = ()
    """Other answers to the question, which are right too."""

    @property
    def prompt(self) -> list[tuple[str, str, float]]:
        """The (role, content, weight) of every message before the last answer."""
        return messages_of(self.sample)[: self._last]

    @property
    def expected(self) -> str:
        """The last answer."""
        return self.sample.messages[self._last].content

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.expected, *self.others)

    @property
    def type(self) -> tuple[str, str]:
        """Its data set and question type; a sample without a type has the name of its data set."""
        return self.sample.dataset, self.sample.task or self.sample.dataset

    @property
    def _last(self) -> int:
        last = _last_answer(self.sample)
        assert last is not None, "a question without an answer"
        return last


def questions(root: CacheRoot, samples: SampleList) -> Iterator[Question]:
    """Yield the questions of samples that can be trained on and have an answer, in the order of the list.

    Several answers to one question are one question, at the place of the first.
    """
    first = first_answers(samples.choice, samples.media_hash())
    others: dict[int, list[str]] = {}
    if (first != np.arange(samples.size)).any():
        for at, sample in _stored(root, samples):
            if (of := int(first[at])) != at and (end := _last_answer(sample)) is not None:
                others.setdefault(of, []).append(sample.messages[end].content)
    for at, sample in _stored(root, samples):
        if first[at] == at and _last_answer(sample) is not None:
            media = samples.media_of(at)[: _media_before(sample)].tolist()
            yield Question(sample=sample, media=tuple(media), others=tuple(others.get(at, ())))


def _last_answer(sample: Sample) -> int | None:
    """Return the number of the last message of the assistant; None if there is none."""
    return max((i for i, m in enumerate(sample.messages) if m.role == "assistant"), default=None)


def _media_before(sample: Sample) -> int:
    """Return the number of media in the turns before the last answer; later ones are not in the prompt."""
    turns = [(m.role, m.content) for m in sample.messages]
    texts = split_at_marks(turns, len(sample.media))[: _last_answer(sample)]
    return sum(len(text) - 1 for text in texts)


def _stored(root: CacheRoot, samples: SampleList) -> Iterator[tuple[int, Sample]]:
    """Yield position and stored sample of every sample of the list, in the order of the list."""
    at = 0
    for number, name in enumerate(samples.names):
        chosen = samples.index[samples.dataset == number]
        for sample in samples_at(root, name, chosen):
            yield at, sample
            at += 1
    assert at == samples.size, "the samples file is shorter than the list made from it"
