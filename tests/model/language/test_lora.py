"""Adapters: on every linear layer of the blocks, saved as peft reads them, merged without a change.

vlm.add_adapters(rank=8, seed=0)
save_adapters(folder, vlm.language, vlm.adapters, adapter_parameters(vlm.language), base="Qwen/Qwen3-0.6B")
merge_saved(language, folder, vlm.adapters)
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
)

from configs import UserError
from model.language import lora
from model.language.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_parameters,
    add_adapters,
    merge_saved,
    save_adapters,
    weights_checksum,
)
from model.vlm import VLM, build_vlm, parameter_counts
from tests.support.trained_runs import VISION, one_sample, random_features

LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
TRANSFORMERS_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
"""peft asks transformers by a name that it is giving up."""


def plain(seed: int = 0, device: str = "cpu") -> VLM:
    return build_vlm(VISION, "random:qwen3-tiny", "linear", seed, device=device)[0]


def adapted(rank: int = 8) -> VLM:
    """Return a model with adapters that do something, as after training."""
    vlm = plain()
    vlm.add_adapters(rank, 0)
    generator = torch.Generator().manual_seed(1)
    for value in adapter_parameters(vlm.language).values():
        value.data = torch.randn(value.shape, generator=generator) * 0.1
    return vlm


def logits(language: nn.Module) -> Tensor:
    language.set_attn_implementation("sdpa")
    with torch.inference_mode():
        return language(torch.arange(40, 60)[None]).logits


def loss_of(vlm: VLM) -> Tensor:
    return vlm.loss(one_sample(), random_features())[0]


def test_every_linear_layer_of_the_blocks_has_one_and_nothing_else_trains() -> None:
    vlm = plain()
    whole = parameter_counts(vlm)["language"][1]
    before, state = loss_of(vlm), torch.random.get_rng_state()
    number = lora.count(vlm.language, 8)
    vlm.add_adapters(8, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert vlm.adapters is not None
    assert (vlm.adapters.rank, vlm.adapters.alpha) == (8, 16)
    assert vlm.adapters.target_modules == LINEAR
    assert vlm.freeze(True, True) == {
        "connector": (VISION * 64 + 64, VISION * 64 + 64),
        "language": (0, whole),
        "adapters": (number, number),
    }
    names = set(adapter_parameters(vlm.language))
    assert names == {
        f"model.layers.{i}.{part}.lora_{x}.default.weight"
        for i in range(2)
        for part in (
            *(f"self_attn.{n}_proj" for n in "qkvo"),
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
        for x in "AB"
    }
    after = loss_of(vlm)
    assert torch.equal(after, before), "B starts at zero"
    after.backward()
    learns = {n for n, p in vlm.language.named_parameters() if p.grad is not None}
    assert learns == names
    assert all(p.dtype == torch.float32 for p in vlm.language.parameters())


def test_adapters_may_be_frozen_and_are_equal_for_one_seed() -> None:
    one, two, other = plain(), plain(), plain()
    for vlm, seed in ((one, 3), (two, 3), (other, 4)):
        vlm.add_adapters(4, seed)
    first, second, third = (adapter_parameters(v.language) for v in (one, two, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, third[name]) for name, value in first.items())
    counts = one.freeze(train_connector=True, train_llm=False)
    assert counts["adapters"][0] == counts["language"][0] == 0


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "llama": (LlamaConfig(**SIZES, intermediate_size=48, vocab_size=320), LINEAR),
    "phi3, joined layers": (
        Phi3Config(**SIZES, intermediate_size=48, vocab_size=320, pad_token_id=0),
        ("down_proj", "gate_up_proj", "o_proj", "qkv_proj"),
    ),
    "opt, a layer before the blocks": (
        OPTConfig(**SIZES, ffn_dim=48, vocab_size=320, word_embed_proj_dim=16),
        ("fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"),
    ),
}


@pytest.mark.parametrize(("config", "targets"), OTHERS.values(), ids=OTHERS)
def test_other_models_have_other_layers(config: Any, targets: tuple[str, ...]) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    number = lora.count(model, 4)
    adapters = add_adapters(model, 4, seed=0)
    assert adapters.target_modules == targets
    found = adapter_parameters(model)
    assert sum(p.numel() for p in found.values()) == number
    assert all(".layers." in name for name in found)


def test_a_model_without_linear_layers_and_a_rank_that_is_none_are_refused() -> None:
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    )
    with pytest.raises(UserError, match=r"gpt2: its blocks have no linear layers .*--lora 0$"):
        add_adapters(gpt2, 4, seed=0)
    with pytest.raises(UserError, match="--lora 65: more than the 64 values"):
        add_adapters(plain().language, 65, seed=0)


def test_parameters_are_counted_on_meta() -> None:
    assert lora.count(plain(device="meta").language, 16) == lora.count(plain().language, 16)


# ---- saved and merged


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, VLM]:
    """Save adapters; return the folder, and the model that has them."""
    vlm = adapted()
    assert vlm.adapters is not None
    parameters = adapter_parameters(vlm.language)
    save_adapters(tmp_path, vlm.language, vlm.adapters, parameters, "Qwen/Qwen3-0.6B")
    return tmp_path, vlm


def test_merged_logits_equal_unmerged_ones(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    expected, loss = logits(vlm.language), loss_of(adapted())
    assert vlm.adapters is not None
    again = plain()
    unadapted = logits(again.language)
    merge_saved(again.language, folder, vlm.adapters)
    assert (logits(again.language) - expected).abs().max() < 1e-5
    assert (unadapted - expected).abs().max() > 0.1, "they do something"
    in_memory = adapted()
    in_memory.merge_adapters()
    assert (logits(in_memory.language) - expected).abs().max() < 1e-5
    for merged in (again, in_memory):
        assert merged.state_dict().keys() == plain().state_dict().keys()
        assert merged.adapters is None
    again = plain()
    merge_saved(again.language, folder, vlm.adapters)
    assert torch.allclose(loss_of(again), loss, atol=1e-4)


@TRANSFORMERS_WARNS
def test_peft_loads_them(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    expected = logits(vlm.language)
    theirs = PeftModel.from_pretrained(plain().language, str(folder))
    assert (logits(theirs) - expected).abs().max() < 1e-6
    merged = theirs.merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-5
    ours = plain()
    assert vlm.adapters is not None
    merge_saved(ours.language, folder, vlm.adapters)
    theirs_now = dict(merged.named_parameters())
    for name, value in ours.language.named_parameters():
        assert torch.allclose(value, theirs_now[name], atol=1e-6), name


def test_the_files_are_those_that_peft_writes(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
    assert config["target_modules"] == list(LINEAR) and config["inference_mode"]
    assert not config["use_rslora"] and config["task_type"] == "CAUSAL_LM"
    theirs = get_peft_model_state_dict(vlm.language, save_embedding_layers=False)
    stored = load_file(folder / ADAPTER)
    assert {f"base_model.model.{name}" for name in theirs} == stored.keys()
    assert all(torch.equal(stored[f"base_model.model.{n}"], value) for n, value in theirs.items())


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[max(tensors)]


def left_over(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(8, 64)


def of_another_rank(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        tensors[name] = (value[:4] if "lora_A" in name else value[:, :4]).contiguous()


def of_another_width(tensors: dict[str, Tensor]) -> None:
    name = max(tensors)
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[max(tensors)][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without, "1 tensors are not those of rank 8"),
        (left_over, r"1 tensors are not those of rank 8 .*lm_head"),
        (of_another_rank, "28 tensors are not those of rank 8"),
        (of_another_width, "1 tensors are not those of rank 8"),
        (not_finite, "has values that are not finite"),
    ],
)
def test_what_does_not_fit_the_base_is_one_line(
    saved: tuple[Path, VLM], damage: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    folder, vlm = saved
    assert vlm.adapters is not None
    tensors = load_file(folder / ADAPTER)
    damage(tensors)
    save_file(tensors, folder / ADAPTER)
    with pytest.raises(UserError, match=says) as refused:
        merge_saved(plain().language, folder, vlm.adapters)
    assert str(folder / ADAPTER) in str(refused.value) and "\n" not in str(refused.value)


def test_a_cut_file_is_one_line(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    assert vlm.adapters is not None
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated"):
        merge_saved(plain().language, folder, vlm.adapters)


def test_the_checksum_of_weights_is_of_every_bit() -> None:
    one = plain()
    assert weights_checksum(one.language) == weights_checksum(plain().language)
    assert weights_checksum(one.language) != weights_checksum(plain(seed=1).language)
    with torch.no_grad():
        one.language.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 5] ^= 1
    assert weights_checksum(one.language) != weights_checksum(plain().language)


# ---- packages, and weights of 4 bits


@pytest.mark.parametrize(
    ("gone", "four", "says"),
    [
        (
            "peft",
            False,
            r"--lora needs the package peft; install it: pip install 'nanomolmo2\[lora\]'",
        ),
        (
            "bitsandbytes",
            True,
            r"--load-in-4bit needs the package bitsandbytes; install it: pip install 'nanomolmo2\[qlora\]'",
        ),
    ],
)
def test_a_missing_package_is_one_line(
    gone: str, four: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else name)
    with pytest.raises(UserError, match=f"^{says}$"):
        lora.check_packages(four)
    lora.check_packages(load_in_4bit=False) if gone != "peft" else None


class Params4bit(nn.Parameter):
    """What bitsandbytes' has before it is moved to a GPU: the values, and how they will be rounded."""

    def __new__(cls, data: Tensor, requires_grad: bool, **how: Any) -> Params4bit:
        made = super().__new__(cls, data, requires_grad)
        made.how = how
        return made


