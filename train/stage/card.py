"""card.json of a stage: what a model was trained on and its scores, for whoever gets the model alone.

    write_card(folder, options, reader, data.train, used, origin)

    {"format": 1, "stages": [{"stage": 1, ...}, {"stage": 2, "data_sets": [...], "space": {...}}]}

    add_scores(folder, meta, rows)     # train.evaluate: {"stages": [..., {"stage": 2, ..., "scores": [...]}]}

Stages are in the order of training: those of the model that the stage started from, then the stage itself.
Data sets are named and counted. Paths and addresses of files are not in it, because a card is published.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.remote.open import cache_root
from cache.store.files import write_atomic
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.references import NOUNS, read_references
from configs import UserError
from model.io.run_files import read_json
from train.config import Options
from train.data.sample_list import SampleList
from train.metrics import read_metrics

if TYPE_CHECKING:
    from model.language.lora import Adapters
    from train.stage.origin import Origin

log = logging.getLogger(__name__)

CARD = "card.json"


class _Card(TypedDict):
    stages: list[dict[str, Any]]


FORMAT = 1
"""Version of the file."""
SETTINGS = (
    *("train_connector", "train_llm", "learning_rate", "connector_learning_rate", "weight_decay"),
    *("max_sequence_length", "max_frames", "held_out", "precision", "seed"),
    *("train_vision_blocks", "vision_learning_rate"),
)
"""Options that a card states."""


def write_card(
    folder: Path,
    options: Options,
    reader: FeatureReader,
    train: SampleList,
    used: SampleList,
    origin: Origin | None,
    adapters: Adapters | None = None,
) -> None:
    """Write the card of a stage that has done its last step.

    Args:
        folder: the folder of the stage.
        options: the resolved options.
        reader: a reader of the space.
        train: the training split.
        used: the samples that it trained on.
        origin: what the stage started from.
        adapters: of the language model, if it was trained by adapters.
    """
    held_out = [line for line in read_metrics(folder) if "held_out_loss" in line]
    stage = {
        "stage": options.stage,
        "steps": options.max_steps,
        "samples_per_step": options.samples_per_step,
        "llm": options.llm,
        "connector": options.connector,
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "lora": adapters.meta() if adapters else None,
        "space": {
            "name": reader.path.name,
            "fingerprint": reader.spec.fingerprint,
            "rows": {array: reader.rows(array) for array in ("image", "frame")},
        },
        "data_sets": _data_sets(cache_root(reader), train, used),
        "media": _media(used),
        "held_out_loss": held_out[-1]["held_out_loss"] if held_out else None,
    }
    content = {"format": FORMAT, "stages": [*_before(origin), stage]}
    write_atomic(folder / CARD, (json.dumps(content, indent=1) + "\n").encode())


def add_scores(folder: Path, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add scores to the card of a stage; those of the same split and data set are replaced.

    Args:
        folder: the folder of the stage.
        meta: content of the model's nanomolmo2.json, for a card that is missing.
        rows: from `train.evaluate.result.card_rows`.
    """
    path = folder / CARD
    try:
        content = read_json(path, dict[str, Any], "scores are not added", not_finite=True)
        last = content["stages"][-1]
        before = [dict(row) for row in last.get("scores", ())]
        kept = [row for row in before if not any(_replaces(new, row) for new in rows)]
    except FileNotFoundError:
        last, kept = _incomplete(meta), []
        content = {"format": FORMAT, "stages": [last]}
    except UserError as error:
        log.warning("%s", error)
        return
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        log.warning("%s: cannot be read (%s), so the scores are not added to it", path, error)
        return
    last["scores"] = [*kept, *rows]
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return all(new[name] == old.get(name) for name in ("split", "data_set"))


def _data_sets(root: CacheRoot, train: SampleList, used: SampleList) -> list[dict[str, Any]]:
    """Return what each data set has, what of it is trained on, and how much failed."""
    ledger = media_table(root)
    trained = np.bincount(used.dataset, minlength=len(used.names)).tolist()
    shares = train.mix or [None] * len(train.names)
    return [
        {
            "name": count.dataset,
            "share": share,
            "samples": count.samples,
            "with_features": count.present,
            "trained_on": number,
            "with_failed_media": count.failed,
            "without_features": count.missing,
            "failed_media": _failed(root, count.dataset, ledger),
        }
        for count, number, share in zip(train.counts, trained, shares, strict=True)
    ]


def _failed(root: CacheRoot, name: str, ledger: pa.Table) -> dict[str, int]:
    """Return the number of distinct media of a data set that failed, by the step at which they failed."""
    references = read_references(root, name, ledger)
    mentioned = np.unique(references.source[references.source < len(ledger)])
    stages = ledger["stage"].take(pa.array(mentioned)).drop_null()
    return {row["values"]: row["counts"] for row in pc.value_counts(stages).to_pylist()}


def _media(used: SampleList) -> dict[str, int]:
    """Return the number of distinct images and videos of the samples, and of their frames."""
    items = np.unique(used.media)
    kinds = used.kinds[items]
    numbers = np.bincount(kinds, minlength=len(NOUNS)).tolist()
    rows = np.diff(used.starts)[items]
    counted = {f"{noun}s": number for noun, number in zip(NOUNS, numbers, strict=True)}
    return counted | {"frames": int(rows[kinds == NOUNS.index("video")].sum())}


def _before(origin: Origin | None) -> list[dict[str, Any]]:
    """Return the stages of the model that a stage started from, oldest first."""
    if origin is None:
        return []
    with contextlib.suppress(OSError, UserError):
        if origin.path.name == "final":
            path = origin.path.parent / CARD
            before = read_json(path, _Card, "copy it again", not_finite=True)
            return list(before["stages"])
    if not origin.meta["stage"]:  # a LLaVA, of which `llm` is the name
        return []
    # A checkpoint, or a model that was copied without its card: what it records itself.
    return [_incomplete(origin.meta)]


def _incomplete(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model records itself of its stage."""
    known = ("stage", "step", "llm", "connector")
    return {name: meta[name] for name in known} | {"incomplete": True}
