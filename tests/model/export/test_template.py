"""The exported chat template gives the tokens of training, for content as text and as lists of parts.

tokenizer = exported_tokenizer(own); tokenizer.chat_template = chat_template(own)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs import UserError
from model.export.template import (
    BREAK,
    CUT,
    as_parts,
    chat_template,
    check_template,
    exported_tokenizer,
)
from model.language.chat_template import Message, prompt_ids, tokenize_messages
from model.language.tokenizer import SPECIALS, byte_tokenizer, encode_text, prepare_tokenizer

PIECES = (
    *("What", " is", "this?", "\n", "\n\n", " ", "  ", "\t", "user\n", "assistant\n", "user", "é"),
    *("中文", "🙂", "3.14", "<", "<|", "|>", "<think>", "</think>", "'s", "ﬁ", "e\u0301", "<image"),
    *SPECIALS,
    "<|im_end|>\n<|im_start|>assistant\n",
)
"""What texts are made of: spaces and lines at their ends, roles, and control tokens as text."""


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Qwen's: it composes characters (NFC), and joins line breaks and spaces."""
    backend = byte_tokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("ĊĊ", "Ċ"), ("Ġ", "i"), ("Ġi", "s"), ("u", "s"), ("us", "e")]
    merges += [("use", "r"), ("Ċ", "u"), ("<", "|"), ("ĉ", "Ċ")]
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>"])  # words, as in Qwen3
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    return prepare_tokenizer(tokenizer)


def sentencepiece_like(newer: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: each text that it gets begins with a space, in either form of it."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "i"), ("▁i", "s"), ("▁", "▁"), ("▁", "u"), ("u", "s")]
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    if newer:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", *SPECIALS]})
    return prepare_tokenizer(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": lambda: byte_tokenizer(("What", "is")),
    "as Qwen": merging_tokenizer,
    "as Llama 2": lambda: sentencepiece_like(newer=False),
    "as Llama 2, newer": lambda: sentencepiece_like(newer=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS.values(), ids=TOKENIZERS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """A tokenizer of training, and the exported one as transformers loads it from its folder."""
    own = request.param()
    exported = exported_tokenizer(own)
    exported.chat_template = chat_template(own)
    folder = tmp_path_factory.mktemp("tokenizer")
    exported.save_pretrained(folder)
    return own, AutoTokenizer.from_pretrained(folder)


def same(
    pair: tuple[Any, Any], messages: Sequence[Message], images: int, given: list[dict[str, Any]]
) -> None:
    own, exported = pair
    for prompt in (False, True):
        ours = tokenize_messages(own, messages, images).ids.tolist()
        ours = prompt_ids(own, messages, images) if prompt else ours
        theirs = exported.apply_chat_template(
            given, add_generation_prompt=prompt, return_dict=False
        )
        assert theirs == ours, (messages, exported.convert_ids_to_tokens(theirs))


texts = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
conversations = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(conversation=conversations)
def test_text_of_any_kind(pair: tuple[Any, Any], conversation: list[tuple[str, str]]) -> None:
    """As text and as one text part; a control token in it stays text."""
    messages = [(role, text, 1.0) for role, text in conversation]
    as_text = [{"role": role, "content": text} for role, text in conversation]
    same(pair, messages, 0, as_text)
    parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in conversation]
    same(pair, messages, 0, parts)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    conversation=st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant"]),
            st.lists(texts, min_size=1, max_size=4),
        ),
        min_size=1,
    )
)
def test_images_between_texts(
    pair: tuple[Any, Any], conversation: list[tuple[str, list[str]]]
) -> None:
    """In user turns `<image>` and image parts are the places of images; in others it is text."""
    messages = [(role, "<image>".join(pieces), 1.0) for role, pieces in conversation]
    images = sum(len(pieces) - 1 for role, pieces in conversation if role == "user")
    if images:
        same(pair, messages, images, [{"role": r, "content": text} for r, text, _ in messages])
        same(pair, messages, images, as_parts(messages, images))


@pytest.mark.parametrize(
    ("kind", "text"), [*itertools.product(["image", "image_url"], ["", "\nA?"])]
)
def test_images_without_marks_are_first(pair: tuple[Any, Any], kind: str, text: str) -> None:
    messages = [("system", "Be brief.", 1.0), ("user", text, 1.0), ("assistant", " A", 1.0)]
    parts = [*[{"type": kind}] * 2, {"type": "text", "text": text}]
    given = [{"role": r, "content": t} for r, t, _ in messages]
    same(pair, messages, 2, [given[0], {"role": "user", "content": parts}, given[2]])
    same(pair, messages, 2, as_parts(messages, 2))


def test_the_mark_in_a_text_part_is_text(pair: tuple[Any, Any]) -> None:
    own, exported = pair
    content = [{"type": "text", "text": "the tag <image>"}, {"type": "image"}]
    ids = exported.apply_chat_template([{"role": "user", "content": content}], return_dict=False)
    head = encode_text(own, "the tag <image>")
    image = own.convert_tokens_to_ids("<image>")
    assert ids.count(image) == 1
    assert ids[ids.index(image) - len(head) : ids.index(image)] == head


def test_a_mark_that_is_broken_by_hand_is_no_control_token(pair: tuple[Any, Any]) -> None:
    _, exported = pair
    text = f"a<{BREAK}|im_end|>{CUT}b"
    ids = exported.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
    assert ids.count(exported.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "x"}, "role tool is none of system, user, assistant"),
        ({"role": "user", "content": [{"type": "video"}]}, "type video is none of text, image"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "images belong into user turns"),
    ],
)
def test_what_training_does_not_have_is_refused(
    pair: tuple[Any, Any], message: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Exception, match=reason):
        pair[1].apply_chat_template([message])


def test_plain_text_has_the_tokens_of_the_models_own_tokenizer(pair: tuple[Any, Any]) -> None:
    own, exported = pair
    for text in ("What is this?\n\n", " a  b\tc", "é 中文 🙂", "<think>\n</think>", "user\n\n"):
        assert exported.encode(text) == own.encode(text)
        assert exported.decode(exported.encode(text)) == own.decode(own.encode(text))


def test_exporting_an_exported_tokenizer_changes_nothing(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    again = exported_tokenizer(pair[1])
    assert again.backend_tokenizer.to_str() == pair[1].backend_tokenizer.to_str()
    assert chat_template(pair[1]) == pair[1].chat_template


def test_a_tokenizer_that_no_template_serves_is_refused() -> None:
    """Its control token takes the spaces before it, which training keeps."""
    own = merging_tokenizer()
    own.add_special_tokens({"eos_token": AddedToken("<|im_end|>", lstrip=True, special=True)})
    exported = exported_tokenizer(own)
    exported.chat_template = chat_template(own)
    with pytest.raises(UserError, match="no chat template gives the tokens of training") as caught:
        check_template(exported, own)
    assert "\n" not in str(caught.value)


def test_the_check_sees_a_tokenizer_without_the_cut() -> None:
    own = merging_tokenizer()
    plain = merging_tokenizer()
    plain.chat_template = chat_template(own)
    with pytest.raises(UserError, match="no chat template"):
        check_template(plain, own)
