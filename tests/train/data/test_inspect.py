"""A packed micro-batch as text.

print(inspect_text(next(loader), tokenizer, trees))    # python -m train.run --inspect
"""

from __future__ import annotations

import re
from dataclasses import replace

from tests.support.feature_caches import World, ask, key_of
from tests.support.trained_runs import turns
from train.data.inspect import inspect_text
from train.data.schedule import SinglePass


def inspected(world: World) -> str:
    """Return the only micro-batch of data set `d` as text."""
    trees = world.trees(world.join())
    with world.load(SinglePass(trees, 8)) as loader:
        (micro,) = loader
        return inspect_text(micro, world.tokenizer, trees)


def test_the_text_shows_shared_images_branches_and_supervised_tokens(world: World) -> None:
    world.write(
        d=[
            ask("1", ["a"], "<image>how many?", "two"),
            ask("2", ["a"], "<image>which?", "red", weight=0.5),
            ask("3", [], "hello", "hi\nyou"),
        ]
    )
    world.encode(["a"])
    text = inspected(world)
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


def test_the_text_shows_each_frame_with_its_time(world: World) -> None:
    world.write(d=[ask("1", ["video b", "p"], "<image> or <image>?", "no")])
    world.encode(["p"])
    world.encode_videos({"video b": 0.8})
    text = inspected(world)
    video, image = key_of("video b")[:12], key_of("p")[:12]
    assert "1 image, 1 video, 1 sample" in text.splitlines()[0]
    assert (
        f"user\\n0.0 [1/3 of video {video}.. x1 tokens]0.5 [2/3 of video {video}.. x1 tokens]"
        f"0.8 [3/3 of video {video}.. x1 tokens] or [image {image}.. x4 tokens]?<|im_end|>" in text
    )
    assert "«no»«<|im_end|>»" in text


def test_text_that_looks_like_a_mark_or_a_control_token_is_shown_as_text(world: World) -> None:
    world.write(d=[ask("1", ["a"], "<video>what is <image>?", "an <image> and <|im_end|>\n")])
    world.encode(["a"])
    text = inspected(world)
    assert f"user\\n[image {key_of('a')[:12]}.. x4 tokens]what is <image>?<|im_end|>" in text
    assert "«an <image> and \\<|im_end|>\\n»«<|im_end|>»" in text


def test_one_of_several_answers_is_marked(world: World) -> None:
    world.write(d=[ask("1", answer="a", choice="q"), ask("2", answer="b", choice="q"), ask("3")])
    world.encode(["a"])
    text = inspected(world)
    assert re.findall(r"^  (d/.*?) \d+-\d+ ", text, re.MULTILINE) == [
        "d/1 (one of 2 answers)",
        "d/3",
    ]


def test_samples_that_share_all_their_tokens_have_nothing_of_their_own(world: World) -> None:
    world.write(
        d=[
            replace(ask(str(i), ["p"]), messages=turns("hm", "an answer", f"<image> {end}"))
            for i, end in enumerate(("now?", "then?"))
        ]
    )
    world.encode(["p"])
    text = inspected(world)
    assert "d/0: nothing of its own" in text and "d/1: nothing of its own" in text
    supervised = 2 * (len("an answer") + 1)  # the shared answer, once for each
    assert f"{supervised} supervised tokens" in text.splitlines()[0]
    assert text.count("sequence ") == 1
