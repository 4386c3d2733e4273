"""Read somebody else's LlavaForConditionalGeneration: language model, projector, tokenizer and template.

    llava = open_llava(Path("llava-1.5-7b-hf"))      # config.json and the weights' headers; no values
    language, connector, tokenizer = llava.load()

The folder is in llava-hf's layout: config.json with `vision_config` and `text_config`, safetensors in one
file or in shards, a processor and a chat template. Tensors have the names of published checkpoints
(`language_model.model.*`) or those of transformers 5 (`model.language_model.*`). Our own exports are such
folders, those with pooled images included. Code in a folder is never run.

The vision tower is not loaded: its features are in a cache (`encode.run --encoder hf:FOLDER`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from configs import UserError, one_line
from model.connector import ACTIVATIONS, ConnectorKind, build_connector
from model.language.checkpoint import (
    CONFIG,
    VISION_KEYS,
    Checkpoint,
    check_tensors,
    quantised,
    read_headers,
    weight_files,
)
from model.language.files import AGAIN, StoredTensor, check_folder, read_object, read_text
from model.language.folder_template import FolderTemplate, attach
from model.language.loading import (
    HARMLESS,
    check_tied,
    empty_model,
    fit,
    load_weights,
    quiet,
    read_tensors,
)
from model.language.model import prepare_model
from model.language.tokenizer import Marks, set_marks
from model.language.tokenizer_files import read_tokenizer

TYPES = ("llava", "pooled_llava")
"""`model_type` of a folder: transformers' own class, and that of our exports with pooled images."""
OWN_KEYS = ("pool_size", "register_tokens")
"""What the config of our exports has besides that of transformers' own class."""
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a chat template is, the first that exists: a processor's two files, and the tokenizer's."""
LANGUAGE = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?!lm_head\.)(.+)")
OUTPUT = re.compile(r"(?:(?:model\.)?language_model\.)?(lm_head\..+)")
PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(.+)")
TOWER = re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?")
FORMER_CLASS = "a model in the format of LLaVA's own repository; take it in llava-hf's"


@dataclass(frozen=True, kw_only=True)
class LlavaFolder:
    """A folder, as far as its files say."""

    folder: Path
    """The folder."""
    config: Any
    """transformers' LlavaConfig."""
    pool: int
    """Side of the windows of patches that one token is the mean of; 1 but for our own exports."""
    language: Checkpoint
    """The language model's part of the weights."""
    names: Mapping[str, str]
    """Stored name -> name in the language model."""
    projector: Mapping[str, StoredTensor]
    """Name in the projector (`linear_1.weight`) -> stored tensor."""
    stored: Mapping[str, str]
    """Stored name -> name in the projector."""
    tower: Mapping[str, StoredTensor]
    """Stored name -> tensor of the vision tower."""
    kind: ConnectorKind
    """The connector that computes what the projector does."""

    @property
    def vision_width(self) -> int:
        """Values of a feature."""
        return self.projector["linear_1.weight"].shape[1]

    @property
    def text_config(self) -> Any:
        """A copy of the language model's config."""
        config = copy.deepcopy(self.config.text_config)  # a model changes the config it is made of
        config.tie_word_embeddings = bool(self.config.tie_word_embeddings)
        return config

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, tokens, if the config says it."""
        found = getattr(self.config.text_config, "max_position_embeddings", None)
        return int(found) if found else None

    def check(self) -> PreTrainedTokenizerFast:
        """Check the folder as far as possible without reading its weights; return the tokenizer.

        Raises:
            UserError: see `load`.
        """
        shapes = empty_model(self.text_config, self.folder)
        fit(self.language, shapes, self.names)
        tokenizer = self._tokenizer(shapes)
        prepare_model(shapes, tokenizer)
        return tokenizer

    def load(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[PreTrainedModel, nn.Module, PreTrainedTokenizerFast]:
        """Return language model, connector and tokenizer.

        Raises:
            UserError: a tensor is missing, left over or of another shape, the tokenizer or the template is
                missing or damaged, or our attention or loss lacks a feature of the language model.
        """
        shapes = empty_model(self.text_config, self.folder)
        names = fit(self.language, shapes, self.names)
        check_tied(self.language, names, shapes)
        tokenizer = self._tokenizer(shapes)
        language = load_weights(self.language, self.text_config, names, dtype)
        prepare_model(language, tokenizer)
        width = language.get_input_embeddings().embedding_dim
        connector = build_connector(str(self.kind), self.vision_width, width).to(dtype)
        values = self._projector_values()
        own = {
            name: value
            for name, value in values.items()
            if self.kind.mlp or name.startswith("linear_1.")
        }
        connector.load_state_dict(
            own if self.kind.mlp else {k.removeprefix("linear_1."): v for k, v in own.items()}
        )
        return language, connector, tokenizer

    def tower_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the vision tower as stored, by their names without a prefix.

        Raises:
            UserError: a file cannot be read.
        """
        part = Checkpoint(self.folder, {}, dict(self.tower))
        return read_tensors(part, {name: TOWER.sub("", name) for name in self.tower}, None)

    def _projector_values(self) -> dict[str, Tensor]:
        part = Checkpoint(
            self.folder, {}, {name: self.projector[new] for name, new in self.stored.items()}
        )
        values = read_tensors(part, self.stored, torch.float32)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                path = self.projector[name].path
                raise UserError(f"{path}: tensor {name} has values that are not finite; {AGAIN}")
        return values

    def _tokenizer(self, shapes: PreTrainedModel) -> PreTrainedTokenizerFast:
        rows = int(shapes.get_input_embeddings().weight.shape[0])
        ends = _numbers(getattr(shapes.config, "eos_token_id", None))
        tokenizer = read_tokenizer(self.folder, rows, ends, whole_model=True)
        if (most := max(tokenizer.get_vocab().values())) >= rows:
            raise UserError(
                f"{self.folder}: the tokenizer has ids up to {most:,} and the embedding {rows:,} rows; copy "
                "the tokenizer from where the weights come from"
            )
        number = self.config.image_token_index
        image = tokenizer.convert_ids_to_tokens(number) if number < rows else None
        if image is None or number not in tokenizer.added_tokens_decoder:
            raise UserError(
                f"{self.folder / CONFIG}: image_token_index {number:,} is no added token of the tokenizer; "
                "copy the tokenizer from where the weights come from"
            )
        text, where = _template(self.folder)
        return with_template(tokenizer, text, str(image), self._ends(tokenizer, ends), where)

    def _ends(self, tokenizer: PreTrainedTokenizerFast, ends: Iterable[int]) -> tuple[int, ...]:
        """Return the ids that end an answer: those of generation_config.json, config.json and tokenizer."""
        path = self.folder / "generation_config.json"
        values = read_object(path) if path.exists() or path.is_symlink() else {}
        named = [*_numbers(values.get("eos_token_id")), *ends, *_numbers(tokenizer.eos_token_id)]
        known = set(tokenizer.get_vocab().values())
        return tuple(dict.fromkeys(end for end in named if end in known))


