"""Trained weights of a CLIP tower: where they are, what they hold, and whether they fit the model.

A tower computes wrong features, and no error, when its activation is not the one it was trained with.
What can be known of that is compared with the model as built, and any contradiction is refused:

1. the encoder entry's own `activation:` (always stated);
2. open_clip's record of the tag (`pretrained: openai` was trained with QuickGELU);
3. beside a local file: `open_clip_config.json`, or Hugging Face's `config.json`;
4. in the file: the three extra tensors that OpenAI's own files carry;
5. for a local file about which 3 and 4 say nothing: published weights of that model must exist with
   this activation (`ViT-L-14-336` was only ever trained with QuickGELU).

A bare file that passes 5 is taken at the entry's word, and the log says so: tensors alone don't tell.

Understood: open_clip's files, safetensors or torch, and Hugging Face's CLIP ones (a folder of
`CLIPModel` or `CLIPVisionModel`). The hash covers the tensors used, as float32 and by open_clip's
names: the same weights have the same hash in every one of these formats.
"""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open

from configs import UserError
from model.clip_tower import ClipTower
from model.encoder_config import EncoderConfig
from model.hub import fetch

__all__ = ["check_entry", "fill"]

log = logging.getLogger(__name__)

FILE_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""What is looked for in a folder, best first."""

_OPENAI_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})
_HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def check_entry(
    tower: ClipTower, config: EncoderConfig
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Compare the entry with the tower as built and with its tag; needs no weights.

    Returns:
        Mean and standard deviation of the colours.

    Raises:
        UserError: the activations differ, the tag does not exist, or mean and std are nowhere said.
    """
    if tower.activation != config.activation:
        raise UserError(
            f"encoder {config.name}: activation {config.activation}, but open_clip builds {config.model} "
            f"with {tower.activation}; for OpenAI's weights the model's name ends in -quickgelu"
        )
    record = _tag_record(config)
    if record and not tower.is_timm and _trained_with(record) != tower.activation:
        raise UserError(
            f"encoder {config.name}: weights {config.pretrained} were trained with {_trained_with(record)}, "
            f"but {config.model} computes {tower.activation}: wrong features; choose the model "
            f"{_other_model(config.model)} and activation: {_trained_with(record)}"
        )
    mean, std = config.mean or record.get("mean"), config.std or record.get("std")
    if mean is None or std is None:
        raise UserError(
            f"encoder {config.name}: no tag (pretrained:) to take mean and std from: give both"
        )
    return tuple(mean), tuple(std)


def _tag_record(config: EncoderConfig) -> dict[str, Any]:
    """What open_clip knows of the entry's weights: hub place, mean, std, quick_gelu. {} without a tag."""
    if not config.pretrained:
        return {}
    record: dict[str, Any] = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if not record:
        tags = open_clip.list_pretrained_tags_by_model(config.model)
        hint = f"it has: {', '.join(tags)}" if tags else "it has none"
        raise UserError(
            f"encoder {config.name}: open_clip's {config.model} has no weights {config.pretrained!r} ({hint})"
        )
    return record


def _trained_with(record: Mapping[str, Any]) -> str:
    return "quick_gelu" if record.get("quick_gelu") else "gelu"


