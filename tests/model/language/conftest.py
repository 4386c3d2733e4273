"""A small Qwen3 in a folder as published, for the tests of what may be wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from model.language.tokenizer import byte_tokenizer

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def write(
    folder: Path, *, shard: str = "", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """Write a Qwen3 with random weights and a byte tokenizer, as transformers saves them."""
    torch.manual_seed(5)
    config = Qwen3Config(**{"tie_word_embeddings": True, **SIZES, **sizes})
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write three models: tied, untied, and sharded."""
    root = tmp_path_factory.mktemp("published")
    return {
        "tied": write(root / "tied"),
        "untied": write(root / "untied", tie_word_embeddings=False),
        "sharded": write(root / "sharded", shard="30KB"),
    }


@pytest.fixture
def copy_of(published: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies one of the models to a folder of the test."""
    return lambda name: Path(shutil.copytree(published[name], tmp_path / "llm"))