class Linear4bit(nn.Linear):
    def __init__(self, *sizes: int, bias: bool, device: str, **how: Any) -> None:
        super().__init__(*sizes, bias=bias, device=device)
        self.how = how


def test_the_linear_layers_of_the_blocks_are_rounded_to_4_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for bitsandbytes, which needs a GPU: the layers, their values and their options."""
    stand_in: Any = types.ModuleType("bitsandbytes")
    stand_in.nn = types.SimpleNamespace(Linear4bit=Linear4bit, Params4bit=Params4bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    before, vlm = plain(), plain()
    vlm.add_adapters(8, 0, load_in_4bit=True)
    assert vlm.adapters is not None and vlm.adapters.load_in_4bit
    assert "over weights of 4 bits" in str(vlm.adapters)
    rounded = {
        n.removesuffix(".base_layer"): one
        for n, one in vlm.language.named_modules()
        if isinstance(one, Linear4bit)
    }
    assert rounded.keys() == lora.linear_layers(before.language).keys()
    for name, layer in rounded.items():
        assert layer.how["quant_type"] == layer.weight.how["quant_type"] == "nf4"
        assert layer.how["compress_statistics"] and layer.weight.how["compress_statistics"]
        assert layer.how["compute_dtype"] == torch.float32  # of this machine, which has no GPU
        assert torch.equal(layer.weight, before.language.get_submodule(name).weight)
    assert not any(
        p.requires_grad for n, p in vlm.language.named_parameters() if lora.MARK not in n
    )
    assert vlm.base_checksum == weights_checksum(before.language), "of the weights before rounding"
    assert torch.equal(loss_of(vlm), loss_of(before))
