"""What a stage keeps beside its weights: metadata, the model that it starts from, and room for all of it.

    check_room(folder, options, vlm, origin, command)                 # UserError: the disk is too small
    facts = keep_origin(folder, facts, origin, vlm, tokenizer, model_meta(options, reader))
    facts = keep_base(folder, facts, options, vlm)

`facts` is run.json, which is written again when it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from cache.format.checksums import read_sealed_json
from cache.store.reader import FeatureReader
from configs import UserError
from configs.command_line import CommandLine
from configs.console import bytes_text, free_bytes
from model.io.base_model import base_name, final_base, language_base
from model.io.runs import read_meta
from model.io.saved_model import save_final
from model.language.chat_template import template_version
from model.language.model import unique_tensors
from model.vlm import VLM
from train.config import Options
from train.stage import checkpoint, files, run_folder
from train.stage.origin import Origin, recorded

WORD_BYTES, SMALL_FILES_BYTES = 100, 128 << 10
"""Disk space of a word in the files of a tokenizer, and of the metrics and the sample list of a small run."""


def model_meta(options: Options, reader: FeatureReader) -> dict[str, Any]:
    """Return the metadata saved with a model: with its step, enough to use it without the run."""
    return {
        "llm": options.llm,
        "connector": options.connector,
        "space": read_sealed_json(reader.paths.space_json),
        "stage": options.stage,
        "max_frames": options.max_frames,
    }


def checkpoint_meta(
    options: Options, reader: FeatureReader, facts: Mapping[str, Any], tokenizer: Any, vlm: VLM
) -> dict[str, Any]:
    """Return the metadata saved with a checkpoint: with its step, enough to start another run from it."""
    return {
        **model_meta(options, reader),
        **({"lora": vlm.adapters.meta()} if vlm.adapters else {}),
        "samples_digest": facts["samples_digest"],
        "template": template_version(tokenizer),
        "vision_width": reader.spec.seen.width,
        "seed": options.seed,
        "origin": facts["origin"],
    }


def keep_origin(
    folder: Path,
    facts: dict[str, Any],
    origin: Origin | None,
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """Record in run.json where the model of a new stage comes from; return run.json.

    A checkpoint is copied as a finished model, because its own run may remove it before this one ends. So is
    a LLaVA, whose frozen parameters are read from the copy. `meta` is the `model_meta` of this stage.
    """
    if origin is None or facts["origin"] is not None:
        return facts
    if origin.kind != "final":
        start = folder / files.START
        kept = ("llm", "connector", "space", "stage", "step", "max_frames")
        values = dict(meta) | {
            key: origin.meta[key] for key in kept if origin.meta.get(key) is not None
        }
        # Adapters belong to whole weights, and those of `vlm` may be rounded to 4 bits.
        whole = vlm if vlm.adapters is None else origin.load(vlm.tail)
        save_final(start, whole, tokenizer, {key: values[key] for key in kept})
        origin = Origin(path=start, kind="final", meta=read_meta(start))
    facts = {**facts, "origin": origin.record(folder)}
    run_folder.write_facts(folder, facts)
    return facts


def keep_base(folder: Path, facts: dict[str, Any], options: Options, vlm: VLM) -> dict[str, Any]:
    """Record in run.json which model the adapters of a new stage belong to; return run.json.

    Raises:
        UserError: a resumed stage would go on with adapters on another model.
    """
    if vlm.adapters is None:
        return facts
    if (origin := recorded(facts["origin"], folder)) is None:
        base = language_base(str(options.llm), seed=options.seed, checksum=vlm.base_checksum)
    else:
        seal = read_meta(origin.path)["seal"]
        base = final_base(origin.path, folder / files.FINAL, seal)
    new, facts = "base" not in facts, {"base": base, **facts}
    if new:
        run_folder.write_facts(folder, facts)
    elif any(base.get(key) != facts["base"].get(key) for key in ("crc32c", "seal")):
        raise UserError(
            f"{folder}: {base_name(base)} has other weights than when this run began, and its adapters "
            "belong to the former ones; put those back, or start again: --run NEW"
        )
    return {**facts, "base": base}


def check_room(
    folder: Path, options: Options, vlm: VLM, origin: Origin | None, command: CommandLine
) -> None:
    """Check that the disk of a run has room for what the stage will save.

    Raises:
        UserError: it has not. The message says what is needed and what is free.
    """
    begun = checkpoint.committed(folder / files.CHECKPOINTS)
    done = int(begun[-1].name.removeprefix("step-")) if begun else 0
    one = checkpoint.nbytes(vlm)
    words = vlm.language.get_input_embeddings().num_embeddings
    whole = sum(w.nbytes for w in unique_tensors(vlm).values()) + words * WORD_BYTES
    model = whole if vlm.adapters is None else checkpoint.nbytes(vlm) // 3 + words * WORD_BYTES
    to_save = -(-options.max_steps // options.save_every) - done // options.save_every
    # The newest two are kept while the next is written, and the final model is written beside them.
    most = min(len(begun) + to_save, checkpoint.KEEP + 1) * one
    last = min(len(begun) + to_save, checkpoint.KEEP) * one + model
    copied = whole if origin is not None and origin.kind != "final" else 0
    needed = max(most, last) - len(begun) * one + copied + SMALL_FILES_BYTES
    if needed > (free := free_bytes(folder)):
        raise UserError(
            f"{folder}: needs {bytes_text(needed)} of disk (up to {checkpoint.KEEP + 1} checkpoints of "
            f"{bytes_text(one)}, the model {bytes_text(model)}), and {bytes_text(free)} are free; "
            f"make room (or choose another disk: --run PATH), then: {command.text()}"
        )
