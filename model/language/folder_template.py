"""The chat template of somebody else's folder: messages to token ids and loss weights.

    template = FolderTemplate(text, tokenizer, "llava/chat_template.jinja")
    attach(tokenizer, template)                # from here on `model.language.chat_template` uses it
    template.tokenize(messages, media)

The text of a conversation is what the template makes of it. It becomes ids as transformers' processor does
it: as a whole, with a BOS token before it unless the template has written one. What the assistant says is
found by prefixes: the text up to a turn, with the generation prompt, has to be the beginning of the text with
that turn, and that the beginning of the whole text. The difference is supervised: every token that begins in
it. A conversation for which that fails is refused.

Control tokens that a user's text spells stay text, as with our own template.

n tokens of a sample with one token a placeholder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cache.format.media_marks import split_at_marks
from configs import UserError, one_line
from model.language.records import FOLDER_TEMPLATE
from model.language.sandbox import compile_template
from model.language.tokenizer import ROLES, image_id, image_token, token_id

BREAK = "\ufdd0"
"""In what looks like a control token in a text. Unicode keeps this code point free for uses in a program."""
WAYS = ("parts", "text", "mixed")
"""How templates take `content`: as a list of parts, as text, or as parts of users and as text of others."""
USER, ASSISTANT = "what is 7 here", "it is 12 now"
"""What a template is tried with."""

Content = Literal["parts", "text", "mixed"]
Turns = Sequence[tuple[str, Sequence[str]]]
"""Roles, and the texts of each turn between its images: k + 1 of them for k images."""


class FolderTemplate:
    """A chat template and the tokenizer that it is for."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast, where: str) -> None:
        """Compile a template and try it.

        Args:
            text: the template, in Jinja's language.
            tokenizer: with its marks, see `model.language.tokenizer.set_marks`.
            where: the file that the template is from, for messages.

        Raises:
            UserError: it is no chat template, it places no image, or what the assistant says cannot be found.
        """
        self.text = text
        self._compiled = compile_template(text, where)
        self._tokenizer = tokenizer
        self._image = image_token(tokenizer)
        self._names = {
            name: str(value)
            for name, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        added = tokenizer.added_tokens_decoder.values()
        controls = {token.content for token in added if token.special} | {self._image}
        longest_first = sorted(filter(None, controls), key=lambda token: (-len(token), token))
        self._controls = re.compile("|".join(map(re.escape, longest_first)))
        self.content = self._find_content(where)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of what decides the text of a conversation, and its placeholders."""
        parts = [FOLDER_TEMPLATE, self.text, self._image, sorted(self._names.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def tokenize(
        self, messages: Sequence[tuple[str, str, float]], media: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the (n,) ids and the (n,) loss weights of a conversation that has `media` media.

        Raises:
            ValueError: a role is unknown, the marks do not fit the media, the template raises, or what the
                assistant says cannot be found.
        """
        turns = self._turns(messages, media)
        text = self._render(turns)
        ids, offsets = self._encode(text, media)
        weights = np.zeros(len(ids), dtype=np.float32)
        for start, end, weight in self._spans(turns, text, [weight for *_, weight in messages]):
            # A token without a character is none of the text: a BOS token.
            inside = (offsets[:, 0] >= start) & (offsets[:, 0] < end)
            weights[inside & (offsets[:, 1] > offsets[:, 0])] = weight
        return ids, weights

    def prompt(self, messages: Sequence[tuple[str, str, float]], media: int) -> list[int]:
        """Return the ids of a conversation, up to the start of the assistant's next turn.

        Raises:
            ValueError: see `tokenize`.
        """
        text = self._render(self._turns(messages, media), prompt=True)
        result: list[int] = self._encode(text, media)[0].tolist()
        return result

    def messages(self, turns: Turns) -> list[dict[str, Any]]:
        """Return turns as the template takes them."""
        return [
            {"role": role, "content": _content(texts, self._image, _as_parts(self.content, role))}
            for role, texts in turns
        ]

    def end_token(self) -> int | None:
        """Return the control token that the template writes behind an answer, if it writes one."""
        text = self._render([("user", ["", USER]), ("assistant", [ASSISTANT])])
        behind = text.rpartition(ASSISTANT)[2].lstrip()
        found = self._controls.match(behind)
        return None if found is None else token_id(self._tokenizer, found[0])

    @property
    def adds_bos(self) -> bool:
        """Whether a BOS token is put before the text, because the template writes none."""
        text, bos = self._render([("user", [USER])]), self._tokenizer.bos_token
        if not bos or text.startswith(str(bos)):
            return False
        return int(self._encode(text, 0)[0][0]) == self._tokenizer.bos_token_id

    # ---- text

    def _turns(self, messages: Sequence[tuple[str, str, float]], media: int) -> Turns:
        for role, _, _ in messages:
            if role not in ROLES:
                raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
        split = split_at_marks([(role, text) for role, text, _ in messages], media)
        return [
            (role, [self._controls.sub(_broken, text) for text in texts])
            for (role, _, _), texts in zip(messages, split, strict=True)
        ]

    def _render(self, turns: Turns, prompt: bool = False) -> str:
        values = {"tools": None, "documents": None, **self._names}
        try:
            return self._compiled.render(
                values | {"messages": self.messages(turns), "add_generation_prompt": prompt}
            )
        except TemplateError as error:
            raise ValueError(
                f"the folder's chat template refuses it ({one_line(error) or 'no reason given'})"
            ) from None

    def _spans(
        self, turns: Turns, text: str, weights: Sequence[float]
    ) -> list[tuple[int, int, float]]:
        """Return where in the text what the assistant says starts and ends, and its weight, for each turn."""
        spans = []
        for i, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            before = self._render(turns[:i], prompt=True) if i else self._render([], prompt=True)
            after = text if i + 1 == len(turns) else self._render(turns[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "the folder's chat template writes the beginning of a conversation in another way when "
                    f"more follows (turn {i + 1} of {len(turns)}), so that what the assistant says cannot "
                    "be found"
                )
            spans.append((len(before), len(after), weights[i]))
        return spans

    def _find_content(self, where: str) -> Content:
        """Try in which form the template takes `content`, and that the assistant's turn can be found."""
        turns: Turns = [("user", ["", USER]), ("assistant", [ASSISTANT])]
        reasons = []
        ways: tuple[Content, ...] = ("parts", "text", "mixed")
        for way in ways:
            self.content = way
            try:
                text = self._render(turns)
                marks = text.count(self._image)
                if marks != 1:
                    raise ValueError(f"it writes {self._image} {marks} times for one image")
                if USER not in text or ASSISTANT not in text:
                    raise ValueError("it leaves out what is said")
                if "'type'" in text or '"type"' in text:
                    raise ValueError("it writes a list as text")
                ((start, end, _),) = self._spans(turns, text, [1.0, 1.0])
                if ASSISTANT not in text[start:end] or USER in text[start:end]:
                    raise ValueError("what the assistant says cannot be found")
            except ValueError as error:
                reasons.append(str(error))
            else:
                return way
        raise UserError(
            f"{where}: a conversation about one image cannot be written with this chat template: "
            f"{one_line('; '.join(dict.fromkeys(reasons)), 300)}; give a folder whose template takes images "
            "(chat_template.jinja)"
        )

    # ---- tokens

    def _encode(self, text: str, media: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return (n,) ids, and (n, 2) the start and the end of each in the text."""
        bos = self._tokenizer.bos_token
        # transformers' processor decides so, and its tokenizer alone would never add it.
        special = not (bos and text.startswith(str(bos)))
        core = _core(self._tokenizer, len(self._tokenizer), BREAK in text)
        encoding = core.encode(text, add_special_tokens=special)
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        if (found := int((ids == image_id(self._tokenizer)).sum())) != media:
            raise ValueError(
                f"the folder's chat template writes {found} images for {media} of the sample"
            )
        return ids, offsets


def attach(tokenizer: PreTrainedTokenizerFast, template: FolderTemplate) -> None:
    """Make `model.language.chat_template` use a template with a tokenizer."""
    tokenizer.nanomolmo2_template = template
    tokenizer.chat_template = template.text


def detach(tokenizer: PreTrainedTokenizerFast) -> None:
    """Undo `attach`, and take the marks of the folder from a tokenizer: it has ours from here on."""
    for name in ("nanomolmo2_template", "nanomolmo2_marks"):
        vars(tokenizer).pop(name, None)


def attached(tokenizer: PreTrainedTokenizerFast) -> FolderTemplate | None:
    """Return the template that a tokenizer was given; None for our own template."""
    found: FolderTemplate | None = vars(tokenizer).get("nanomolmo2_template")
    return found


def _as_parts(content: Content, role: str) -> bool:
    return content == "parts" or (content == "mixed" and role == "user")


def _content(texts: Sequence[str], image: str, as_parts: bool) -> str | list[dict[str, str]]:
    if not as_parts:
        return image.join(texts)
    parts = []
    for i, text in enumerate(texts):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
    return parts


def _broken(found: re.Match[str]) -> str:
    return found[0][0] + BREAK + found[0][1:]


@functools.lru_cache(maxsize=8)
def _core(tokenizer: PreTrainedTokenizerFast, _length: int, broken: bool) -> Tokenizer:
    """Return the core of a tokenizer, as it tokenises a whole conversation.

    Args:
        tokenizer: of the folder.
        _length: key of the cache only: adding a token makes another core.
        broken: whether the text has `BREAK`, which is dropped.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    if broken:
        drop = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
        own = state["normalizer"]
        state["normalizer"] = (
            {"type": "Sequence", "normalizers": [drop, own]} if own is not None else drop
        )
        for token in state["added_tokens"]:
            # One that is looked for behind the normalizer would be found again where `BREAK` was.
            token["normalized"] = token["normalized"] and not token["special"]
    return Tokenizer.from_str(json.dumps(state))
