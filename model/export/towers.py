"""A vision tower as a class of transformers: CLIPVisionModel, SiglipVisionModel, or the one that it is.

    tower = export_tower(encoder)
    tower.config, tower.tensors, tower.layers

All blocks are exported, also those behind the last one that the features need: runtimes count
`vision_feature_layer` from the end. A norm behind the last block that open_clip's weights have is exported as
one that changes nothing: features are taken before it. A tower of transformers keeps its own.

V width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from configs import UserError
from model.io.tower_config import read_tower_config
from model.io.tower_folder import class_config, empty_tower, open_tower, published, read_tensors
from model.tail import VisionTail, block_tensors
from model.vision.config import EncoderConfig, tower_folder
from model.vision.demo_tower import DemoTower
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.hf_tower import HfTower

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our names of activations -> transformers'."""
NESTED = "vision_tower.vision_model."
"""What precedes the names of a CLIP or SigLIP tower in a published LLaVA."""
DEMO_EPS = 1e-5
"""What torch adds to the variance in a layer norm, unless told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExportedTower:
    """A vision tower in transformers' names."""

    config: PreTrainedConfig
    """Its architecture."""
    tensors: dict[str, Tensor]
    """Every tensor of the tower, by its name in published checkpoints without a prefix, float32."""
    layers: int | list[int]
    """`vision_feature_layer`: the hidden states that are used, counted from the end."""
    select: Literal["default", "full"]
    """`vision_feature_select_strategy`: whether the first token, CLS, is dropped (`default`)."""
    registers: int = 0
    """Tokens between CLS and the patches, which no class of LLaVA drops."""

    @property
    def prefix(self) -> str:
        """What precedes the names of its tensors in a published LLaVA."""
        return "vision_tower." if self.config.model_type.startswith("din") else NESTED


