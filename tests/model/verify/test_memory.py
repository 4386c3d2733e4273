"""The arithmetic of `model.verify` agrees with running models: bytes that autograd keeps, peaks, operations.

parts = step_bytes(sizes, Step(tokens=4096, checkpointing=True, gpu=True))
parts["total"] / GIB          # of a training step, estimated
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from model.attention.batch import PackedBatch
from model.connector import build_connector
from model.language.model import LanguagePreset, load_language
from model.verify.memory import (
    GIB,
    Sizes,
    Step,
    layer_bytes,
    sample_flops,
    sizes_of,
    stage_days,
    state_bytes,
    step_bytes,
)
from model.vlm import VLM, parameter_counts
from tests.benchmarks.real_size import OFF, Case, allocated_peak, train_steps

pytestmark = pytest.mark.slow

T = 256  # tokens of the batch whose memory is counted
IMAGE = 299  # token id at the places of features
RANK = 6  # of adapters
LEARNS = ("frozen", "adapters", "whole")
FAMILIES = ("qwen3", "qwen2")


def small(layers: int, family: Any = "qwen3", learns: str = "whole") -> tuple[VLM, Sizes]:
    """Build a small model whose widths all differ, so that a test notices two swapped terms."""
    preset = LanguagePreset(
        hidden_size=96,
        layers=layers,
        heads=8,
        kv_heads=2,
        head_dim=12 if family == "qwen2" else 16,
        intermediate_size=208,
        family=family,
    )
    model = AutoModelForCausalLM.from_config(preset.config(300))
    vlm = VLM(model, build_connector("linear", 32, 96), 32)
    counts = parameter_counts(vlm)
    sizes = sizes_of(model.config, counts["language"][1], counts["connector"][1])
    if learns == "adapters":
        pytest.importorskip("peft")
        vlm.add_adapters(RANK, seed=0)
    vlm.freeze(train_connector=True, train_llm=learns != "frozen")
    return vlm, sizes


def one_sample(supervised: int = 8) -> PackedBatch:
    """Return one sample of T tokens: features in the first four, the last ones supervised."""
    ids, weights = torch.arange(T) % 290, torch.zeros(T)
    ids[:4] = IMAGE
    weights[-supervised:] = 1
    return PackedBatch.one_sample(ids, weights, IMAGE)


def kept_bytes(layers: int, family: str, autocast: bool, learns: str, checkpointing: bool) -> int:
    """Return the bytes that autograd holds after the forward pass, without parameters, each storage once."""
    vlm, _ = small(layers, family, learns)
    vlm.gradient_checkpointing(checkpointing)
    vlm.train()
    known = {p.untyped_storage().data_ptr() for p in vlm.parameters()}
    held: dict[int, Any] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # The estimate counts copies of weights in bfloat16 separately ("bf16 copies").
        if storage.data_ptr() not in known and not (x.dim() == 2 and T not in x.shape):
            held[storage.data_ptr()] = storage
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss, _ = vlm.loss(one_sample(), torch.randn(1, 4, 32))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("autocast", [True, False])
def test_activations_equal_the_formula(autocast: bool, learns: str, family: str) -> None:
    """Two more layers hold exactly twice the bytes of `layer_bytes` more."""
    _, sizes = small(1, family)
    two, four = (kept_bytes(n, family, autocast, learns, checkpointing=False) for n in (2, 4))
    rank = RANK if learns == "adapters" else 0
    assert (four - two) / 2 / T == layer_bytes(sizes, autocast, learns != "frozen", rank)


@pytest.mark.parametrize("learns", LEARNS)
def test_checkpointing_keeps_the_inputs_of_layers(learns: str) -> None:
    two, four = (kept_bytes(n, "qwen3", True, learns, checkpointing=True) for n in (2, 4))
    assert (four - two) / 2 / T == 4 * small(1)[1].width


# ---- peaks

SMALL = LanguagePreset(
    hidden_size=192,
    layers=4,
    heads=6,
    kv_heads=2,
    head_dim=32,
    intermediate_size=576,
    vocab_rows=4096,
)
PEAKS = {
    "short": Case(llm=SMALL, tokens=64),
    "long": Case(llm=SMALL, tokens=384),
    "one micro-batch": Case(llm=SMALL, tokens=384, micro_batches=1),
    "recomputed": Case(llm=SMALL, tokens=384, checkpointing=True),
    "connector": Case(llm=SMALL, tokens=384, train_llm=False),
    "many words": Case(llm=dataclasses.replace(SMALL, layers=2, vocab_rows=32768), tokens=48),
    "qwen2": Case(llm=dataclasses.replace(SMALL, family="qwen2"), tokens=384),
    "adapters": Case(llm=SMALL, tokens=384, lora=8),
    "adapters, recomputed": Case(llm=SMALL, tokens=384, lora=8, checkpointing=True),
}


@pytest.mark.parametrize("case", PEAKS.values(), ids=PEAKS)
def test_the_estimate_is_within_15_percent_of_the_peak(case: Case) -> None:
    """All tensors of two steps on the CPU, from the weights to the moments of AdamW, as torch counts them.

    tests/benchmarks/real_size.py compares the resident memory of whole processes, up to Qwen3-0.6B.
    """
    if case.lora:
        pytest.importorskip("peft")
    case = dataclasses.replace(case, supervised=1.0)
    found: list[Sizes] = []

    def work() -> None:
        vlm, sizes = case.build()
        found.append(sizes)
        train_steps(case, vlm)

    measured = allocated_peak(work)
    parts = step_bytes(found[0], case.step())
    estimated = parts["total"] - parts["process"]  # what is no tensor
    assert estimated == pytest.approx(measured, rel=OFF), estimated / measured


ON_AN_H100 = {
    "all": (Step(tokens=16284, checkpointing=False, gpu=True), 48.8),
    "all, recomputed": (Step(tokens=16284, checkpointing=True, gpu=True), 15.7),
    "connector": (Step(tokens=16284, checkpointing=False, gpu=True, train_llm=False), 29.2),
    "36,864, recomputed": (Step(tokens=36816, checkpointing=True, gpu=True), 19.8),
    "all, recomputed, one micro-batch": (
        Step(tokens=16284, checkpointing=True, gpu=True, accumulates=False),
        12.8,
    ),
    "36,864, recomputed, one micro-batch": (
        Step(tokens=36816, checkpointing=True, gpu=True, accumulates=False),
        17.0,
    ),
}
"""Steps of Qwen3-0.6B (23 and 52 images of 708 tokens), and GiB measured (docs/BENCHMARKS.md, 2026-11-26)."""


@pytest.mark.parametrize(("step", "measured"), ON_AN_H100.values(), ids=ON_AN_H100)
def test_the_estimate_is_near_what_a_gpu_used(step: Step, measured: float) -> None:
    assert step_bytes(qwen3(), step)["total"] / GIB == pytest.approx(measured, rel=0.1)


def test_the_estimate_is_near_a_measured_process() -> None:
    """Measured: Qwen3-0.6B in train.run on a CPU, two images in 1,414 tokens, 15.14 GiB resident at most."""
    step = Step(tokens=1414, checkpointing=False, gpu=False)
    assert step_bytes(qwen3(), step)["total"] / GIB == pytest.approx(15.14, rel=0.06)


# ---- what settings change


def qwen3() -> Sizes:
    model = load_language("random:qwen3-0.6b", device="meta")[0]
    return sizes_of(model.config, sum(p.numel() for p in model.parameters()), 1_049_600)


def test_the_published_figures_of_qwen3() -> None:
    sizes = qwen3()
    parts = step_bytes(sizes, Step(tokens=4096, checkpointing=True, gpu=True))
    state = parts["weights"] + parts["gradients"] + parts["AdamW"]
    assert state == 16 * (596_049_920 + 1_049_600)
    assert state / GIB == pytest.approx(8.9, abs=0.05)
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    # Measured elsewhere in pure bfloat16: 76 KB a token a layer. Autocast keeps float32 norms.
    assert 76_000 < layer_bytes(sizes, autocast=True, trains=True) < 84_000


def test_frozen_parts_hold_less() -> None:
    sizes = qwen3()
    base = {"tokens": 4096, "checkpointing": False, "gpu": True}
    all_of_it = step_bytes(sizes, Step(**base))
    frozen = step_bytes(sizes, Step(**base, train_llm=False))
    assert frozen["gradients"] == 4 * sizes.connector
    assert frozen["AdamW"] == 8 * sizes.connector
    assert frozen["weights"] == all_of_it["weights"]
    assert frozen["activations"] < all_of_it["activations"]


def test_adapters_alone_have_gradients_and_moments() -> None:
    vlm, sizes = small(3, learns="adapters")
    adapters = parameter_counts(vlm)["adapters"]
    assert adapters == (sizes.adapters(RANK),) * 2
    parts = step_bytes(sizes, Step(tokens=T, checkpointing=False, gpu=False, lora=RANK))
    trained = sizes.adapters(RANK) + sizes.connector
    assert (parts["gradients"], parts["AdamW"]) == (4 * trained, 8 * trained)
    assert parts["weights"] == 4 * (trained + sizes.language)


def test_weights_of_4_bits() -> None:
    sizes = qwen3()
    base = Step(tokens=4096, checkpointing=True, gpu=True, lora=16)
    rounded = dataclasses.replace(base, load_in_4bit=True)
    saved = step_bytes(sizes, base)["weights"] - step_bytes(sizes, rounded)["weights"]
    assert saved == pytest.approx(3.5 * sizes.body, rel=0.01)


def test_full_shards_divide_weights_gradients_and_moments() -> None:
    sizes = qwen3()
    base = Step(tokens=4096, checkpointing=True, gpu=True, processes=4)
    none, full = (
        step_bytes(sizes, dataclasses.replace(base, parts=parts, accumulates=False))
        for parts in (1, 4)
    )
    for name in ("weights", "AdamW"):
        assert full[name] == none[name] // 4
    # Until the last micro-batch of a step, each process adds up whole gradients.
    several = step_bytes(sizes, dataclasses.replace(base, parts=4))
    assert several["gradients"] == 4 * (sizes.language + sizes.connector)
    assert full["gradients"] < several["gradients"] / 2


def test_offloading_leaves_one_layer_on_the_gpu() -> None:
    sizes = qwen3()
    base = Step(tokens=4096, checkpointing=True, gpu=True, accumulates=False)
    offloaded = dataclasses.replace(base, offload=True)
    parts = step_bytes(sizes, offloaded)
    assert parts["weights"] == parts["AdamW"] == 0
    assert 4 * sizes.embeddings < parts["gathered"] < 0.5 * 4 * sizes.language
    assert state_bytes(sizes, offloaded) == state_bytes(sizes, base)  # in the CPU's memory


# ---- operations and sizes


@pytest.mark.parametrize("learns", [True, False])
def test_operations_equal_the_count_of_torch(learns: bool) -> None:
    """torch's counter on a running step agrees. It counts attention in full, the formula its causal half."""
    vlm, sizes = small(3)
    vlm.freeze(train_connector=True, train_llm=learns)
    batch, features = one_sample(supervised=40), torch.randn(1, 4, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.loss(batch, features)[0].backward()
    products = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    full_attention = 3 * sizes.layers * 4 * sizes.heads * sizes.head_dim * T * T
    assert products["aten.bmm"] == full_attention
    # The connector runs on 4 of the tokens only, and the formula counts norms as parameters.
    wanted = sample_flops(sizes, T, 40, learns) - full_attention / 2
    assert counter.get_total_flops() - full_attention == pytest.approx(wanted, rel=0.02)


def test_days_are_operations_over_speed() -> None:
    assert stage_days(1e15, 86_400, peak_tflops=100, mfu=0.5) == pytest.approx(20.0)


def test_sizes_of_a_config_without_kv_heads_and_head_dim() -> None:
    class Plain:
        hidden_size, num_hidden_layers, num_attention_heads = 64, 2, 4
        intermediate_size, vocab_size, tie_word_embeddings = 128, 320, False

    sizes = sizes_of(Plain(), 1000, 10)
    assert (sizes.kv_heads, sizes.head_dim, sizes.embeddings) == (4, 16, 2 * 320 * 64)
