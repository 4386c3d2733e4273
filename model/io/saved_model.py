"""A trained model on disk: saved at the end of a stage, found by run, loaded without the encoder.

A folder contains `model.safetensors` (names `connector.*` and `language.*`), the language model's config and
tokenizer in Hugging Face's layout, and `nanomolmo2.json`, which records how the features were made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedTokenizerFast

from configs import UserError, nearest
from model.connector import build_connector
from model.language.chat_template import TEMPLATE_VERSION
from model.language.model import load_tokenizer, no_progress_bar, prepare_model, save_language
from model.vlm import VLM

WEIGHTS = "model.safetensors"
META = "nanomolmo2.json"
RUNS = Path("runs")
FORMAT = 1
"""Version of `nanomolmo2.json`."""


def weights_of(vlm: VLM) -> dict[str, Tensor]:
    """Return name -> tensor, each once: a tied output layer is left out, its embedding is kept."""
    seen: set[int] = set()
    state = {}
    for name, value in vlm.state_dict().items():
        if value.data_ptr() not in seen:
            state[name] = value.detach().contiguous()
        seen.add(value.data_ptr())
    return state


def save_final(
    folder: Path, vlm: VLM, tokenizer: PreTrainedTokenizerFast, meta: Mapping[str, Any]
) -> None:
    """Write a model to `folder` atomically. It replaces a folder of that name.

    Args:
        folder: such as runs/<name>/stage1/final.
        vlm: the model.
        tokenizer: its tokenizer.
        meta: JSON values: `connector` (linear | mlp), `llm` (its source), `space` (content of space.json),
            `stage`, `step`, and any others.
    """
    missing = [key for key in ("connector", "llm", "space", "stage", "step") if key not in meta]
    assert not missing, f"meta lacks {missing}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights_of(vlm), partial / WEIGHTS)
    save_language(partial, vlm.language, tokenizer)
    content = {
        "format": FORMAT,
        "template": TEMPLATE_VERSION,
        "vision_width": vlm.vision_width,
        **meta,
    }
    (partial / META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # safetensors makes its file readable for the owner only; give it the mode of the other files.
    (partial / WEIGHTS).chmod((partial / META).stat().st_mode)
    for path in (*partial.iterdir(), partial):
        _sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of nanomolmo2.json.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    path = folder / META
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a trained model (looked for {META}); train one: python -m train.run --stage 1"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}; train the stage again") from None
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: format {meta.get('format')}, this version reads {FORMAT}")
    if meta["template"] != TEMPLATE_VERSION:
        raise UserError(
            f"{path}: trained with chat template {meta['template']}, this version uses "
            f"{TEMPLATE_VERSION}; use the version that trained it"
        )
    return meta


def load_final(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[VLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """Load a saved model.

    Returns:
        The model in evaluation mode, its tokenizer, and the content of nanomolmo2.json.

    Raises:
        UserError: a file is missing, damaged, or of another version or model.
    """
    meta = read_meta(folder)
    tokenizer = load_tokenizer(str(folder))
    config = AutoConfig.from_pretrained(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS}: cannot be read: {error}; train the stage again"
        ) from None
    parts = {
        part: {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
        for part in ("language.", "connector.")
    }
    with no_progress_bar():
        language = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=dict(parts["language."]), dtype=dtype
        )
    prepare_model(language, tokenizer)
    width = language.get_input_embeddings().embedding_dim
    connector = build_connector(meta["connector"], meta["vision_width"], width).to(dtype)
    vlm = VLM(language, connector, meta["vision_width"])
    # transformers fills missing weights with random values.
    if differ := sorted(weights_of(vlm).keys() ^ state.keys()):
        raise UserError(
            f"{folder / WEIGHTS}: not the weights of this model: {', '.join(differ[:3])}"
        )
    connector.load_state_dict(parts["connector."])
    return vlm.to(device).eval(), tokenizer, meta


def find_run(run: str, stage: int | None = None) -> Path:
    """Return the `final` folder of a stage of a run.

    Args:
        run: a name below runs/, the path of a run, or the path of a `final` folder.
        stage: number of the stage; None for the last finished one.

    Raises:
        UserError: there is no such run, or the stage is not finished.
    """
    root = Path(run)
    if (root / META).is_file():
        return root
    if not root.is_dir() or not any(root.glob("stage*")):
        root = RUNS / run
    if not root.is_dir():
        names = sorted(p.name for p in RUNS.glob("*") if any(p.glob("stage*")))
        raise UserError(
            f"no run {run} (looked in {root}){nearest(run, names)}; "
            f"{'there are: ' + ', '.join(names) if names else 'train one: python -m train.run --stage 1'}"
        )
    found = {
        int(path.parent.parent.name.removeprefix("stage")): path.parent
        for path in root.glob(f"stage[0-9]/final/{META}")
    }
    wanted = stage if stage is not None else max(found, default=1)
    if wanted not in found:
        raise UserError(
            f"run {run}: stage {wanted} is not finished (no {root}/stage{wanted}/final); "
            f"continue with: python -m train.run --stage {wanted} --run {run} --resume"
        )
    return found[wanted]
