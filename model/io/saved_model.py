"""A trained model on disk: saved at the end of a stage, found by run, loaded without the encoder.

    final/
        config.json, model.safetensors, tokenizer.json, ...    the language model, as transformers reads it
        chat_template.jinja                                     the template of an imported folder, or ours
        connector.safetensors                                   the connector
        tail.safetensors                                        the encoder's last blocks, if there is a tail
        nanomolmo2.json                                         what both were trained on; seals the others

`AutoModelForCausalLM.from_pretrained(final)` and `--llm final` load the language model alone, exactly. A file
that was changed or cut since it was saved is refused by `load_final`.

After training with adapters (LoRA) there are these two instead of the language model. `load_final` loads the
model that they belong to (see base_model.py), which is not copied, and returns it with the adapters merged:

        adapter_config.json, adapter_model.safetensors          as peft writes them
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cache.format.checksums import crc32c, sealed_json
from cache.format.spec import FeatureSpec
from configs import UserError, one_line
from model.connector import build_connector
from model.io.base_model import base_name, find_base, other_weights
from model.io.llava_folder import TEMPLATES, with_template
from model.io.run_files import META
from model.io.runs import FORMAT, again, read_meta
from model.language.chat_template import template_version
from model.language.files import read_text
from model.language.lora import (
    Adapters,
    adapter_parameters,
    merge_saved,
    save_adapters,
    weights_checksum,
)
from model.language.model import (
    load_folder,
    load_language,
    load_tokenizer,
    prepare_model,
    save_language,
    save_tokenizer,
    unique_tensors,
)
from model.language.records import FOLDER_TEMPLATE
from model.language.tokenizer import eos_ids, image_token, prepare_tokenizer
from model.language.tokenizer_files import read_tokenizer
from model.tail import VisionTail, empty_tail
from model.vlm import VLM

CONNECTOR, TAIL = "connector.safetensors", "tail.safetensors"


KEYS = ("connector", "llm", "space", "stage", "step")
"""What `nanomolmo2.json` always records, besides the files and their checksums."""


def save_final(
    folder: Path, vlm: VLM, tokenizer: PreTrainedTokenizerFast, meta: Mapping[str, Any]
) -> None:
    """Write a model to `folder` atomically. It replaces a folder of that name.

    Args:
        folder: such as runs/<name>/stage1/final.
        vlm: the model.
        tokenizer: its tokenizer.
        meta: JSON values: `connector` (linear | mlp), `llm` (its source), `space` (content of space.json),
            `stage`, `step`, and any others; of a model with adapters also `base`, see base_model.py.
    """
    missing = [key for key in (*KEYS, *(["base"] if vlm.adapters else [])) if key not in meta]
    assert not missing, f"meta lacks {missing}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if vlm.adapters is None:
        save_language(partial, vlm.language, tokenizer)
    else:
        name = base_name(meta["base"])
        save_adapters(partial, vlm.language, vlm.adapters, adapter_parameters(vlm.language), name)
        save_tokenizer(partial, tokenizer)
        positions = getattr(vlm.language.config, "max_position_embeddings", None)
        meta = {**meta, "lora": vlm.adapters.meta(), "positions": positions}
    save_file(unique_tensors(vlm.connector), partial / CONNECTOR)
    if vlm.tail is not None:
        save_file(unique_tensors(vlm.tail), partial / TAIL)
    content = {
        "format": FORMAT,
        "template": template_version(tokenizer),
        **_marks(tokenizer),
        "vision_width": vlm.vision_width,
        **meta,
        "files": {path.name: _fingerprint(path) for path in sorted(partial.iterdir())},
    }
    (partial / META).write_bytes(sealed_json(content))
    # safetensors makes its files readable for the owner only; give them the mode of the others.
    for path in partial.glob("*.safetensors"):
        path.chmod((partial / META).stat().st_mode)
    for path in (*partial.iterdir(), partial):
        _sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _marks(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what `saved_tokenizer` needs besides the files, for the template of an imported folder."""
    if template_version(tokenizer) != FOLDER_TEMPLATE:
        return {}
    return {"marks": {"image": image_token(tokenizer), "ends": list(eos_ids(tokenizer))}}


