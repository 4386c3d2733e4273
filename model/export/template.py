"""The chat template of an exported folder, and a tokenizer with which it gives the tokens of training.

    tokenizer = exported_tokenizer(own)                 # tokenizer.json of the folder
    tokenizer.chat_template = chat_template(own)        # chat_template.jinja
    check_template(tokenizer, own)

In training a turn's role, its text and its media are tokenised one by one, and text never becomes a control
token. A chat template gives one string for all of it. Two code points that are no characters make up for
that: the template writes them, and the tokenizer of the folder drops them.

- `CUT` is behind a turn's role, and the tokenizer cuts there. So a text that begins with a line break is not
  joined to the one before it.
- `BREAK` is in whatever looks like a control token in a text, so that it stays text.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from configs import UserError, one_line
from model.language.chat_template import Message, prompt_ids, tokenize_messages
from model.language.tokenizer import IM_END, IM_START, IMAGE_TOKEN, ROLES

BREAK, CUT = "\ufdd0", "\ufdd1"
"""Unicode keeps these code points free for uses inside a program: they are in no text."""

SPACE = "feature_space.json"
"""File of an exported folder: the spec of the features it was trained on, and a hash of its tower."""

_CUT = {
    "type": "Split",
    "pattern": {"String": CUT},
    "behavior": "Removed",
    "invert": False,
}
_REPLACE_CUT = {"type": "Replace", "pattern": {"Regex": rf"{CUT}(?=[\s\S])"}}
_DROP = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}

TEMPLATE = """\
{%- set controls = CONTROLS -%}
{%- macro plain(text) -%}
  {%- set seen = namespace(text=text) -%}
  {%- for token in controls -%}
    {%- set seen.text = seen.text | replace(token, token[0] + '\\ufdd0' + token[1:]) -%}
  {%- endfor -%}
  {{- seen.text -}}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] not in ROLES -%}
    {{- raise_exception('role ' + message['role'] + ' is none of ' + ROLES | join(', ')) -}}
  {%- endif -%}
  {{- 'IM_START' + message['role'] + '\\n\\ufdd1' -}}
  {%- if message['content'] is string -%}
    {%- if message['role'] == 'user' -%}
      {%- for text in message['content'].split('IMAGE') -%}
        {{- '' if loop.first else 'IMAGE' -}}
        {{- plain(text) -}}
      {%- endfor -%}
    {%- else -%}
      {{- plain(message['content']) -}}
    {%- endif -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {{- plain(part['text']) -}}
      {%- elif part['type'] in ['image', 'image_url'] and message['role'] == 'user' -%}
        {{- 'IMAGE' -}}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {{- raise_exception('images belong into user turns') -}}
      {%- else -%}
        {{- raise_exception('a part of type ' + part['type'] + ' is none of text, image') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- 'IM_END\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- 'IM_STARTassistant\\n\\ufdd1' -}}
{%- endif -%}
"""

PROBES: tuple[tuple[Sequence[Message], int], ...] = (
    ([("user", "What is this?", 1.0)], 1),
    ([("user", "\n\n  two lines\n", 1.0), ("assistant", "\nyes\n\n", 1.0)], 1),
    ([("system", " Be brief. ", 1.0), ("user", "<image> or\n<image>\n?", 1.0)], 2),
    (
        [
            ("user", "user\nassistant\n", 1.0),
            ("assistant", "", 1.0),
            ("user", "3.14, 中文 🙂", 1.0),
        ],
        0,
    ),
    ([("user", f"say {IM_END} or {IM_START}", 1.0), ("assistant", f"an {IMAGE_TOKEN}", 1.0)], 0),
)
"""Conversations, and the number of their images, that `check_template` compares."""


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the chat template (Jinja) of an exported folder, for messages as text or as lists of parts.

    In the text of a user each `<image>` is the place of an image. In a list of parts an image part is, and
    everything in text parts is text.
    """
    values = {
        "CONTROLS": json.dumps(_controls(tokenizer), ensure_ascii=False),
        "ROLES": json.dumps(list(ROLES)),
        "IMAGE": IMAGE_TOKEN,
        "IM_START": IM_START,
        "IM_END": IM_END,
    }
    return re.sub("|".join(values), lambda found: values[found[0]], TEMPLATE).rstrip("\n")


def _controls(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the tokenizer's control tokens: its special tokens, in the order of their ids."""
    added = tokenizer.added_tokens_decoder
    return [added[number].content for number in sorted(added) if added[number].special]


def exported_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that tokenises a whole conversation as training tokenises its pieces."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    normalizers = _steps(state["normalizer"], "normalizers")
    # Llama 2 puts a space before every text, so also behind a cut.
    prepended = [step["prepend"] for step in normalizers if step["type"] == "Prepend"]
    first = [_DROP, *(_REPLACE_CUT | {"content": CUT + text} for text in prepended)]
    state["normalizer"] = _sequence(first, normalizers, "normalizers")
    pieces = _steps(state["pre_tokenizer"], "pretokenizers")
    for step in pieces:
        if step.get("prepend_scheme") == "first":  # the same in a newer form
            step["prepend_scheme"] = "always"
    state["pre_tokenizer"] = _sequence([_CUT], pieces, "pretokenizers")
    for token in state["added_tokens"]:
        # One that is looked for behind the normalizer would be found again where `BREAK` was.
        token["normalized"] = token["normalized"] and not token["special"]
    result = copy.deepcopy(tokenizer)
    result._tokenizer = Tokenizer.from_str(json.dumps(state))
    return result


def _steps(steps: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer."""
    if steps is None:
        return []
    return list(steps[key]) if steps["type"] == "Sequence" else [steps]


def _sequence(
    first: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], key: str
) -> dict[str, Any]:
    """Return steps of which some are the first ones, once."""
    every = [*first, *(step for step in others if step not in first)]
    return every[0] if len(every) == 1 else {"type": "Sequence", key: every}


def as_parts(messages: Sequence[Message], images: int) -> list[dict[str, Any]]:
    """Return messages as transformers takes them, with content as lists of parts.

    Args:
        messages: with `<image>` marks in user turns, or none for images before the first of them.
        images: number of images.
    """
    left, given = images, sum(t.count(IMAGE_TOKEN) for role, t, _ in messages if role == "user")
    first = next((i for i, (role, _, _) in enumerate(messages) if role == "user"), -1)
    result = []
    for i, (role, text, _) in enumerate(messages):
        texts = text.split(IMAGE_TOKEN, left) if role == "user" else [text]
        if i == first and not given:
            texts = [*[""] * left, text]
        left -= len(texts) - 1
        result.append({"role": role, "content": list(_parts(texts))})
    return result


def _parts(texts: Sequence[str]) -> Iterator[dict[str, str]]:
    for i, text in enumerate(texts):
        if i:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def check_template(exported: PreTrainedTokenizerFast, own: PreTrainedTokenizerFast) -> None:
    """Compare the tokens of an exported tokenizer and its template with those of training.

    Raises:
        UserError: they differ for one of `PROBES`.
    """
    for messages, images in PROBES:
        for prompt in (False, True):
            ours = (
                prompt_ids(own, messages, images)
                if prompt
                else tokenize_messages(own, messages, images).ids.tolist()
            )
            theirs = exported.apply_chat_template(
                as_parts(messages, images), add_generation_prompt=prompt, return_dict=False
            )
            if theirs != ours:
                raise UserError(
                    "this model cannot be exported: with its tokenizer no chat template gives the tokens of "
                    f"training: {one_line(repr(messages), 60)} becomes {_few(exported, theirs, ours)}, in "
                    f"training {_few(exported, ours, theirs)}; train on another --llm"
                )


def _few(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], others: Sequence[int]) -> str:
    """Return a few tokens, from before the first that differs from `others`."""
    pairs = enumerate(zip(ids, others, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))
    return repr(tokenizer.convert_ids_to_tokens(list(ids[max(0, first - 2) : first + 3])))