def fill(tower: ClipTower, config: EncoderConfig, weights: str | None) -> Path:
    """Put trained weights into `tower`: those of `weights` (a file or folder), else of the entry's tag.

    Returns:
        The file they came from.

    Raises:
        UserError: they cannot be had, cannot be read, or don't fit the model.
    """
    record = _tag_record(config)
    if weights is not None:
        path = _find_file(Path(weights).expanduser())
    else:
        path = fetch(record.get("hf_hub", ""), encoder=config.name)
    tensors = _read(path)
    _check_training(tower, config, path, tensors, is_local=weights is not None)
    tower.load(_select(tower, _in_open_clip_names(tower, tensors, path), path))
    return path


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"--weights {path}: no such file or folder")
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise UserError(
        f"--weights {path}: none of {', '.join(FILE_NAMES)} in this folder; name the file"
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a weights file, on the CPU, memory-mapped where the format allows."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if _is_torchscript(path):
            raise UserError(
                f"{path}: a TorchScript program (OpenAI's original file), not plain weights; take the "
                "same weights as safetensors, on the Hugging Face hub under timm/vit_*_clip_*.openai"
            )
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: no readable weights file ({_short(error)})") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(loaded).__name__}, not named tensors")
    return {
        str(name).removeprefix("module."): tensor
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_training(
    tower: ClipTower,
    config: EncoderConfig,
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    is_local: bool,
) -> None:
    """Refuse weights that are known to be trained for another activation or colour normalisation."""
    if not is_local:
        return  # the tag's record was compared before anything was fetched
    stated: str | None = None
    if tensors.keys() >= _OPENAI_MARKS:
        stated, source = "quick_gelu", "it is OpenAI's own file"
    else:
        stated, source = _activation_beside(path)
    if stated is None:
        published = {
            _trained_with(open_clip.get_pretrained_cfg(config.model, tag))
            for tag in open_clip.list_pretrained_tags_by_model(config.model)
        }
        if tower.is_timm or not published or tower.activation in published:
            log.warning(
                "%s says nothing of its activation; taken for %s, as encoder %s has it",
                path,
                tower.activation,
                config.name,
            )
            return
        stated, source = published.pop(), f"all published weights of {config.model} are"
    if stated != tower.activation:
        raise UserError(
            f"{path}: weights trained with {stated} ({source}), but encoder {config.name} builds "
            f"{config.model} with {tower.activation}: wrong features; choose the model "
            f"{_other_model(config.model)} and activation: {stated}"
        )


def _activation_beside(path: Path) -> tuple[str | None, str]:
    """What the configuration file beside a weights file says, and that file's name."""
    ours, theirs = path.parent / "open_clip_config.json", path.parent / "config.json"
    if ours.is_file():
        model = _json(ours).get("model_cfg")
        if isinstance(model, Mapping):
            is_timm = "timm_model_name" in model.get("vision_cfg", {})
            if not is_timm:
                return ("quick_gelu" if model.get("quick_gelu") else "gelu"), f"says {ours}"
    if theirs.is_file():
        values = _json(theirs)
        values = values.get("vision_config", values)
        if isinstance(values, Mapping) and values.get("hidden_act") in _HF_ACTIVATIONS:
            return _HF_ACTIVATIONS[values["hidden_act"]], f"says {theirs}"
    return None, ""


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({_short(error)})") from None
    return values if isinstance(values, dict) else {}


def _other_model(model: str) -> str:
    return (
        model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
    )


def _in_open_clip_names(
    tower: ClipTower, tensors: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """The vision tower's tensors under the names of `tower.tensors()`."""
    if any(name.startswith(tower.prefix) for name in tensors):
        cut = len(tower.prefix)
        return {n[cut:]: t for n, t in tensors.items() if n.startswith(tower.prefix)}
    vision = {n.removeprefix("vision_model."): t for n, t in tensors.items()}
    if "embeddings.class_embedding" in vision and not tower.is_timm:
        return _from_hugging_face(vision)
    raise UserError(
        f"{path}: no tensors named {tower.prefix}*: not open_clip's file for this kind of tower"
        + (" (of Hugging Face's files, only CLIP's are understood)" if tower.is_timm else "")
    )


def _from_hugging_face(vision: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of `transformers.CLIPVisionModel` under open_clip's names."""
    renamed = {
        "class_embedding": vision["embeddings.class_embedding"],
        "conv1.weight": vision["embeddings.patch_embedding.weight"],
        "positional_embedding": vision["embeddings.position_embedding.weight"],
        "ln_pre.weight": vision["pre_layrnorm.weight"],  # sic
        "ln_pre.bias": vision["pre_layrnorm.bias"],
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    depth = sum(n.endswith("layer_norm1.weight") for n in vision)
    for index in range(depth):
        here, there = f"transformer.resblocks.{index}", f"encoder.layers.{index}"
        for kind in ("weight", "bias"):
            for ours, theirs in parts.items():
                renamed[f"{here}.{ours}.{kind}"] = vision[f"{there}.{theirs}.{kind}"]
            renamed[f"{here}.attn.in_proj_{kind}"] = torch.cat(
                [vision[f"{there}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
    return renamed


def _select(
    tower: ClipTower, tensors: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """The tensors the tower needs, as float32, checked for name and shape."""
    chosen = {}
    for name, like in tower.tensors().items():
        if name not in tensors:
            raise UserError(
                f"{path}: tensor {tower.prefix}{name} is missing: other weights than the encoder's?"
            )
        if tensors[name].shape != like.shape:
            raise UserError(
                f"{path}: tensor {tower.prefix}{name} is {tuple(tensors[name].shape)}, the encoder's is "
                f"{tuple(like.shape)}: other weights than the encoder's"
            )
        chosen[name] = tensors[name].float()
    return chosen


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
