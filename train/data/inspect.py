"""Packed batches as text, for `python -m train.run --inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from train.data.loader import MicroBatch
from train.data.message_trees import Trees
from train.data.packing import PlacedTree
from train.data.sample_list import Join

KEY_SHOWN = 12
"""Hex digits of an image's or a video's key in the text."""


def inspect_text(micro: MicroBatch, tokenizer: Any, trees: Trees) -> str:
    """A real packed batch as text: what stands where, who sees what, what is learned."""
    packed = micro.packed
    media = {m for tree in micro.placed for m in tree.media}
    head = (
        f"step {micro.step}, micro-batch {micro.index}: {micro.tokens:,} tokens, "
        f"{_seen(media, trees.join)}, {_count(micro.samples, 'sample')}, "
        f"{_count(len(packed.targets), 'supervised token')} of weight "
        f"{float(packed.loss_weights.sum()):,.1f} (the step's: {micro.step_weight:,.1f})"
    )
    lines = [head]
    for number, tree in enumerate(micro.placed):
        lines += _tree_lines(number, tree, _Renderer(micro, tokenizer, trees, tree))
    lines.append(
        "«...» is supervised, «0.2: ...» with that weight; samples see what is shared above them; "
        "a sample's last word is only predicted, never read"
    )
    return "\n".join(lines)


def _tree_lines(number: int, tree: PlacedTree, render: _Renderer) -> list[str]:
    first, end = tree.prefix[0], tree.branches[-1][1]
    count = f"{_seen(tree.media, render.trees.join)}, {_count(len(tree.branches), 'sample')}"
    lines = [f"sequence {number}: tokens {first}-{end - 1}, {count}"]
    shared_first, shared_end = tree.prefix
    if shared_end > shared_first:
        text = render(shared_first, shared_end, before=shared_first)
        lines.append(f"  shared {shared_first}-{shared_end - 1}: {text}")
    for at, stop, sample in tree.branches:
        name = render.trees.join.name_of(sample)
        if stop == at:
            lines.append(f"  {name}: nothing of its own")
            continue
        text = render(at, stop, before=shared_end - 1) + render.unread(stop)
        lines.append(f"  {name} {at}-{stop - 1}{render.positions(at, stop)}: {text}")
    return lines


def _seen(media: Iterable[int], join: Join) -> str:
    videos = [join.is_video(m) for m in media]
    images = _count(len(videos) - sum(videos), "image")
    return f"{images}, {_count(sum(videos), 'clip')}" if any(videos) else images


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class _Renderer:
    """Turns stretches of one tree's tokens into text, from the tensors the model is given."""

    def __init__(self, micro: MicroBatch, tokenizer: Any, trees: Trees, tree: PlacedTree) -> None:
        packed = micro.packed
        self.trees = trees
        self._ids: list[int] = packed.input_ids.tolist()
        self._positions: list[int] = packed.position_ids.tolist()
        self._images = set(packed.image_slots.tolist())
        self._tokenizer = tokenizer
        self._predicted: dict[int, list[tuple[int, float]]] = {}  # place -> what, and its weight
        triples = (packed.loss_positions, packed.targets, packed.loss_weights)
        for source, target, weight in zip(*(t.tolist() for t in triples), strict=True):
            self._predicted.setdefault(source, []).append((target, weight))
        self._rows = iter([row for m in tree.media for row in self._names(m)])

    def _names(self, media: int) -> list[tuple[str, int]]:
        """For each row of an image or video its text, and how many tokens it stands for."""
        join, places = self.trees.join, self.trees.places
        key = join.key(media)[:KEY_SHOWN]
        if not join.is_video(media):
            size = places.image_tokens
            return [(f"[image {key}.. x{size} tokens]", size)]
        size, count = places.frame_tokens, len(join.rows_of(media))
        return [
            (f"[{i}/{count} of video {key}.. x{size} tokens]", size) for i in range(1, count + 1)
        ]

    def positions(self, first: int, end: int) -> str:
        """The positions the model is told."""
        return f" (positions {self._positions[first]}-{self._positions[end - 1]})"

    def __call__(self, first: int, end: int, before: int) -> str:
        """Tokens [first, end); `before` is what the first one is predicted from."""
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

    def unread(self, end: int) -> str:
        """What the last token of a branch is to predict, which does not stand in the sequence."""
        return "".join(self._words([t], weight) for t, weight in self._predicted.get(end - 1, ()))

    def _words(self, ids: list[int], weight: float) -> str:
        words = self._tokenizer.decode(ids).replace("\n", "\\n")
        mark = "" if weight == 1.0 else f"{weight:g}: "
        return f"«{mark}{words}»" if weight else words

    def _weight(self, at: int, first: int, before: int) -> float:
        source = at - 1 if at > first else before
        return dict(self._predicted.get(source, ())).get(self._ids[at], 0.0)