def with_template(
    tokenizer: PreTrainedTokenizerFast, text: str, image: str, ends: tuple[int, ...], where: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the marks and the template of a folder.

    Args:
        tokenizer: of the folder.
        text: the template.
        image: the token that is replaced by the features of an image.
        ends: ids that end an answer.
        where: the file that the template is from.

    Raises:
        UserError: the template cannot be used.
    """
    set_marks(tokenizer, Marks(image, ends))
    template = FolderTemplate(text, tokenizer, where)
    if after := template.end_token():
        ends = tuple(dict.fromkeys((after, *ends)))
        set_marks(tokenizer, Marks(image, ends))
    attach(tokenizer, template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(
            ends[0] if ends else 0
        )
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def is_llava(folder: Path) -> bool:
    """Whether a folder has a config.json of a LLaVA.

    Raises:
        UserError: config.json cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return False
    check_folder(folder)
    return read_object(path).get("model_type") in TYPES


def other_model(folder: Path) -> str:
    """Return what a folder has if it is a vision-language model that cannot be imported, else ''."""
    values = read_object(folder / CONFIG)
    if not any(values.get(key) for key in VISION_KEYS):
        return ""
    return (
        f"a {one_line(values.get('model_type'), 40)}, and of vision-language models only a "
        "LlavaForConditionalGeneration (model_type llava) can be imported"
    )


def open_llava(folder: Path) -> LlavaFolder:
    """Return what the files of a folder describe.

    Raises:
        UserError: a file is missing or damaged, or the folder has a model of another kind.
    """
    values = read_object(folder / CONFIG)
    config, pool = _config(folder, values)
    tensors = read_headers(folder, weight_files(folder))
    names: dict[str, str] = {}
    stored: dict[str, str] = {}
    tower: dict[str, StoredTensor] = {}
    strange = []
    for name in tensors:
        if found := OUTPUT.fullmatch(name):
            names[name] = found[1]
        elif found := LANGUAGE.fullmatch(name):
            names[name] = f"model.{found[1]}"
        elif found := PROJECTOR.fullmatch(name):
            stored[name] = found[1]
        elif TOWER.match(name):
            tower[name] = tensors[name]
        elif not HARMLESS.search(name):
            strange.append(name)
    if strange:
        raise UserError(
            f"{tensors[strange[0]].path}: tensor {one_line(strange[0], 80)} is none of a "
            "LlavaForConditionalGeneration (language_model.*, multi_modal_projector.*, vision_tower.*): is "
            "it a model of another class?"
        )
    language = Checkpoint(
        folder, values.get("text_config") or {}, {name: tensors[name] for name in names}
    )
    check_tensors(folder, language.config, language.tensors)
    projector = {new: tensors[name] for name, new in stored.items()}
    found_kind = _projector_kind(folder, config, projector)
    llava = LlavaFolder(
        folder=folder,
        config=config,
        pool=pool,
        language=language,
        names=names,
        projector=projector,
        stored=stored,
        tower=tower,
        kind=found_kind,
    )
    if found_kind.activation == "linear":  # which of the two, only the values say
        second = llava._projector_values()
        weight, bias = second["linear_2.weight"], second.get("linear_2.bias")
        if torch.equal(weight, torch.eye(len(weight))) and (bias is None or not bool(bias.any())):
            object.__setattr__(llava, "kind", ConnectorKind(False, bias=found_kind.bias))
    return llava


def _config(folder: Path, values: Mapping[str, Any]) -> tuple[Any, int]:
    """Return the config and the side of the pooled windows."""
    path = folder / CONFIG
    if problem := quantised(values):
        raise UserError(f"{path}: {problem}")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: an adapter (adapter_config.json), not a whole model; merge it first"
        )
    if values.get("model_type") not in TYPES:
        raise UserError(
            f"{path}: a {one_line(values.get('model_type'), 40)}; only a LlavaForConditionalGeneration "
            "(model_type llava) can be imported"
        )
    if not all(isinstance(values.get(key), dict) for key in ("vision_config", "text_config")):
        former = any(key in values for key in ("mm_vision_tower", "mm_projector_type"))
        what = FORMER_CLASS if former else f"no vision_config and text_config; {AGAIN}"
        raise UserError(f"{path}: {what}")
    kept = {k: v for k, v in values.items() if k not in ("model_type", "auto_map", *OWN_KEYS)}
    pool = values.get("pool_size", 1)
    if type(pool) is not int or pool < 1:
        raise UserError(f"{path}: pool_size {one_line(pool, 40)}; {AGAIN}")
    text = values["text_config"].get("model_type", "llama")
    if text not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{path}: text_config has model_type {one_line(text, 40)!r}, which is no causal language model "
            "of transformers"
        )
    try:
        with quiet():
            config = LlavaConfig.from_dict(kept)
    except Exception as error:  # whatever a value of the wrong type may cause
        raise UserError(f"{path}: not a config of a model ({one_line(error)}); {AGAIN}") from None
    return config, pool


