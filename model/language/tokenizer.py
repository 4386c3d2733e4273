"""Tokenizers: a built-in one that needs no file, and the special tokens added to a language model's own.

Plain text never becomes a control token: `encode_text` tokenises the strings of special tokens like any other
text. Code that means a control token inserts its id (`token_id`). Strings that are ordinary words of a
vocabulary stay words (Qwen3's `<think>` and `<tool_call>` are words, not special tokens).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from configs import UserError

IMAGE_TOKEN = "<image>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")

# Qwen3's special tokens, in its order. `<image>` follows them, as in Qwen3, where it gets id 151669.
SPECIALS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True)
class Marks:
    """The control tokens of a conversation, for a tokenizer whose marks are not ours."""

    image: str
    """The token that is replaced by the features of an image."""
    ends: tuple[int, ...]
    """Ids that end an answer."""


def set_marks(tokenizer: PreTrainedTokenizerFast, marks: Marks) -> None:
    """Give a tokenizer its own marks. Without them, a tokenizer has ours."""
    tokenizer.nanomolmo2_marks = marks


def _marks(tokenizer: PreTrainedTokenizerFast) -> Marks | None:
    found: Marks | None = vars(tokenizer).get("nanomolmo2_marks")
    return found


def image_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the token that is replaced by the features of an image."""
    marks = _marks(tokenizer)
    return IMAGE_TOKEN if marks is None else marks.image


def image_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of `image_token`."""
    return token_id(tokenizer, image_token(tokenizer))


def byte_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer that needs no file: ids of 256 bytes, roles, `words`, and special tokens.

    GPT-2's rules cut text into words, numbers and punctuation. A piece in `words` is one token, also with a
    space before it; any other piece becomes its bytes. A word inside a longer word is not a token, and every
    text decodes to itself.

    Raises:
        UserError: GPT-2's rules cut a word into several pieces.
    """
    vocabulary = {character: byte for byte, character in sorted(bytes_to_unicode().items())}
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for word in (*ROLES, *words):
        for text in (word, " " + word):
            pieces = cut.pre_tokenize_str(text)
            if len(pieces) != 1:
                raise UserError(
                    f"tokenizer word {word!r}: several pieces, "
                    f"{', '.join(repr(text[a:b]) for _, (a, b) in pieces)}; list those instead"
                )
            vocabulary.setdefault(pieces[0][0], len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_special(text) for text in (*SPECIALS, IMAGE_TOKEN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add `<image>` and the chat marks as special tokens if they are missing. Qwen3 lacks `<image>` only."""
    known = tokenizer.get_vocab()
    specials = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    missing = [text for text in (IM_START, IM_END, IMAGE_TOKEN) if text not in specials]
    if missing:
        tokenizer.add_tokens([_special(text) for text in missing], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_TEXT if END_OF_TEXT in known else IM_END
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = (
        False  # answers keep the model's spaces before punctuation
    )
    return tokenizer


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def token_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Return the id of a special token."""
    found = tokenizer.convert_tokens_to_ids(text)
    assert isinstance(found, int), f"{text} is not in the tokenizer"
    return found


def eos_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids that end an answer: the end of a turn, and the tokenizer's own end of text."""
    if (marks := _marks(tokenizer)) is not None:
        return marks.ends
    vocabulary = tokenizer.get_vocab()
    ends = [IM_END, END_OF_TEXT, tokenizer.eos_token]
    return tuple(dict.fromkeys(vocabulary[text] for text in ends if text in vocabulary))


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 (hex) of everything that decides how text becomes ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {k: v for k, v in state.items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of plain text. Strings of special tokens in it become ordinary tokens."""
    ids: list[int] = _plain(tokenizer, len(tokenizer)).encode(text, add_special_tokens=False).ids
    return ids


@functools.lru_cache(maxsize=8)
def _plain(tokenizer: PreTrainedTokenizerFast, _length: int) -> Tokenizer:
    """Return the core of a tokenizer, for plain text: several times as fast as through transformers.

    The length is a key of the cache only: adding a token to the tokenizer makes another core.
    """
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.encode_special_tokens = True
    core.no_padding()
    core.no_truncation()
    return core
