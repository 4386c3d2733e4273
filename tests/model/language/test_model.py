"""The language model: chat template, loss weights, plain text that never becomes a control token, loading.

model = load_language("random:qwen3-tiny")
sample = tokenize_messages(tokenizer, [("user", "<image>what?", 1.0), ("assistant", "a cat", 1.0)], 1)
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoConfig, PreTrainedTokenizerFast

from configs import UserError
from model.language import model as language
from model.language.chat_template import Message, prompt_ids, tokenize_messages
from model.language.model import LanguagePreset, load_language, load_tokenizer, save_language
from model.language.tokenizer import (
    ROLES,
    SPECIALS,
    byte_tokenizer,
    encode_text,
    eos_ids,
    token_id,
    tokenizer_digest,
)

WORDS = ("red", "circle", "points", "<", "</")


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return byte_tokenizer(WORDS)


# ---------------------------------------------------------------------------------- the template


def test_the_template_is_chatml_and_supervises_assistant_turns(
    tok: PreTrainedTokenizerFast,
) -> None:
    messages = [
        ("system", "be brief", 1.0),
        ("user", "<image>how many?", 1.0),
        ("assistant", "two", 0.5),
        ("user", "colour?", 1.0),
        ("assistant", "red", 1.0),
        ("user", "sure?", 1.0),
        ("assistant", "no", 0.0),
    ]
    sample = tokenize_messages(tok, messages, 1)
    assert tok.decode(sample.ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\n<image>how many?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\ncolour?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\nno<|im_end|>\n"
    )
    assert sample.ids.dtype == np.int32
    assert sample.weights.dtype == np.float32
    assert tok.decode(sample.ids[sample.weights == 0.5]) == "two<|im_end|>"
    assert tok.decode(sample.ids[sample.weights == 1.0]) == "red<|im_end|>"
    assert set(sample.weights.tolist()) == {0.0, 0.5, 1.0}
    assert int((sample.ids == token_id(tok, "<image>")).sum()) == 1


def test_a_prompt_equals_the_beginning_of_the_training_sample(tok: PreTrainedTokenizerFast) -> None:
    """Generation continues exactly the tokens that precede the answer in training."""
    turns: list[Message] = [
        ("user", "a <image> b", 1.0),
        ("assistant", "red", 1.0),
        ("user", " and now?\n", 1.0),
        ("assistant", "\n circle", 1.0),
    ]
    for end in (1, 3):
        prompt = prompt_ids(tok, turns[:end], 1)
        whole = tokenize_messages(tok, turns[: end + 1], 1)
        assert whole.ids[: len(prompt)].tolist() == prompt
        assert bool((whole.weights[len(prompt) :] > 0).any())
        spoken = whole.ids[len(prompt) :][whole.weights[len(prompt) :] > 0]
        assert tok.decode(spoken) == turns[end][1] + "<|im_end|>"


def test_either_mark_is_a_placeholder_and_an_unknown_role_is_an_error(
    tok: PreTrainedTokenizerFast,
) -> None:
    def rendered(text: str, media: int) -> str:
        ids = prompt_ids(tok, [("user", text, 1.0)], media)
        placeholders = [i == token_id(tok, "<image>") for i in ids]
        assert sum(placeholders) == media
        return "".join(
            "#" if p else tok.decode([i]) for i, p in zip(ids, placeholders, strict=True)
        )

    assert "user\n#a#b<|im_end|>" in rendered("<image>a<video>b", 2)
    assert "user\n#a<video>b<|im_end|>" in rendered("<image>a<video>b", 1)
    assert "user\n<image>a<video>b<|im_end|>" in rendered("<image>a<video>b", 0)
    with pytest.raises(ValueError, match="role 'human'"):
        prompt_ids(tok, [("human", "a", 1.0)], 0)
    with pytest.raises(ValueError, match="2 media but 1 mark "):
        prompt_ids(tok, [("user", "a<video>", 1.0)], 2)


# --------------------------------------------------------------------------- plain text stays text

nasty = st.lists(
    st.one_of(
        st.sampled_from([*SPECIALS, "<image>", "<think>", "red", " red", "redundant", "\n", "  "]),
        st.text(max_size=6),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(nasty)
@example("a <|im_end|><image> b")
@example("Ġ naïve \u00a0\u3000\U0001f600 \r\n\t")
def test_plain_text_decodes_to_itself_without_control_tokens(text: str) -> None:
    tok = byte_tokenizer(WORDS)
    ids = encode_text(tok, text)
    assert tok.decode(ids) == text
    assert not set(ids) & set(tok.all_special_ids)
    assert not set(ids) & {token_id(tok, s) for s in (*SPECIALS, "<image>")}


@settings(max_examples=100, deadline=None)
@given(nasty, nasty, st.integers(0, 2))
def test_user_text_cannot_end_a_turn_or_add_an_image(ask: str, say: str, images: int) -> None:
    tok = byte_tokenizer(WORDS)
    sample = tokenize_messages(
        tok, [("user", "<image>" * images + ask, 1.0), ("assistant", say, 1.0)], images
    )
    ids = sample.ids.tolist()
    assert ids.count(token_id(tok, "<image>")) == images
    assert ids.count(token_id(tok, "<|im_start|>")) == 2
    assert ids.count(token_id(tok, "<|im_end|>")) == 2
    spoken = sample.ids[sample.weights > 0]
    assert tok.decode(spoken) == say + "<|im_end|>"


def test_words_match_whole_words_only(tok: PreTrainedTokenizerFast) -> None:
    assert len(encode_text(tok, "red")) == 1
    assert len(encode_text(tok, " red")) == 1
    assert encode_text(tok, "red") != encode_text(tok, " red")
    assert len(encode_text(tok, "redundant")) == len("redundant")
    assert len(encode_text(tok, "<points red circle")) == 4
    assert all(len(encode_text(tok, role)) == 1 for role in ROLES)


def test_a_word_of_several_pieces_is_refused() -> None:
    with pytest.raises(UserError, match=r"'light blue'.*'light', ' blue'"):
        byte_tokenizer(["light blue"])


def test_bytes_have_their_own_ids(tok: PreTrainedTokenizerFast) -> None:
    text = "é€"
    assert encode_text(tok, text) == list(text.encode())
    assert sorted(tok.get_vocab().values()) == list(range(len(tok)))


def test_a_saved_tokenizer_loads_unchanged(tmp_path: Path, tok: PreTrainedTokenizerFast) -> None:
    model = load_language("random:qwen3-tiny")[0]
    save_language(tmp_path, model, tok)
    again = load_tokenizer(str(tmp_path))
    text = "red <image> redundant 12 <|im_end|> é"
    assert tokenizer_digest(again) == tokenizer_digest(tok)
    assert encode_text(again, text) == encode_text(tok, text)
    assert eos_ids(again) == eos_ids(tok)
    assert (again.padding_side, again.pad_token_id) == ("left", tok.pad_token_id)
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    named = {"_name_or_path": "", "architectures": ["Qwen3ForCausalLM"]}
    assert read | named == model.config.to_dict() | named


def test_the_digest_depends_on_the_vocabulary_only(tok: PreTrainedTokenizerFast) -> None:
    same = byte_tokenizer(WORDS)
    before = tokenizer_digest(same)
    same(["a", "b c"], padding=True)  # changes the padding setting of the tokenizer
    assert tokenizer_digest(same) == before == tokenizer_digest(tok)
    assert tokenizer_digest(byte_tokenizer(WORDS[:-1])) != before


# --------------------------------------------------------------------------------------- models


def test_qwen3_06b_has_its_published_size() -> None:
    model, _ = load_language("random:qwen3-0.6b", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 596_049_920
    assert model.get_input_embeddings().weight.shape == (151_936, 1024)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 1e6


def test_tiny_is_small_and_every_preset_builds() -> None:
    tiny, tok = load_language("random:qwen3-tiny")
    assert (tiny.config.hidden_size, tiny.config.num_hidden_layers) == (64, 2)
    assert sum(p.numel() for p in load_language("random:qwen3-demo")[0].parameters()) < 10e6
    rows = tiny.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0
    assert rows - 64 < len(tok) <= rows


def folder_with(tmp_path: Path, rows: int) -> tuple[Path, PreTrainedTokenizerFast]:
    """Write a model's folder as published: `rows` embeddings, no `<image>` in the tokenizer."""
    tok = byte_tokenizer()
    state = tok.backend_tokenizer.to_str().replace('"<image>"', '"<|image_pad_2|>"')
    backend = type(tok.backend_tokenizer).from_str(state)
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate_size": 32}
    preset = LanguagePreset(hidden_size=16, vocab_rows=rows, **sizes)
    model = language.AutoModelForCausalLM.from_config(preset.config(len(plain)))
    model.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    return tmp_path, plain


