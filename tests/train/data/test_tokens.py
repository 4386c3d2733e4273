"""The token store: made once for each (texts, tokenizer, template), complete or absent.

tokens = TokenStore.open(root, ["d"], tokenizer, folder=Path("runs/.tokens"))
tokens.sample(0, 17).ids
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef, Message, Sample, write_samples
from model.language.chat_template import TokenizedSample, tokenize_messages
from model.language.model import load_tokenizer
from model.language.tokenizer import byte_tokenizer
from tests.support.trained_runs import turns
from train.data import tokens
from train.data.tokens import TokenStore, messages_of

TOKENIZER = load_tokenizer("random:qwen3-tiny")


@pytest.fixture
def root(tmp_path: Path) -> CacheRoot:
    """Return a cache with the data set `d`."""
    root = CacheRoot(tmp_path / "cache")
    write_samples(root, "d", some_samples())
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def opened(root: CacheRoot, folder: Path) -> TokenStore:
    return TokenStore.open(root, ["d"], TOKENIZER, folder=folder)


def some_samples(answer: str = "two") -> list[Sample]:
    def sample(name: str, user: str, images: int, weight: float = 1.0) -> Sample:
        return Sample(
            id=name,
            dataset="d",
            messages=turns(user, answer, weight=weight),
            media=tuple(MediaRef(source=f"/{name}/{i}") for i in range(images)),
        )

    return [
        sample("plain", "hello", 0),
        sample("one", "<image> how many?", 1, 0.25),
        sample("two", "<image> or <image>?", 2),
        sample("unmarked", "how many?", 1),
    ]


def all_samples(store: TokenStore, count: int) -> list[tuple[list[int], list[float]]]:
    return [
        (store.sample(0, i).ids.tolist(), store.sample(0, i).weights.tolist()) for i in range(count)
    ]


def test_a_store_has_the_tokens_and_weights_of_the_template(root: CacheRoot, folder: Path) -> None:
    store = opened(root, folder)
    for i, sample in enumerate(some_samples()):
        expected = tokenize_messages(TOKENIZER, messages_of(sample), len(sample.media))
        found = store.sample(0, i)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.weights.tolist() == expected.weights.tolist()
    dataset, index = np.zeros(4, np.int16), np.arange(4)
    records = store.records(dataset, index)
    lengths = records["used"]
    # All tokens but the end mark, which is only predicted, and the newline after it.
    assert lengths.tolist() == [len(store.sample(0, i).ids) - 2 for i in range(4)]
    sums = records["loss_weight"]
    # t, w, o and the end mark; 0.25 each in the second sample.
    assert sums.tolist() == [4.0, 1.0, 4.0, 4.0]
    prefixes, hashes = (records[f] for f in ("prefix", "prefix_hash"))
    for i in range(4):
        ids = store.sample(0, i).ids
        places = np.flatnonzero(ids == store.image_token_id)
        assert prefixes[i] == (places[-1] + 1 if len(places) else 0)
    assert hashes[1] == hashes[3]  # both are "user\n<image>"
    assert len(set(hashes.tolist())) == 3
    assert not list(Path(root.path).rglob("*.bin"))  # the cache is only read


def test_opening_again_tokenises_nothing(
    root: CacheRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = all_samples(opened(root, folder), 4)
    monkeypatch.setattr(tokens, "tokenize_messages", None)  # calling it would fail
    assert all_samples(opened(root, folder), 4) == first


def test_another_text_tokenizer_or_template_makes_another_store(
    root: CacheRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def stores() -> int:
        return len(list(folder.iterdir()))

    opened(root, folder)
    assert stores() == 1
    write_samples(root, "d", some_samples("three"))
    changed = opened(root, folder)
    assert stores() == 2
    words = TokenStore.open(root, ["d"], byte_tokenizer(["three"]), folder=folder)
    assert stores() == 3
    assert len(words.sample(0, 0).ids) < len(changed.sample(0, 0).ids)
    monkeypatch.setattr(tokens, "template_digest", lambda tokenizer: "other")
    opened(root, folder)
    assert stores() == 4


def test_an_interrupted_or_truncated_store_is_made_again(
    root: CacheRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_sample = tokens.tokenize_sample

    def stop(sample: Sample, tok: object) -> object:
        if sample.id == "two":
            raise KeyboardInterrupt
        return tokenize_sample(sample, tok)

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "tokenize_sample", stop)
        with pytest.raises(KeyboardInterrupt):
            opened(root, folder)
    assert list(folder.iterdir()) == []
    whole = all_samples(opened(root, folder), 4)
    for name in tokens.FILES:
        (path,) = folder.glob(f"*/{name}")
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert all_samples(opened(root, folder), 4) == whole
        assert path.read_bytes() == data
    (meta,) = folder.glob("*/meta.json")
    meta.write_text("{")
    assert all_samples(opened(root, folder), 4) == whole


def test_the_weight_of_the_first_token_does_not_count() -> None:
    sample = TokenizedSample(
        ids=np.array([5, 9, 6], np.int32), weights=np.array([1.0, 0.0, 0.5], np.float32)
    )
    record = tokens._record(sample, 3, 9)[0]
    assert (record["loss_weight"], record["prefix"], record["images"]) == (0.5, 2, 1)
    assert record["used"] == 2  # the second token predicts the third, which is left out


def test_two_processes_may_make_one_store_at_the_same_time(
    root: CacheRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = tokens._tokenize

    def overtaken(*arguments: object) -> int:
        monkeypatch.setattr(tokens, "_tokenize", tokenize)
        opened(root, folder)  # the other process finishes first
        return tokenize(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens, "_tokenize", overtaken)
    store = opened(root, folder)
    assert len(all_samples(store, 4)) == 4
    assert len(list(folder.iterdir())) == 1


def test_samples_whose_media_do_not_fit_have_no_tokens_and_a_reason(
    root: CacheRoot, folder: Path
) -> None:
    media = (MediaRef(source="/a"), MediaRef(source="/b"))
    alone = (Message(role="assistant", content="A cat."),)
    write_samples(
        root,
        "d",
        [
            Sample(id="s7", dataset="d", messages=turns("<image> ?", "yes"), media=media),
            *some_samples(),
            Sample(id="s8", dataset="d", messages=alone, media=media),
        ],
    )
    for store in (opened(root, folder), opened(root, folder)):  # made, then mapped
        assert [len(store.sample(0, i).ids) > 0 for i in range(6)] == [False, *[True] * 4, False]
        records = store.records(np.zeros(6, np.int16), np.arange(6))
        assert records["fault"].tolist() == [1, 0, 0, 0, 0, 1]
        assert records["loss_weight"].tolist() == [0.0, 4.0, 1.0, 4.0, 4.0, 0.0]
    (meta,) = folder.glob("*/meta.json")
    faults = json.loads(meta.read_text())["faults"]
    assert faults.keys() == {"0", "5"}
    assert "2 media but 1 mark" in faults["0"] and "no user turn" in faults["5"]


@pytest.mark.parametrize(
    "messages",
    [
        (),
        turns("hm")[:1],
        turns("hm", "yes", weight=0.0),
        turns("hm", ""),
        turns("hm", " \n"),
        (Message(role="system", content="be brief"),),
    ],
)
def test_a_sample_without_text_to_learn_has_no_tokens_and_no_fault(
    messages: tuple[Message, ...],
) -> None:
    media = (MediaRef(source="/a"),)
    sample = Sample(id="a", dataset="d", messages=messages, media=media)
    text, fault = tokens.tokenize_sample(sample, TOKENIZER)
    assert (len(text.ids), len(text.weights), fault) == (0, 0, "")


def test_several_data_sets_and_an_empty_one(root: CacheRoot, folder: Path) -> None:
    write_samples(root, "a", some_samples())
    write_samples(root, "b", some_samples("a much longer answer"))
    write_samples(root, "none", [])
    store = TokenStore.open(root, ["b", "none", "a"], TOKENIZER, folder=folder)
    lengths = store.records(np.array([2, 0], np.int16), np.array([0, 0]))["used"]
    assert lengths[1] - lengths[0] == len("a much longer answer") - len("two")


def test_progress_is_shown_and_the_end_is_logged(
    root: CacheRoot,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("UPDATE_S", "FIRST_LINE_S", "GROUP"):
        monkeypatch.setattr(f"configs.progress.{name}", int(name == "GROUP"))
    with caplog.at_level(logging.INFO, "train.data.tokens"):
        opened(root, folder)
    assert "  tokenise d  1" in capsys.readouterr().err
    assert "d: 4 samples, " in caplog.text


@pytest.mark.parametrize(
    ("weights", "prefix", "used"),
    [
        ([0, 0, 1, 1, 0, 0], 0, 3),  # up to the predictor of the last supervised token
        ([0, 0, 0, 0, 0, 1], 0, 5),
        ([0, 1, 0, 0, 0, 0], 4, 4),  # the prefix is kept
        ([1, 0, 0, 0], 0, 4),  # without a target the sample is kept whole
    ],
)
def test_tokens_are_used_up_to_the_last_predictor(
    weights: list[float], prefix: int, used: int
) -> None:
    assert tokens.used_tokens(np.array(weights, np.float32), prefix) == used
