"""Which samples can be trained on, and how those longer than the window are cut.

samples = fit_window(samples, tokens, placeholders, max_tokens=4096, over_long="split")
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.store.samples import Message, Sample
from configs import UserError
from model.language.chat_template import TokenizedSample, find_turns, tokenize_messages
from model.language.tokenizer import byte_tokenizer
from tests.support.feature_caches import M, World, ask, names_of, new_world, ref
from tests.support.trained_runs import turns
from train.data.inspect import inspect_text
from train.data.schedule import SinglePass, TrainingSchedule
from train.data.tokens import TokenStore
from train.data.usable import NothingToLearnError, cut_sample, exchange_starts, learnable

TOKENIZER = byte_tokenizer(())
STORE = TokenStore([], TOKENIZER)


def chat(name: str, images: list[str], *contents: str, **more: Any) -> Sample:
    """Return a sample of several turns, the user's first."""
    return replace(ask(name, images), messages=turns(*contents), **more)


def spoken(text: TokenizedSample) -> list[tuple[int, float]]:
    """Return the supervised tokens with their weights."""
    chosen = text.weights > 0
    return list(zip(text.ids[chosen].tolist(), text.weights[chosen].tolist(), strict=True))


# ---- samples without text


def test_samples_without_text_stop_no_other_sample(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    alone = replace(ask("alone", ["a"]), messages=())
    misfit = ask("misfit", ["a", "b"], "<image> what?")
    world.write(
        d=[alone, ask("1", ["a"]), misfit, replace(alone, id="2"), ask("3", ["a"], answer="")]
    )
    world.encode(["a", "b"])
    joined = world.join()
    found = learnable(joined, world.tokens(joined))
    assert names_of(found) == ["d/1"]
    assert found.digest == joined.digest
    assert (
        "3 samples: left out, because there is no answer to learn from; first d/alone"
        in caplog.text
    )
    assert (
        "1 sample: left out, because their media do not fit their messages; first d/misfit: 2 media"
        in (caplog.text)
    )
    assert len(world.trees(joined)) == 1


def test_nothing_to_learn_at_all_is_one_error_that_counts(world: World) -> None:
    alone = replace(ask("alone", ["a"]), messages=())
    world.write(d=[alone, ask("misfit", ["a", "b"], "<video>?")])
    world.encode(["a", "b"])
    joined = world.join()
    with pytest.raises(NothingToLearnError) as refused:
        world.trees(joined)
    assert "d: no sample has text to learn from (1 sample without an answer; 1 whose" in str(
        refused.value
    )
    assert "first d/misfit: 2 media but 1 mark" in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- cutting one sample


messages = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "user", "assistant", "assistant"]),
        st.lists(st.sampled_from(["<image>", "<video>", "word ", "x"]), max_size=6).map("".join),
        st.sampled_from([0.0, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


@given(messages, st.integers(0, 4), st.lists(st.integers(0, 30), min_size=4), st.integers(1, 400))
@settings(deadline=None, max_examples=300)
def test_parts_have_the_answers_of_the_sample_once_and_their_context(
    said: list[tuple[str, str, float]], media: int, extra: list[int], window: int
) -> None:
    try:
        whole = tokenize_messages(TOKENIZER, said, media)
    except ValueError:
        return
    added = np.array(extra[:media], dtype=np.int64)
    all_turns = find_turns(TOKENIZER, whole.ids)
    assert [(t.role, t.end) for t in all_turns][-1] == (said[-1][0], len(whole.ids))
    parts = cut_sample(whole, added, STORE, window)
    cuts = [STORE.cut(whole, all_turns, first, end) for first, end, _, _ in parts]
    # Every supervised token is in one part, in order and with its weight.
    assert [pair for cut in cuts for pair in spoken(cut)] == spoken(whole)
    starts = exchange_starts(all_turns)
    image = STORE.image_token_id
    for number, ((first, end, count, fits), cut) in enumerate(zip(parts, cuts, strict=True)):
        record = STORE.record(cut)
        length = int(record["used"]) + int(added[:count].sum())
        assert (length <= window) == fits
        so_far = whole.ids[: all_turns[end - 1].end]
        assert count == int((cut.ids == image).sum()) == int((so_far == image).sum())
        assert first in starts and (end in starts or end == len(all_turns))
        if not fits:  # nothing smaller to cut it into
            assert starts.index(first) + 1 == (starts.index(end) if end in starts else len(starts))
        before = [t for t in all_turns[:first] if t.role == "system"]
        found = find_turns(TOKENIZER, cut.ids)
        assert [t.role for t in found] == [t.role for t in [*before, *all_turns[first:end]]]
        # The text is unchanged; only placeholders of earlier media are new.
        for new, old in zip(found, [*before, *all_turns[first:end]], strict=True):
            content, was = cut.ids[new.content : new.end], whole.ids[old.content : old.end]
            assert content[content != image].tolist() == was[was != image].tolist()
        if fits and number + 1 < len(parts) and parts[number + 1][0] == end:  # as few parts as fit
            following = next((s for s in starts if s > end), len(all_turns))
            more = STORE.record(STORE.cut(whole, all_turns, first, following))
            assert int(more["used"]) + int(added[: int(more["images"])].sum()) > window


def test_a_sample_is_cut_after_an_answer_and_before_a_question() -> None:
    def starts(*roles: str) -> list[int]:
        text = tokenize_messages(TOKENIZER, [(role, "x", 1.0) for role in roles], 0)
        return exchange_starts(find_turns(TOKENIZER, text.ids))

    assert starts("user", "assistant", "user", "assistant") == [0, 2]
    assert starts("system", "user", "assistant", "assistant", "user", "assistant") == [0, 4]
    assert starts("user", "user", "assistant") == [0]
    assert starts("user", "assistant", "system", "user", "assistant") == [0, 2]
    assert starts("user", "assistant", "system", "assistant") == [0]
    assert starts("assistant", "user", "assistant") == [0, 1]


# ---- lists with parts


def test_a_long_conversation_is_trained_in_parts_with_its_images(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    talk = ("<image>one?", "1" * 20, "<video>two?", "2" * 20, "three?", "3" * 20, "four?", "4" * 90)
    system = Message(role="system", content="be brief")
    long = chat("long", ["a", "b"], *talk, weight=0.5)
    long = replace(long, messages=(system, *long.messages))
    world.write(d=[ask("short", ["a"]), long, ask("last")])
    world.encode(["a", "b"])
    joined = world.join()
    trees = world.trees(joined, max_tokens=80, over_long="split")
    assert names_of(trees.samples) == [
        "d/short",
        "d/long turns 1-3",
        "d/long turns 4-5",
        "d/long turns 6-7",
        "d/last",
    ]
    assert (
        "1 of 3 samples are longer than the window of 80 tokens: cut between turns into 3 parts; 1 part "
        "too long alone: left out, first d/long turns 8-9"
    ) in caplog.text
    assert trees.samples.digest == joined.digest
    assert [len(trees.samples.media_of(i)) for i in range(5)] == [1, 1, 2, 2, 0]
    with world.load(SinglePass(trees, 8)) as loader:
        micro_batches = list(loader)
        text = "\n".join(inspect_text(m, world.tokenizer, trees) for m in micro_batches)
    lines = sorted(line for line in text.splitlines() if line.startswith("  d/long"))
    words = [line.split(": ", 1)[1] for line in lines]
    head = "<|im_start|>system\\nbe brief<|im_end|>\\n<|im_start|>user\\n"
    assert len(words) == 3
    assert all(line.startswith(f"{head}[image ") for line in words)
    assert words[0].endswith(
        f"x{M} tokens]one?<|im_end|>\\n<|im_start|>assistant\\n«0.5: {'1' * 20}»«0.5: <|im_end|>»"
    )
    assert [line.count("[image ") for line in words] == [1, 2, 2]
    assert "tokens]two?<" in words[1] and "tokens]three?<" in words[2]
    assert "one?" not in words[1] and "two?" not in words[2]
    # Images and text of a part are loaded as for any sample.
    assert sum(m.samples for m in micro_batches) == 5


@given(seed=st.integers(0, 10**6), window=st.integers(60, 200))
@settings(deadline=None, max_examples=15)
def test_weights_of_parts_and_lost_parts_are_those_of_the_samples(
    tmp_path_factory: pytest.TempPathFactory, seed: int, window: int
) -> None:
    world = new_world(tmp_path_factory.mktemp("parts"))
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(8):
        images = [f"p{j}" for j in rng.integers(0, 4, rng.integers(0, 4))]
        count = 2 * int(rng.integers(1, 6))
        said = ["w" * int(rng.integers(1, 25)) for _ in range(count)]
        for place in rng.integers(0, count // 2, len(images)):
            said[2 * place] += "<image>"
        samples.append(chat(str(i), images, *said, weight=float(rng.choice([0.5, 2.0]))))
    world.write(d=samples)
    world.encode([f"p{j}" for j in range(4)])
    joined = world.join()
    whole = world.trees(joined, max_tokens=10**4)
    try:
        cut = world.trees(joined, max_tokens=window, over_long="split")
    except UserError:
        assert window < int(whole.length.max())
        return
    assert int(cut.length[cut.members].max()) <= window
    assert sorted(cut.members.tolist()) == list(range(cut.samples.size))
    per_sample = np.bincount(cut.samples.index, cut.loss_weight, minlength=8)
    text = world.tokens(joined)
    for i in range(8):
        of = np.flatnonzero(joined.index == i)[0]
        extra = cut.placeholders.lengths(joined)[joined.media_of(of)] - 1
        every = text.of(joined, of)
        lost = [
            text.record(text.cut(every, text.turns(every), first, end))["loss_weight"]
            for first, end, _, fits in cut_sample(every, extra, text, window)
            if not fits and whole.length[of] > window
        ]
        assert per_sample[i] + sum(lost) * joined.weight[of] == pytest.approx(whole.loss_weight[of])
    if (whole.length <= window).all():
        assert names_of(cut.samples) == names_of(joined)


def test_leave_out_counts_and_names(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.write(d=[ask("1"), ask("2", answer="x" * 90), ask("3", answer="x" * 100)])
    world.encode(["a"])
    joined = world.join()
    trees = world.trees(joined, max_tokens=80, over_long="leave-out")
    assert names_of(trees.samples) == ["d/1"]
    assert (
        "2 of 3 samples are longer than the window of 80 tokens: left out (--over-long leave-out), first d/2"
        in caplog.text
    )
    with pytest.raises(
        UserError, match=r"nothing is left to train on; raise --max-sequence-length"
    ):
        world.trees(joined, max_tokens=10, over_long="leave-out")
    with pytest.raises(
        UserError, match=r"nothing is left to train on; raise --max-sequence-length"
    ):
        world.trees(joined, max_tokens=10, over_long="split")


def test_parts_of_one_conversation_are_drawn_like_samples(world: World) -> None:
    """A step does not depend on how the list came about; a resumed run computes the parts again."""
    said = [text for i in range(12) for text in (f"question {i}?", f"answer {i}")]
    world.write(d=[chat("long", [], *said), *(ask(str(i)) for i in range(5))])
    world.encode(["a"])
    joined = world.join()
    drawn = []
    for _ in range(2):  # as in a run and in its resumption
        trees = world.trees(joined, max_tokens=100, over_long="split")
        schedule = TrainingSchedule(trees, 4, seed=0)
        members = [int(m) for n in range(12) for s in schedule.step(n).slices for m in s.members]
        drawn.append([trees.samples.name_of(m) for m in members])
    assert drawn[0] == drawn[1]
    parts = {name for name in drawn[0] if "turns" in name}
    assert len(parts) > 3
    epoch = schedule.samples_per_epoch
    assert epoch == 5 + len(parts)
    assert sorted(drawn[0][:epoch]) == sorted(names_of(trees.samples))


# ---- parts and several answers


def test_answers_that_are_cut_are_drawn_part_by_part(world: World) -> None:
    talks = [
        Sample(
            id=f"{kind}",
            dataset="",
            messages=turns("one?", kind * 20, "two?", kind * 20),
            media=(ref("a"),),
            choice="q",
        )
        for kind in "xyz"
    ]
    world.write(d=talks)
    world.encode(["a"])
    trees = world.trees(world.join(), max_tokens=60, over_long="split")
    assert len(trees.members) == 2
    assert trees.choices.slots.tolist() == [0, 1]
    schedule = TrainingSchedule(trees, 4, seed=0)
    members = [int(m) for n in range(3) for s in schedule.step(n).slices for m in s.members]
    names = [trees.samples.name_of(m) for m in members]
    assert sorted(names[:6]) == sorted(names_of(trees.samples))  # three epochs of two parts


def test_an_answer_that_is_too_long_leaves_the_other_answers(world: World) -> None:
    world.write(
        d=[ask(str(n), ["a"], "what?", "x" * n, choice="q") for n in (5, 90, 6)] + [ask("other")]
    )
    world.encode(["a"])
    trees = world.trees(world.join(), max_tokens=80, over_long="leave-out")
    assert names_of(trees.samples) == ["d/5", "d/6", "d/other"]
    assert len(trees.members) == 2 and trees.choices.answers.tolist() == [0, 1]