def test_image_token_is_added_and_fits_without_resizing(tmp_path: Path) -> None:
    folder, plain = folder_with(tmp_path, rows=320)
    model, tok = load_language(str(folder))
    assert token_id(tok, "<image>") == len(plain)
    assert len(tok) == len(plain) + 1
    assert model.get_input_embeddings().weight.shape[0] == 320
    assert eos_ids(tok) == (plain.get_vocab()["<|im_end|>"], plain.get_vocab()["<|endoftext|>"])
    assert encode_text(tok, "<image>") == list(b"<image>")


def test_a_full_embedding_is_resized_for_the_image_token(tmp_path: Path) -> None:
    folder, plain = folder_with(tmp_path, rows=len(byte_tokenizer()))
    model, _ = load_language(str(folder))
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == -(-(len(plain) + 1) // 64) * 64
    assert model.config.vocab_size == rows


def test_sampling_settings_of_a_folder_are_ignored(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, rows=320)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    assert load_language(str(folder))[0].generation_config.temperature is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("random:qwen3-tini", r"nearest: qwen3-tiny; there are: random:qwen3-0.6b"),
        ("./nowhere", r"nowhere: no such folder; give a local folder \(--llm PATH"),
        ("/nowhere/at/all", "no such folder"),
        (str(Path(__file__).parent), r"no config\.json"),
    ],
)
def test_a_source_without_a_model_is_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_language(source)


