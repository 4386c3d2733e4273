"""A CLIP tower small enough for tests, registered with open_clip, and its equal in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from configs import UserError
from model.vision.config import EncoderConfig
from model.vision.encoder import load_encoder

WIDTH, DEPTH, HEADS, PATCH, SIDE = 64, 4, 2, 8, 32


def register(folder: Path) -> None:
    """Register `tiny-quickgelu` with open_clip, and `tiny`, which computes exact GELU."""
    vision = {"image_size": SIDE, "layers": DEPTH, "width": WIDTH, "patch_size": PATCH}
    vision["head_width"] = WIDTH // HEADS
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    for name, quick in (("tiny-quickgelu", True), ("tiny", False)):
        config = {"embed_dim": 32, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)


def entry(**overrides: Any) -> EncoderConfig:
    """Return an encoder entry with the tiny tower, in float32."""
    values: dict[str, Any] = {
        "name": "tiny-clip",
        "library": "open_clip",
        "model": "tiny-quickgelu",
        "activation": "quick_gelu",
        "blocks": (2,),
        "mean": (0.48, 0.46, 0.41),
        "std": (0.27, 0.26, 0.28),
        "pool_frame": 2,
        "batch_size": 3,
        "compute_dtype": "float32",
    }
    return EncoderConfig(**{**values, **overrides})


def hugging_face(seed: int = 0, activation: str = "quick_gelu", **sizes: int) -> CLIPVisionModel:
    """Return this architecture as transformers builds it, with random weights large enough to matter."""
    torch.manual_seed(seed)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": DEPTH}
    tower |= {"num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH, **sizes}
    with torch.device("meta"):  # transformers' own initialisation is slow
        model = CLIPVisionModel(CLIPVisionConfig(hidden_act=activation, **tower)).eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            limit = 1.7 if "embedding" in name else 1.7 * parameter.shape[-1] ** -0.5
            parameter.uniform_(*((0.5, 1.5) if is_norm else (-limit, limit)))
    positions = model.get_buffer(next(n for n, _ in model.named_buffers() if "position_ids" in n))
    positions.copy_(torch.arange(positions.numel()))
    return model


def open_clip_checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a checkpoint of the whole model under open_clip's names, text tower included."""
    torch.manual_seed(seed)
    return dict(open_clip.create_model("tiny-quickgelu").state_dict())


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return random pixels, (count, side, side, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def refusal(config: EncoderConfig, weights: Path | None = None) -> str:
    """Return the one-line message with which an encoder is refused."""
    with pytest.raises(UserError) as caught:
        load_encoder(config, device="cpu", weights=str(weights) if weights else None)
    assert "\n" not in str(caught.value)
    return str(caught.value)
