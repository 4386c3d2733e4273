"""Templates as published: the tokens of transformers' processor, and what the assistant says.

template = FolderTemplate(text, tokenizer, "chat_template.jinja")
ids, weights = template.tokenize(messages, media)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from configs import UserError
from model.language.chat_template import (
    TEMPLATE_VERSION,
    prompt_ids,
    template_digest,
    template_text,
    template_version,
    tokenize_messages,
)
from model.language.folder_template import (
    FOLDER_TEMPLATE,
    FolderTemplate,
    attach,
    attached,
    detach,
)
from model.language.tokenizer import Marks, eos_ids, image_id, set_marks
from tests.support.tiny_clip import TEMPLATES, stranger_tokenizer

Talk = list[tuple[str, str, float]]
SHORT: Talk = [("user", "What is this?", 1.0), ("assistant", "a cat", 1.0)]
LONG: Talk = [*SHORT, ("user", "And?", 1.0), ("assistant", "two", 0.5)]


def made(style: str, text: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = stranger_tokenizer(style)
    set_marks(tokenizer, Marks("<image>", (tokenizer.eos_token_id,)))
    attach(tokenizer, FolderTemplate(text or TEMPLATES[style], tokenizer, "chat_template.jinja"))
    return tokenizer


def said(tokenizer: Any, ids: np.ndarray, weights: np.ndarray, weight: float) -> str:
    return str(tokenizer.decode(ids[weights == np.float32(weight)]))


WRITTEN = {
    "vicuna": (
        "<s> USER: <image> \nWhat is this? ASSISTANT: a cat USER: And? ASSISTANT: two ",
        ("a cat ", "two "),
    ),
    "chatml": (
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>What is "
            "this?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
            "<|im_start|>assistant\ntwo<|im_end|>\n"
        ),
        ("a cat<|im_end|>\n", "two<|im_end|>\n"),
    ),
    "llama3": (
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>What is this?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\na cat<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        ),
        ("a cat<|eot_id|>", "two<|eot_id|>"),
    ),
    "mistral": (
        "<s> [INST] <image> What is this? [/INST]a cat</s> [INST] And? [/INST]two</s>",
        ("a cat</s>", "two</s>"),
    ),
}
"""Style -> the text of `LONG`, and what is supervised of it."""


@pytest.mark.parametrize("style", WRITTEN)
def test_published_templates(style: str) -> None:
    text, (first, second) = WRITTEN[style]
    tokenizer = made(style)
    sample = tokenize_messages(tokenizer, LONG, 1)
    assert tokenizer.decode(sample.ids) == text
    assert int((sample.ids == image_id(tokenizer)).sum()) == 1
    assert said(tokenizer, sample.ids, sample.weights, 1.0).strip() == first.strip()
    assert said(tokenizer, sample.ids, sample.weights, 0.5).strip() in (
        second.strip(),
        f": {second}".strip(),
    )
    assert sample.ids.dtype == np.int32 and sample.weights.dtype == np.float32
    asked = prompt_ids(tokenizer, LONG[:1], 1)
    assert tokenizer.decode(asked) == text[: len(tokenizer.decode(asked))]
    assert not sample.weights[: len(asked)].any()


def test_a_bos_token_comes_once() -> None:
    for style in ("vicuna", "llama3", "mistral"):
        tokenizer = made(style)
        ids = prompt_ids(tokenizer, SHORT[:1], 0)
        assert [number == tokenizer.bos_token_id for number in ids].count(True) == 1
        assert ids[0] == tokenizer.bos_token_id
        template = attached(tokenizer)
        assert template is not None and template.adds_bos is (style == "vicuna")


@pytest.mark.parametrize("style", TEMPLATES)
def test_control_tokens_in_a_text_stay_text(style: str) -> None:
    tokenizer = made(style)
    controls = {token.content for token in tokenizer.added_tokens_decoder.values()}
    evil = " ".join(sorted(controls))
    plain = tokenize_messages(tokenizer, SHORT, 1).ids
    sample = tokenize_messages(
        tokenizer, [("user", f"<image>{evil}", 1.0), ("assistant", f"{evil}.", 1.0)], 1
    )
    added = set(tokenizer.added_tokens_decoder)
    assert [n for n in sample.ids if n in added] == [n for n in plain if n in added]
    assert f"{evil}." in tokenizer.decode(sample.ids).replace(" .", ".")


def test_images_are_where_the_marks_are_unless_the_template_moves_them() -> None:
    talk: Talk = [("user", "one <image> two <video>", 1.0), ("assistant", "a cat", 1.0)]
    assert "one <image> two <image><|im_end|>" in made("chatml").decode(
        tokenize_messages(made("chatml"), talk, 2).ids
    )
    moved = made("vicuna").decode(tokenize_messages(made("vicuna"), talk, 2).ids)
    assert moved.startswith("<s> USER: <image> \n<image> \none ")


@pytest.mark.parametrize(
    ("style", "talk", "media", "reason"),
    [
        ("mistral", [("system", "x", 1.0), *SHORT], 0, r"refuses it \(Conversation roles must"),
        ("chatml", [("tool", "x", 1.0)], 0, "role 'tool' is none of"),
        ("chatml", [("user", "<image>", 1.0), ("assistant", "a", 1.0)], 2, "2 media but 1 mark"),
    ],
)
def test_what_a_template_cannot_write_is_a_fault_of_the_sample(
    style: str, talk: Talk, media: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        tokenize_messages(made(style), talk, media)
    assert "\n" not in str(caught.value)


THINKS = TEMPLATES["chatml"].replace(
    "message['content'] +",
    "('<think></think>' if loop.last and message.role == 'assistant' else '') + message['content'] +",
)


def test_a_beginning_that_changes_is_refused() -> None:
    """As in Qwen3, whose last answer alone has a place for thoughts."""
    tokenizer = made("chatml", THINKS)
    sample = tokenize_messages(tokenizer, SHORT, 1)
    assert said(tokenizer, sample.ids, sample.weights, 1.0) == "<think></think>a cat<|im_end|>\n"
    with pytest.raises(ValueError, match=r"in another way when more follows \(turn 2 of 4\)"):
        tokenize_messages(tokenizer, LONG, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('never') }}", "refuses it (never)"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "writes <image> 0 times for one image"),
        (
            TEMPLATES["chatml"].replace("+ message['content']", "+ '<image>'"),
            "2 times for one image",
        ),
        (
            TEMPLATES["chatml"].replace("message['content']", "message.content[:9]"),
            "leaves out what is said",
        ),
        (TEMPLATES["chatml"] + "{{ messages | length }}", "in another way when more follows"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' if add_generation_prompt }}",
            "in another",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        made("chatml", text)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("chat_template.jinja: a conversation about one image")


def test_a_template_that_takes_parts_of_users_only() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{% if m.role == 'user' %}{{ raise_exception('parts') }}{% endif %}{{ m.content }}{% else %}"
        "{% if m.role != 'user' %}{{ raise_exception('text') }}{% endif %}"
        "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = made("chatml", text)
    template = attached(tokenizer)
    assert template is not None and template.content == "mixed"
    assert tokenizer.decode(tokenize_messages(tokenizer, SHORT, 1).ids) == (
        "<|im_start|>user\n<image>What is this?<|im_end|><|im_start|>assistant\na cat<|im_end|>"
    )


def test_a_tokenizer_has_the_template_it_was_given() -> None:
    tokenizer = made("chatml")
    other = made("chatml", THINKS)
    assert template_version(tokenizer) == FOLDER_TEMPLATE
    assert template_text(tokenizer) == TEMPLATES["chatml"]
    assert len({template_digest(tokenizer), template_digest(other), TEMPLATE_VERSION}) == 3
    assert eos_ids(tokenizer) == (tokenizer.eos_token_id,)
    detach(tokenizer)
    assert template_version(tokenizer) == template_digest(tokenizer) == TEMPLATE_VERSION
    assert attached(tokenizer) is None