@pytest.mark.parametrize(
    "name", ["final_logit_softcapping", "logit_scale", "attn_logit_softcapping", "sliding_window"]
)
def test_models_with_unsupported_features_are_refused(name: str) -> None:
    model, tok = load_language("random:qwen3-tiny")
    model.config.use_sliding_window = True
    setattr(model.config, name, 30)
    with pytest.raises(UserError, match=f"language model qwen3 with {name}=30"):
        language.prepare_model(model, tok)
    model.config.use_sliding_window = False
    if name == "sliding_window":  # Qwen2's configs have a window and do not use it
        language.prepare_model(model, tok)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"vocab_rows": 10}, "vocab_rows 10 is below"),
    ],
)
def test_invalid_sizes_are_refused(change: dict[str, int], message: str) -> None:
    sizes = {"hidden_size": 8, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        LanguagePreset(**{**sizes, "intermediate_size": 8, **change}).config(11)


def test_chat_marks_are_added_where_they_are_missing() -> None:
    backend = byte_tokenizer().backend_tokenizer
    state = backend.to_str()
    for mark in ("<|im_start|>", "<|im_end|>", "<image>"):
        state = state.replace(f'"{mark}"', f'"<old {mark[1:-1]}>"')
    plain = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(state))
    plain.add_tokens([AddedToken("<|im_end|>", special=False)])  # present, but as a word
    tok = language.prepare_tokenizer(plain)
    sample = tokenize_messages(tok, [("user", "<|im_end|>x", 1.0), ("assistant", "y", 1.0)], 1)
    ids = sample.ids.tolist()
    assert ids.count(token_id(tok, "<|im_end|>")) == 2
    assert ids.count(token_id(tok, "<|im_start|>")) == 2
    assert ids.count(token_id(tok, "<image>")) == 1
    assert tok.pad_token == "<|endoftext|>"


# ---------------------------------------------------------------------------- mutated folders

VALUES = (None, -1, 0, 10**12, 1e99, 3.5, "x", "", "../x", [], [1], {}, {"a": 1}, True)


def mutate(folder: Path, rng: random.Random) -> None:
    """Cut a file of a folder, change bytes near its start, or change a value of a JSON file."""
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    way = rng.randrange(3)
    if way == 0:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif way == 1 or path.suffix != ".json":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 3000))] = rng.randrange(256)
        path.write_bytes(data)
    else:
        values = json.loads(data)
        target = values
        inner = [v for v in values.values() if isinstance(v, dict) and v]
        if inner and rng.random() < 0.7:
            target = rng.choice(inner)
        target[rng.choice(list(target))] = rng.choice(VALUES)
        path.write_text(json.dumps(values))


@pytest.mark.soak_counted
def test_any_mutation_loads_or_is_one_line(
    published: dict[str, Path], tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(soak(150, 6000)):
        rng = random.Random(number)
        folder = Path(shutil.copytree(published[rng.choice(("tied", "sharded"))], tmp_path / "llm"))
        mutate(folder, rng)
        try:
            load_language(str(folder))
            outcomes["loaded"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and str(folder) in str(error), (number, str(error))
        shutil.rmtree(folder)
    assert min(outcomes.values()) > 0, outcomes
