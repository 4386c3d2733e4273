"""Load, check and save a language model: an untrained preset, a folder, or a Hugging Face id.

`random:<preset>` (configs/model.yaml) is an untrained Qwen with a byte-level tokenizer. It needs no file and
no network.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import configs
from model.language.chat_template import template_text
from model.language.checkpoint import CONFIG, WEIGHTS, open_checkpoint, read_config
from model.language.files import AGAIN, read_object
from model.language.loading import check_tied, empty_model, fit, load_weights, quiet
from model.language.records import RANDOM
from model.language.sources import has_weights, hub_hint, local_folder
from model.language.tokenizer import byte_tokenizer, eos_ids, prepare_tokenizer
from model.language.tokenizer_files import read_tokenizer

log = logging.getLogger(__name__)

"""Prefix of an untrained model's name."""
ROW_MULTIPLE = 64
"""Embedding rows are rounded up to a multiple of this when they are created or resized."""


@dataclass(frozen=True, kw_only=True)
class LanguagePreset:
    """Sizes of an untrained Qwen, and the words of its built-in tokenizer."""

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
    family: Literal["qwen3", "qwen2"] = "qwen3"
    """`qwen3` has norms of queries and keys, `qwen2` (also Qwen2.5) biases of queries, keys and values."""
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

    def config(self, vocabulary: int) -> Qwen3Config | Qwen2Config:
        """Return the transformers config for a tokenizer of `vocabulary` ids."""
        rows = self.vocab_rows or -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
        if rows < vocabulary:
            raise ValueError(f"vocab_rows {rows} is below the tokenizer's {vocabulary} ids")
        config = Qwen3Config if self.family == "qwen3" else Qwen2Config
        return config(
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
        UserError: the source does not exist or is damaged, or the model has a feature that our attention or
            loss lacks.
    """
    if source.startswith(RANDOM):
        tokenizer = load_tokenizer(source)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(_preset_config(source, tokenizer), dtype=dtype)
    else:
        with hub_hint(source):
            folder = local_folder(source, weights=device != "meta")
            model, tokenizer = load_folder(folder, dtype) if device != "meta" else _shapes(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    # Qwen3 has 151,936 rows for 151,670 ids; other models may have no free row.
    if len(tokenizer) > rows:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # new rows are drawn around the mean of the old ones
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROW_MULTIPLE)
        more = model.get_input_embeddings().weight.shape[0]
        model.added_rows = more - rows  # drawn, so adapters are saved with them, see lora.py
        log.info("%s: %d embedding rows became %d, for added tokens", source, rows, more)
    prepare_model(model, tokenizer)
    return model, tokenizer


def load_folder(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a language model and its tokenizer from a folder, exactly as stored.

    Args:
        folder: the folder.
        dtype: of the parameters.
        tokenizer: the folder's, if it has been loaded.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing or left over, or the tokenizer is not
            that of the model.
    """
    checkpoint = open_checkpoint(folder)
    config = _folder_config(folder)
    shapes = empty_model(config, folder)
    names = fit(checkpoint, shapes)
    check_tied(checkpoint, names, shapes)
    tokenizer = tokenizer or _own_tokenizer(folder, shapes)
    return load_weights(checkpoint, config, names, dtype), tokenizer


def check_folder(folder: Path) -> None:
    """Check a language model's folder as far as possible without reading its weights: seconds for any size.

    Raises:
        UserError: see `load_folder` and `prepare_model`.
    """
    checkpoint = open_checkpoint(folder)
    shapes, tokenizer = _shapes(folder)
    check_tied(checkpoint, fit(checkpoint, shapes), shapes)
    prepare_model(shapes, tokenizer)


def _shapes(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model of a folder's config on `meta`, and its tokenizer."""
    model = empty_model(_folder_config(folder), folder)
    return model, _own_tokenizer(folder, model)


def _own_tokenizer(folder: Path, model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a model's folder, after a comparison with the model."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    ends = getattr(model.config, "eos_token_id", None)
    named = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    return prepare_tokenizer(read_tokenizer(folder, rows, named))


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


def _preset_config(source: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    try:
        return preset(source.removeprefix(RANDOM)).config(len(tokenizer))
    except ValueError as error:
        raise configs.UserError(f"configs/model.yaml: {source}: {error}") from None


def _folder_config(folder: Path) -> Any:
    """Return config.json as transformers reads it. Python code beside it is never run."""
    read_config(folder)
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a value of the wrong type may cause
        raise configs.UserError(
            f"{folder / CONFIG}: not a config of a model ({configs.one_line(error)}); {AGAIN}"
        ) from None


def max_positions(source: str) -> int | None:
    """Return the longest sequence in a language model's config, tokens; None if there is none.

    The rest of a folder is checked, too, so that nothing is computed for a model that cannot be loaded.

    Raises:
        UserError: the source does not exist or is damaged, see `check_folder`.
    """
    if source.startswith(RANDOM):
        config = _preset_config(source, load_tokenizer(source))
    else:
        with hub_hint(source):
            folder = local_folder(source, weights=False)
            if Path(source).expanduser().is_dir() or has_weights(folder):
                check_folder(folder)
            config = _folder_config(folder)
    return _positions(config)


def saved_positions(folder: Path) -> int | None:
    """Return `max_positions` of a folder that this package wrote, without a look at the rest of it."""
    return _positions(_folder_config(folder))


def _positions(config: Any) -> int | None:
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a language model, with `<image>` and the chat marks as special tokens.

    Raises:
        UserError: there is no such model, or its tokenizer is missing, damaged, or does not give texts back.
    """
    if source.startswith(RANDOM):
        return byte_tokenizer(preset(source.removeprefix(RANDOM)).words)
    with hub_hint(source):
        folder = local_folder(source, weights=False)
        read_config(folder)
        return prepare_tokenizer(read_tokenizer(folder, rows=None))


def save_language(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a language model into `folder` as transformers reads it: config, tokenizer and weights."""
    config = copy.deepcopy(model.config)  # save_pretrained changes the config it saves
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    save_file(unique_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a tokenizer into `folder`, with its chat template, and the ids at which answers end."""
    tokenizer.chat_template = template_text(tokenizer)
    tokenizer.save_pretrained(folder)
    if type(tokenizer) is not PreTrainedTokenizerFast:
        # The class of a model may make another tokenizer of the same tokenizer.json beside another config.
        path = folder / "tokenizer_config.json"
        values = read_object(path) | {"tokenizer_class": PreTrainedTokenizerFast.__name__}
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    ends = list(eos_ids(tokenizer))
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def unique_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor, each once: a tied output layer is left out, its embedding is kept."""
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            state[name] = value.detach().contiguous()
        seen.add(value.data_ptr())
    return state
