"""Tower and projector as llama.cpp's `clip` computes them, for the second file of the pair.

    tensors = write_mmproj(writer, connector, tower, spec)
    check_projector(path, connector, tower)

llama.cpp's LLaVA projector is `mm.0`, GELU, `mm.2`. A linear connector is one of these too, exactly, because
GELU(z) - GELU(-z) = z: `mm.0` is [W; -W] and `mm.2` is [I, -I]. Both are scaled, the first up and the second
down, because llama.cpp takes GELU from a table of float16 between -10 and 10 and computes it exactly beyond.

L tower blocks, V width of the tower, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, SiglipVisionConfig

from cache.format.spec import FeatureSpec
from configs import UserError
from model.connector import kind_of
from model.export.compare import MismatchError
from model.export.folder import projector_tensors
from model.export.towers import ExportedTower

if TYPE_CHECKING:
    from gguf import GGUFWriter

SCALE = 1024.0
"""Of a linear connector's hidden values. A power of two, so that scaling rounds nothing."""
PROJECTOR_LIMIT = 1e-5
"""Largest difference of a projected value, as a part of the largest one."""
PAD_COLOUR = (122, 116, 104)
"""The colour with which llama.cpp fills images up to a square, in 8-bit levels."""
OUTSIDE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
INSIDE = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""Names in transformers' CLIP and SigLIP -> llama.cpp's."""


def write_mmproj(
    writer: GGUFWriter, connector: nn.Module, tower: ExportedTower, spec: FeatureSpec
) -> dict[str, np.ndarray]:
    """Write the keys of the file; return its tensors, float32.

    Raises:
        UserError: llama.cpp does not compute this tower.
    """
    layers = feature_layers(tower)
    config = tower.config
    tensors = tower_tensors(tower) | projector(connector, tower)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    # Blocks behind the last one that is used are left out.
    writer.add_vision_block_count(max(layers))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_projection_dim(len(tensors["mm.2.bias"]))
    writer.add_array("clip.vision.feature_layer", sorted(layers))
    writer.add_vision_image_mean(list(spec.mean))
    writer.add_vision_image_std(list(spec.std))
    writer.add_vision_use_gelu(config.hidden_act != "quick_gelu")
    return tensors


def feature_layers(tower: ExportedTower) -> list[int]:
    """Return the hidden states that are used, in the order of training; 0 is the input of the first block."""
    from_end = tower.layers if isinstance(tower.layers, list) else [tower.layers]
    return [tower.config.num_hidden_layers + 1 + layer for layer in from_end]


def tower_tensors(tower: ExportedTower) -> dict[str, np.ndarray]:
    """Return the tensors of the tower by llama.cpp's names, without blocks and norms that nothing uses.

    Raises:
        UserError: it is no CLIP or SigLIP, or of a size that llama.cpp takes for something else.
    """
    config = tower.config
    if not isinstance(config, CLIPVisionConfig | SiglipVisionConfig):
        raise UserError(
            f"--gguf: {type(config).__name__.removesuffix('Config')}: llama.cpp's LLaVA computes CLIP and "
            "SigLIP towers only; export without --gguf, or train on an encoder of one of these two kinds"
        )
    if config.intermediate_size == config.hidden_size:
        raise UserError(
            f"--gguf: the tower's MLP is as wide as the tower ({config.hidden_size}), and llama.cpp would "
            "exchange its two matrices; export without --gguf"
        )
    depth = max(feature_layers(tower))
    result = {}
    for own, tensor in tower.tensors.items():
        # The norm behind the last block; llama.cpp would apply it to the features.
        if own.startswith("post_layernorm."):
            continue
        name = OUTSIDE.get(own)
        if name is None:
            number, _, rest = own.removeprefix("encoder.layers.").partition(".")
            part, _, kind = rest.rpartition(".")
            if not number.isdigit() or part not in INSIDE:
                raise UserError(f"--gguf: llama.cpp's LLaVA has no tensor {own} of a tower")
            if int(number) >= depth:
                continue
            name = f"v.blk.{number}.{INSIDE[part]}.{kind}"
        result[name] = tensor.float().numpy()
    return result


def projector(connector: nn.Module, tower: ExportedTower) -> dict[str, np.ndarray]:
    """Return mm.0 (features -> hidden) and mm.2 (hidden -> D), float32.

    Of several blocks llama.cpp joins the features in the order of the tower, whatever the order of training.

    Raises:
        UserError: llama.cpp does not compute this connector.
    """
    kind = kind_of(connector)
    if not kind.bias or (kind.mlp and kind.activation != "gelu"):
        raise UserError(
            f"--gguf: connector {kind}: llama.cpp's projector has biases, and GELU between two layers; "
            "export without --gguf"
        )
    state = {name: value.float().numpy() for name, value in projector_tensors(connector).items()}
    weight, bias = state["linear_1.weight"], state["linear_1.bias"]
    layers = feature_layers(tower)
    parts = np.split(weight, len(layers), axis=1)
    weight = np.concatenate([parts[layers.index(layer)] for layer in sorted(layers)], axis=1)
    if not isinstance(connector, nn.Linear):
        last = {"mm.2.weight": state["linear_2.weight"], "mm.2.bias": state["linear_2.bias"]}
        return {"mm.0.weight": weight, "mm.0.bias": bias, **last}
    identity = np.eye(len(bias), dtype=np.float32) / np.float32(SCALE)
    return {
        "mm.0.weight": np.concatenate([weight, -weight]) * np.float32(SCALE),
        "mm.0.bias": np.concatenate([bias, -bias]) * np.float32(SCALE),
        "mm.2.weight": np.concatenate([identity, -identity], axis=1),
        "mm.2.bias": np.zeros(len(bias), np.float32),
    }


def check_projector(path: Path, connector: nn.Module, tower: ExportedTower) -> float:
    """Compute the projector from the tensors of a file, as llama.cpp does, and compare it with the connector.

    Returns:
        The largest difference, as a part of the largest value.

    Raises:
        MismatchError: it is above 1e-5.
    """
    import gguf

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    state: Mapping[str, torch.Tensor] = {
        name: torch.tensor(value) for name, value in tensors.items() if name.startswith("mm.")
    }
    layers = feature_layers(tower)
    width = state["mm.0.weight"].shape[1] // len(layers)
    features = torch.randn(16, len(layers), width, generator=torch.Generator().manual_seed(0))
    order = [layers.index(layer) for layer in sorted(layers)]
    hidden = F.linear(features[:, order].flatten(1), state["mm.0.weight"], state["mm.0.bias"])
    found = F.linear(F.gelu(hidden), state["mm.2.weight"], state["mm.2.bias"])
    with torch.inference_mode():
        expected = connector(features.flatten(1))
    different = float((found - expected).abs().max() / expected.abs().max())
    if not different <= PROJECTOR_LIMIT:
        raise MismatchError(
            f"{path.name}: its projector differs from the connector by {different:.2g} of the largest value"
        )
    return different


def tower_note(tower: ExportedTower) -> str:
    """Return which builds of llama.cpp compute a tower wrongly; '' if none is known to."""
    if not isinstance(tower.config, CLIPVisionConfig):
        return ""
    return (
        "builds of llama.cpp with issue 25814 (11434 has it) put CLIP's class token behind the patches, and "
        "all image tokens are wrong; llama.cpp pull request 25844 is the fix, one line"
    )


def image_note(spec: FeatureSpec) -> str:
    """Return how llama.cpp prepares images otherwise than training; '' if it does not."""
    size = f"{spec.image_size} x {spec.image_size}"
    if spec.fit == "crop":
        return (
            "llama.cpp pads images to a square, and this model was trained on the middle of images: resize "
            f"them until the shorter side has {spec.shorter_side} pixels, and cut out {size}, before you "
            "give them to it"
        )
    if spec.fit != "pad":
        return (
            "llama.cpp pads images to a square, and this model was trained on images made square without "
            f"regard to their aspect ratio: resize them to {size} before you give them to it"
        )
    colour = tuple(int(255 * value) for value in spec.mean)
    if max(abs(a - b) for a, b in zip(colour, PAD_COLOUR, strict=True)) > 1:
        return (
            f"llama.cpp pads images with the colour {PAD_COLOUR}, and this model was trained on images "
            f"padded with {colour}: pad and resize them to {size} before you give them to it"
        )
    return ""
