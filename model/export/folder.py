"""The folder of an exported model, without its card: weights, configs, processor, tokenizer, template.

    config.json, generation_config.json       LlavaForConditionalGeneration
    model.safetensors                         language_model.*, vision_tower.*, multi_modal_projector.*
    processor_config.json                     size, fit and colours of images
    preprocessor_config.json                  the same once more, for older runtimes
    tokenizer.json, tokenizer_config.json     see template.py
    chat_template.jinja
    feature_space.json                        the spec of the features that it was trained on
    pooled_llava.py                           the model's class, where transformers has none

The names of tensors are those of published LLaVA checkpoints. transformers 5 would save other names, which it
can read itself and vLLM cannot.

M tokens of an image, V width of features, D width of the language model.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cache.format.spec import FeatureSpec
from configs import UserError
from model.connector import kind_of
from model.export import pooled_llava
from model.export.template import SPACE, chat_template, check_template, exported_tokenizer
from model.export.towers import ExportedTower
from model.inference import generation_config
from model.io.tensors import hash_tensors
from model.language.folder_template import attached
from model.language.model import unique_tensors
from model.language.tokenizer import image_id, image_token
from model.vlm import VLM

LANGUAGE, PROJECTOR = "language_model.", "multi_modal_projector."
"""Prefixes of the tensors, besides `ExportedTower.prefix`."""
POOLED_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
"""Prefixes of published checkpoints -> those of the class's own tensors.

transformers renames tensors for its own classes only, so those of ours have their own names in the file.
"""
WEIGHTS = "model.safetensors"
PROCESSOR = "processor_config.json"
CODE = "pooled_llava.py"
"""The class for pooled images, copied into the folder."""
AUTO_MAP = {
    "AutoConfig": "pooled_llava.PooledLlavaConfig",
    "AutoModelForImageTextToText": "pooled_llava.PooledLlavaForConditionalGeneration",
}
"""Which classes transformers takes from `CODE`."""
TOKENIZER_CONFIG = {
    # In every version of transformers the class that takes tokenizer.json as it is.
    "tokenizer_class": "PreTrainedTokenizerFast",
    # transformers saves these two only if the model's own folder stated them.
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}
"""What tokenizer_config.json says, whatever the language model's own says."""


def check_exportable(spec: FeatureSpec) -> None:
    """Refuse features that neither LlavaForConditionalGeneration nor pooled_llava.py computes.

    Args:
        spec: of the space that the model was trained on.

    Raises:
        UserError: they keep the CLS token.
    """
    if spec.seen.keep_cls:
        raise UserError(
            f"space {spec.name}: keeps the CLS token: this model cannot be exported; train on a space "
            "without it"
        )


def write_folder(
    folder: Path,
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    tower: ExportedTower,
    spec: FeatureSpec,
) -> None:
    """Write every file of an exported model but its card.

    Args:
        folder: empty.
        vlm: the trained model.
        tokenizer: its tokenizer.
        tower: the vision tower.
        spec: of the features that it was trained on.

    Raises:
        UserError: transformers' classes cannot hold the language model, or its tokenizer.
    """
    exported = tokenizer
    if attached(tokenizer) is None:
        exported = exported_tokenizer(tokenizer)
        exported.chat_template = chat_template(tokenizer)
        check_template(exported, tokenizer)
    tensors = {
        **{f"{LANGUAGE}{name}": value for name, value in language_tensors(vlm.language).items()},
        **{f"{tower.prefix}{name}": value for name, value in tower.tensors.items()},
        **{f"{PROJECTOR}{name}": value for name, value in projector_tensors(vlm.connector).items()},
    }
    if has_own_class(spec, tower):
        tensors = {_own_name(name): value for name, value in tensors.items()}
        shutil.copyfile(str(pooled_llava.__file__), folder / CODE)
    config = llava_config(vlm, tokenizer, tower, spec)
    config.save_pretrained(folder)
    generation(vlm.language, tokenizer).save_pretrained(folder)
    _write_processor(folder, exported, tower, spec)
    _write(folder / SPACE, {"spec": spec.to_json(), "tower": hash_tensors(tower.tensors)})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes its files readable for the owner only; give it the mode of the others.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def _own_name(name: str) -> str:
    """Return the name of a tensor in the class in pooled_llava.py."""
    prefix = next(prefix for prefix in POOLED_PREFIXES if name.startswith(prefix))
    return POOLED_PREFIXES[prefix] + name.removeprefix(prefix)