def _projector_kind(
    folder: Path, config: Any, projector: Mapping[str, StoredTensor]
) -> ConnectorKind:
    """Return the kind of connector that has the projector's tensors."""
    path = folder / CONFIG
    act = config.projector_hidden_act
    if act not in ACTIVATIONS:
        raise UserError(
            f"{path}: projector_hidden_act {one_line(act, 40)!r} is none of {', '.join(ACTIVATIONS)}: this "
            "projector cannot be imported"
        )
    bias = bool(config.multimodal_projector_bias)
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1)
    inner = config.text_config.hidden_size
    wanted: dict[str, tuple[int, ...]] = {
        "linear_1.weight": (inner, width),
        "linear_2.weight": (inner, inner),
    }
    wanted |= {"linear_1.bias": (inner,), "linear_2.bias": (inner,)} if bias else {}
    found = {name: tensor.shape for name, tensor in projector.items()}
    if found != wanted:
        name = min(dict(found.items() ^ wanted.items()))
        raise UserError(
            f"{folder}: multi_modal_projector.{one_line(name, 60)} is {found.get(name, 'missing')}, by "
            f"{CONFIG} it is {wanted.get(name, 'not there')}: a projector of another class cannot be imported"
        )
    return ConnectorKind(True, act, bias)


def _template(folder: Path) -> tuple[str, str]:
    """Return the text of the folder's chat template, and where it is."""
    for name in TEMPLATES:
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            continue
        if path.suffix == ".jinja":
            return read_text(path), str(path)
        found = read_object(path).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found, str(path)
    raise UserError(
        f"{folder}: no chat template ({', '.join(TEMPLATES)}), so it is unknown how the model is asked; copy "
        "chat_template.jinja from where the model comes from"
    )


def _numbers(value: object) -> list[int]:
    """Return the integers of a value that may be one, a list of them, or neither."""
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
