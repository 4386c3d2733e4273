"""`--gguf`: the pair of files for llama.cpp, read with `gguf` and computed as llama.cpp computes it.

python -m model.export --run default --out exported --gguf
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from configs import UserError
from model.export import mmproj
from model.export.__main__ import main
from model.export.compare import MismatchError
from model.export.gguf import (
    LLAMA3,
    QWEN2,
    check_gguf,
    interleave,
    llm_tensors,
    pre_tokenizer,
    write_gguf,
)
from model.export.mmproj import image_note, tower_tensors
from model.export.towers import ExportedTower, export_tower
from model.inference import generation_mode
from model.language.chat_template import prompt_ids
from model.language.tokenizer import SPECIALS, byte_tokenizer, prepare_tokenizer, token_id
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vlm import VLM, build_vlm
from tests.support import tiny_clip

SIZES: dict[str, Any] = {
    "vocab_size": 480,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# transformers reads a Qwen3 GGUF with heads of 128 only.
QWEN3 = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
CLIP: dict[str, Any] = {"fit": "pad"}
SIGLIP: dict[str, Any] = {"model": "tiny-siglip", "activation": "gelu"}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "qwen3, linear": (Qwen3Config(**QWEN3, tie_word_embeddings=True), "linear", CLIP),
    "qwen3, untied, mlp": (Qwen3Config(**QWEN3, tie_word_embeddings=False), "mlp", CLIP),
    "two blocks, the last first": (
        Qwen3Config(**QWEN3, tie_word_embeddings=True),
        "mlp",
        {"blocks": (3, 1)},
    ),
    "three blocks": (Qwen2Config(**SIZES), "linear", {"blocks": (1, 3, 0), "fit": "squash"}),
    "qwen2, siglip": (Qwen2Config(**SIZES, tie_word_embeddings=True), "mlp", SIGLIP),
    "llama, exact GELU": (
        LlamaConfig(**SIZES, tie_word_embeddings=False, rope_theta=5e4),
        "linear",
        {"model": "tiny", "activation": "gelu", "blocks": (0,)},
    ),
    "a clip of transformers": (Qwen2Config(**SIZES), "linear", {"hf": "clip", "blocks": (0,)}),
    "a siglip of transformers": (Qwen2Config(**SIZES), "mlp", {"hf": "siglip", "blocks": (1, 0)}),
    "mistral": (MistralConfig(**SIZES, sliding_window=None, head_dim=32), "linear", CLIP),
}


def trained_tokenizer(pattern: str = QWEN2) -> PreTrainedTokenizerFast:
    """A small tokenizer as Qwen's: byte-level BPE that composes characters."""
    core = Tokenizer(models.BPE(ignore_merges=pattern == LLAMA3))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=letters, special_tokens=[], show_progress=False
    )
    text = "What is this? A cup of coffee beside a spoon. user assistant system\n"
    core.train_from_iterator([text] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    return tokenizer


def build(folder: Path, config: Any, connector: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    """Return (vlm, tokenizer, encoder, tower) with weights that matter."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llm")
    trained_tokenizer().save_pretrained(folder / "llm")
    changes = dict(changes)
    if kind := changes.pop("hf", ""):
        tower = tiny_clip.save_tower(folder / "tower", tiny_clip.transformers_tower(kind))
        entry = encoder_config(f"hf:{tower}", compute_dtype="float32", **changes)
        eyes = load_encoder(entry, device="cpu")
    else:
        entry = tiny_clip.entry(**changes)
        weights = tiny_clip.write_weights(folder / "weights", entry.model)
        eyes = load_encoder(entry, device="cpu", weights=str(weights))
    vlm, tokenizer = build_vlm(eyes.spec("fp16").width, str(folder / "llm"), connector, seed=0)
    generator = torch.Generator().manual_seed(2)
    for p in vlm.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return vlm.eval(), tokenizer, eyes, export_tower(eyes)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, VLM, PreTrainedTokenizerFast, VisionEncoder]:
    folder = tmp_path_factory.mktemp("gguf")
    vlm, tokenizer, eyes, tower = build(folder, *request.param)
    files = write_gguf(folder, "mine", vlm, tokenizer, tower, eyes.spec("fp16"), kind="f32")
    assert [path.name for path in files] == ["mine-F32.gguf", "mmproj-mine.gguf"]
    return *files, vlm, tokenizer, eyes


def values(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {one.name: torch.tensor(one.data) for one in GGUFReader(path).tensors}


def test_tower_and_projector_give_the_trained_embeddings(written: tuple[Any, ...]) -> None:
    """From pixels to the width of the language model."""
    _, path, vlm, _, eyes = written
    pixels = tiny_clip.noise(3, eyes.spec("fp16").image_size)
    tanh = eyes.tower.activation == "gelu_tanh"  # otherwise exact, which llama.cpp approximates
    with torch.inference_mode():
        expected = vlm.connector(torch.as_tensor(eyes.encode(pixels)).float())
        found = tiny_clip.LlamaCpp(path, tanh=tanh)(eyes.normalize(pixels))
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_projector_in_numpy(written: tuple[Any, ...]) -> None:
    """fp32: within 1e-5, also for values near 0."""
    _, path, vlm, _, eyes = written
    file = {one.name: one.data for one in GGUFReader(path).tensors if one.name.startswith("mm.")}
    assert set(file) == {"mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"}
    assert all(value.dtype == np.float32 for value in file.values())
    width = file["mm.0.weight"].shape[1]
    if len(eyes.config.blocks) > 1:
        return  # their order is in the test of the tower
    erf = np.vectorize(math.erf)
    for size in (0.01, 1.0, 30.0):
        features = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
        features *= np.float32(size)
        hidden = features @ file["mm.0.weight"].T + file["mm.0.bias"]
        gelu = (hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))).astype(np.float32)
        found = gelu @ file["mm.2.weight"].T + file["mm.2.bias"]
        with torch.inference_mode():
            expected = vlm.connector(torch.tensor(features)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_keys_of_the_projector(written: tuple[Any, ...]) -> None:
    _, path, vlm, _, eyes = written
    keys = values(path)
    assert keys["general.architecture"] == "clip" and keys["general.type"] == "mmproj"
    assert keys["clip.projector_type"] == "mlp" and keys["clip.has_vision_encoder"] is True
    assert keys["clip.vision.image_size"] == eyes.spec("fp16").image_size
    assert keys["clip.vision.projection_dim"] == vlm.language.config.hidden_size
    np.testing.assert_allclose(keys["clip.vision.image_mean"], eyes.config.mean, atol=1e-7)
    np.testing.assert_allclose(keys["clip.vision.image_std"], eyes.config.std, atol=1e-7)
    assert keys["clip.use_gelu"] is (eyes.config.activation != "quick_gelu")
    assert sorted(b + 1 for b in eyes.config.blocks) == keys["clip.vision.feature_layer"]


def test_transformers_loads_the_language_model(written: tuple[Any, ...]) -> None:
    """Someone else's reader gives equal logits: names, rotation of queries and keys, and sizes."""
    path, _, vlm, _, _ = written
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), generation_mode(vlm):
        theirs = model(ids).logits
        ours = vlm.language(ids).logits
    assert (theirs - ours).abs().max() <= 1e-4


def test_every_tensor_of_the_language_model_is_there(written: tuple[Any, ...]) -> None:
    path, _, vlm, _, _ = written
    keys, found = values(path), tensors(path)
    config = vlm.language.config
    kind = {"mistral": "llama"}.get(config.model_type, config.model_type)
    assert keys["general.architecture"] == kind
    block = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"}
    block |= {"ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
    block |= {"attn_q_norm", "attn_k_norm"} if kind == "qwen3" else set()
    names = {f"blk.{n}.{one}.weight" for n in range(2) for one in block}
    if kind == "qwen2":
        names |= {f"blk.{n}.attn_{one}.bias" for n in range(2) for one in "qkv"}
    names |= {"token_embd.weight", "output_norm.weight"}
    names |= set() if config.tie_word_embeddings else {"output.weight"}
    assert set(found) == names
    assert keys[f"{kind}.vocab_size"] == len(found["token_embd.weight"])
    theta = config.rope_parameters["rope_theta"]
    assert keys[f"{kind}.rope.freq_base"] == pytest.approx(theta)


def test_the_tokenizer(written: tuple[Any, ...]) -> None:
    path, _, vlm, own, _ = written
    keys = values(path)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == vlm.language.config.vocab_size
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    for text, number in own.get_vocab().items():
        assert tokens[number] == text
    assert {tokens[i] for i, kind in enumerate(kinds) if kind == TokenType.CONTROL} == {
        *SPECIALS,
        "<image>",
    }
    user = {tokens[i] for i, kind in enumerate(kinds) if kind == TokenType.USER_DEFINED}
    assert user == {"<think>", "</think>"}
    unused = [tokens[i] for i, kind in enumerate(kinds) if kind == TokenType.UNUSED]
    assert unused == [f"[PAD{i}]" for i in range(len(own), len(tokens))]
    assert keys["tokenizer.ggml.eos_token_id"] == token_id(own, "<|im_end|>")
    assert keys["tokenizer.ggml.eot_token_id"] == own.eos_token_id
    assert keys["tokenizer.ggml.padding_token_id"] == own.pad_token_id
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert token_id(own, "<image>") in keys["tokenizer.ggml.suppress_tokens"]


def test_transformers_tokenizes_with_it(written: tuple[Any, ...]) -> None:
    """Its reader of GGUF has Llama 3's and GPT-2's cuts only, which are Qwen's for these texts."""
    path, _, _, own, _ = written
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("What is this?", " a cup of coffee  beside", "spoon. user assistant", "x<think>y"):
        assert theirs.encode(text, add_special_tokens=False) == own.encode(text)
    messages = [{"role": "user", "content": "What is this?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompt_ids(own, [("user", "What is this?", 1.0)], 0)


def test_the_chat_template_is_plain(written: tuple[Any, ...]) -> None:
    template = values(written[0])["tokenizer.chat_template"]
    assert template.isascii() and "<|im_start|>" in template


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    config = Qwen3Config(**QWEN3, tie_word_embeddings=True)
    return build(tmp_path_factory.mktemp("model"), config, "mlp", CLIP)


def test_half_the_size(model: tuple[Any, ...], tmp_path: Path) -> None:
    """Matrices are float16; vectors, positions and the projector stay float32."""
    vlm, tokenizer, eyes, tower = model
    spec = eyes.spec("fp16")
    whole = write_gguf(tmp_path, "mine", vlm, tokenizer, tower, spec, kind="f32")
    size = [path.stat().st_size for path in whole]
    half = write_gguf(tmp_path, "mine", vlm, tokenizer, tower, spec, kind="f16")
    assert half[0].name == "mine-F16.gguf"
    assert half[0].stat().st_size < 0.6 * size[0] and half[1].stat().st_size < size[1]
    for path in half:
        for one in GGUFReader(path).tensors:
            keeps = len(one.shape) == 1 or one.name.startswith(("mm.", "v.position_embd"))
            assert one.data.dtype == (np.float32 if keeps else np.float16), one.name
    vlm.language.get_input_embeddings().weight.data[3, 3] = 7e4
    try:
        with pytest.raises(UserError, match=r"token_embd.weight has a value of 7e\+04.*type f32"):
            write_gguf(tmp_path, "mine", vlm, tokenizer, tower, spec, kind="f16")
    finally:
        vlm.language.get_input_embeddings().weight.data[3, 3] = 0.1


def test_a_projector_that_differs_is_noticed(
    model: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, tokenizer, eyes, tower = model
    inner = mmproj.projector

    def changed(*given: Any) -> dict[str, np.ndarray]:
        result = {name: value.copy() for name, value in inner(*given).items()}
        result["mm.0.weight"][5, 7] += 0.01
        return result

    monkeypatch.setattr(mmproj, "projector", changed)
    with pytest.raises(MismatchError, match="its projector differs from the connector by"):
        write_gguf(tmp_path, "mine", vlm, tokenizer, tower, eyes.spec("fp16"), kind="f32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "gemma is none of qwen3, qwen2, llama, mistral"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "within a sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"scaled \(yarn\)"),
        ({"hidden_act": "gelu"}, "computes silu, not gelu"),
    ],
)
def test_a_language_model_that_is_not_written_is_refused(
    changes: dict[str, Any], message: str, model: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = model[0]
    stand_in = type("Config", (), {**vlm.language.config.to_dict(), **changes})()
    monkeypatch.setattr(vlm.language, "config", stand_in)
    with pytest.raises(UserError, match=message) as caught:
        llm_tensors(vlm)
    assert "\n" not in str(caught.value) and "--gguf" in str(caught.value)


def test_a_tower_that_is_not_clip_is_refused(model: tuple[Any, ...], tmp_path: Path) -> None:
    tower: ExportedTower = model[3]
    folder = tiny_clip.save_tower(tmp_path / "tower", tiny_clip.transformers_tower("dinov2"))
    other = load_encoder(encoder_config(f"hf:{folder}"), device="cpu")
    with pytest.raises(UserError, match=r"Dinov2: llama\.cpp's LLaVA computes CLIP and SigLIP"):
        tower_tensors(export_tower(other))
    config = type(tower.config)(**{**tower.config.to_dict(), "intermediate_size": tiny_clip.WIDTH})
    with pytest.raises(UserError, match="would exchange its two matrices"):
        tower_tensors(dataclasses.replace(tower, config=config))


def test_pooled_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    eyes = load_encoder(tiny_clip.entry(pool_image=2), device="cpu", random_weights=True)
    tiny_clip.save_trained(tmp_path / "run", eyes)
    with pytest.raises(UserError, match=r"--gguf: space .*2 x 2 patches .*does not pool"):
        main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--gguf"])
    assert not (tmp_path / "out").exists()


def test_the_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    spec = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True).spec("fp16")
    with pytest.raises(UserError, match=r"install it: pip install 'nanomolmo2\[gguf\]'"):
        check_gguf(spec)


def test_how_text_is_cut() -> None:
    def name(tokenizer: PreTrainedTokenizerFast) -> str:
        return pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))

    assert name(trained_tokenizer()) == "qwen2"
    assert name(trained_tokenizer(LLAMA3)) == "llama-bpe"
    assert name(byte_tokenizer(("What",))) == "llama-bpe"  # whole words without merges
    other = trained_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    assert name(other) == "smollm"
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert name(other) == "gpt-2"
    for pieces in (pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        other.backend_tokenizer.pre_tokenizer = pieces
        with pytest.raises(UserError, match="the tokenizer cuts text in a way that is not known"):
            name(other)
    other = trained_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="not known here"):
        name(other)


def test_an_exported_tokenizer_is_the_models_own() -> None:
    """What the export added to a tokenizer is left out again."""
    from model.export.template import exported_tokenizer

    own = prepare_tokenizer(trained_tokenizer())
    assert pre_tokenizer(json.loads(exported_tokenizer(own).backend_tokenizer.to_str())) == "qwen2"


def test_rows_are_interleaved_head_by_head() -> None:
    rows = np.arange(8)[:, None]  # two heads of four: halves (0, 1) and (2, 3)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_images_that_llama_cpp_prepares_otherwise() -> None:
    spec = load_encoder(tiny_clip.entry(fit="pad"), device="cpu", random_weights=True).spec("fp16")
    clip = (0.48145466, 0.4578275, 0.40821073)
    assert image_note(dataclasses.replace(spec, mean=clip)) == ""
    grey = dataclasses.replace(spec, mean=(0.5, 0.5, 0.5))
    assert "padded with (127, 127, 127): pad and resize them to 32 x 32" in image_note(grey)
    squash = dataclasses.replace(spec, fit="squash")
    assert (
        "regard to their aspect ratio: resize them to 32 x 32 before you give them to it"
        in image_note(squash)
    )
    middle = image_note(dataclasses.replace(spec, fit="crop"))
    assert "until the shorter side has 32 pixels, and cut out 32 x 32, before" in middle


@pytest.mark.slow
def test_the_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a `random:` model, whose tokenizer has no merges."""
    eyes = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True)
    tiny_clip.save_trained(tmp_path / "run", eyes, "mlp")
    words = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "mine"), "--gguf"]
    assert main(words) == 0
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"mine-F32.gguf", "mmproj-mine.gguf", "model.safetensors"} <= names
    printed = capsys.readouterr().out
    assert "gguf      mine-F32.gguf (" in printed and "read back equal" in printed
    assert "images    llama.cpp pads images to a square" in printed
    card = (tmp_path / "mine/README.md").read_text()
    assert "llama-mtmd-cli -m mine-F32.gguf --mmproj mmproj-mine.gguf" in card
    keys = values(tmp_path / "mine/mine-F32.gguf")
    assert len(keys["tokenizer.ggml.merges"]) == 1
    assert "qwen3.attention.key_length" in keys
