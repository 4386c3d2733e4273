"""Load, check and save a language model: an untrained preset, a folder, or a Hugging Face id.

`random:<preset>` (configs/model.yaml) is an untrained Qwen3 with a byte-level tokenizer. It needs no file and
no network.
"""

from __future__ import annotations

import contextlib
import copy
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

import configs
from model.language.tokenizer import byte_tokenizer, prepare_tokenizer

RANDOM = "random:"
"""Prefix of an untrained model's name."""
HUB_TIMEOUT_S = 5.0
"""Seconds without an answer before the hub counts as unreachable."""
ROW_MULTIPLE = 64
"""Embedding rows are rounded up to a multiple of this when they are created or resized."""


@dataclass(frozen=True, kw_only=True)
class LanguagePreset:
    """Sizes of an untrained Qwen3, and the words of its built-in tokenizer."""

    hidden_size: int
    """Width of the residual stream."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; each is shared by heads / kv_heads query heads."""
    head_dim: int
    """Values per head; even, because rotary positions rotate pairs of values."""
    intermediate_size: int
    """Width inside the MLP."""
    vocab_rows: int = 0
    """Rows of the tied embedding; 0: the size of the tokenizer, rounded up to a multiple of 64."""
    max_positions: int = 4096
    """Longest sequence in the model's config, tokens."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies."""
    words: tuple[str, ...] = ()
    """Words that are one token each, with and without a space before them. Other text becomes bytes."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd")

    def config(self, vocabulary: int) -> Qwen3Config:
        """Return the transformers config for a tokenizer of `vocabulary` ids."""
        rows = self.vocab_rows or -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
        if rows < vocabulary:
            raise ValueError(f"vocab_rows {rows} is below the tokenizer's {vocabulary} ids")
        return Qwen3Config(
            vocab_size=rows,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            attention_dropout=0.0,
        )


def preset(name: str) -> LanguagePreset:
    """Return the entry `name` of `presets` in configs/model.yaml."""
    entries = configs.load("model")["presets"]
    if name not in entries:
        raise configs.UserError(
            f"no language model {RANDOM}{name}{configs.nearest(name, entries)}; "
            f"there are: {', '.join(RANDOM + n for n in entries)}"
        )
    return configs.build(LanguagePreset, entries[name], f"configs/model.yaml: presets: {name}")


def load_language(
    source: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load or build a language model. Return it with its tokenizer.

    Args:
        source: `random:<preset>`, a folder in Hugging Face's layout, or a Hugging Face id.
        dtype: of the parameters.
        seed: of the initial weights of `random:` models. The global random state does not change.
        device: `cpu`, or `meta` for shapes without values.

    Raises:
        UserError: the source does not exist, or the model has a feature that our attention or loss lacks.
    """
    tokenizer = load_tokenizer(source)
    config = _config(source, tokenizer)
    if source.startswith(RANDOM) or device == "meta":
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        with no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    rows = model.get_input_embeddings().weight.shape[0]
    # Qwen3 has 151,936 rows for 151,670 ids; other models may have no free row.
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROW_MULTIPLE)
    prepare_model(model, tokenizer)
    return model, tokenizer


def prepare_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that packed attention and the loss support a model, and remove its sampling settings.

    Raises:
        UserError: the model has a feature that our attention or loss lacks.
    """
    config: Any = model.config
    changed = {
        name: getattr(config, name, None)
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
        if getattr(config, name, None) not in (None, 1)
    }
    for name in ("attn_logit_softcapping", "sliding_window"):
        if getattr(config, name, None) is not None and getattr(config, "use_sliding_window", True):
            changed[name] = getattr(config, name)
    if changed:
        found = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise configs.UserError(
            f"language model {config.model_type} with {found}: the packed attention and the loss do not "
            "support that; choose another --llm"
        )
    # A model's folder may contain sampling settings (Qwen3: temperature 0.6, top_k 20), which would apply
    # wherever a call names none. `model.inference` alone decides on sampling.
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Switch off transformers' progress bar for loading weights."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _config(source: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    if source.startswith(RANDOM):
        try:
            return preset(source.removeprefix(RANDOM)).config(len(tokenizer))
        except ValueError as error:
            raise configs.UserError(f"configs/model.yaml: {source}: {error}") from None
    return AutoConfig.from_pretrained(source)


def max_positions(source: str) -> int | None:
    """Return the longest sequence in a language model's config, tokens; None if there is none."""
    if not source.startswith(RANDOM):
        check_source(source)
    found = getattr(_config(source, load_tokenizer(source)), "max_position_embeddings", None)
    return int(found) if found else None


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a language model, with `<image>` and the chat marks as special tokens."""
    if source.startswith(RANDOM):
        return byte_tokenizer(preset(source.removeprefix(RANDOM)).words)
    check_source(source)
    return prepare_tokenizer(AutoTokenizer.from_pretrained(source))


def check_source(source: str) -> None:
    """Raise UserError within seconds if there is no such folder, no such id, or no connection to the hub.

    transformers itself retries for most of a minute before it fails.
    """
    way_out = (
        "give a local folder (--llm PATH with config.json, tokenizer.json, model.safetensors), "
        "or an untrained one (--llm random:qwen3-0.6b)"
    )
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise configs.UserError(f"{source}: no config.json, so no language model; {way_out}")
        return
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise configs.UserError(f"{source}: no such folder; {way_out}")
    if isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{source}"
            with urllib.request.urlopen(url, timeout=HUB_TIMEOUT_S):  # noqa: S310  the hub's own https
                return
        except urllib.error.HTTPError as error:
            reason = f"huggingface.co returns {error.code}"
        except OSError as error:
            reason = f"huggingface.co cannot be reached: {getattr(error, 'reason', error)}"
    raise configs.UserError(f"{source}: no such folder, not downloaded before, {reason}; {way_out}")


def save_language(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write config and tokenizer files into `folder`, as `load_tokenizer` and `AutoConfig` read them."""
    config = copy.deepcopy(model.config)  # save_pretrained changes the config it saves
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
