"""Message trees: which samples share an image, and where trees are split.

trees = build_message_trees(samples, tokens, max_tokens=512, max_branches=4, placeholders=placeholders)
trees.slices(np.array([0]))[0].members    # the samples of the first tree
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cache.store.samples import Message, Sample
from configs import UserError
from tests.support.feature_caches import M, World, ask, names_of
from train.data.message_trees import MessageTrees, TreeSlice
from train.data.schedule import TrainingSchedule


def whole(trees: MessageTrees, number: int | None = None, *, seed: int = 0) -> list[TreeSlice]:
    """Return all trees; of several answers the first, or those that pass `number` takes."""
    passes = None if number is None else np.full(len(trees), number, np.int32)
    return trees.slices(np.arange(len(trees)), seed=seed, passes=passes)


def family(trees: MessageTrees) -> list[list[str]]:
    return [[trees.samples.name_of(int(m)) for m in one.members] for one in whole(trees)]


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
    assert whole(trees)[0].tokens == trees.length[0] + trees.length[2] - (3 + M)


def test_trees_are_split_at_max_branches_and_at_the_window(world: World) -> None:
    world.write(d=[ask(f"{i}", ["a"], "<image> " + "x" * 20, "y" * (i + 1)) for i in range(10)])
    world.encode(["a"])
    joined = world.join()
    assert [len(f) for f in family(world.trees(joined, max_branches=4))] == [4, 4, 2]
    one = world.trees(joined, max_branches=1)
    longest = int(one.length.max())
    for window in (longest, longest + 30, 3 * longest):
        trees = world.trees(joined, max_tokens=window, max_branches=16)
        assert sorted(n for f in family(trees) for n in f) == sorted(names_of(joined))
        tokens = [one.tokens for one in whole(trees)]
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
    assert "--over-long split" in str(refused.value) and "--over-long leave-out" in str(
        refused.value
    )
    assert "--pool" not in str(refused.value), "its text alone is too long"
    with pytest.raises(UserError, match=r"more pooling than now \(encode\.run --pool\)"):
        world.trees(joined, max_tokens=length - 1)
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
    assert "3 samples: left out, because there is no answer" in caplog.text
    assert "d/silent" in caplog.text
    assert "not in the mix: e" in caplog.text
    with pytest.raises(UserError, match=r"no sample has text to learn from \(1 sample without"):
        world.trees(world.join("e"))


def test_answers_to_one_question_are_one_member_with_room_for_the_longest(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def answers(name: str, images: list[str], lengths: list[int], choice: str) -> list[Sample]:
        return [ask(f"{name}{n}", images, "<image>?", "x" * n, choice=choice) for n in lengths]

    world.write(
        d=[
            *answers("a", ["a"], [3, 30, 9], "q1"),
            *answers("b", ["a"], [5], "q2"),
            *answers("c", ["b"], [4, 6], "q1"),  # another image, so another question
            *(replace(ask(f"t{n}", answer="y" * n), choice="q3") for n in (1, 2)),
            *answers("d", ["a"], [8], ""),
            replace(ask("silent", ["a"], "<image>?", weight=0.0), choice="q1"),
        ],
        e=answers("a", ["a"], [3, 4], "q1"),  # another data set
    )
    world.encode(["a", "b"])
    joined = world.join("d", "e")
    trees = world.trees(joined)
    assert family(trees) == [["d/a3", "d/b5", "d/d8"], ["d/c4"], ["d/t1"], ["e/a3"]]
    assert "(9 answers to 4 of them, one an epoch)" in trees.describe()
    drawn = set()
    for number in range(6):
        drawn.add(
            tuple(trees.samples.name_of(int(m)) for s in whole(trees, number) for m in s.members)
        )
    assert {names[0] for names in drawn} == {"d/a3", "d/a30", "d/a9"}
    assert {names[1:3] for names in drawn} == {("d/b5", "d/d8")}
    assert {names[3] for names in drawn} == {"d/c4", "d/c6"}
    assert {names[4] for names in drawn} == {"d/t1", "d/t2"}
    assert {names[5] for names in drawn} == {"e/a3", "e/a4"}

    # The window holds for whichever answer is drawn.
    alone = world.trees(joined, max_branches=1)
    window = int(alone.length.max()) + 3
    tight = world.trees(joined, max_tokens=window)
    assert family(tight)[:3] == [["d/a3"], ["d/b5", "d/d8"], ["d/c4"]]
    for number in range(6):
        assert all(one.tokens <= window for one in whole(tight, number, seed=3))
    # A part of a tree has the answers that the whole one has, and the tokens of its own branches.
    tree, passes = np.array([0]), np.array([4], np.int32)
    (all_of_it,) = trees.slices(tree, passes=passes)
    for low, high in ((0, 1), (0, 2), (1, 3), (2, 3)):
        given = np.array([low]), np.array([high])
        (part,) = trees.slices(tree, *given, passes=passes)
        assert part.members.tolist() == all_of_it.members[low:high].tolist()
        assert part.prefix == (all_of_it.prefix if high - low > 1 else 0)
        lengths = trees.length[part.members]
        assert part.tokens == int(lengths.sum()) - part.prefix * (high - low - 1)
    assert trees.slices(np.arange(0)) == []


def test_which_answer_is_drawn_does_not_depend_on_other_data_sets(world: World) -> None:
    def names(*datasets: str) -> list[list[str]]:
        trees = world.trees(world.join(*datasets))
        return [
            [
                trees.samples.name_of(int(m))
                for one in whole(trees, number, seed=1)
                for m in one.members
                if trees.samples.name_of(int(m)).startswith("d/")
            ]
            for number in range(5)
        ]

    both = [ask(f"{q}{i}", choice=q) for q in "pqrs" for i in range(5)]
    world.write(c=both, d=both)
    world.encode(["a"])
    assert names("d") == names("c", "d")


def test_answers_of_one_question_are_loaded_packed_and_resumed(world: World) -> None:
    world.write(
        d=[
            ask(
                f"{q}-{i}",
                ["a"] if q < 4 else ["b"],
                f"<video>{q}?",
                f"{q}{'x' * i}",
                choice=f"{q}",
            )
            for q in range(6)
            for i in range(3)
        ]
    )
    world.encode(["a", "b"])
    trees = world.trees(world.join(), max_tokens=90)

    def run(start: int, stop: int) -> list[tuple[int, int, tuple[int, ...], list[int]]]:
        schedule = TrainingSchedule(trees, 4, seed=5)
        with world.load(schedule, max_tokens=120, start=start, stop=stop) as loader:
            return [(m.step, m.index, m.sample_numbers, m.packed.targets.tolist()) for m in loader]

    whole = run(0, 9)
    assert [one for one in whole if one[0] >= 4] == run(4, 9)
    samples = [trees.samples.name_of(s) for _, _, numbers, _ in whole for s in numbers]
    # Nine steps of four are six epochs of six questions with three answers each.
    assert Counter(samples) == dict.fromkeys(names_of(trees.samples), 2)
