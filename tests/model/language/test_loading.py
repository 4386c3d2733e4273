"""Sound folders of language models load every tensor and train, in each form that they are published in.

model, tokenizer = load_language("/models/Qwen3-0.6B")
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from configs import UserError
from model.language.model import check_folder, load_language, max_positions
from model.language.tokenizer import byte_tokenizer
from model.vlm import build_vlm
from tests.support.trained_runs import VISION, one_sample, random_features

WEIGHTS = "model.safetensors"
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    state = {k: v.contiguous().clone() for k, v in change(load_file(folder / WEIGHTS)).items()}
    save_file(state, folder / WEIGHTS)


def trains(folder: Path) -> None:
    """Train a step on one sample, and find the loss lower."""
    check_folder(folder)
    assert max_positions(str(folder))
    vlm, _ = build_vlm(VISION, str(folder), "linear", 0)
    optimizer = torch.optim.SGD(vlm.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        total, weight = vlm.loss(one_sample(), random_features())
        loss = total / weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def same(folder: Path, expected: dict[str, Tensor]) -> None:
    """The loaded model has exactly these parameters."""
    model, _ = load_language(str(folder))
    state = model.state_dict()
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del state["lm_head.weight"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].float()) for name, value in state.items())


@pytest.mark.parametrize("name", ["tied", "untied", "sharded"])
def test_each_layout_loads_and_trains(name: str, published: dict[str, Path]) -> None:
    folder = published[name]
    files = sorted(folder.glob("model*.safetensors"))
    assert (len(files) > 1) == (name == "sharded")
    same(folder, {k: v for file in files for k, v in load_file(file).items()})
    trains(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_loaded_as_float32(dtype: torch.dtype, copy_of: Any) -> None:
    folder = copy_of("tied")
    rewrite(folder, lambda state: {k: v.to(dtype) for k, v in state.items()})
    stored = load_file(folder / WEIGHTS)
    same(folder, stored)
    assert load_language(str(folder))[0].dtype == torch.float32
    trains(folder)


def test_a_padded_vocabulary_trains(tmp_path: Path) -> None:
    """Qwen3 has 151,936 rows for 151,669 ids."""
    config = LlamaConfig(**SIZES | {"vocab_size": 1024})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_language(str(tmp_path))[0].config.vocab_size == 1024
    trains(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        MistralConfig(**SIZES, sliding_window=None),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ],
    ids=lambda config: str(config.model_type),
)
def test_other_families_load_and_train(config: PreTrainedConfig, tmp_path: Path) -> None:
    """A mixture of experts has other names in its file than in the model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    state = load_language(str(tmp_path))[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    trains(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.base_model.model.{name}",
        lambda name: f"_orig_mod.module.module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: "_fsdp_wrapped_module." + name.replace("mlp", "_fsdp_wrapped_module.mlp"),
        lambda name: f"model.{name}",
        lambda name: f"student.net.{name}",
        lambda name: f"language_model.{name}",
    ],
)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_prefixes_of_wrappers_are_undone(
    name: str, wrap: Callable[[str], str], copy_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would draw all of these at random."""
    folder = copy_of(name)
    before = load_file(folder / WEIGHTS)
    rewrite(folder, lambda state: {wrap(k): v for k, v in state.items()})
    with caplog.at_level(logging.INFO, "model"):
        same(folder, before)
    assert "names without the prefixes of wrappers" in caplog.text
    trains(folder)


def test_the_base_model_alone_is_whole_if_its_output_layer_is_tied(copy_of: Any) -> None:
    folder = copy_of("tied")
    before = load_file(folder / WEIGHTS)
    rewrite(folder, lambda state: {k.removeprefix("model."): v for k, v in state.items()})
    same(folder, before)


def test_a_tied_output_layer_may_be_stored_too_or_instead(copy_of: Any) -> None:
    folder = copy_of("tied")
    before = load_file(folder / WEIGHTS)
    embedding = before["model.embed_tokens.weight"]
    rewrite(folder, lambda state: state | {"lm_head.weight": embedding})
    same(folder, before)
    rewrite(folder, lambda state: {k: v for k, v in state.items() if "embed" not in k})
    same(folder, before)


def test_buffers_of_older_versions_are_counted(
    copy_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of("tied")
    before = load_file(folder / WEIGHTS)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    rewrite(folder, lambda state: state | old)
    with caplog.at_level(logging.INFO, "model"):
        same(folder, before)
    assert "2 tensors are not parameters of the model" in caplog.text


def test_class_names_of_wrappers_are_no_other_model(copy_of: Any) -> None:
    folder = copy_of("tied")
    path = folder / "config.json"
    for name in ("FSDPQwen3ForCausalLM", "PeftModelForCausalLM"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
        check_folder(folder)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **experts)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: {k: v for k, v in s.items() if "layers.1.mlp.experts.2" not in k})
    with pytest.raises(UserError, match=r"3 missing .*layers\.1\.mlp\.experts\.2\.down_proj"):
        check_folder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, copy_of: Any) -> None:
    folder = copy_of("tied")

    def spoil(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["model.norm.weight"][3] = value
        return state

    rewrite(folder, spoil)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight has values that are not fin"):
        load_language(str(folder))


def test_the_holes_of_a_download_are_warned_of(
    copy_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Programs that reserve a file's size first leave zeros where they stopped."""
    folder = copy_of("tied")
    load_language(str(folder))
    assert not caplog.text
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    load_language(str(folder))
    assert "matrices are zero everywhere (model.layers" in caplog.text


def test_a_later_change_of_the_file_does_not_change_the_model(copy_of: Any) -> None:
    """Files are mapped into memory while they are read."""
    folder = copy_of("tied")
    model, _ = load_language(str(folder))
    before = model.model.norm.weight.clone()
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * (folder / WEIGHTS).stat().st_size)
    assert torch.equal(model.model.norm.weight, before)
