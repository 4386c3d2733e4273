"""What the JSON files of a Hugging Face folder say about its vision tower, without torch or transformers.

    found = read_tower_config(Path("dinov2-small"))
    found.kind, found.depth, found.blocks, found.fit      # "dinov2", 12, (10,), "crop"

A folder holds one of these, or a whole CLIP, SigLIP or LLaVA model with such a tower in it:

    CLIPVisionModel, SiglipVisionModel (SigLIP2 of one resolution is that class, too)
    Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel

The code that a folder may bring along is never run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError, one_line
from model.language.files import AGAIN, read_object

CONFIG = "config.json"
WHOLE = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "llava": "clip_vision_model",
    "pooled_llava": "clip_vision_model",
}
"""Models with a tower in `vision_config` -> the tower's type if `vision_config` names none."""
KINDS = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
"""`model_type` of a tower -> its class in transformers."""
WITHOUT_CLS = ("siglip_vision_model",)
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Towers that take images of another size than their config's, as transformers runs them."""
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""transformers' names of activations -> ours."""
GATED = "swiglu"
"""The activation of an MLP with a gate."""
LARGEST = 1 << 20
"""Largest size that a config may state."""
NUMBERS = (
    *("num_attention_heads", "head_dim", "intermediate_size", "mlp_ratio", "layer_norm_eps"),
    "rope_theta",
)
"""Keys of a tower's config that are numbers above 0, if it has them."""
BICUBIC = 3
"""Pillow's number of the filter that images are resized with here."""


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The vision tower of a folder, and how its images are prepared."""

    folder: Path
    """The folder."""
    kind: str
    """One of `KINDS`."""
    values: Mapping[str, Any]
    """The tower's own config, as in the file."""
    depth: int
    """Transformer blocks."""
    width: int
    """Values per token."""
    patch_size: int
    """Side of a patch, pixels."""
    activation: str
    """Activation of the MLPs, by our name."""
    blocks: tuple[int, ...]
    """Blocks (0-based) that LLaVA's config names, else the last but one."""
    trained_size: int
    """Side of the images that its positions were trained for, pixels."""
    image_size: int
    """Side of the square that the folder's processor makes, else `trained_size`; pixels."""
    fit: str
    """How its processor makes images square: `pad`, `crop` or `squash`."""
    mean: tuple[float, float, float] | None
    """Mean colour in [0, 1]; None if no file says it."""
    std: tuple[float, float, float] | None
    """Standard deviation of the colours; None if no file says it."""
    shorter_side: int
    """Pixels of the shorter side before `crop` cuts out the middle."""
    notes: tuple[str, ...] = ()
    """What the processor does in another way than it is done here."""

    @property
    def class_name(self) -> str:
        """Name of the tower's class in transformers."""
        return KINDS[self.kind]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""
        registers = self.values.get("num_register_tokens", 4 if "registers" in self.kind else 0)
        return 0 if self.kind in WITHOUT_CLS else 1 + int(registers)


def read_tower_config(folder: Path) -> TowerConfig:
    """Return what the JSON files of a folder say.

    Raises:
        UserError: a file is missing or damaged, or the folder contains no tower of these classes.
    """
    path = folder / CONFIG
    if not (path.exists() or path.is_symlink()):
        raise UserError(
            f"{folder}: no {CONFIG}, so no model of transformers; give the folder that has one: "
            "--encoder hf:FOLDER"
        )
    whole = read_object(path)
    kind, values = _tower_values(path, whole)
    activation = _activation(path, kind, values)
    depth, width = (_size(path, values, n) for n in ("num_hidden_layers", "hidden_size"))
    patch, trained = (_size(path, values, n) for n in ("patch_size", "image_size"))
    if values.get("num_channels", 3) != 3:
        raise UserError(f"{path}: num_channels {values['num_channels']}; images have 3 here")
    for name in NUMBERS:
        number = values.get(name, 1)
        if type(number) not in (int, float) or not 0 < number <= LARGEST:
            raise UserError(f"{path}: {name} {one_line(number, 40)}; {AGAIN}")
    registers = values.get("num_register_tokens", 0)
    if type(registers) is not int or not 0 <= registers <= LARGEST:
        raise UserError(f"{path}: num_register_tokens {one_line(registers, 40)}; {AGAIN}")
    images = _Images(folder, trained)
    return TowerConfig(
        folder=folder,
        kind=kind,
        values=values,
        depth=depth,
        width=width,
        patch_size=patch,
        activation=activation,
        blocks=_blocks(path, whole, kind, depth, registers),
        trained_size=trained,
        image_size=images.side,
        fit=images.fit,
        mean=images.colours("image_mean", 0.0),
        std=images.colours("image_std", 1.0),
        shorter_side=images.shorter_side,
        notes=images.notes(),
    )


