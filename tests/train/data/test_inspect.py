"""A packed micro-batch as text.

print(inspect_text(next(loader), tokenizer, trees))    # python -m train.run --inspect
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.feature_caches import (
    World,
    ask,
    key_of,
    new_world,
)
from train.data.inspect import inspect_text
from train.data.loader import FeatureLoader
from train.data.schedule import SinglePass


@pytest.fixture
def world(tmp_path: Path) -> World:
    return new_world(tmp_path)


def test_the_text_shows_shared_images_branches_and_supervised_tokens(world: World) -> None:
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
