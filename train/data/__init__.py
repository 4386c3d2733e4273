"""From the cache to packed micro-batches: the trainer's one door to its data.

    reader = FeatureReader(find_space(root, None))
    train = join(root, reader, {"demo": None}, split="train", held_out=0.05, min_coverage=0.95)
    tokens = TokenStore.open(root, train.names, tokenizer, folder=Path("runs/.tokens"))
    places = Placeholders.of(reader.spec, tokenizer)
    trees = grow_trees(train, tokens, max_tokens=4096, max_branches=16, places=places)
    plan = StepPlan(trees, samples_per_step=32, seed=0)
    with FeatureLoader(plan, tokens, reader, max_tokens=8192, start=0, stop=1000) as loader:
        for micro in loader:
            forward.loss(micro).backward()              # see train.forward
            if micro.last:
                optimizer.step()

join.py: which samples have all their features, and where; sample_list.py holds them. text.py: their
tokens. places.py: what stands for an image or video. trees.py: samples that share them. plan.py:
which trees a step takes. packing.py: trees in
one sequence. loader.py: all of it, with the features, a few batches ahead. Here: held-out samples one by
one, and batches as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample
from train.data.join import Join, join
from train.data.loader import FeatureLoader, MicroBatch
from train.data.message_trees import Trees, grow_trees
from train.data.packing import PlacedTree
from train.data.placeholders import Placeholders
from train.data.schedule import OnePass, StepPlan
from train.data.tokens import TokenStore, messages_of

__all__ = [
    "FeatureLoader",
    "HeldOut",
    "Join",
    "MicroBatch",
    "OnePass",
    "Placeholders",
    "StepPlan",
    "TokenStore",
    "Trees",
    "grow_trees",
    "held_out_samples",
    "inspect_text",
    "join",
]

READ_AT_ONCE = 8192
KEY_SHOWN = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """One sample as evaluation wants it: words to answer, rows to look at."""

    sample: Sample
    """As stored: messages, task, media."""
    messages: list[tuple[str, str, float]]
    """(role, content, weight), as the template takes them."""
    media: tuple[int, ...]
    """Its images and videos, in order, as the join numbers them."""


def held_out_samples(root: CacheRoot, joined: Join) -> Iterator[HeldOut]:
    """The samples of a join with their texts, in the order of the list."""
    at = 0
    for number, name in enumerate(joined.names):
        chosen = joined.index[joined.dataset == number]
        start = 0
        with pq.ParquetFile(root.samples(name)) as file:
            for batch in file.iter_batches(batch_size=READ_AT_ONCE):
                here = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
                for row in batch.take(here).to_pylist():
                    messages = tuple(Message(**m) for m in row.pop("messages"))
                    media = tuple(MediaRef(**m) for m in row.pop("media"))
                    sample = Sample(messages=messages, media=media, **row)
                    yield HeldOut(
                        sample=sample,
                        messages=messages_of(sample),
                        media=tuple(joined.media_of(at).tolist()),
                    )
                    at += 1
                start += len(batch)
    assert at == joined.size, "the samples file is shorter than the list made from it"


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
