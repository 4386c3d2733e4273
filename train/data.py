"""From the cache to packed micro-batches: the trainer's one door to its data.

    reader = FeatureReader(find_space(root, None))
    train = join(root, reader, {"demo": None}, split="train", held_out=0.05, min_coverage=0.95)
    tokens = TokenStore.open(root, train.names, tokenizer, folder=Path("runs/.tokens"))
    trees = grow_trees(train, tokens, max_tokens=4096, max_branches=16, picture_tokens=576)
    plan = StepPlan(trees, samples_per_step=32, seed=0)
    with FeatureLoader(plan, tokens, reader, max_tokens=8192, start=0, stop=1000) as loader:
        for micro in loader:
            micro = micro.to(device)
            features = unpack(micro.codes, ...)[micro.pictures]
            loss, _ = vlm.loss(micro.packed, features)
            (loss / micro.step_weight).backward()
            if micro.last:
                optimizer.step()

join.py: which samples have all their features, and where; sample_list.py holds them. text.py: their
tokens. trees.py: samples that share pictures. plan.py: which trees a step takes. packing.py: trees in
one sequence. loader.py: all of it, with the features, a few batches ahead. Here: held-out samples one by
one, and batches as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from cache.layout import CacheRoot
from cache.tables import MediaRef, Message, Sample
from train.join import Join, join
from train.loader import FeatureLoader, MicroBatch
from train.packing import PlacedTree
from train.plan import OnePass, StepPlan
from train.text import TokenStore, messages_of
from train.trees import Trees, grow_trees

__all__ = [
    "FeatureLoader",
    "HeldOut",
    "Join",
    "MicroBatch",
    "OnePass",
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
    rows: npt.NDArray[np.int64]
    """Rows of its pictures, in order."""


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
                        rows=joined.rows[joined.media_of(at)],
                    )
                    at += 1
                start += len(batch)
    assert at == joined.size, "the samples file is shorter than the list made from it"


def inspect_text(micro: MicroBatch, tokenizer: Any, trees: Trees) -> str:
    """A real packed batch as text: what stands where, who sees what, what is learned."""
    packed = micro.packed
    head = (
        f"step {micro.step}, micro-batch {micro.index}: {micro.tokens:,} tokens, "
        f"{_count(len(micro.codes), 'picture')}, {_count(micro.samples, 'sample')}, "
        f"{_count(len(packed.targets), 'supervised token')} of weight "
        f"{float(packed.loss_weights.sum()):,.1f} (the step's: {micro.step_weight:,.1f})"
    )
    lines = [head]
    weights = {
        (int(position), int(target)): float(weight)
        for position, target, weight in zip(
            packed.loss_positions, packed.targets, packed.loss_weights, strict=True
        )
    }
    for number, tree in enumerate(micro.placed):
        lines += _tree_lines(number, tree, _Renderer(micro, tokenizer, trees, weights, tree))
    lines.append(
        "«...» is supervised, «0.2: ...» with that weight; samples see what is shared above them"
    )
    return "\n".join(lines)


def _tree_lines(number: int, tree: PlacedTree, render: _Renderer) -> list[str]:
    first, end = tree.prefix[0], tree.branches[-1][1]
    count = f"{_count(len(tree.media), 'picture')}, {_count(len(tree.branches), 'sample')}"
    lines = [f"sequence {number}: tokens {first}-{end - 1}, {count}"]
    shared_first, shared_end = tree.prefix
    if shared_end > shared_first:
        text = render(shared_first, shared_end, before=shared_first)
        lines.append(f"  shared {shared_first}-{shared_end - 1}: {text}")
    for at, stop, sample in tree.branches:
        text = render(at, stop, before=shared_end - 1)
        positions = render.positions(at, stop)
        lines.append(f"  {render.trees.join.name_of(sample)} {at}-{stop - 1}{positions}: {text}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class _Renderer:
    """Turns stretches of one tree's tokens into text, from the tensors the model is given."""

    def __init__(
        self,
        micro: MicroBatch,
        tokenizer: Any,
        trees: Trees,
        weights: dict[tuple[int, int], float],
        tree: PlacedTree,
    ) -> None:
        self.trees = trees
        self._ids: list[int] = micro.packed.input_ids.tolist()
        self._positions: list[int] = micro.packed.position_ids.tolist()
        self._images = set(micro.packed.image_slots.tolist())
        self._tokenizer = tokenizer
        self._weights = weights
        self._media = iter(tree.media)

    def positions(self, first: int, end: int) -> str:
        """The positions the model is told."""
        return f" (positions {self._positions[first]}-{self._positions[end - 1]})"

    def __call__(self, first: int, end: int, before: int) -> str:
        """Tokens [first, end); `before` is what the first one is predicted from."""
        text = ""
        at = first
        while at < end:
            if at in self._images:
                tokens = self.trees.picture_tokens
                key = self.trees.join.key(next(self._media))[:KEY_SHOWN]
                text += f"[picture {key}.. x{tokens} tokens]"
                at += tokens
                continue
            weight = self._weight(at, first, before)
            stop = at + 1
            while (
                stop < end
                and stop not in self._images
                and self._weight(stop, first, before) == weight
            ):
                stop += 1
            words = self._tokenizer.decode(self._ids[at:stop]).replace("\n", "\\n")
            mark = "" if weight == 1.0 else f"{weight:g}: "
            text += f"«{mark}{words}»" if weight else words
            at = stop
        return text

    def _weight(self, at: int, first: int, before: int) -> float:
        source = at - 1 if at > first else before
        return self._weights.get((source, self._ids[at]), 0.0)
