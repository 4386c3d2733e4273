"""The options of `python -m model.verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Load every part once and report parameters, memory, days and disk space."""

    encoder: str = "clip-vit-l14-336"
    """An entry of configs/encoders.yaml, or hf:FOLDER."""
    llm: str | None = None
    """Hub id, folder, or `random:qwen3-0.6b`; when not given, the one in configs/model.yaml."""
    connector: Literal["linear", "mlp"] | None = None
    """Kind of connector; when not given, the one in configs/model.yaml."""
    random_weights: bool = False
    """Use untrained weights of the same sizes: nothing is downloaded."""
    weights: str | None = None
    """File or folder of the encoder's weights."""
    device: str = "auto"
    """Where the encoder runs: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    train_vision_blocks: int = 0
    """How many of the encoder's last blocks train, behind rows of `encode.run --block N --tail`."""
    features: Path = Path("cache")
    """For the disk space: where the feature cache is or will be."""
    codec: Literal["int8", "int4", "fp16"] = "int8"
    """For the disk space: how rows are stored."""
    gpus: int = 4  # configs/train.yaml counts its batches for 4
    """For the days: GPUs that train together."""
    hardware: str = "auto"
    """For the table of single settings: a hardware preset of configs/train.yaml; `auto`: that of this GPU."""
    mfu: float = 0.35
    """For the days: share of the GPUs' peak that becomes model arithmetic."""
    text_tokens: int = 100
    """For the days: tokens of question and answer in a sample; all count as supervised."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.text_tokens < 1:
            raise ValueError("gpus and text_tokens must be at least 1")
        if self.train_vision_blocks < 0:
            raise ValueError(f"train_vision_blocks {self.train_vision_blocks} is below 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu {self.mfu} is not between 0 and 1")
