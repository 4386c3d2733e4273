"""Check that a CLIP tower runs with the activation and colours its weights were trained with.

With another activation, or with colours normalised differently, a tower computes wrong features (0.7 % off on
a tiny network) and raises no error. The tensors themselves do not show it. These sources are compared, and
any contradiction is refused:

1. the encoder entry's `activation:`, which is required, with the model as open_clip builds it;
2. open_clip's record of the tag (`pretrained: openai` was trained with QuickGELU);
3. beside a local file: `open_clip_config.json`, or Hugging Face's `config.json`;
4. in a local file: three extra tensors that OpenAI's own files contain;
5. without 3 and 4: published weights of that model must exist with this activation (`ViT-L-14-336` was only
   trained with QuickGELU).

A bare file that passes 5 is used with the entry's activation, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from cache.format.gate import parse_json, read_regular
from configs import UserError, one_line
from model.vision.clip_tower import ClipTower
from model.vision.config import EncoderConfig

log = logging.getLogger(__name__)

Colours = tuple[float, float, float]

_OPENAI_TENSORS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Extra tensors in OpenAI's own files, whose models all use QuickGELU."""
_HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, kw_only=True)
class _Training:
    """How weights were trained, as far as their file or one beside it says. None: unknown."""

    source: str = ""
    """The file or tensors that say so, for messages."""
    activation: str | None = None
    mean: Colours | None = None
    std: Colours | None = None


def check_entry(tower: ClipTower, config: EncoderConfig) -> tuple[Colours, Colours]:
    """Compare the entry with the tower as built and with its tag, before any weights are loaded.

    Returns:
        Mean and standard deviation of the colours.

    Raises:
        UserError: the activations differ, the tag does not exist, or mean and std are unknown.
    """
    if tower.activation != config.activation:
        raise UserError(
            f"encoder {config.name}: activation {config.activation}, but open_clip builds "
            f"{config.model} with {tower.activation}; for OpenAI's weights the model's name ends in "
            "-quickgelu"
        )
    record = tag_record(config)
    if record and not tower.is_timm and _trained_with(record) != tower.activation:
        whose = f"encoder {config.name}: weights {config.pretrained}"
        raise _mismatch(whose, _trained_with(record), tower, config)
    mean, std = config.mean or record.get("mean"), config.std or record.get("std")
    if mean is None or std is None:
        raise UserError(
            f"encoder {config.name}: mean and std are unknown without a tag (pretrained:); give both"
        )
    return _colours(mean), _colours(std)


def tag_record(config: EncoderConfig) -> dict[str, Any]:
    """Return open_clip's record of the entry's tag: hub place, mean, std, quick_gelu. {} without a tag."""
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


def check_file(
    tower: ClipTower,
    config: EncoderConfig,
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    colours: tuple[Colours, Colours],
) -> None:
    """Compare a local weights file with the tower and with the colours of its input.

    Raises:
        UserError: they contradict each other.
    """
    training = _training_of(path, tensors)
    if training.activation is None:
        known = [
            _trained_with(open_clip.get_pretrained_cfg(config.model, tag))
            for tag in open_clip.list_pretrained_tags_by_model(config.model)
        ]
        if not tower.is_timm and known and tower.activation not in known:
            whose = f"{path}: all published weights of {config.model}"
            raise _mismatch(whose, known[0], tower, config)
        message = "%s does not name its activation; using %s, as encoder %s states"
        log.warning(message, path, tower.activation, config.name)
    elif training.activation != tower.activation:
        whose = f"{path}: weights, according to {training.source},"
        raise _mismatch(whose, training.activation, tower, config)
    known_colours = (training.mean, training.std)
    for what, wanted, found in zip(("mean", "std"), colours, known_colours, strict=True):
        if found is not None and max(abs(a - b) for a, b in zip(wanted, found, strict=True)) > 1e-3:
            raise UserError(
                f"{path}: trained with {what} {list(found)}, according to {training.source}; encoder "
                f"{config.name} has {list(wanted)}: wrong features; give the entry this {what}"
            )


def _trained_with(record: Mapping[str, Any]) -> str:
    return "quick_gelu" if record.get("quick_gelu") else "gelu"


def _mismatch(whose: str, trained: str, tower: ClipTower, config: EncoderConfig) -> UserError:
    plain = config.model.removesuffix("-quickgelu")
    fitting = f"{plain}-quickgelu" if trained == "quick_gelu" else plain
    return UserError(
        f"{whose} were trained with {trained}, but {config.model} computes {tower.activation}: wrong "
        f"features; give encoder {config.name} model: {fitting} and activation: {trained}"
    )


def _training_of(path: Path, tensors: Mapping[str, torch.Tensor]) -> _Training:
    if tensors.keys() >= _OPENAI_TENSORS:
        return _Training(source="OpenAI's tensors in it", activation="quick_gelu")
    name = "open_clip_config.json"
    if values := _json(path.parent / name):
        model, colours = _mapping(values, "model_cfg"), _mapping(values, "preprocess_cfg")
        is_timm = "timm_model_name" in _mapping(model, "vision_cfg")
        activation = None if is_timm or not model else _trained_with(model)
        mean, std = colours.get("mean"), colours.get("std")
    else:
        name = "config.json"
        values, colours = _json(path.parent / name), _json(path.parent / "preprocessor_config.json")
        vision = _mapping(values, "vision_config") or values
        activation = _HF_ACTIVATIONS.get(vision.get("hidden_act", ""))
        mean, std = colours.get("image_mean"), colours.get("image_std")
    return _Training(
        source=name,
        activation=activation,
        mean=_colours_or_none(mean),
        std=_colours_or_none(std),
    )


def _json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file, {} if it is missing or holds something else."""
    try:
        values = parse_json(read_regular(path))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({one_line(error)})") from None
    return values if isinstance(values, dict) else {}


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _colours(values: Any) -> Colours:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _colours_or_none(values: Any) -> Colours | None:
    is_three = isinstance(values, list) and len(values) == 3
    return _colours(values) if is_three else None
