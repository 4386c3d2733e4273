"""Held-out samples one by one, and packed batches as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.feature_caches import (
    World,
    ask,
    key_of,
    mixed_samples,
    mixed_world,
    names_of,
    new_world,
)
from train.data.inspect import inspect_text
from train.data.loader import FeatureLoader
from train.data.schedule import SinglePass
from train.evaluate.questions import evaluation_samples


@pytest.fixture
def world(tmp_path: Path) -> World:
    return new_world(tmp_path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> World:
    return mixed_world(tmp_path_factory.mktemp("mixed"))


def test_held_out_samples_come_with_words_and_rows_in_order(mixed: World) -> None:
    joined = mixed.join("e", "d", split="val", held_out=0.4)
    found = list(evaluation_samples(mixed.root, joined))
    assert [f"{h.sample.dataset}/{h.sample.id}" for h in found] == names_of(joined)
    everything = {
        f"{name}/{s.id}": s
        for name, samples in (("d", mixed_samples(60, 0)), ("e", mixed_samples(30, 1)))
        for s in samples
    }
    for held in found:
        source = everything[f"{held.sample.dataset}/{held.sample.id}"]
        assert held.sample == replace(source, dataset=held.sample.dataset)
        assert held.messages == [(m.role, m.content, m.weight) for m in source.messages]
        keys = [key_of(Path(m.source).stem) for m in source.media]
        rows = [int(row) for m in held.media for row in joined.rows_of(m)]
        assert rows == mixed.reader.lookup("image", keys).tolist()


def test_inspect_shows_shared_images_branches_and_what_is_learned(world: World) -> None:
    world.write(
        d=[
            ask("1", ["a"], "<image>how many?", "two"),
            ask("2", ["a"], "<image>which?", "red", weight=0.5),
            ask("3", [], "hello", "hi\nyou"),
        ]
    )
    world.encode(["a"])
    joined = world.join()
    trees = world.trees(joined)
    with FeatureLoader(
        SinglePass(trees, 8), world.tokens(joined), world.reader, max_tokens=512
    ) as loader:
        text = inspect_text(next(loader), world.tokenizer, trees)
    key = key_of("a")[:12]
    start, end = "<|im_start|>", "<|im_end|>\\n"
    assert (
        text
        == f"""\
step 0, micro-batch 0: 57 tokens, 1 image, 3 samples, 15 supervised tokens of weight 13.0 (the step's: 13.0)
sequence 0: tokens 0-37, 1 image, 2 samples
  shared 0-6: {start}user\\n[image {key}.. x4 tokens]
  d/1 7-23 (positions 7-23): how many?{end}{start}assistant\\n«two»«<|im_end|>»
  d/2 24-37 (positions 7-20): which?{end}{start}assistant\\n«0.5: red»«0.5: <|im_end|>»
sequence 1: tokens 38-56, 0 images, 1 sample
  d/3 38-56 (positions 0-18): {start}user\\nhello{end}{start}assistant\\n«hi\\nyou»«<|im_end|>»
«...» is supervised, «0.2: ...» with that weight; samples see what is shared above them; \
a sample's last word is only predicted, never read"""
    )
