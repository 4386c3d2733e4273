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

import contextlib
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cache.format.checksums import crc32c, read_sealed_json, sealed_json
from cache.format.gate import fit
from cache.format.spec import FeatureSpec
from configs import UserError, nearest, one_line, read_yaml
from configs.command_line import command_text
from model.connector import build_connector
from model.io.base_model import Base, base_name, check_base, find_base, other_weights
from model.io.llava_folder import TEMPLATES, with_template
from model.io.run_files import META, MOST, Count, Name, refuse_links, refuse_links_beside
from model.language.chat_template import VERSIONS, template_version
from model.language.files import check_file, check_folder, read_text
from model.language.folder_template import FOLDER_TEMPLATE
from model.language.lora import (
    Adapters,
    AdaptersMeta,
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
from model.language.tokenizer import eos_ids, image_token, prepare_tokenizer
from model.language.tokenizer_files import read_tokenizer
from model.tail import VisionTail, empty_tail
from model.vlm import VLM

CONNECTOR, TAIL = "connector.safetensors", "tail.safetensors"
RUNS = Path("runs")
FORMAT = 2
"""Version of the folder and of `nanomolmo2.json`."""


class _Marks(TypedDict):
    image: str
    ends: list[int]


class _File(TypedDict):
    bytes: Count
    crc32c: Count


class _Space(TypedDict):
    """Content of space.json; `spec` is checked where it is used."""

    name: NotRequired[Name]
    spec: NotRequired[dict[str, Any]]
    load: NotRequired[dict[str, Any] | None]


class Meta(TypedDict):
    """What nanomolmo2.json, and state.json of a checkpoint, say of a model."""

    connector: str
    llm: str
    space: _Space | None
    stage: Annotated[int, msgspec.Meta(ge=0, le=99)]
    step: Count
    template: str
    vision_width: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    max_frames: NotRequired[int | None]
    lora: NotRequired[AdaptersMeta]


class _FinalMeta(Meta):
    files: dict[Name, _File]
    marks: NotRequired[_Marks]
    base: NotRequired[Base]
    positions: NotRequired[Count | None]


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


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of nanomolmo2.json.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    path = folder / META
    if not (path.exists() or path.is_symlink()):
        raise UserError(
            f"{folder}: not a trained model (looked for {META}); train one: python -m train.run --stage 1"
        )
    check_folder(folder)
    refuse_links_beside(folder)
    if check_file(path) > MOST:
        raise UserError(f"{path}: more than the {MOST:,} bytes that are read; {_again(folder)}")
    try:
        meta = read_sealed_json(path)
    except (
        Exception
    ) as error:  # CorruptError of the cache, of which this package imports the format alone
        what = one_line(getattr(error, "what", error))
        raise UserError(f"{path}: {what}; {_again(folder)}") from None
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {one_line(meta.get('format'), 40)}, this version reads {FORMAT}"
        )
    try:
        fit(meta, _FinalMeta)
        if "base" in meta:
            check_base(meta["base"])
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}; {_again(folder)}") from None
    if ("lora" in meta) != ("base" in meta):
        raise UserError(f"{path}: has only one of lora and base; {_again(folder)}")
    check_template_version(path, meta["template"])
    if meta["template"] == FOLDER_TEMPLATE and "marks" not in meta:
        raise UserError(f"{path}: no marks; {_again(folder)}")
    return meta


def check_template_version(path: Path, version: object) -> None:
    """Raise UserError if a model was trained with a template that this version does not have."""
    if version not in VERSIONS:
        raise UserError(
            f"{path}: trained with chat template {version}, this version uses "
            f"{VERSIONS[0]}; use the version that trained it"
        )


def _again(folder: Path) -> str:
    return f"copy {folder} again, or train the stage again"


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
            raise UserError(f"{path}: is missing; {_again(folder)}")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise UserError(
                f"{path}: {size:,} bytes, should be {written['bytes']:,}; {_again(folder)}"
            )
        if contents and _fingerprint(path) != written:
            raise UserError(
                f"{path}: was changed after training (its crc32c differs); {_again(folder)}"
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
        raise UserError(f"{folder / CONNECTOR}: {one_line(error)}; {_again(folder)}") from None
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
            raise UserError(f"{path}: {stored:,} bytes are too few; {_again(folder)}")
        tail = empty_tail(known)
        tail.load_state_dict(load_file(path))
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: {one_line(error)}; {_again(folder)}") from None
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


def find_run(run: str, stage: int | None = None) -> Path:
    """Return the `final` folder of a stage of a run.

    Args:
        run: a name below runs/, the path of a run, of a stage, or of a `final` folder.
        stage: number of the stage; None for the last finished one.

    Raises:
        UserError: there is no such run, or the stage is not finished.
    """
    root = Path(run)
    if (root / META).is_file():
        refuse_links_beside(root)
        return root
    if (root / "final" / META).is_file():
        refuse_links(root)
        return root / "final"
    root = find_root(run)
    found = {
        int(path.parent.parent.name.removeprefix("stage")): path.parent
        for path in root.glob(f"stage[0-9]/final/{META}")
    }
    wanted = stage if stage is not None else max(found, default=1)
    refuse_links(root / f"stage{wanted}")
    if wanted not in found:
        words = ["--stage", str(wanted), "--run", run, *_features_of(root, wanted), "--resume"]
        raise UserError(
            f"run {run}: stage {wanted} is not finished (no {root}/stage{wanted}/final); "
            f"continue with: {command_text('python -m train.run', words)}"
        )
    return found[wanted]


def find_root(run: str) -> Path:
    """Return the folder of a run.

    Args:
        run: its path, or its name below runs/.

    Raises:
        UserError: there is no such run.
    """
    root = Path(run)
    if not root.is_dir() or not any(root.glob("stage*")):
        root = RUNS / run
    if not root.is_dir():
        names = sorted(p.name for p in RUNS.glob("*") if any(p.glob("stage*")))
        raise UserError(
            f"no run {run} (looked in {root}){nearest(run, names)}; "
            f"{'there are: ' + ', '.join(names) if names else 'train one: python -m train.run --stage 1'}"
        )
    return root


def _features_of(root: Path, stage: int) -> list[str]:
    """Return the option that names the cache of a run: that of a stage, or of the last one before it."""
    for number in range(stage, 0, -1):
        path = root / f"stage{number}" / "config.yaml"
        with contextlib.suppress(OSError, UserError, KeyError):
            return ["--features", str(read_yaml(path)["features"])]
    return []
