"""Questions: stored samples with their texts and the rows of their media.

for question in questions(root, samples): question.prompt, question.media, question.expected
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache.store.samples import Message
from model.language.chat_template import prompt_ids
from model.language.tokenizer import token_id
from tests.support.feature_caches import (
    ask,
    key_of,
    mixed_samples,
    mixed_world,
    names_of,
    new_world,
)
from tests.support.trained_runs import turns
from train.evaluate.evaluation import scored
from train.evaluate.metrics import choose_metrics
from train.evaluate.questions import questions


def test_questions_have_their_texts_and_rows_in_the_order_of_the_list(tmp_path: Path) -> None:
    mixed = mixed_world(tmp_path)
    joined = mixed.join("e", "d", split="val", held_out=0.4)
    found = list(questions(mixed.root, joined))
    assert [f"{q.sample.dataset}/{q.sample.id}" for q in found] == names_of(joined)
    everything = {
        f"{name}/{s.id}": replace(s, dataset=name)
        for name, samples in (("d", mixed_samples(60, 0)), ("e", mixed_samples(30, 1)))
        for s in samples
    }
    for question in found:
        source = everything[f"{question.sample.dataset}/{question.sample.id}"]
        assert question.sample == source
        *before, last = [(m.role, m.content, m.weight) for m in source.messages]
        assert (question.prompt, question.expected) == (before, last[1])
        keys = [key_of(Path(m.source).stem) for m in source.media]
        rows = [int(row) for m in question.media for row in joined.rows_of(m)]
        assert rows == mixed.reader.lookup("image", keys).tolist()


def test_a_sample_without_an_answer_is_no_question(tmp_path: Path) -> None:
    world = new_world(tmp_path)
    silent = replace(ask("silent"), messages=(Message(role="user", content="hm"),))
    world.write(d=[silent, ask("asked")])
    world.encode(["a"])
    (question,) = questions(world.root, world.join())
    assert question.sample.id == "asked"


def test_a_question_with_several_answers_is_asked_once(tmp_path: Path) -> None:
    world = new_world(tmp_path)
    world.write(
        d=[
            ask("1", ["a"], answer="red", choice="q"),
            ask("2", ["b"], answer="blue"),
            ask("3", ["a"], answer="crimson", choice="q"),
            ask("4", ["b"], answer="other image", choice="q"),
            ask("5", ["a"], answer="red", choice="q"),
        ],
        e=[ask("1", ["a"], answer="green", choice="q")],
    )
    world.encode(["a", "b"])
    found = list(questions(world.root, world.join("d", "e")))
    assert [(q.sample.id, q.expected, q.others) for q in found] == [
        ("1", "red", ("crimson", "red")),
        ("2", "blue", ()),
        ("4", "other image", ()),
        ("1", "green", ()),
    ]


def test_an_answer_is_right_if_it_equals_any_of_them(tmp_path: Path) -> None:
    world = new_world(tmp_path)
    answers = ("Red", "crimson", "red and blue")
    world.write(d=[ask(str(i), ["a"], answer=a, choice="q") for i, a in enumerate(answers)])
    world.encode(["a"])
    joined = world.join()
    asked = list(questions(world.root, joined))
    metrics = choose_metrics(asked, {})
    for given, right in (
        ("red.", True),
        ("Crimson", True),
        ("red and blue", True),
        ("blue", False),
    ):
        (found,) = scored(joined, asked, metrics, [[given], ["crimson"]], 0.05)
        assert (found.correct, found.blind_correct) == (right, True)
        assert (found.expected, found.others) == ("Red", ("crimson", "red and blue"))
        assert (found.metric, found.scores) == ("exact", (float(right),))
        assert found.item == key_of("a")


def test_media_after_the_last_answer_are_not_in_the_prompt(tmp_path: Path) -> None:
    world = new_world(tmp_path)
    talk = turns("<image>one?", "red", "and <video>?")
    first = turns("one?", "red", "<image> is text", "blue", "end")
    world.write(
        d=[
            replace(ask("1", ["a", "b"]), messages=talk),
            replace(ask("2", ["a", "b"]), messages=turns("<video>one <image>?", "red")),
            replace(ask("3", ["a"]), messages=first),
            replace(ask("4", ["b"]), messages=turns("one?", "<image>red")),
        ]
    )
    world.encode(["a", "b"])
    joined = world.join()
    found = list(questions(world.root, joined))
    keys = [[joined.key(m) for m in q.media] for q in found]
    assert keys == [
        [key_of("a")],
        [key_of("a"), key_of("b")],
        [key_of("a")],  # at its mark, which is before the last answer
        [key_of("b")],
    ]
    for question in found:  # as `model.inference` splits it
        ids = prompt_ids(world.tokenizer, question.prompt, len(question.media))
        assert ids.count(token_id(world.tokenizer, "<image>")) == len(question.media)