def _fingerprint(path: Path) -> dict[str, int]:
    """Return the size and the crc32c of a file."""
    size = path.stat().st_size
    if not size:
        return {"bytes": 0, "crc32c": 0}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {"bytes": size, "crc32c": crc32c(data)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_files(folder: Path, meta: Mapping[str, Any], *, contents: bool = True) -> None:
    """Check that every file of a saved model has the bytes that were written, and that its base is there.

    Args:
        folder: the saved model.
        meta: content of its nanomolmo2.json.
        contents: whether to read the files (2.4 GB take a second from memory), or compare sizes only.

    Raises:
        UserError: a file is missing or has changed, or adapters without the model that they belong to.
    """
    if "base" in meta:
        find_base(folder, meta["base"], _seal)
    for name, written in meta["files"].items():
        path = folder / name  # a name without a slash, see _FinalMeta
        if not path.is_file():
            raise UserError(f"{path}: is missing; {again(folder)}")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise UserError(
                f"{path}: {size:,} bytes, should be {written['bytes']:,}; {again(folder)}"
            )
        if contents and _fingerprint(path) != written:
            raise UserError(
                f"{path}: was changed after training (its crc32c differs); {again(folder)}"
            )


def load_final(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[VLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Load a saved model, with its adapters merged.

    Returns:
        The model in evaluation mode, its tokenizer, and the content of nanomolmo2.json.

    Raises:
        UserError: a file is missing, damaged, or of another version or model; or the model that adapters
            belong to is not there, or is another one now.
    """
    meta = read_meta(folder)
    check_files(folder, meta)
    language, tokenizer = _language(folder, meta, dtype)
    prepare_model(language, tokenizer)
    width = language.get_input_embeddings().embedding_dim
    connector = build_connector(meta["connector"], meta["vision_width"], width).to(dtype)
    try:
        connector.load_state_dict(load_file(folder / CONNECTOR))
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: names or shapes
        raise UserError(f"{folder / CONNECTOR}: {one_line(error)}; {again(folder)}") from None
    tail = _load_tail(folder, meta, dtype)
    vlm = VLM(language, connector, meta["vision_width"], tail)
    return vlm.to(device).eval(), tokenizer, meta


def _language(
    folder: Path, meta: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the language model and the tokenizer of a saved model whose files have been checked."""
    if "lora" not in meta:
        own = meta["template"] != FOLDER_TEMPLATE
        return load_folder(folder, dtype, None if own else saved_tokenizer(folder, meta))
    adapted = [(folder, meta)]
    while True:  # to the model that the first adapters were trained on
        here, record = adapted[-1]
        place = find_base(here, record["base"], _seal)
        if isinstance(place, str):
            language, _ = load_language(place, seed=record["base"]["seed"])
            if weights_checksum(language) != record["base"]["crc32c"]:
                raise other_weights(here, record["base"], place)
            break
        below = read_meta(place)
        check_files(place, below)
        if "lora" not in below:
            language, _ = _language(place, below, torch.float32)
            break
        adapted.append((place, below))
    for here, record in reversed(adapted):
        merge_saved(language, here, Adapters.from_meta(record["lora"]))
    return language.to(dtype), saved_tokenizer(folder, meta)


def _seal(folder: Path) -> str:
    return str(read_meta(folder)["seal"])


def _load_tail(folder: Path, meta: Mapping[str, Any], dtype: torch.dtype) -> VisionTail | None:
    """Return the encoder's last blocks as they were trained, for a model of a space with a tail."""
    path, spec = folder / TAIL, (meta["space"] or {}).get("spec")
    if not isinstance(spec, Mapping) or spec.get("tail") is None:
        return None
    try:
        known = FeatureSpec.from_json(spec)
        assert known.tail is not None
        stored = meta["files"].get(TAIL, {"bytes": 0})["bytes"]
        if stored < known.tail.nbytes(known.width):  # before memory is allocated
            raise UserError(f"{path}: {stored:,} bytes are too few; {again(folder)}")
        tail = empty_tail(known)
        tail.load_state_dict(load_file(path))
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: {one_line(error)}; {again(folder)}") from None
    return tail.to(dtype)


def saved_tokenizer(folder: Path, meta: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a saved model, with the template that the model was trained with.

    Raises:
        UserError: it is missing or damaged.
    """
    if meta["template"] != FOLDER_TEMPLATE:
        if "lora" not in meta:
            return load_tokenizer(str(folder))
        return prepare_tokenizer(read_tokenizer(folder, rows=None))
    tokenizer = read_tokenizer(folder, rows=None, whole_model=True)
    marks, path = meta["marks"], folder / TEMPLATES[0]
    text = read_text(path)
    return with_template(tokenizer, text, marks["image"], tuple(marks["ends"]), str(path))
