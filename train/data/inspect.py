"""Print a packed micro-batch as text: its sequences, what they share, and what is supervised.

    print(inspect_text(next(loader), tokenizer, trees))    # python -m train.run --inspect

The text is rendered from the tensors that the model gets, so it shows what training really uses. An image or
a frame is written as [kind key.. x tokens]. `<image>` and `<video>` in the output are text, and a control
token that the text spells has a backslash before it: \\<|im_end|>.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from configs.text import lines_text
from train.data.loader import MicroBatch
from train.data.message_trees import MessageTrees
from train.data.packing import TreeLayout
from train.data.sample_list import SampleList

KEY_SHOWN = 12
"""Hex digits shown of the key of an image or video."""
SPELT = re.compile(r"<\|\w+\|>")
"""A control token, written in letters."""


def inspect_text(micro: MicroBatch, tokenizer: Any, trees: MessageTrees) -> str:
    """Return a micro-batch as text, one line for each shared prefix and each sample."""
    packed = micro.packed
    media = {m for tree in micro.layouts for m in tree.media}
    head = (
        f"step {micro.step}, micro-batch {micro.index}: {micro.tokens:,} tokens, "
        f"{_count_media(media, trees.samples)}, {_count(micro.samples, 'sample')}, "
        f"{_count(len(packed.targets), 'supervised token')} of weight "
        f"{float(packed.loss_weights.sum()):,.1f} (the step's: {micro.step_weight:,.1f})"
    )
    lines = [head]
    for number, tree in enumerate(micro.layouts):
        lines += _tree_lines(number, tree, _Renderer(micro, tokenizer, trees, tree))
    lines.append(
        "«...» is supervised, «0.2: ...» with that weight; samples see what is shared above them; "
        "a sample's last word is only predicted, never read"
    )
    return lines_text(lines)


def _tree_lines(number: int, tree: TreeLayout, render: _Renderer) -> list[str]:
    first, end = tree.prefix[0], tree.branches[-1][1]
    samples = render.trees.samples
    count = f"{_count_media(tree.media, samples)}, {_count(len(tree.branches), 'sample')}"
    lines = [f"sequence {number}: tokens {first}-{end - 1}, {count}"]
    shared_first, shared_end = tree.prefix
    if shared_end > shared_first:
        text = render(shared_first, shared_end, before=shared_first)
        lines.append(f"  shared {shared_first}-{shared_end - 1}: {text}")
    for at, stop, sample in tree.branches:
        name = samples.name_of(sample)
        if (answers := render.trees.choices.count(sample)) > 1:
            name += f" (one of {answers} answers)"
        if stop == at:
            lines.append(f"  {name}: nothing of its own")
            continue
        text = render(at, stop, before=shared_end - 1) + render.last_target(stop)
        places = render.positions[at:stop]
        lines.append(f"  {name} {at}-{stop - 1} (positions {places[0]}-{places[-1]}): {text}")
    return lines


def _count_media(media: Iterable[int], samples: SampleList) -> str:
    videos = [samples.is_video(m) for m in media]
    images = _count(len(videos) - sum(videos), "image")
    return f"{images}, {_count(sum(videos), 'video')}" if any(videos) else images


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Renderer:
    """Turn token ranges of one tree into text, from the tensors that the model gets."""

    def __init__(
        self, micro: MicroBatch, tokenizer: Any, trees: MessageTrees, tree: TreeLayout
    ) -> None:
        packed = micro.packed
        self.trees = trees
        self._ids: list[int] = packed.input_ids.tolist()
        self.positions: list[int] = packed.position_ids.tolist()
        self._images = set(packed.image_slots.tolist())
        self._tokenizer = tokenizer
        self._controls = {
            number for text, number in tokenizer.get_added_vocab().items() if SPELT.fullmatch(text)
        }
        self._targets: dict[int, list[tuple[int, float]]] = {}  # position -> (target, weight)
        triples = (packed.loss_positions, packed.targets, packed.loss_weights)
        for source, target, weight in zip(*(t.tolist() for t in triples), strict=True):
            self._targets.setdefault(source, []).append((target, weight))
        self._rows = iter([row for m in tree.media for row in self._row_texts(m)])

    def _row_texts(self, item: int) -> list[tuple[str, int]]:
        """Return for each row of an image or video its text, and the number of tokens that represent it."""
        samples, placeholders = self.trees.samples, self.trees.placeholders
        key = samples.key(item)[:KEY_SHOWN]
        if not samples.is_video(item):
            size = placeholders.image_tokens
            return [(f"[image {key}.. x{size} tokens]", size)]
        size, count = placeholders.frame_tokens, len(samples.rows_of(item))
        return [
            (f"[{i}/{count} of video {key}.. x{size} tokens]", size) for i in range(1, count + 1)
        ]

    def __call__(self, first: int, end: int, before: int) -> str:
        """Return tokens [first, end) as text; the token at `before` predicts the first of them."""
        text = ""
        at = first
        while at < end:
            if at in self._images:
                name, size = next(self._rows)
                text += name
                at += size
                continue
            weight = self._weight(at, first, before)
            stop = at + 1
            while (
                stop < end
                and stop not in self._images
                and self._weight(stop, first, before) == weight
            ):
                stop += 1
            text += self._words(self._ids[at:stop], weight)
            at = stop
        return text

    def last_target(self, end: int) -> str:
        """Return the target of a branch's last token, which is not itself part of the sequence."""
        return "".join(self._words([t], weight) for t, weight in self._targets.get(end - 1, ()))

    def _words(self, ids: list[int], weight: float) -> str:
        words = ""
        for control, group in itertools.groupby(ids, self._controls.__contains__):
            text = self._tokenizer.decode(list(group)).replace("\n", "\\n")
            words += text if control else SPELT.sub(r"\\\g<0>", text)
        mark = "" if weight == 1.0 else f"{weight:g}: "
        return f"«{mark}{words}»" if weight else words

    def _weight(self, at: int, first: int, before: int) -> float:
        """Return the loss weight with which the token at `at` is predicted; 0: not supervised."""
        source = at - 1 if at > first else before
        return dict(self._targets.get(source, ())).get(self._ids[at], 0.0)
