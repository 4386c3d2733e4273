"""Steps of the proof that ask models, with tiny random ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from model.inference import answer, generation_mode
from model.io.saved_model import save_final
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vlm import build_vlm
from tests.proof import outside, training
from tests.proof.work import Work

pytestmark = pytest.mark.slow

COLOURS = ("red", "lime", "blue")


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return load_encoder(encoder_config("demo"), device="cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, encoder: VisionEncoder) -> Work:
    """Make a proof's folder: texts, drawings, and a run whose answers to them differ."""
    folder = tmp_path_factory.mktemp("proof")
    work = Work(folder, {"perplexity_tokens": 1300})
    (folder / "data").mkdir()
    for i, colour in enumerate(COLOURS):
        drawing = Image.new("RGB", (150 + 40 * i, 120), "white")
        ImageDraw.Draw(drawing).ellipse((20 * i, 10, 60 + 30 * i, 90), fill=colour)
        drawing.save(folder / f"{colour}.png")
    words = [f"word{i}" for i in range(2000)]
    texts = {"chapters": [" ".join(words)], "addresses": [" ".join(words[i:]) for i in (1, 2)]}
    (folder / "data/texts.json").write_text(json.dumps(texts))
    vlm, tokenizer = build_vlm(encoder.spec("fp16").width, "random:qwen3-tiny", "linear", seed=6)
    vlm.language.save_pretrained(folder / "models/language")
    tokenizer.save_pretrained(folder / "models/language")
    generator = torch.Generator().manual_seed(11)
    for p in vlm.language.parameters():
        p.data += (0.3 if p.dim() == 1 else 0.1) * torch.randn(p.shape, generator=generator)
    # Remove the mean of the features and enlarge the rest, or the answers would be equal.
    common = features(encoder, folder).mean((0, 1))
    vlm.connector.weight.data *= 20
    vlm.connector.bias.data = -vlm.connector.weight.data @ common
    space = {"spec": encoder.spec("fp16").to_json(), "load": encoder.load_info()}
    meta = {"connector": "linear", "llm": "random:qwen3-tiny", "space": space}
    final = folder / training.MAIN / "stage2/final"
    save_final(final, vlm, tokenizer, meta | {"stage": 2, "step": 3})
    return work


def features(encoder: VisionEncoder, folder: Path) -> torch.Tensor:
    drawings = [Image.open(folder / f"{colour}.png").convert("RGB") for colour in COLOURS]
    return encoder.encode(np.stack([encoder.prepare(one) for one in drawings]))


def test_live_answers_are_about_each_questions_own_drawing(
    work: Work, encoder: VisionEncoder
) -> None:
    asked = [(colour, text) for text in ("What is this?", "Which?") for colour in COLOURS[::-1]]

    def question(colour: str, text: str) -> Any:
        media = (SimpleNamespace(source=str(work.folder / f"{colour}.png")),)
        prompt = [("user", f"<image>\n{text}", 1.0)]
        return SimpleNamespace(sample=SimpleNamespace(media=media), prompt=prompt)

    told = outside.live_answers(work, [question(*one) for one in asked])
    vlm, tokenizer, _ = training.load_final(work.folder / training.MAIN / "stage2/final")
    of = dict(zip(COLOURS, features(encoder, work.folder), strict=True))
    for (colour, text), one in zip(asked, told, strict=True):
        prompt = ([("user", f"<image>\n{text}", 1.0)], [of[colour]])
        assert answer(vlm, tokenizer, [prompt], max_new_tokens=training.LONGEST) == [one]
    assert len(set(told)) > 3, "the answers tell nothing about the order"


@pytest.mark.parametrize("kind", ["chapters", "addresses"])
def test_perplexity_is_that_of_windows_on_their_own(work: Work, kind: str) -> None:
    texts = json.loads((work.folder / "data/texts.json").read_text())[kind]
    vlm, tokenizer, _ = training.load_final(work.folder / training.MAIN / "stage2/final")
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : 1300 // len(texts)]
        for at in range(0, ids.shape[1], training.WINDOW):
            window = ids[:, at : at + training.WINDOW]
            with torch.inference_mode(), generation_mode(vlm):
                logits = vlm.language(input_ids=window).logits[0].double().log_softmax(1)
            losses += [-logits[i, one].item() for i, one in enumerate(window[0, 1:].tolist())]
    found = training.english_perplexity(work, training.MAIN, 2, kind)
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    before = training.english_perplexity(work, None, 0, kind)
    assert before != pytest.approx(found, rel=1e-2), "of another model"
