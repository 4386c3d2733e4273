"""Load a model's own tokenizer from its folder, and try it.

    tokenizer = read_tokenizer(folder, rows=151_936)

transformers makes an empty tokenizer where the files are missing, and every text becomes nothing. Here the
files are read first, and the tokenizer has to give some texts back.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs import UserError, one_line
from model.language.files import AGAIN, check_file, read_object
from model.language.loading import quiet
from model.language.tokenizer import encode_text

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.json",
)
"""JSON files that transformers reads beside tokenizer.json, if they exist."""
SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken")
"""Tokenizers in their makers' own formats, which other packages convert."""
PROBES = (
    "Hello world, it's 12345 and 3.14!",
    " a leading space and a trailing one ",
    "two  spaces, three   spaces",
    "lines\nand\n\nempty lines\ttabs\n",
    "def f(x):\n    return {'a': [x ** 2]}  # <b> & \"c\" \\ ~ ^ | @ $ % `",
    "É é ü ñ ß ø Ł ç; 1 2 3",
    "Привет, мир; 中文字符; 日本語; العربية; हिन्दी; 한국어",
    "emoji 🙂 and signs € → ≤ ∑",
)
"""Texts that a tokenizer has to give back, all in Unicode's composed form (NFC)."""
FAR_FEWER = 8192
"""A tokenizer with less than half as many ids as the embedding has rows, and this many fewer, is of another
model. Padding of embeddings adds a few hundred rows."""


def read_tokenizer(
    folder: Path, rows: int | None, ends: Iterable[int] = (), *, whole_model: bool = False
) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a folder.

    Args:
        folder: of the model.
        rows: rows of the model's embedding; None: not compared.
        ends: ids that the model's config names as ends of a text.
        whole_model: whether it is that of a vision-language model. What transformers makes of it counts, with
            which that model was trained, even if it does not give texts back.

    Raises:
        UserError: the tokenizer is missing, damaged, of another model, or does not give texts back.
    """
    for name in BESIDE:
        if (folder / name).exists() or (folder / name).is_symlink():
            read_object(folder / name)
    file = folder / TOKENIZER
    if file.exists() or file.is_symlink():
        check_file(file)
        tokenizer = (_by_class(folder) if whole_model else None) or _from_file(file)
    else:
        tokenizer = _converted(folder)
    _check_ids(folder, tokenizer, rows, ends)
    try:
        _check_round_trip(folder, tokenizer)
    except UserError as error:
        if not whole_model:
            raise
        log.warning("%s", error)
    return tokenizer


def _by_class(folder: Path) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that transformers makes by the class that the folder names, if it can."""
    try:
        with quiet():
            made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a class of any model may raise
        log.info("%s: its tokenizer is read from %s alone: %s", folder, TOKENIZER, one_line(error))
        return None
    return made if isinstance(made, PreTrainedTokenizerFast) else None


def _from_file(file: Path) -> PreTrainedTokenizerFast:
    """Load tokenizer.json itself: transformers' class for a model may build another one from its parts."""
    try:
        with quiet():
            return PreTrainedTokenizerFast.from_pretrained(file.parent)
    except (
        Exception
    ) as error:  # the Rust library raises plain Exception, tokenizer_config.json any other
        read_object(
            file
        )  # names what is wrong with it as JSON; not before, as 11 MB take half a second
        raise UserError(
            f"{file.parent}: its tokenizer cannot be loaded ({one_line(error)}); {AGAIN}"
        ) from None


def _converted(folder: Path) -> PreTrainedTokenizerFast:
    """Let transformers convert a tokenizer in an older format."""
    slow = next((name for name in SLOW if (folder / name).exists()), "")
    pair = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    if not slow and not pair:
        raise UserError(
            f"{folder}: no {TOKENIZER}, so no tokenizer; copy it from where the model comes from"
        )
    if slow and not pair and importlib.util.find_spec("sentencepiece") is None:
        code = f"from transformers import AutoTokenizer as T; T.from_pretrained({json.dumps(str(folder))})"
        code += f".save_pretrained({json.dumps(str(folder))})"
        raise UserError(
            f"{folder}: {slow} without {TOKENIZER}; convert it (first pip install sentencepiece tiktoken "
            f"protobuf): python -c {shlex.quote(code)}"
        )
    if pair:
        read_object(folder / "vocab.json")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the conversion of any format may raise
        raise UserError(
            f"{folder}: no {TOKENIZER}, and {slow or 'vocab.json'} cannot be converted ({one_line(error)}); "
            f"copy {TOKENIZER} from where the model comes from"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{folder}: a tokenizer in Python ({type(tokenizer).__name__}) without {TOKENIZER}, which "
            "is needed"
        )
    return tokenizer


def _check_ids(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int | None, ends: Iterable[int]
) -> None:
    """Raise UserError if there are no ids, or if they are not those of the model."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = set(tokenizer.added_tokens_decoder)
    words = {text: number for text, number in vocabulary.items() if number not in added}
    if not words:
        raise UserError(f"{folder}: the tokenizer is empty; {AGAIN}")
    if rows is None:
        return
    last = max(words, key=lambda text: words[text])
    if words[last] >= rows:
        raise UserError(
            f"{folder}: the tokenizer is of another model: token {one_line(repr(last), 40)} has id "
            f"{words[last]:,}, and the embedding has {rows:,} rows; copy it from where the weights come from"
        )
    count = max(vocabulary.values()) + 1
    if count * 2 < rows and count + FAR_FEWER < rows and not _is_built_in(tokenizer):
        raise UserError(
            f"{folder}: the tokenizer is of another model: {count:,} ids, and the embedding has {rows:,} "
            "rows; copy it from where the weights come from"
        )
    # An id beyond the embedding is a default that somebody forgot, and is never used.
    if absent := [end for end in ends if end < rows and end not in vocabulary.values()]:
        raise UserError(
            f"{folder}: the tokenizer is of another model: config.json ends a text with id "
            f"{absent[0]:,}, which it does not have; copy it from where the weights come from"
        )
    if count > rows:
        log.info("%s: %d added tokens get new embedding rows", folder, count - rows)


def _is_built_in(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it is that of `random:` models, which have the rows of a real one for a few hundred ids."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return bool(core.get("ignore_merges")) and not core.get("merges")


def _check_round_trip(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError unless each of `PROBES` becomes ids that become the text again.

    One space at the start may differ: SentencePiece adds one, and removes it when it decodes.
    """
    for text in PROBES:
        again = _there_and_back(folder, tokenizer, text)
        if again.removeprefix(" ") != text.removeprefix(" "):
            raise UserError(
                f"{folder}: the tokenizer does not give text back: {one_line(repr(text), 60)} became "
                f"{one_line(repr(again), 60)}; copy it again from where the weights come from"
            )


def _there_and_back(folder: Path, tokenizer: Any, text: str) -> str:
    try:
        return str(
            tokenizer.decode(encode_text(tokenizer, text), clean_up_tokenization_spaces=False)
        )
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(
            f"{folder}: the tokenizer fails on {text!r} ({one_line(error)}); {AGAIN}"
        ) from None
