"""Message trees: which samples share an image, and where trees are split.

trees = build_message_trees(samples, tokens, max_tokens=512, max_branches=4, placeholders=placeholders)
trees.slice(0).members    # the samples of the first tree
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cache.store.samples import Message
from configs import UserError
from tests.support.feature_caches import M, World, ask, names_of
from train.data.message_trees import MessageTrees


def family(trees: MessageTrees) -> list[list[str]]:
    return [
        [trees.samples.name_of(int(m)) for m in trees.slice(t).members] for t in range(len(trees))
    ]


def test_a_tree_has_samples_of_equal_images_and_equal_beginnings(world: World) -> None:
    world.write(
        d=[
            ask("1", ["a"], "<image> what?"),
            ask("2", ["b"], "<image> what?"),
            ask("3", ["a"], "<image> where?", "there"),
            ask("4", ["a"], "look: <image>"),
            ask("5", ["a", "b"], "<image> or <image>?"),
            ask("6", ["b", "a"], "<image> or <image>?"),
            ask("7", ["a", "b"], "<image> or <image> then?"),
            ask("8", ["a", "b"], "<image> and <image>?"),
            ask("9"),
            ask("10"),
        ],
        e=[ask("1", ["a"], "<image> what?")],
    )
    world.encode(["a", "b"])
    trees = world.trees(world.join("d", "e"))
    assert family(trees) == [
        ["d/1", "d/3"],
        ["d/2"],
        ["d/4"],
        ["d/5", "d/7"],
        ["d/6"],
        ["d/8"],
        ["d/9"],
        ["d/10"],
        ["e/1"],
    ]
    assert trees.dataset.tolist() == [0] * 8 + [1]
    assert trees.first_row[6] == -1
    # Shared: the tokens <|im_start|>, "user" and "\n", then M feature tokens.
    assert trees.prefix.tolist() == [3 + M, 0, 0, 2 * (3 + M) - 3 + len(" or "), 0, 0, 0, 0, 0]
    assert trees.slice(0).tokens == trees.length[0] + trees.length[2] - (3 + M)


def test_trees_are_split_at_max_branches_and_at_the_window(world: World) -> None:
    world.write(d=[ask(f"{i}", ["a"], "<image> " + "x" * 20, "y" * i) for i in range(10)])
    world.encode(["a"])
    joined = world.join()
    assert [len(f) for f in family(world.trees(joined, max_branches=4))] == [4, 4, 2]
    one = world.trees(joined, max_branches=1)
    longest = int(one.length.max())
    for window in (longest, longest + 30, 3 * longest):
        trees = world.trees(joined, max_tokens=window, max_branches=16)
        assert sorted(n for f in family(trees) for n in f) == sorted(names_of(joined))
        tokens = [trees.slice(t).tokens for t in range(len(trees))]
        assert max(tokens) <= window
        # Split as late as possible: the next branch does not fit.
        for t, used in enumerate(tokens[:-1]):
            following = int(trees.members[trees.starts[t + 1]])
            assert used + trees.length[following] - trees.prefix.max() > window


def test_a_sample_longer_than_the_window_is_an_error_that_names_it(world: World) -> None:
    world.write(
        d=[
            ask("short"),
            ask("long", ["a", "b"], answer="x" * 90),
            ask("longest", ["a"], answer="x" * 100),
        ]
    )
    world.encode(["a", "b"])
    joined = world.join()
    length = int(world.trees(joined).length[2])
    with pytest.raises(UserError) as refused:
        world.trees(joined, max_tokens=100)
    assert f"d/longest is {length} tokens long (1 x 4 for images" in str(refused.value)
    assert "2 of 3 samples do not fit" in str(refused.value)
    assert f"--max-sequence-length to {length}" in str(refused.value)
    assert len(world.trees(joined, max_tokens=length).members) == 3


def test_samples_without_supervised_tokens_are_left_out_and_named(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    silent = replace(ask("silent", ["a"]), messages=(Message(role="user", content="hm"),))
    world.write(d=[ask("1"), silent, ask("nothing", weight=0.0)], e=[silent])
    world.encode(["a"])
    trees = world.trees(world.join(mix={"d": 0.5, "e": 0.5}))
    assert family(trees) == [["d/1"]]
    assert (trees.names, trees.mix) == (("d",), (1.0,))
    assert "3 samples have no assistant words" in caplog.text
    assert "d/silent" in caplog.text
    assert "not in the mix: e" in caplog.text
    with pytest.raises(UserError, match="no sample has assistant words"):
        world.trees(world.join("e"))
