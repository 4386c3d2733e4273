"""Tokenizers: the built-in one that needs no file, and what is added to a language model's own.

Plain text never becomes a control token: `encode_text` spells the strings of special tokens out like any
other text; whoever means the control token puts in its id (`token_id`). What a vocabulary holds as a word
of its own stays one (Qwen3's `<think>` and `<tool_call>` are words, not special tokens).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs import UserError

IMAGE_TOKEN = "<image>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")

# Qwen3's special strings, in its order; `<image>` comes after them here as it does there (id 151669).
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


def byte_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer that needs no file: 256 bytes, then roles and `words`, then special tokens.

    Text is cut into words, numbers and punctuation as GPT-2 cuts it; a piece that is in `words` is one
    token (also with a space before it), any other is spelt in bytes. So a word inside a longer word is
    never cut out of it, and every text comes back byte for byte.
    """
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for word in (*ROLES, *words):
        for text in (word, " " + word):
            pieces = cut.pre_tokenize_str(text)
            if len(pieces) != 1:
                raise UserError(
                    f"tokenizer word {word!r}: not one piece but "
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
    """Add what is missing of `<image>` and the chat marks, as special tokens (Qwen3 lacks only the first)."""
    known = tokenizer.get_vocab()
    specials = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    missing = [text for text in (IM_START, IM_END, IMAGE_TOKEN) if text not in specials]
    if missing:
        tokenizer.add_tokens([_special(text) for text in missing], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_TEXT if END_OF_TEXT in known else IM_END
    tokenizer.padding_side = "left"
    return tokenizer


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _byte_alphabet() -> list[str]:
    """The printable stand-in of every byte, as all byte-level tokenizers use it (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def token_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """The id of a special token."""
    found = tokenizer.convert_tokens_to_ids(text)
    assert isinstance(found, int), f"{text} is not in the tokenizer"
    return found


def eos_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids that end an answer: the chat mark, and the tokenizer's own end of text."""
    vocabulary = tokenizer.get_vocab()
    ends = [IM_END, END_OF_TEXT, tokenizer.eos_token]
    return tuple(dict.fromkeys(vocabulary[text] for text in ends if text in vocabulary))


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 (hex) of all that decides how text becomes ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {k: v for k, v in state.items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of plain text; the strings of special tokens in it are spelt out like any other text."""
    ids: list[int] = _plain(tokenizer, len(tokenizer)).encode(text, add_special_tokens=False).ids
    return ids


@functools.lru_cache(maxsize=8)
def _plain(tokenizer: PreTrainedTokenizerFast, _length: int) -> Tokenizer:
    """The tokenizer's core, for text alone: several times as fast as going through transformers."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.encode_special_tokens = True
    core.no_padding()
    core.no_truncation()
    return core
