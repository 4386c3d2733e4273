"""The tensors of a vision tower in a Hugging Face folder, and their hash.

    found = open_tower(Path("dinov2-small"))            # config and headers, checked against each other
    tensors = read_tensors(found, blocks=(8,))          # what block 8 needs, float32, by published names
    tower_hash(Path("llava"), blocks=(22,))             # `weights` in the spec of a space

Names are those of published checkpoints without prefix, in every version of transformers: the hash does not
depend on the version, nor on whether a tower is alone or in a LLaVA. It needs no encoder, so training may use
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs import UserError, one_line
from model.io.tensors import hash_tensors
from model.io.tower_config import CONFIG, TowerConfig, read_tower_config
from model.language.checkpoint import read_headers, weight_files
from model.language.files import AGAIN, FLOATS, StoredTensor

PREFIXES = (
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.vision_model.",
    "vision_tower.",
    "vision_model.",
    "dinov2_with_registers.",
    "dinov2.",
    "dinov3_vit.",
    "",
)
"""What may precede the names of a tower's tensors, the longest first."""
PATCHES = {
    "clip_vision_model": "embeddings.patch_embedding.weight",
    "siglip_vision_model": "embeddings.patch_embedding.weight",
    "dinov2": "embeddings.patch_embeddings.projection.weight",
    "dinov2_with_registers": "embeddings.patch_embeddings.projection.weight",
    "dinov3_vit": "embeddings.patch_embeddings.weight",
}
"""The tensor by which a tower is found in a file."""
RENAMED = {
    "dinov2": (
        (".attention.q_proj.", ".attention.attention.query."),
        (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.down_proj.", ".mlp.weights_out."),
    ),
    "dinov3_vit": (("model.layer.", "layer."),),
}
"""Names in a class of transformers 5 -> those of published checkpoints."""
RENAMED["dinov2_with_registers"] = RENAMED["dinov2"]
HALVES = ("mlp.gate_proj.", "mlp.up_proj.")
"""Tensors of DINOv2's gated MLP that published checkpoints have as one, `FUSED`."""
FUSED = "mlp.weights_in."
UNUSED = re.compile(
    r"^(?:(?:post_layernorm|layernorm|norm|head)\.|(?:embeddings\.)?(?:mask_token|position_ids)$)"
)
"""Tensors that no feature of a patch depends on: the last norm, SigLIP's pooling, the mask."""
BESIDE = re.compile(
    r"^(?:text_model|text_projection|visual_projection|classifier|language_model|multi_modal_projector|lm_head)\."
    r"|^logit_(?:scale|bias)$"
)
"""Tensors of other parts of a model whose tower's tensors have no prefix."""
KEYS = frozenset(
    {
        *(
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
        ),
        *("mlp_ratio", "image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps"),
        *("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
        *("use_swiglu_ffn", "use_gated_mlp", "use_mask_token", "num_register_tokens", "rope_theta"),
    }
)
"""Keys of a tower's config that its shapes or features depend on."""
BLOCK = re.compile(r"^(?:encoder\.)?layers?\.(\d{1,6})\.")


@dataclass(frozen=True, kw_only=True)
class TowerFolder:
    """A folder whose files have every tensor of a vision tower."""

    config: TowerConfig
    """What its JSON files say."""
    stored: Mapping[str, tuple[str, ...]]
    """Published name without prefix -> name in its file, or of its two halves; `UNUSED` ones, too."""
    headers: Mapping[str, StoredTensor]
    """Name in its file -> dtype and shape."""


def class_config(config: TowerConfig, depth: int | None = None) -> Any:
    """Return the config of a tower as transformers has it, with `depth` blocks if that is given.

    Raises:
        UserError: transformers refuses it.
    """
    kind = getattr(transformers, config.class_name.replace("Model", "Config"))
    # Others could name code to run, such as an attention kernel on the hub.
    values = {name: value for name, value in config.values.items() if name in KEYS}
    if config.kind == "siglip_vision_model":
        values["vision_use_head"] = False
    if depth is not None:
        values["num_hidden_layers"] = depth
    try:
        return kind(**values)
    except Exception as error:  # whatever the checks of a config raise
        path = config.folder / CONFIG
        raise UserError(
            f"{path}: not a config of {config.class_name} ({one_line(error)})"
        ) from None


def empty_tower(config: TowerConfig, depth: int | None = None) -> nn.Module:
    """Return the tower's class on `meta`: names and shapes without values.

    Raises:
        UserError: its sizes do not make a tower.
    """
    made = class_config(config, depth)
    try:
        with torch.device("meta"):
            tower: nn.Module = getattr(transformers, config.class_name)(made)
    except Exception as error:  # such as a width that its heads do not divide
        path = config.folder / CONFIG
        raise UserError(
            f"{path}: not a config of {config.class_name} ({one_line(error)})"
        ) from None
    return tower


def published(tower: nn.Module, kind: str, *, unused: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a tower's tensors by published names, with those that are `UNUSED` or without."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in tower.state_dict().items():
        plain = published_name(name, kind)
        shape = tuple(value.shape)
        if (whole := fused_name(plain)) is not None:
            plain, shape = whole, (2 * shape[0], *shape[1:])
        if unused or not UNUSED.match(plain):
            shapes[plain] = shape
    return shapes


def published_name(name: str, kind: str) -> str:
    """Return the published name of a tensor of a class of transformers."""
    name = name.removeprefix("vision_model.")
    for ours, theirs in RENAMED.get(kind, ()):
        name = name.replace(ours, theirs) if ours[0] == "." or name.startswith(ours) else name
    return name


def fused_name(name: str) -> str | None:
    """Return the name of the published tensor that has this one as a half; None if there is none."""
    halves = HALVES if name.startswith("encoder.") else ()
    return next((name.replace(half, FUSED) for half in halves if half in name), None)


def open_tower(folder: Path) -> TowerFolder:
    """Return what a folder's files describe, after a check of names, shapes and dtypes.

    Raises:
        UserError: a file is missing or damaged, or tensors are missing, left over or of another shape.
    """
    config = read_tower_config(folder)
    headers = read_headers(folder, weight_files(folder))
    prefix = _prefix(config, headers)
    stored = _names(config, headers, prefix)
    if config.depth > len(stored):  # before a tower of this depth is built
        raise UserError(
            f"{folder / CONFIG}: {config.depth:,} blocks, but the weights have only {len(stored):,} tensors "
            f"of the tower; {AGAIN}"
        )
    shapes = published(empty_tower(config), config.kind)
    missing = sorted(shapes.keys() - stored.keys())
    left = sorted(name for name in stored.keys() - shapes.keys() if not UNUSED.match(name))
    if missing or left:
        parts = [f"missing: {_few(missing)}"] if missing else []
        parts += [f"left over: {_few(left)}"] if left else []
        raise UserError(
            f"{folder}: its tensors {prefix}* are not those of the {config.class_name} in its {CONFIG}: "
            f"{'; '.join(parts)}; {AGAIN}"
        )
    for name, shape in shapes.items():
        files = [headers[part] for part in stored[name]]
        if len(files) > 1:
            shape = (shape[0] // 2, *shape[1:])
        for part, have in zip(stored[name], files, strict=True):
            if have.shape != shape:
                raise UserError(
                    f"{have.path}: tensor {part} is {have.shape}, and by {CONFIG} it is {shape}; {AGAIN}"
                )
            if have.dtype not in FLOATS:
                raise UserError(
                    f"{have.path}: tensor {part} is {have.dtype}: quantised weights; take the unquantised "
                    "weights of the same model"
                )
    return TowerFolder(config=config, stored=stored, headers=headers)


def _prefix(config: TowerConfig, headers: Mapping[str, StoredTensor]) -> str:
    """Return what precedes the names of the tower's tensors."""
    for prefix in PREFIXES:
        if prefix + PATCHES[config.kind] in headers:
            return prefix
    raise UserError(
        f"{config.folder}: no tensor {PATCHES[config.kind]}, with or without vision_tower. or vision_model. "
        f"before it, so no weights of a {config.class_name}; {AGAIN}"
    )


def _names(
    config: TowerConfig, headers: Mapping[str, StoredTensor], prefix: str
) -> dict[str, tuple[str, ...]]:
    """Return published name -> names in the file, of the tensors that have this prefix."""
    found: dict[str, tuple[str, ...]] = {}
    halves: dict[str, dict[str, str]] = {}
    for name in headers:
        if not name.startswith(prefix) or (not prefix and BESIDE.match(name)):
            continue
        plain = published_name(name.removeprefix(prefix), config.kind)
        if (whole := fused_name(plain)) is not None:
            halves.setdefault(whole, {})[plain] = name
        elif plain in found:
            raise UserError(
                f"{headers[name].path}: {one_line(name, 80)} and {one_line(found[plain][0], 80)} are one "
                f"tensor of the tower; {AGAIN}"
            )
        else:
            found[plain] = (name,)
    for whole, parts in halves.items():
        if len(parts) == len(HALVES) and whole not in found:
            found[whole] = tuple(parts[plain] for plain in sorted(parts))  # gate before up
        else:
            found |= {plain: (name,) for plain, name in parts.items()}
    return found


def _few(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 2 else ""
    return ", ".join(one_line(name, 80) for name in names[:2]) + more


def used(names: Iterable[str], blocks: Sequence[int]) -> list[str]:
    """Return the published names that the outputs of `blocks` depend on, sorted."""

    def needed(name: str) -> bool:
        block = BLOCK.match(name)
        return not UNUSED.match(name) and (block is None or int(block[1]) <= max(blocks))

    return sorted(filter(needed, names))


def read_tensors(
    found: TowerFolder, blocks: Sequence[int] | None, *, unused: bool = False
) -> dict[str, Tensor]:
    """Return tensors by published names, float32, as copies of what the files have.

    Args:
        found: from `open_tower`.
        blocks: those that the outputs of these blocks depend on; None: of all blocks.
        unused: also the `UNUSED` ones that the files have.

    Raises:
        UserError: a file cannot be read, or a value is not finite.
    """
    blocks = range(found.config.depth) if blocks is None else blocks
    names = used(found.stored, blocks)
    if unused:
        names += [
            name for name in found.stored if UNUSED.match(name) and "position_ids" not in name
        ]
    parts: dict[str, Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for part in (part for name in names for part in found.stored[name]):
        by_file.setdefault(found.headers[part].path, []).append(part)
    for path, wanted in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for part in wanted:
                    # A copy, so that changes of the mapped file cannot change weights that have been hashed.
                    value = parts[part] = file.get_tensor(part).to(torch.float32, copy=True)
                    if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
                        raise UserError(
                            f"{path}: tensor {part} has values that are not finite; {AGAIN}"
                        )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({one_line(error)}); {AGAIN}") from None
    stored = ((name, [parts[part] for part in found.stored[name]]) for name in names)
    return {name: torch.cat(some) if len(some) > 1 else some[0] for name, some in stored}


def tower_hash(folder: Path, blocks: Sequence[int]) -> str:
    """Return the sha256 (hex) of the tensors that the outputs of `blocks` depend on: the spec's `weights`.

    Raises:
        UserError: the folder contains no whole tower, or it has fewer blocks.
    """
    found = open_tower(folder)
    check_blocks(found.config, blocks)
    return hash_tensors(read_tensors(found, blocks))


def check_blocks(config: TowerConfig, blocks: Sequence[int]) -> None:
    """Refuse blocks that a tower does not have."""
    if max(blocks) >= config.depth:
        raise UserError(
            f"blocks {list(blocks)}: {config.folder} has {config.depth} blocks, 0 to {config.depth - 1}"
        )


def architecture(config: TowerConfig) -> str:
    """Return what identifies a tower's computation besides its tensors: its class, values of its config."""
    made = class_config(config)
    values = {"heads": made.num_attention_heads, "eps": made.layer_norm_eps}
    if config.kind == "dinov3_vit":
        values["theta"] = made.rope_theta
    return f"transformers:{config.class_name}" + "".join(
        f"-{name}{value:g}" for name, value in values.items()
    )


def class_tensors(tower: nn.Module, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return published tensors under the names that a tower of transformers has.

    Args:
        tower: of transformers, cut or whole.
        kind: one of `KINDS`.
        tensors: by published name; those that the tower lacks are left out.
    """
    state = {}
    for name in tower.state_dict():
        plain = published_name(name, kind)
        if (whole := fused_name(plain)) is not None:
            half = 0 if HALVES[0] in plain else 1
            state[name] = tensors[whole].chunk(2)[half].clone()
        elif plain in tensors:
            state[name] = tensors[plain]
    return state
