"""The blocks of a tower that training computes, as a file of a space: read from the tower, renamed, compared.

    tail, data = make_tail(config, encoder.spec("int8"))

The tower is loaded once more, as deep as the features need. Before anything is written, its outputs are
compared with those of `model.tail` on one image of noise: a tower whose blocks compute something else, such
as with scaled layers, is refused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.format.spec import FeatureSpec
from cache.format.tail import Tail, file_bytes, file_sha256
from configs import UserError
from model.tail import load_tail
from model.vision.config import EncoderConfig
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.hf_tower import HfTower

LIMIT = 1e-4
"""Largest relative difference between the outputs of the tower and those of `model.tail`, in float32."""
_KINDS = ("weight", "bias")
_OPEN_CLIP = {
    "ln_1": "norm_1",
    "attn.in_proj": "qkv",
    "attn.out_proj": "out",
    "ln_2": "norm_2",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
_TIMM = {
    "norm1": "norm_1",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "norm2": "norm_2",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}
_TRANSFORMERS = {
    "layer_norm1": "norm_1",
    "self_attn.qkv": "qkv",
    "self_attn.out_proj": "out",
    "layer_norm2": "norm_2",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}


def make_tail(
    config: EncoderConfig,
    spec: FeatureSpec,
    *,
    random_weights: bool = False,
    weights: str | None = None,
) -> tuple[Tail, bytes]:
    """Return the tail of an encoder and the bytes of its file.

    Args:
        config: the encoder's entry, from `EncoderConfig.with_tail`.
        spec: of its space, without a tail.
        random_weights: whether the encoder was loaded so.
        weights: file or folder with the weights; None for the hub.

    Raises:
        UserError: the weights cannot be loaded, or `model.tail` does not compute what the blocks compute.
    """
    stored = config.blocks[0]
    whole = dataclasses.replace(
        config,
        blocks=tuple(dict.fromkeys((stored, *config.tail))),
        tail=(),
        compute_dtype="float32",
    )
    checks = logging.getLogger("model.vision.activation_check")
    checks.disabled = True  # they warned of this file when the encoder was loaded
    try:
        encoder = load_encoder(
            whole,
            device="cpu",
            random_weights=random_weights,
            weights=weights,
        )
    finally:
        checks.disabled = False
    tower: Any = encoder.tower
    tower.keep_cls = True
    blocks, names, _, _ = _layers(tower)
    arrays = {
        f"blocks.{number}.{name}": value.numpy()
        for number in range(stored + 1, max(config.tail) + 1)
        for name, value in _renamed(blocks[number], names, config)
    }
    tail = _describe(config, tower)
    try:
        spec = dataclasses.replace(spec, tail=tail)
    except ValueError as error:
        raise UserError(f"encoder {config.name}: {error}") from None
    _compare(encoder, spec, arrays)
    data = file_bytes(tail, arrays, spec.width)
    return dataclasses.replace(tail, sha256=file_sha256(data)), data


def spec_with_tail(encoder: VisionEncoder, codec: str, trained: int) -> FeatureSpec:
    """Return the spec of a space behind whose rows the last blocks of an encoder can train.

    The stored block is the last one that allows it: `encode.run --block N --tail`. Nothing is compared and no
    file is made, so the tail has no sha256.

    Args:
        encoder: whose entry has no tail.
        codec: of the rows.
        trained: how many blocks train.

    Raises:
        UserError: the encoder has blocks of another kind, or not as many before those of its features.
    """
    blocks = encoder.config.blocks
    if trained > max(blocks):
        raise UserError(
            f"--train-vision-blocks {trained}: before the features of encoder {encoder.config.name}, the "
            f"output of block {', '.join(map(str, blocks))}, are {max(blocks)} blocks that could train and "
            f"the one that is stored; give --train-vision-blocks {max(blocks)}"
        )
    config = encoder.config.with_tail(min(max(blocks) - trained, *blocks))
    spec = encoder.spec(codec)
    plain: dict[str, Any] = {"blocks": config.blocks, "width": spec.width // len(blocks)}
    plain |= {"pool_image": 1, "pool_frame": 1}
    plain |= {"keep_cls": getattr(encoder.tower, "prefix_tokens", 0) == 1}
    return dataclasses.replace(spec, **plain, tail=_describe(config, encoder.tower))


def _describe(config: EncoderConfig, tower: Any) -> Tail:
    """Return the tail of an entry from `EncoderConfig.with_tail`, without a sha256.

    Raises:
        UserError: its blocks are of another kind.
    """
    blocks, names, norm, attention = _layers(tower)
    number = config.blocks[0] + 1
    parts: dict[str, Any] = dict(blocks[number].named_modules())
    up = next(old for old, new in names.items() if new == "up")
    for part in (norm, attention, up):
        if part not in parts:
            raise _other_blocks(config, f"they have no {part}")
    return Tail(
        first=number,
        blocks=config.tail,
        heads=parts[attention].num_heads,
        hidden=len(parts[up].weight),
        eps=parts[norm].eps,
        pool_image=config.pool_image,
        pool_frame=config.pool_frame,
    )


def _layers(tower: Any) -> tuple[Any, dict[str, str], str, str]:
    """Return the blocks of a tower, our names of their parts, and their names of a norm and the attention."""
    if isinstance(tower, HfTower):
        return tower.layers, _TRANSFORMERS, "layer_norm1", "self_attn"
    if tower.is_timm:
        return tower.vit.blocks, _TIMM, "norm1", "attn"
    return tower.vit.transformer.resblocks, _OPEN_CLIP, "ln_1", "attn"


def _renamed(
    block: torch.nn.Module, names: dict[str, str], config: EncoderConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and the values of the tensors of a block.

    Raises:
        UserError: it has others than the blocks of CLIP and SigLIP.
    """
    found = {name.replace("in_proj_", "in_proj."): v for name, v in block.state_dict().items()}
    for kind in _KINDS:
        parts = [f"self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        if all(part in found for part in parts):
            found[f"self_attn.qkv.{kind}"] = torch.cat([found.pop(part) for part in parts])
    wanted = {f"{old}.{kind}": f"{new}.{kind}" for old, new in names.items() for kind in _KINDS}
    if different := sorted(wanted.keys() ^ found.keys()):
        raise _other_blocks(config, f"{different[0]} is in only one of them")
    for name, value in found.items():
        yield wanted[name], value.detach().float().contiguous()


def _other_blocks(config: EncoderConfig, why: str) -> UserError:
    return UserError(
        f"--tail: the blocks of encoder {config.name} are not those of CLIP and SigLIP, which training "
        f"computes ({why}); encode without --block and --tail"
    )


def _compare(encoder: VisionEncoder, spec: FeatureSpec, arrays: dict[str, Any]) -> None:
    """Raise UserError unless the tail computes from a stored block what the tower does."""
    tower = encoder.tower
    side = tower.image_size
    noise = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    with torch.no_grad():
        outputs = dict(zip(tower.take, tower(encoder.normalize(noise)), strict=True))
        assert spec.tail is not None
        wanted = torch.cat([outputs[block] for block in spec.tail.blocks], dim=-1)
        found = load_tail(spec, arrays).outputs(outputs[spec.tail.first - 1])
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= LIMIT:
        raise _other_blocks(encoder.config, f"outputs differ by {difference:.1g}")