def export_tower(encoder: VisionEncoder) -> ExportedTower:
    """Return the whole tower of an encoder.

    Args:
        encoder: on the CPU in float32, with the weights that the features were made with.

    Raises:
        UserError: transformers' CLIP and SigLIP do not compute what the tower computes.
    """
    config, depth = encoder.config, encoder.tower.depth
    loaded = encoder.load_info()
    if isinstance(encoder.tower, HfTower):
        return _from_folder(encoder, encoder.tower)
    checks = logging.getLogger("model.vision.activation_check")
    checks.disabled = True  # they warned of this file when `encoder` was loaded
    try:
        every = load_encoder(
            dataclasses.replace(config, blocks=tuple(range(depth)), tail=()),
            device="cpu",
            random_weights=loaded["random_weights"],
            weights=loaded["weights"],
        )
    finally:
        checks.disabled = False
    tower: Any = every.tower
    if isinstance(tower, DemoTower):
        named, kind, modules = _from_demo(tower), "siglip", (tower.blocks[0].heads, DEMO_EPS)
    elif tower.is_timm:
        first = tower.vit.blocks[0]
        named, kind = _from_timm(tower.tensors(), config), "siglip"
        modules = (first.attn.num_heads, first.norm1.eps)
    else:
        first = tower.vit.transformer.resblocks[0]
        named, kind = _from_open_clip(tower.tensors(), config), "clip"
        modules = (first.attn.num_heads, first.ln_1.eps)
    heads, eps = modules
    sizes: dict[str, Any] = {
        "hidden_size": tower.width,
        "intermediate_size": named["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": eps,
    }
    named |= _norm("post_layernorm", tower.width)
    return ExportedTower(
        config=CLIPVisionConfig(**sizes)
        if kind == "clip"
        else SiglipVisionConfig(**sizes, vision_use_head=False),
        tensors={name: value.contiguous() for name, value in named.items()},
        layers=_from_end(config, depth),
        select="default" if kind == "clip" else "full",
    )


def with_tail(tower: ExportedTower, tail: VisionTail) -> ExportedTower:
    """Return a tower whose last blocks are those of a trained model."""
    trained = block_tensors(tail)
    assert trained.keys() <= tower.tensors.keys(), "blocks that the tower does not have"
    return dataclasses.replace(tower, tensors=tower.tensors | trained)


def _from_end(config: EncoderConfig, depth: int) -> int | list[int]:
    """Return `vision_feature_layer` of an encoder's blocks."""
    layers = [block - depth for block in config.tail or config.blocks]
    return layers[0] if len(layers) == 1 else layers


def _from_folder(encoder: VisionEncoder, tower: HfTower) -> ExportedTower:
    """Return a tower of transformers as its folder has it, without a pooling head."""
    loaded = encoder.load_info()
    if loaded["random_weights"]:
        found = read_tower_config(tower_folder(encoder.config.model, encoder.config.name))
        every = HfTower(found, tuple(range(found.depth)), tower.image_size)
        named = every.random_tensors(encoder.config.seed)
    else:
        opened = open_tower(Path(loaded["weights"]))
        found, named = opened.config, read_tensors(opened, None, unused=True)
    named = {name: value for name, value in named.items() if not name.startswith("head.")}
    # What no feature of a patch depends on may be missing in a folder; the class has it.
    for name, value in published(empty_tower(found), found.kind, unused=True).items():
        if name not in named:
            named[name] = torch.ones(value) if "norm.weight" in name else torch.zeros(value)
    return ExportedTower(
        config=class_config(found),
        tensors={name: named[name].contiguous() for name in sorted(named)},
        layers=_from_end(encoder.config, found.depth),
        select="default" if found.prefix_tokens else "full",
        registers=max(found.prefix_tokens - 1, 0),
    )


def _norm(name: str, width: int) -> dict[str, Tensor]:
    """Return the tensors of a layer norm without scales and shifts."""
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


_OPEN_CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # spelt like this in transformers
    "ln_pre.bias": "pre_layrnorm.bias",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.in_proj_": "",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "pos_embed": "embeddings.position_embedding.weight",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv.": "",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _from_open_clip(tensors: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Rename the tensors of open_clip's own ViT to those of CLIPVisionModel."""
    return _rename(tensors, _OPEN_CLIP, _OPEN_CLIP_BLOCK, "transformer.resblocks.", config)


def _from_timm(tensors: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Rename the tensors of timm's ViT, as SigLIP has it, to those of SiglipVisionModel."""
    named = _rename(tensors, _TIMM, _TIMM_BLOCK, "blocks.", config)
    positions = "embeddings.position_embedding.weight"
    return {**named, positions: named[positions][0]}  # (1, N, V) -> (N, V)


def _rename(
    tensors: Mapping[str, Tensor],
    outside: Mapping[str, str],
    inside: Mapping[str, str],
    blocks: str,
    config: EncoderConfig,
) -> dict[str, Tensor]:
    """Rename every tensor of a tower; queries, keys and values in one tensor become three.

    Args:
        tensors: by their library's names.
        outside: names outside of the blocks -> transformers'.
        inside: names within a block, without weight or bias -> transformers'; '' for queries, keys and
            values.
        blocks: what precedes the number of a block.
        config: the encoder's entry, for the message.

    Raises:
        UserError: a tensor has no counterpart, or one is missing.
    """
    named: dict[str, Tensor] = {}
    unknown = []
    for name, value in tensors.items():
        number, _, rest = name.removeprefix(blocks).partition(".")
        part, _, kind = rest.rpartition(".")
        fused = next((old for old, new in inside.items() if not new and rest.startswith(old)), "")
        if name in outside:
            named[outside[name]] = value
        elif not name.startswith(blocks) or (part not in inside and not fused):
            unknown.append(name)
        elif fused:
            kind = rest.removeprefix(fused)
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                named[f"encoder.layers.{number}.self_attn.{letter}_proj.{kind}"] = third
        else:
            named[f"encoder.layers.{number}.{inside[part]}.{kind}"] = value
    missing = sorted(set(outside) - set(tensors))
    if unknown or missing:
        what = f"has a tensor {unknown[0]}" if unknown else f"lacks a tensor {missing[0]}"
        raise UserError(
            f"encoder {config.name}: {config.model} {what}, so neither CLIP nor SigLIP of transformers "
            "computes the same: it cannot be exported; train on an encoder of one of these two kinds"
        )
    return named


def _from_demo(tower: DemoTower) -> dict[str, Tensor]:
    """Return the demo tower as a SigLIP tower: the norms and biases that it lacks change nothing."""
    width = tower.width
    named = {
        "embeddings.patch_embedding.weight": tower.patches.weight,
        "embeddings.patch_embedding.bias": torch.zeros(width),
        "embeddings.position_embedding.weight": tower.positions,
    }
    blocks: list[Any] = list(tower.blocks)
    for number, block in enumerate(blocks):
        there = f"encoder.layers.{number}"
        named |= _norm(f"{there}.layer_norm1", width) | _norm(f"{there}.layer_norm2", width)
        queries, keys = block.queries_keys.weight.chunk(2)
        for name, weight in (
            ("self_attn.q_proj", queries),
            ("self_attn.k_proj", keys),
            ("self_attn.v_proj", block.values.weight),
            ("self_attn.out_proj", block.attended.weight),
            ("mlp.fc1", block.expand.weight),
            ("mlp.fc2", block.contract.weight),
        ):
            named[f"{there}.{name}.weight"] = weight
            named[f"{there}.{name}.bias"] = torch.zeros(len(weight))
    return {name: value.detach() for name, value in named.items()}