def _tower_values(path: Path, whole: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the type and the config of the tower."""
    kind = whole.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UserError(f"{path}: no model_type, so not a model of transformers; {AGAIN}")
    values: Any = dict(whole)
    if kind in WHOLE:
        values = whole.get("vision_config")
        if not isinstance(values, dict):
            raise UserError(f"{path}: no vision_config, which a {kind} has; {AGAIN}")
        default = WHOLE[kind]
        kind = values.get("model_type") or default
    # CLIPModel's vision_config carries this name in files of older versions.
    kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(kind, kind)
    if kind not in KINDS:
        raise UserError(
            f"{path}: a {one_line(kind, 40)}, whose tower is none of {', '.join(KINDS.values())}, alone or "
            "in a CLIPModel, SiglipModel or LLaVA; other towers: library: open_clip in nanomolmo2.yaml"
        )
    return kind, values


DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
        "hidden_act": "quick_gelu",
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 224,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "dinov2": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    },
    "dinov2_with_registers": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 224,
        "hidden_act": "gelu",
        "num_register_tokens": 4,
    },
    "dinov3_vit": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 224,
        "hidden_act": "gelu",
    },
}
"""What transformers takes for keys that config.json leaves out, as older versions saved it."""


def _size(path: Path, values: Mapping[str, Any], name: str) -> int:
    """Return a size of the config: an integer, or two equal ones."""
    value = values[name]
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or not 1 <= value <= LARGEST:
        what = "the tower takes squares only" if isinstance(value, list) else AGAIN
        raise UserError(f"{path}: {name} {one_line(value, 40)}; {what}")
    return value


def _activation(path: Path, kind: str, values: dict[str, Any]) -> str:
    for name, value in DEFAULTS[kind].items():
        values.setdefault(name, value)
    if values.get("use_swiglu_ffn") or values.get("use_gated_mlp"):
        name = "silu" if values.get("use_swiglu_ffn") else values["hidden_act"]
        if name == "silu":
            return GATED
    elif values["hidden_act"] in ACTIVATIONS:
        return ACTIVATIONS[values["hidden_act"]]
    raise UserError(
        f"{path}: hidden_act {one_line(values['hidden_act'], 40)!r} is none of {', '.join(ACTIVATIONS)}"
    )


def _blocks(
    path: Path, whole: Mapping[str, Any], kind: str, depth: int, registers: int
) -> tuple[int, ...]:
    """Return LLaVA's `vision_feature_layer` as blocks, else the last but one."""
    if not str(whole.get("model_type")).endswith("llava"):
        return (max(depth - 2, 0),)
    layers = whole.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or any(type(layer) is not int for layer in layers):
        raise UserError(f"{path}: vision_feature_layer {one_line(layers, 40)}; {AGAIN}")
    # hidden_states has the input of the first block and the output of each.
    blocks = tuple(layer - 1 if layer >= 0 else depth + layer for layer in layers)
    if any(not 0 <= block < depth for block in blocks) or len(set(blocks)) < len(blocks):
        raise UserError(
            f"{path}: vision_feature_layer {layers} does not name outputs of its {depth} blocks, each once"
        )
    kept = {"full": 0, "default": 1}.get(
        str(whole.get("vision_feature_select_strategy", "default"))
    )
    first = 0 if kind in WITHOUT_CLS else 1 + registers
    if whole.get("model_type") == "llava" and kept != first:
        raise UserError(
            f"{path}: vision_feature_select_strategy "
            f"{one_line(whole.get('vision_feature_select_strategy', 'default'), 40)!r} on a {KINDS[kind]} "
            "does not give the features of its patches alone, which are the only ones stored here"
        )
    return blocks


class _Images:
    """What the folder's processor does with an image."""

    def __init__(self, folder: Path, trained: int) -> None:
        self.path, self.values = _processor(folder)
        size, crop = self._side("size"), self._side("crop_size")
        crops = bool(self.values.get("do_center_crop", "crop_size" in self.values))
        given = self.values.get("size")
        squashes = isinstance(given, Mapping) and "shortest_edge" not in given
        self.side = (crop if crops else size) or size or trained
        self.shorter_side = size or self.side
        is_cut = crops and not squashes and not self.values.get("do_pad")
        self.fit = "crop" if is_cut else "pad" if self.values.get("do_pad") else "squash"
        larger = self.shorter_side > self.side
        if crops and self.shorter_side != self.side and not (is_cut and larger):
            raise UserError(
                f"{self.path}: size {one_line(given, 60)} and crop_size {self.side}: of images made square, "
                "or smaller than that, no middle is cut out here; set do_center_crop false"
            )
        for name in ("do_resize", "do_rescale"):
            if self.values.get(name) is False:
                raise UserError(f"{self.path}: {name} false: images of the web need both")
        scale = self.values.get("rescale_factor", 1 / 255)
        if not isinstance(scale, float | int) or not math.isclose(scale, 1 / 255, rel_tol=1e-3):
            raise UserError(
                f"{self.path}: rescale_factor {one_line(scale, 40)}; pixels are divided by 255 here"
            )

    def _side(self, name: str) -> int | None:
        value = self.values.get(name)
        if isinstance(value, Mapping):
            sides = {value.get(k) for k in ("height", "width", "shortest_edge") if value.get(k)}
            value = sides.pop() if len(sides) == 1 else (list(sides) or None)
        if value is None:
            return None
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise UserError(
                f"{self.path}: {name} {one_line(value, 60)} is not the side of a square"
            )
        return value

    def colours(self, name: str, without: float) -> tuple[float, float, float] | None:
        """Return the mean or the standard deviation of the colours, None if unknown."""
        if self.values.get("do_normalize") is False:
            return (without,) * 3
        value = self.values.get(name)
        if value is None:
            return None
        numbers = value if isinstance(value, list) else [value] * 3
        if len(numbers) != 3 or any(
            type(n) not in (int, float) or not math.isfinite(n) or (without and n <= 0)
            for n in numbers
        ):
            raise UserError(f"{self.path}: {name} {one_line(value, 60)}; three numbers are needed")
        red, green, blue = (float(number) for number in numbers)
        return red, green, blue

    def notes(self) -> tuple[str, ...]:
        """Return what is done here in another way, a line each."""
        resample = self.values.get("resample", BICUBIC)
        if resample == BICUBIC:
            return ()
        named = one_line(resample, 20)
        return (f"{self.path} resizes with filter {named}; here it is bicubic ({BICUBIC})",)


def _processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the image processor's values, and these; {} without such a file."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.exists() or path.is_symlink():
            values = read_object(path)
            if name.startswith("processor"):
                values = values.get("image_processor") or {}
            if isinstance(values, dict) and values:
                return path, values
    return folder / "preprocessor_config.json", {}