def language_tensors(language: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a language model, without the output layer if it is tied to the embedding.

    Raises:
        UserError: its tensors are not named as in Llama and Qwen, as LLaVA checkpoints need.
    """
    tensors = unique_tensors(language)
    strange = [name for name in tensors if not name.startswith(("model.", "lm_head.weight"))]
    if strange:
        raise UserError(
            f"language model {language.config.model_type}: has a tensor {strange[0]}, and LLaVA's classes "
            "take the names of Llama and Qwen (model.*, lm_head.weight): this model cannot be exported; "
            "train on another --llm"
        )
    return tensors


def projector_tensors(connector: nn.Module) -> dict[str, Tensor]:
    """Return linear_1 (V -> D) and linear_2 (D -> D) of LLaVA's projector.

    A linear connector is linear_1; linear_2 is the identity, and so is the activation between them.
    """
    tensors = {name: value.detach().contiguous() for name, value in connector.state_dict().items()}
    if not isinstance(connector, nn.Linear):
        return tensors
    tensors = {f"linear_1.{name}": value for name, value in tensors.items()}
    tensors["linear_2.weight"] = torch.eye(connector.out_features)
    if connector.bias is not None:
        tensors["linear_2.bias"] = torch.zeros(connector.out_features)
    return tensors


def llava_config(
    vlm: VLM, tokenizer: PreTrainedTokenizerFast, tower: ExportedTower, spec: FeatureSpec
) -> LlavaConfig:
    """Return the config of the whole model."""
    # A copy: LlavaConfig changes the config that it is given, and the live model would compute other logits.
    text = copy.deepcopy(vlm.language.config)
    text.architectures = [type(vlm.language).__name__]
    text.dtype = torch.float32
    text._name_or_path = ""  # of a folder on this machine
    kind = LlavaConfig
    pooling: dict[str, Any] = {}
    if has_own_class(spec, tower):
        kind, pooling = pooled_llava.PooledLlavaConfig, {"pool_size": spec.pool_image}
        if tower.registers:
            pooling["register_tokens"] = tower.registers
        if vlm.tail is not None:  # which pools behind its blocks, where nothing is stored
            pooling["pool_rounded"] = False
    config = kind(
        **pooling,
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_id(tokenizer),
        image_seq_length=spec.tokens("image"),
        projector_hidden_act=kind_of(vlm.connector).activation,
        multimodal_projector_bias=kind_of(vlm.connector).bias,
        vision_feature_select_strategy=tower.select,
        vision_feature_layer=tower.layers,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
    )
    config.architectures = [model_class(spec, tower)]
    if pooling:
        config.auto_map = AUTO_MAP
    config.dtype = torch.float32
    return config


def has_own_class(spec: FeatureSpec, tower: ExportedTower) -> bool:
    """Return whether no class of transformers computes a model on these features."""
    return spec.pool_image > 1 or tower.registers > 0


def model_class(spec: FeatureSpec, tower: ExportedTower) -> str:
    """Return the name of the class that computes a model on these features."""
    own = pooled_llava.PooledLlavaForConditionalGeneration.__name__
    return own if has_own_class(spec, tower) else "LlavaForConditionalGeneration"


def generation(language: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return how answers end and which tokens they never have, as `model.inference` decides it."""
    return GenerationConfig(
        **{
            name: value
            for name, value in generation_config(language, tokenizer, 1, 0.0).to_diff_dict().items()
            if name not in ("max_new_tokens", "transformers_version")
        }
    )


def _write_processor(
    folder: Path, tokenizer: PreTrainedTokenizerFast, tower: ExportedTower, spec: FeatureSpec
) -> None:
    side = {"height": spec.image_size, "width": spec.image_size}
    is_cut = spec.fit == "crop"
    images = LlavaImageProcessor(
        do_pad=spec.fit == "pad",  # with the mean colour
        size={"shortest_edge": spec.shorter_side} if is_cut else side,
        crop_size=side,  # runtimes count an image's tokens by it, also where nothing is cut
        do_center_crop=is_cut,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=spec.patch_size * spec.pool_image,  # it counts tokens, one for each window
        vision_feature_select_strategy=tower.select,
        num_additional_image_tokens=int(tower.select == "default"),
        image_token=image_token(tokenizer),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    # Runtimes that know no nested processor_config.json read this one.
    values = _read(folder / PROCESSOR)["image_processor"]
    _write(folder / "preprocessor_config.json", values | {"processor_class": "LlavaProcessor"})
    config = folder / "tokenizer_config.json"
    # Sorted, because transformers puts keys that a tokenizer's own file had first.
    _write(config, dict(sorted((_read(config) | TOKENIZER_CONFIG).items())))


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
