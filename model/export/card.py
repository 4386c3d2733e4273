"""README.md of an exported folder: how to load it, what it was trained on, its scores, how it was compared.

card = find_card(folder)                     # card.json, which train.run and train.evaluate wrote
text = model_card("mine", meta, spec, tower, card, found)

The text is in card.md.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import Environment, StrictUndefined

from cache.format.gate import fit
from cache.format.spec import FeatureSpec
from configs import UserError, one_line
from model.export.compare import NEW_TOKENS, Comparison
from model.export.folder import CODE, has_own_class, model_class
from model.export.mmproj import image_note, tower_note
from model.export.towers import NESTED, ExportedTower
from model.io.run_files import read_json
from model.language.lora import Adapters
from model.language.records import FOLDER_TEMPLATE, AdaptersMeta
from model.media.fit import SPARE

CARD = "card.json"
OVERRIDES = '{"projector_hidden_act":"torch.nn.modules.linear.Identity"}'
"""vLLM takes no name for the identity activation but the class."""
SPLITS = {
    "test": "Images and videos of the split `test`: not trained on, and nothing was chosen by them.",
    "val": "Images and videos of the split `val`: not trained on, but choices may have been made by them. "
    "The split `test` was not evaluated.",
}
"""Split whose scores are published -> what it is; the first one that was evaluated counts."""
FITS = {
    "pad": "padded to a square with the mean colour, then resized to {size} pixels",
    "squash": "made square without regard to its aspect ratio, resized to {size} pixels",
    "crop": "resized until its shorter side has {shorter} pixels, of which the middle {size} are taken,",
}


class _Score(TypedDict):
    data_set: str
    split: str
    type: str
    metric: str
    n: int
    value: float | None
    blind: NotRequired[float | None]
    gain: NotRequired[float | None]
    interval: NotRequired[tuple[float, float] | None]
    blind_interval: NotRequired[tuple[float, float] | None]
    gain_interval: NotRequired[tuple[float, float] | None]


class _DataSet(TypedDict):
    name: str
    share: float | None
    samples: int
    trained_on: int
    without_features: int
    failed_media: dict[str, int]


class _Settings(TypedDict):
    connector_learning_rate: float
    learning_rate: float
    train_vision_blocks: NotRequired[int]
    vision_learning_rate: NotRequired[float]


class _Stage(TypedDict):
    stage: int
    steps: int
    samples_per_step: int
    settings: _Settings
    lora: NotRequired[AdaptersMeta | None]
    held_out_loss: float | None
    data_sets: list[_DataSet]
    media: NotRequired[dict[str, int]]
    scores: NotRequired[list[_Score]]


class _Incomplete(TypedDict):
    """A stage of which only the model is known."""

    stage: int
    step: int
    scores: NotRequired[list[_Score]]


class _Card(TypedDict):
    stages: NotRequired[list[dict[str, Any]]]


def find_card(folder: Path) -> dict[str, Any]:
    """Return card.json of the stage whose `final` folder is given; {} if it has none.

    Raises:
        UserError: it cannot be read.
    """
    for path in (folder / CARD, folder.parent / CARD):
        if os.path.lexists(path):
            way_out = "copy it again, or remove it, and the model card names no data sets"
            values: dict[str, Any] = read_json(path, _Card, way_out, not_finite=True)
            try:
                for stage in values.get("stages", ()):
                    fit(stage, _Incomplete if stage.get("incomplete") is True else _Stage)
            except ValueError as error:
                raise UserError(f"{path}: cannot be read ({one_line(error)}); {way_out}") from None
            return values
    return {}


def frames_note(spec: FeatureSpec, card: Mapping[str, Any]) -> str:
    """Return what becomes of videos, for a model that was trained on some; '' if it saw none."""
    if not any(stage.get("media", {}).get("videos") for stage in card.get("stages", ())):
        return ""
    if spec.pool_frame != spec.pool_image:
        frame, image = (
            f"{n} x {n} patches" if n > 1 else "one patch"
            for n in (spec.pool_frame, spec.pool_image)
        )
        return (
            f"not exported, because a token of a frame is {frame} and one of an image {image}, and the "
            "model's class pools both alike; the folder takes images only"
        )
    return "give the frames as images, and before each its time in seconds, as `0.5 `"


def decode_note(spec: FeatureSpec) -> str:
    """Return which images were decoded otherwise in training than a processor does; '' for none."""
    if spec.decode == "whole":
        return ""
    least, side = 2 * SPARE * spec.shorter_side, "longer" if spec.fit == "pad" else "shorter"
    return (
        f"in training, a JPEG whose {side} side has {least:,} pixels or more was decoded at 1/2, 1/4 or 1/8 "
        "of its size; the processor decodes it whole, and its features differ slightly"
    )


def own_class_note(spec: FeatureSpec, tower: ExportedTower) -> str:
    """Return why a model has a class of its own, and which runtimes take it; '' if it has none."""
    if not has_own_class(spec, tower):
        return ""
    size = f"{spec.pool_image} x {spec.pool_image}"
    why = []
    if spec.pool_image > 1:
        why.append(f"{size} patches of an image are averaged into one token")
    if tower.registers:
        why.append(f"the tower's {tower.registers} register tokens are dropped")
    return (
        f"{CODE} in the folder, because {' and '.join(why)}, and no class of transformers does that; "
        "transformers loads it with trust_remote_code=True, vLLM and llama.cpp "
        "do not"
    )


def model_card(
    name: str,
    meta: Mapping[str, Any],
    spec: FeatureSpec,
    tower: ExportedTower,
    card: Mapping[str, Any],
    found: Comparison,
    *,
    gguf: str = "",
    as_text: bool = False,
) -> str:
    """Return the text of README.md (Markdown).

    Args:
        name: of the folder.
        meta: nanomolmo2.json of the model.
        spec: of the features that it was trained on.
        tower: its vision tower.
        card: from `find_card`.
        found: how the folder compares with the trained model.
        gguf: name of llama.cpp's file of the language model; '' if there is none.
        as_text: whether the chat template, of an imported folder, takes content as text only.
    """
    llm = str(meta["llm"])
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", llm) and not Path(llm).exists()
    # Markdown, not HTML: names from data go through `cell` or `code`.
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    environment.filters |= {"code": _code, "cell": _cell, "figure": _figure, "shell": shlex.quote}
    source = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=one_line(name),
        base_model=llm if is_id else "",
        meta=meta,
        as_text=as_text,
        imported=meta.get("template") == FOLDER_TEMPLATE,
        spec=spec,
        tower=spec.architecture.partition(":")[2],
        layers=tower.layers,
        # Of a folder the last part: a card is published, and a path is not.
        language=llm if is_id or not Path(llm).is_absolute() else Path(llm).name,
        overrides=OVERRIDES,
        fit=FITS[spec.fit].format(
            size=f"{spec.image_size} x {spec.image_size}", shorter=spec.shorter_side
        ),
        decoded=decode_note(spec),
        frames=frames_note(spec, card),
        found=found,
        new_tokens=NEW_TOKENS,
        model_class=model_class(spec, tower),
        pooled=own_class_note(spec, tower),
        in_vllm=tower.prefix == NESTED,
        gguf=gguf,
        mmproj=f"mmproj-{name}.gguf",
        gguf_tower=tower_note(tower),
        gguf_images=image_note(spec),
        stages=[_stage(stage) for stage in card.get("stages", ())],
        scores=reported(card),
        splits=SPLITS,
    )


def reported(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the scores of the last stage on the split `test`, or if it has none, on `val`."""
    stages = card.get("stages") or [{}]
    scores = stages[-1].get("scores", ())
    for split in SPLITS:
        if rows := [row for row in scores if row.get("split") == split]:
            return rows
    return []


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage of card.json with what the text says of it in words."""
    settings = stage.get("settings", {})
    parts = {"train_connector": "connector", "train_llm": "language model"}
    if lora := stage.get("lora"):
        adapters = Adapters.from_meta(lora)
        parts["train_llm"] = (
            f"adapters of the language model (LoRA: {adapters}), which are merged here"
        )
    trained = [text for key, text in parts.items() if settings.get(key)]
    if blocks := settings.get("train_vision_blocks"):
        trained.append(f"the last {blocks} blocks of the vision encoder that the features need")
    seen = [f"{number:,} {what}" for what, number in stage.get("media", {}).items() if number]
    return {
        "incomplete": False,
        **stage,
        "trained": " and ".join(trained),
        "seen": ", ".join(seen) or "no media",
    }


def _cell(text: str) -> str:
    """Return text for a cell of a table."""
    return one_line(text, 80).replace("|", "\\|")


def _figure(value: float | None, interval: Sequence[float] | None) -> str:
    """Return a value with half the width of its interval."""
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else "")


def _code(text: str) -> str:
    """Return text as code."""
    return f"`{one_line(text, 80).replace('`', '')}`"
