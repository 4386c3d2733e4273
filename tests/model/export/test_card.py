"""The model card: how to load the folder, and what it was trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache.format.spec import FeatureSpec
from configs import UserError
from model.export.card import OVERRIDES, decode_note, find_card, frames_note, model_card
from model.export.compare import Comparison
from model.export.towers import ExportedTower, export_tower
from model.vision.encoder import load_encoder
from tests.support import tiny_clip

FOUND = Comparison(prompts=7, logits=3.5e-6, tokens=112, levels=1.0, rounded=0.026)
STAGE: dict[str, Any] = {
    "stage": 2,
    "steps": 50_000,
    "samples_per_step": 512,
    "settings": {
        "train_connector": True,
        "train_llm": False,
        "learning_rate": 5e-05,
        "connector_learning_rate": 1e-4,
    },
    "media": {"images": 717_000, "videos": 0, "frames": 0},
    "held_out_loss": 1.25,
    "data_sets": [
        {
            "name": "cap|tions",
            "share": 0.6,
            "samples": 1_000_000,
            "with_features": 900_000,
            "trained_on": 880_000,
            "with_failed_media": 90_000,
            "without_features": 10_000,
            "failed_media": {"fetch": 80_000, "decode": 7},
        },
        {
            "name": "text",
            "share": None,
            "samples": 5,
            "with_features": 5,
            "trained_on": 5,
            "with_failed_media": 0,
            "without_features": 0,
            "failed_media": {},
        },
    ],
}


@pytest.fixture(scope="module")
def tower() -> tuple[ExportedTower, FeatureSpec]:
    eyes = load_encoder(tiny_clip.entry(fit="pad"), device="cpu", random_weights=True)
    return export_tower(eyes), eyes.spec("int4")


def card_of(tower: tuple[ExportedTower, FeatureSpec], card: dict[str, Any], **meta: Any) -> str:
    known = {"connector": "linear", "llm": "Qwen/Qwen3-0.6B", "stage": 2, "step": 50_000, **meta}
    return model_card("mine", known, tower[1], tower[0], card, FOUND)


def test_adapters_are_named(tower: tuple[ExportedTower, FeatureSpec]) -> None:
    lora = {"rank": 16, "alpha": 32, "target_modules": ["q_proj"], "load_in_4bit": True}
    settings = {**STAGE["settings"], "train_llm": True}
    text = card_of(tower, {"stages": [{**STAGE, "settings": settings, "lora": lora}]})
    assert (
        "adapters of the language model (LoRA: rank 16, alpha 32, on q_proj, over weights of 4 bits)"
        in text
    )
    assert "trained: connector and adapters" in text and "merged here" in text
    plain = card_of(tower, {"stages": [{**STAGE, "lora": None}]})
    assert "adapters" not in plain


def test_a_card_names_data_sets_counts_and_failures(
    tower: tuple[ExportedTower, FeatureSpec],
) -> None:
    text = card_of(tower, {"stages": [{"stage": 1, "step": 9, "incomplete": True}, STAGE]})
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen3-0.6B"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert (
        "| cap\\|tions | 0.60 | 1,000,000 | 880,000 | 10,000 | 80,000 (fetch) 7 (decode) |" in text
    )
    assert "| text | by size | 5 | 5 | 0 | 0 |" in text
    assert "Step 9; its data sets are not recorded." in text
    assert "50,000 steps of 512 samples; trained: connector;" in text
    assert "717,000 images. Held-out loss 1.2500." in text
    assert "stored as `int4`" in text and "2.6e-02" in text and "3.5e-06" in text
    assert tower[1].weights in text


def row(split: str, **changes: Any) -> dict[str, Any]:
    values = {"data_set": "cap|tions", "split": split, "type": "colour", "metric": "exact match"}
    values |= {"n": 1_234, "value": 0.931, "interval": [0.9, 0.95]}
    return {**values, "blind": 0.161, "blind_interval": [0.1, 0.2], **changes}


def test_scores_are_those_of_the_test_split(tower: tuple[ExportedTower, FeatureSpec]) -> None:
    rows = [
        row("val"),
        row("test"),
        row("test", metric="mean error", value=1.5, interval=None, blind=None),
    ]
    text = card_of(
        tower, {"stages": [{**STAGE, "scores": [row("test", n=7)]}, {**STAGE, "scores": rows}]}
    )
    table = text.split("## Scores")[1].split("## Training")[0]
    assert "split `test`: not trained on, and nothing was chosen by them" in table
    assert "| cap\\|tions | colour | 1,234 | exact match | 0.931 ± 0.025 | 0.161 ± 0.050 |" in table
    assert "| mean error | 1.500 |  |" in table
    assert table.count("\n|") == 4, "the last stage, one split"
    only = card_of(tower, {"stages": [{**STAGE, "scores": rows[:1]}]})
    assert "split `val`" in only and "`test` was not evaluated" in only
    for card in ({}, {"stages": [STAGE]}, {"stages": [{**STAGE, "scores": [row("train")]}]}):
        assert "## Scores" not in card_of(tower, card)


def test_only_a_linear_connector_needs_overrides(tower: tuple[ExportedTower, FeatureSpec]) -> None:
    line = f"vllm serve . --hf-overrides '{OVERRIDES}'"
    assert line in card_of(tower, {})
    mlp = card_of(tower, {}, connector="mlp")
    assert "hf-overrides" not in mlp and "vllm serve .\n" in mlp
    several = dataclasses.replace(tower[0], layers=[-1, -3])
    for connector in ("linear", "mlp"):
        card = card_of((several, tower[1]), {}, connector=connector)
        assert "vllm serve . --model-impl transformers\n" in card and "hf-overrides" not in card
    assert json.loads(OVERRIDES) == {"projector_hidden_act": "torch.nn.modules.linear.Identity"}


def test_the_path_of_a_language_model_is_not_published(
    tower: tuple[ExportedTower, FeatureSpec], tmp_path: Path
) -> None:
    text = card_of(tower, {}, llm=str(tmp_path / "my-llm"))
    assert "`my-llm`" in text and str(tmp_path) not in text and "base_model" not in text
    assert "base_model" not in card_of(tower, {}, llm="random:qwen3-tiny")


def test_frames_that_are_pooled_otherwise_are_not_exported() -> None:
    spec = load_encoder(tiny_clip.entry(), device="cpu", random_weights=True).spec("fp16")
    seen = {"stages": [{"media": {"images": 3, "videos": 2, "frames": 9}}]}
    assert frames_note(spec, {}) == frames_note(spec, {"stages": [{"incomplete": True}]}) == ""
    note = frames_note(spec, seen)
    assert note.startswith(
        "not exported, because a token of a frame is 2 x 2 patches and one of an"
    )
    assert "image one patch" in note and "takes images only" in note
    for pool in (1, 2):
        alike = tiny_clip.entry(pool_frame=pool, pool_image=pool)
        spec = load_encoder(alike, device="cpu", random_weights=True).spec("fp16")
        assert "frames as images" in frames_note(spec, seen)


def test_a_model_of_reduced_images_says_which_they_were() -> None:
    for fit, shorter, side in (("pad", None, "longer"), ("crop", 40, "shorter")):
        entry = tiny_clip.entry(fit=fit, shorter_side=shorter, decode="reduced")
        eyes = load_encoder(entry, device="cpu", random_weights=True)
        spec = eyes.spec("fp16")
        note = decode_note(spec)
        least = 4 * (shorter or spec.image_size)
        assert note.startswith(f"in training, a JPEG whose {side} side has {least} pixels or more")
        assert f"In training, a JPEG whose {side} side" in card_of((export_tower(eyes), spec), {})
    whole = dataclasses.replace(spec, decode="whole")
    assert decode_note(whole) == "" and "JPEG" not in card_of((export_tower(eyes), whole), {})


def test_a_pooled_model_says_which_runtimes_take_it() -> None:
    eyes = load_encoder(tiny_clip.entry(pool_image=2), device="cpu", random_weights=True)
    text = card_of((export_tower(eyes), eyes.spec("fp16")), {})
    assert "`PooledLlavaForConditionalGeneration`: the frozen vision tower" in text
    assert "The class is pooled_llava.py in the folder, because 2 x 2 patches" in text
    assert text.count("trust_remote_code=True") == 3 and "vllm serve" not in text


def test_a_damaged_card_is_one_line(tmp_path: Path) -> None:
    assert find_card(tmp_path / "final") == {}
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(UserError, match=r"card\.json: cannot be read .*; copy it again, or remove"):
        find_card(tmp_path / "final")
