"""The tables and verdicts of `model.verify`: every preset fits its cards, and a line says what decides.

python -m model.verify --encoder demo --llm random:qwen3-demo
"""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

import configs
from configs.hardware import CARDS, card_of, gpus_of, on_hardware, one_card
from model.verify import tables
from model.verify.memory import GIB, USABLE, Sizes, Step, step_bytes

pytestmark = pytest.mark.slow

PRESETS = list(configs.load("train")["hardware"])
STAGES = list(configs.load("train")["stages"])
HEADROOM = 0.13
"""Least share of a card's usable memory that an estimate of Qwen3-0.6B leaves free (TRAINING_PIPELINE)."""


def sizes(model: str = "Qwen3-0.6B") -> Sizes:
    return tables.known_sizes(tables.MODELS[model], "linear", 1024)


# ---- presets


@pytest.mark.parametrize("name", [name for name in PRESETS if card_of(name)])
@pytest.mark.parametrize("stage", STAGES)
def test_every_preset_fits_its_cards(stage: int, name: str) -> None:
    train = configs.load("train")
    settings = on_hardware(train["stages"][stage], name, train["hardware"][name])
    step = tables.step_of(settings, name)
    assert step.tokens >= settings["max_sequence_length"] and step.checkpointing
    card = card_of(name)
    assert card is not None
    total = step_bytes(sizes(), step)["total"]
    assert tables.fits(name, total)
    assert total <= (1 - HEADROOM) * USABLE * card.gib * GIB
    without = dataclasses.replace(step, tokens=36864, checkpointing=False)
    assert not tables.fits(name, step_bytes(sizes(), without)["total"])


@pytest.mark.parametrize("name", ["2x40gb", "4x40gb", "80gb", "2x80gb"])
def test_the_larger_model_fits_where_the_table_says(name: str) -> None:
    for stage in STAGES:
        assert not tables.estimate_text(sizes("Qwen3-1.7B"), stage, name).startswith("(")


def test_presets_for_several_gpus_have_the_samples_of_the_stage() -> None:
    train = configs.load("train")
    for stage in train["stages"].values():
        samples = stage["batch_size_per_gpu"] * stage["gradient_accumulation_steps"]
        for name, preset in train["hardware"].items():
            found = on_hardware(stage, name, preset)
            here = found["batch_size_per_gpu"] * found["gradient_accumulation_steps"]
            if gpus := gpus_of(name):
                assert here * gpus == 4 * samples
            elif name != "cpu":
                assert here == samples


@pytest.mark.parametrize(
    ("gib", "name"),
    [
        *((8, "16gb"), (15.6, "16gb"), (22.5, "24gb"), (23.6, "24gb"), (39.4, "40gb")),
        *((47.5, "40gb"), (79.2, "80gb"), (139.8, "80gb")),
    ],
)
def test_the_preset_of_a_card(gib: float, name: str) -> None:
    assert one_card(int(gib * GIB)) == name


def test_a_frozen_language_model_has_no_adapters() -> None:
    train = configs.load("train")
    frozen = train["stages"][1] | {"train_llm": False}
    assert on_hardware(frozen, "16gb", train["hardware"]["16gb"])["lora"] == 0
    assert on_hardware(train["stages"][1], "16gb", train["hardware"]["16gb"])["lora"] == 16


def test_every_preset_has_a_card_or_is_the_cpu() -> None:
    assert {name for name in PRESETS if card_of(name) is None} == {"cpu"}
    assert set(CARDS) <= set(PRESETS)
    with pytest.raises(KeyError):
        configs.load("train")["hardware"]["8x40gb"]


# ---- tables


def test_every_setting_that_saves_memory_has_a_smaller_figure() -> None:
    lines = tables.settings_table(sizes(), "24gb").splitlines()
    rows = {re.split(r"  +", line)[0]: re.findall(r"\d+\.\d", line) for line in lines[1:]}
    found = {name: list(map(float, cells)) for name, cells in rows.items()}
    plain = found.pop("as the preset says")
    assert [*found] == [
        "--no-use-gradient-checkpointing",
        "--no-train-llm",
        "--lora 16",
        "2 processes, --shard full",
        "4 processes, --shard full",
        "--offload",
        "--lora 16 --offload",
    ]
    more = found.pop("--no-use-gradient-checkpointing")
    assert all(a > b for a, b in zip(more, plain, strict=True))
    for cells in found.values():
        assert all(a < b for a, b in zip(cells, plain, strict=False))
    held = found["--offload"][-1]
    assert held == pytest.approx(16 * (596_049_920 + 1_049_600) / GIB, abs=0.06)


def test_the_table_of_models_has_each_with_its_parameters() -> None:
    lines = tables.models_table("linear", 1024).splitlines()
    assert lines[0].split() == ["GiB", "parameters", *PRESETS]
    counts = {"Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976, "Qwen2.5-0.5B": 494_032_768}
    assert [line.split()[:2] for line in lines[1::3]] == [[k, f"{n:,}"] for k, n in counts.items()]
    for line in lines[1:]:
        assert len(re.findall(r"\d+\.\d\b", line.partition("stage")[2])) == len(PRESETS)


def test_the_table_says_how_a_step_saves_memory() -> None:
    step = Step(tokens=1, checkpointing=True, gpu=True, lora=8, load_in_4bit=True)
    assert tables.how_text(step) == "recompute, LoRA 8, 4 bit"
    shared = Step(tokens=1, checkpointing=False, gpu=True, processes=4, parts=4, offload=True)
    assert tables.how_text(shared) == "/4, offload"
    assert tables.how_text(Step(tokens=1, checkpointing=False, gpu=True)) == "-"


# ---- verdicts


def test_a_machine_without_a_gpu_gets_a_verdict_for_each_kind() -> None:
    verdicts = tables.memory_verdicts(torch.device("cpu"), sizes())
    assert [re.split(r"( with|:)", line)[0] for line in verdicts] == [
        "Fits a GPU of 16 GB (RTX 4080)",
        "Fits a GPU of 24 GB (RTX 4090)",
        "Fits a GPU of 40 GB (A100-40)",
        "Fits 2 GPUs of 40 GB (2 x A100-40)",
        "Fits 4 GPUs of 40 GB (4 x A100-40)",
        "Fits a GPU of 80 GB (A100-80)",
        "Fits 2 GPUs of 80 GB (2 x A100-80)",
    ]
    assert " with --lora 16: an estimated " in verdicts[0]
    for line in verdicts:
        assert re.search(
            r"an estimated \d+\.\d GiB in stage [13], decided by max_\w+: 36864$", line
        )


def test_a_gpu_gets_one_verdict_by_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=int(39.4 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    (verdict,) = tables.memory_verdicts(torch.device("cuda"), sizes())
    assert re.fullmatch(
        r"Fits this GPU \(NVIDIA A100-SXM4-40GB, 39\.4 GiB\): an estimated \d+\.\d GiB in stage 3, "
        "decided by max_sequence_length: 36864",
        verdict,
    )


def test_too_many_parameters_are_decided_by_what_trains() -> None:
    """No window is short enough when weights, gradients and AdamW alone exceed the card."""
    large = dataclasses.replace(sizes(), language=8_000_000_000)
    verdict = tables.memory_verdicts(torch.device("cpu"), large)[PRESETS.index("80gb") - 1]
    assert re.fullmatch(
        r"Does NOT fit a GPU of 80 GB \(A100-80\): an estimated 1\d\d\.\d GiB in stage 1, decided by "
        r"train_llm: True; stages that fit: none",
        verdict,
    )
