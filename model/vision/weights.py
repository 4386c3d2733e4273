"""Trained weights of a CLIP tower: find the file, read it, rename the tensors, load them.

Supported are open_clip's files, as safetensors or torch's own format, and Hugging Face's CLIP (a folder of
`CLIPModel` or `CLIPVisionModel`). In memory all are float32 under open_clip's names, so equal weights have
equal hashes in every format.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cache.format.gate import check_regular
from configs import UserError, one_line
from model.io.hub import fetch
from model.vision.activation_check import Colours, check_file, tag_record
from model.vision.clip_tower import ClipTower
from model.vision.config import EncoderConfig

FILE_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""File names to look for in a folder, in this order."""


def fill(
    tower: ClipTower, config: EncoderConfig, weights: str | None, colours: tuple[Colours, Colours]
) -> Path:
    """Load trained weights into `tower`.

    Args:
        tower: built from `config`, and checked by `check_entry`.
        config: the encoder's entry.
        weights: file or folder with the weights; None for those of the entry's tag, from the hub.
        colours: mean and standard deviation that the tower's input is normalised with.

    Returns:
        The file with the weights.

    Raises:
        UserError: the weights cannot be found, downloaded or read, or do not fit the model.
    """
    if weights is None:
        path = fetch(tag_record(config).get("hf_hub", ""), encoder=config.name)
        tensors = _read(path)
    else:
        path = _find_file(Path(weights).expanduser())
        tensors = _read(path)
        check_file(tower, config, path, tensors, colours)
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
    """Return the tensors of a weights file, on the CPU, memory-mapped if the format allows it."""
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if _is_torchscript(path):
            raise UserError(
                f"{path}: a TorchScript program (OpenAI's original file), not plain weights; take the "
                "same weights as safetensors, on the Hugging Face hub under timm/vit_*_clip_*.openai"
            )
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError as error:
        what = error.strerror or one_line(error)
        raise UserError(f"{path}: not a readable weights file ({what})") from None
    except (RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a readable weights file ({one_line(error)})") from None
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


def _in_open_clip_names(
    tower: ClipTower, tensors: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """Return the vision tower's tensors under the names of `tower.tensors()`."""
    if any(name.startswith(tower.prefix) for name in tensors):
        cut = len(tower.prefix)
        return {n[cut:]: t for n, t in tensors.items() if n.startswith(tower.prefix)}
    vision = {n.removeprefix("vision_model."): t for n, t in tensors.items()}
    if "embeddings.class_embedding" in vision and not tower.is_timm:
        try:
            return _from_hugging_face(vision)
        except KeyError as missing:
            raise UserError(f"{path}: tensor {missing} is missing") from None
    raise UserError(
        f"{path}: no tensors named {tower.prefix}*: not open_clip's file for this kind of tower"
        + (" (of Hugging Face's files, only CLIP's are supported)" if tower.is_timm else "")
    )


def _from_hugging_face(vision: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of `transformers.CLIPVisionModel` to open_clip's names."""
    renamed = {
        "class_embedding": vision["embeddings.class_embedding"],
        "conv1.weight": vision["embeddings.patch_embedding.weight"],
        "positional_embedding": vision["embeddings.position_embedding.weight"],
        "ln_pre.weight": vision["pre_layrnorm.weight"],  # spelt like this in transformers
        "ln_pre.bias": vision["pre_layrnorm.bias"],
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    depth = sum(
        n.startswith("encoder.layers.") and n.endswith("layer_norm1.weight") for n in vision
    )
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
    """Return the tensors the tower needs, as float32, after a check of names and shapes."""
    chosen = {}
    for name, like in tower.tensors().items():
        if name not in tensors:
            raise UserError(
                f"{path}: tensor {tower.prefix}{name} is missing: weights of another model?"
            )
        if tensors[name].shape != like.shape:
            raise UserError(
                f"{path}: tensor {tower.prefix}{name} is {tuple(tensors[name].shape)}, the encoder's is "
                f"{tuple(like.shape)}: weights of another model"
            )
        # A copy, so that changes of the mapped file cannot change weights that have been hashed.
        chosen[name] = tensors[name].to(torch.float32, copy=True)
    return chosen
