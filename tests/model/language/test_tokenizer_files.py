"""Tokenizers of other people's models: sound families pass; empty, foreign and lossy ones are refused.

tokenizer = read_tokenizer(Path("/models/Qwen3-0.6B"), rows=151_936)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from configs import UserError
from model.language.model import load_language
from model.language.tokenizer import byte_tokenizer, encode_text
from model.language.tokenizer_files import PROBES, read_tokenizer

CORPUS = [Path(__file__).read_text(), Path(pytest.__file__).read_text()]


def byte_level(*, prefix: bool = False, nfc: bool = False) -> Tokenizer:
    """Return a tokenizer as GPT-2's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_added_spaces(tokenizer: Tokenizer) -> Tokenizer:
    """Add words of several spaces, as CodeGen's and Phi's tokenizers have them."""
    tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in range(2, 6)])
    return tokenizer


def sentence_piece(style: str) -> Tokenizer:
    """Return a tokenizer as converted from SentencePiece: Llama 1 and 2 (two styles), or Gemma."""
    every_byte = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        ends.append(decoders.Strip(" ", 1, 0))
    elif style == "llama-new":
        metaspace = {"replacement": "▁", "prepend_scheme": "first", "split": False}
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace)
    else:
        tokenizer.normalizer = space
    specials = ["<unk>", "<s>", "</s>", *every_byte]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are words, not special tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words_only() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "Hello": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def without_newlines() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    return tokenizer


def cut_off() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.decoder = None
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


SOUND: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "with a space before": lambda: byte_level(prefix=True),
    "Qwen": lambda: byte_level(nfc=True),
    "Phi": lambda: with_added_spaces(byte_level()),
    "Llama": lambda: sentence_piece("llama"),
    "Llama, new": lambda: sentence_piece("llama-new"),
    "Gemma": lambda: sentence_piece("gemma"),
    "built in": lambda: byte_tokenizer(["red"]).backend_tokenizer,
}


@pytest.mark.parametrize("family", SOUND)
def test_sound_families_pass(family: str, tmp_path: Path) -> None:
    tokenizer = SOUND[family]()
    found = read_tokenizer(save(tokenizer, tmp_path), rows=len(found_ids(tokenizer)))
    assert found.get_vocab() == found_ids(tokenizer)
    for text in PROBES:
        assert encode_text(found, text) == tokenizer.encode(text, add_special_tokens=False).ids


def found_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids: dict[str, int] = tokenizer.get_vocab()
    return ids


@pytest.mark.parametrize("make", [word_piece, words_only, without_newlines, cut_off])
def test_a_tokenizer_that_loses_text_is_refused(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="does not give text back: ") as caught:
        read_tokenizer(save(make(), tmp_path), rows=None)
    assert "\n" not in str(caught.value)


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    empty = Tokenizer(models.BPE())
    empty.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    with pytest.raises(UserError, match="the tokenizer is empty"):
        read_tokenizer(save(empty, tmp_path), rows=None)


def test_the_built_in_tokenizer_fits_rows_of_real_sizes(tmp_path: Path) -> None:
    """`random:qwen3-0.6b` has 151,936 rows for a few hundred ids; what it learns is loaded again."""
    byte_tokenizer(("What",)).save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path, rows=151_936).get_vocab()["What"] > 255


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    with pytest.raises(UserError, match=r"of another model: token .* has id 399, .* 320 rows"):
        read_tokenizer(tmp_path, rows=320)
    with pytest.raises(UserError, match=r"of another model: 400 ids, .* 32,000 rows"):
        read_tokenizer(tmp_path, rows=32_000)
    read_tokenizer(tmp_path, rows=1024)  # padded


def test_added_tokens_may_be_beyond_the_embedding(
    copy_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As when somebody adds <pad> to Llama's tokenizer: they get rows, and words do not change."""
    folder = copy_of("tied")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<extra {i}>", special=True) for i in range(60)])
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.INFO, "model"):
        model, found = load_language(str(folder))
    assert "320 embedding rows became 384, for added tokens" in caplog.text
    assert len(found) > 320
    assert model.get_input_embeddings().weight.shape[0] == 384


def test_vocabulary_and_merges_are_converted(tmp_path: Path) -> None:
    """Older folders have these two files instead of tokenizer.json."""
    folder = save(byte_level(), tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    expected = encode_text(read_tokenizer(folder, None), "def f(x):\n")
    (folder / "tokenizer.json").unlink()
    assert encode_text(read_tokenizer(folder, None), "def f(x):\n") == expected


def test_tokenizer_json_decides_about_its_class(tmp_path: Path) -> None:
    """transformers' class for a model may build another tokenizer from the parts of the file."""
    folder = save(sentence_piece("gemma"), tmp_path)
    for name in ("Qwen2Tokenizer", "LlamaTokenizerFast", "Unheard"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        found = read_tokenizer(folder, None)
        expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = " two  spaces, 中文\n"
        assert encode_text(found, text) == expected.encode(text, add_special_tokens=False).ids


def test_answers_keep_the_spaces_of_the_model(copy_of: Callable[[str], Path]) -> None:
    """Llama 3's tokenizer_config.json asks for ` .` to become `.` in decoded text."""
    folder = copy_of("tied")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}
    path.write_text(json.dumps(values))
    _, tokenizer = load_language(str(folder))
    text = "a , b . do n't"
    assert tokenizer.decode(encode_text(tokenizer, text)) == text
