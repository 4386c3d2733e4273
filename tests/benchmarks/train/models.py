"""The sizes of a run, and models that are cut so that two cores train them in minutes.

Of ViT-L/14@336 the first block is kept, of 23 that block 22 needs: 576 tokens of 1,024 values, as always. The
language model is a Qwen3 whose layers and vocabulary together are cut by about the same factor, so that the
tower's share of the operations is near that of ViT-L/14@336 beside Qwen3-0.6B. Weights are random.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cache.format.spec import FeatureSpec
from model.connector import build_connector
from model.language.model import LanguagePreset, load_tokenizer
from model.vision.config import EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vlm import VLM
from tests.benchmarks.bench import CLIP
from tests.support.spaces import SPEC

TOKENIZER = "random:qwen3-tiny"
"""Spells text in bytes, of which every preset has the rows."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes of a run."""

    rounds: int
    """Turns of every case."""
    # ---- fed.py
    fed_spec: FeatureSpec
    """Spec of unpooled rows."""
    window: int
    """Tokens of a micro-batch."""
    fed: tuple[tuple[str, int], ...]
    """Codec and pooling window of each kind of rows."""
    ranks: tuple[int, ...]
    """Numbers of processes."""
    seconds: float
    """Seconds that are measured in a turn."""
    gigabytes: float
    """Gigabytes of rows: none is read twice in a turn from the disk or a server."""
    fed_rows: int
    """Rows at least."""
    # ---- speed.py and break_even.py
    encoder: str
    """An entry of configs/encoders.yaml."""
    block: int
    """The block whose output is stored; what follows is cut off."""
    llm: LanguagePreset
    """The language model of the ways to train."""
    images: int
    """Images in each step of theirs."""
    real_llm: str
    """The language model of the real size."""
    real_gib: float
    """GiB of free memory that training its connector takes."""
    encoded: tuple[int, int]
    """Images of a short and of a long encode job."""

    def config(self) -> EncoderConfig:
        """Return the encoder's entry."""
        blocks = tuple(range(self.block + 1)) if self.encoder == "demo" else (self.block,)
        return encoder_config(self.encoder, blocks=blocks, pool_image=1)

    def load_encoder(self) -> VisionEncoder:
        """Return the encoder with random weights, on the CPU."""
        return load_encoder(self.config(), device="cpu", random_weights=self.encoder != "demo")


FULL = Scale(
    rounds=3,
    fed_spec=CLIP,
    window=16_384,
    fed=(("int8", 1), ("fp16", 1), ("int8", 2)),
    ranks=(1, 4, 8),
    seconds=1.5,
    gigabytes=2.5,
    fed_rows=0,
    encoder="clip-vit-l14-336",
    block=0,
    llm=LanguagePreset(
        hidden_size=512,
        layers=5,
        heads=8,
        kv_heads=4,
        head_dim=128,
        intermediate_size=1536,
        vocab_rows=13_312,
        max_positions=40_960,
    ),
    images=5,
    real_llm="random:qwen3-0.6b",
    real_gib=7.0,
    encoded=(8, 40),
)
SMALL = dataclasses.replace(
    FULL,
    rounds=1,
    fed_spec=dataclasses.replace(SPEC, image_size=56, patch_size=14),  # 16 tokens of 64 values
    window=1024,
    fed=(("int8", 1),),
    ranks=(1, 2),
    seconds=0.1,
    gigabytes=0.0,
    fed_rows=400,
    encoder="demo",
    block=1,
    llm=LanguagePreset(
        hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=128
    ),
    real_llm="random:qwen3-tiny",
    real_gib=0.0,
    encoded=(2, 6),
)


def build(scale: Scale, vision_width: int) -> tuple[VLM, PreTrainedTokenizerFast]:
    """Return the model of the ways to train, and its tokenizer."""
    tokenizer = load_tokenizer(TOKENIZER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config: Any = scale.llm.config(len(tokenizer))
        language = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        connector = build_connector("linear", vision_width, scale.llm.hidden_size)
    return VLM(language, connector, vision_width), tokenizer


def proportions(vlm: VLM, encoder: VisionEncoder) -> str:
    """Return a line about the sizes of the models beside those they stand for."""
    embedding = vlm.language.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in vlm.language.parameters()) - embedding
    tower = encoder.parameters_used
    return (
        f"parameters: encoder {tower / 1e6:.1f} M, language model {body / 1e6:.1f} M in its layers, "
        f"{embedding / 1e6:.1f} M in its vocabulary; {tower / body:.2f} and {embedding / body:.2f} of its "
        "layers' (ViT-L/14@336 beside Qwen3-0.6B: 0.66 and 0.35)"
    )
