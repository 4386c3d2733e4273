"""`--from HF_FOLDER`: a LLaVA of somebody else trains from its own weights, with its own template and tokens.

python -m train.run --from llava-1.5-7b-hf --features cache
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from cache.format.spec import FeatureSpec
from cache.store.paths import CacheRoot
from cache.store.samples import Sample
from model.io.saved_model import load_final
from model.io.tower_config import read_tower_config
from model.io.tower_folder import architecture, tower_hash
from model.media.images import decode_image
from tests.support import tiny_clip
from tests.support.trained_runs import conversations, losses, photographs, talk
from train import run

pytestmark = pytest.mark.slow

BASE = [
    *("--hardware", "cpu", "--device", "cpu", "--held-out", "0", "--batch-size", "10"),
    *("--max-sequence-length", "256", "--learning-rate", "3e-3", "--log-every", "1000"),
]
KINDS: dict[str, dict[str, Any]] = {
    "clip, vicuna": {"style": "vicuna"},
    "siglip, chatml": {"style": "chatml", "tower": "siglip", "llm": Qwen2Config, "tied": True},
    "two blocks, llama 3, no bias": {
        "style": "llama3",
        "layers": [-2, -1],
        "act": "silu",
        "multimodal_projector_bias": False,
        "fit": "squash",
    },
    "siglip, mistral, two layers without an activation": {
        "style": "mistral",
        "tower": "siglip",
        "llm": MistralConfig,
        "act": "linear",
    },
    "qwen3, tanh": {"style": "chatml", "llm": Qwen3Config, "act": "gelu_pytorch_tanh"},
}


def make_cache(place: Path, folder: Path, model: LlavaForConditionalGeneration) -> CacheRoot:
    """A cache of features that transformers' own tower computes, as float16."""
    tower = read_tower_config(folder)
    assert tower.mean is not None and tower.std is not None
    processor = AutoProcessor.from_pretrained(folder, backend="pil").image_processor
    layers = model.config.vision_feature_layer
    first = int(model.config.vision_feature_select_strategy == "default")
    spec = FeatureSpec(
        encoder="hf-tiny",
        architecture=architecture(tower),
        weights=tower_hash(folder, tower.blocks),
        activation=tower.activation,
        blocks=tower.blocks,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        width=tower.width * len(tower.blocks),
        fit=tower.fit,
        resize="pillow:bicubic",
        mean=tower.mean,
        std=tower.std,
        pool_frame=1,
        compute_dtype="float32",
        batch_size=1,
        codec="fp16",
    )

    def encode(image: Image.Image) -> Tensor:
        pixels = processor(images=[image], return_tensors="pt")
        with torch.inference_mode():
            hidden = model.model.vision_tower(**pixels, output_hidden_states=True).hidden_states
        wanted = layers if isinstance(layers, list) else [layers]
        return torch.cat([hidden[k][0, first:] for k in wanted], -1)

    return talk(place, spec, encode)


def reference(
    folder: Path, model: LlavaForConditionalGeneration, samples: Sequence[Sample]
) -> float:
    """The mean loss by transformers' own processor and model, one sample after the other."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    as_text = "['type']" not in processor.chat_template and "'type'" not in processor.chat_template
    total = count = 0.0
    for sample in samples:
        image = decode_image(Path(sample.media[0].source).read_bytes())
        said: list[dict[str, Any]] = []
        for number, message in enumerate(sample.messages):
            text = message.content.removeprefix("<image>")
            parts: list[dict[str, Any]] = [{"type": "image"}] if not number else []
            content = (
                "<image>" * (not number) + text
                if as_text
                else [*parts, {"type": "text", "text": text}]
            )
            said.append({"role": message.role, "content": content})
        text = processor.apply_chat_template(said)
        bos = processor.tokenizer.bos_token
        special = {"add_special_tokens": not (bos and text.startswith(bos))}
        inputs = processor(text=text, images=[image], return_tensors="pt", **special)
        labels = torch.full_like(inputs["input_ids"], -100)
        images = (tiny_clip.SIDE // tiny_clip.PATCH) ** 2
        offsets = processor.tokenizer(text, return_offsets_mapping=True, **special)[
            "offset_mapping"
        ]
        ids = processor.tokenizer(text, **special)["input_ids"]
        image_at = ids.index(model.config.image_token_index)
        for turn in range(1, len(said), 2):
            start = len(processor.apply_chat_template(said[:turn], add_generation_prompt=True))
            end = len(processor.apply_chat_template(said[: turn + 1]))
            for at, (first, last) in enumerate(offsets):
                if start <= first < end and last > first:
                    place = at + (images - 1) * (at > image_at)
                    labels[0, place] = inputs["input_ids"][0, place]
        with torch.inference_mode():
            loss = model(**inputs, labels=labels).loss
        number = int((labels != -100).sum())
        total, count = total + float(loss) * number, count + number
    return total / count


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def stranger(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CacheRoot, LlavaForConditionalGeneration]:
    """A folder, a cache of its tower's features, and the model."""
    place = tmp_path_factory.mktemp("llava")
    model = tiny_clip.write_llava(place / "folder", **request.param)
    return place / "folder", make_cache(place, place / "folder", model), model


def train(folder: Path | str, root: CacheRoot, name: Path, *words: str, steps: int = 10) -> Path:
    words = (*BASE, "--features", str(root.path), "--max-steps", str(steps), *words)
    start = [] if "--resume" in words else ["--from", str(folder)]
    assert run.main([*words, *start, "--run", str(name)]) == 0
    return name / "stage1"


def test_the_loss_before_training_is_that_of_transformers(
    stranger: tuple[Path, CacheRoot, LlavaForConditionalGeneration], tmp_path: Path
) -> None:
    folder, root, model = stranger
    stage = train(folder, root, tmp_path / "run")
    measured = losses(stage)
    expected = reference(folder, model, conversations(photographs(tmp_path / "images")))
    assert measured[0] == pytest.approx(expected, abs=1e-4)
    assert measured[-1] < measured[0] - 0.1
    vlm, tokenizer, _ = load_final(stage / "final")
    assert tokenizer.chat_template == (folder / "chat_template.jinja").read_text()
    assert vlm.language.config.vocab_size == model.config.text_config.vocab_size
