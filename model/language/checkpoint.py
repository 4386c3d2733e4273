"""Look at a folder that is given as a language model, before transformers reads it.

    checkpoint = open_checkpoint(folder)     # config.json and the weights' headers; no values are read

transformers itself fills gaps with random values, makes an empty tokenizer, follows an adapter to another
model, or unpickles files. Here a folder is first named as what it is: a plain causal language model in
safetensors files that are whole, or a `UserError` that says what to do.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from configs import UserError, one_line
from model.language.files import AGAIN, FLOATS, StoredTensor, read_header, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WAY_OUT = (
    "give a local folder (--llm PATH with config.json, tokenizer.json, model.safetensors), "
    "or an untrained one (--llm random:qwen3-0.6b)"
)
"""End of an error about a source that is no language model."""
VISION_KEYS = (
    *(
        "vision_config",
        "vision_tower",
        "mm_vision_tower",
        "visual",
        "vision_encoder",
        "text_config",
    ),
    *("audio_config", "thinker_config", "llm_config", "vision_model_name_or_path"),
)
"""Keys of config.json of models that also have an encoder of images or sound."""
WRAPPERS = ("FSDP", "PeftModelForCausalLM", "OptimizedModule", "DistributedDataParallel")
"""Class names that trainers write into `architectures`, alone or before the model's own."""
LORA = re.compile(
    r"\.lora_|lora_embedding|lora_magnitude|\.base_layer\.|modules_to_save|\.ia3_l|\.oft_[rs]\b"
)
"""In the names of tensors of an adapter that is not merged."""
VISION = re.compile(
    r"(?:^|\.)(?:vision_tower|vision_model|vision_encoder|visual|multi_modal_projector|mm_projector"
    r"|image_newline|audio_tower)(?:\.|$)"
)
"""In the names of tensors of a vision-language model."""
QUANTISED = re.compile(
    r"\.(?:qweight|qzeros|scales|g_idx|weight_packed|weight_scale(?:_inv)?|weight_zero_point|biases"
    r"|weight\.(?:absmax|quant_map|nested_absmax|quant_state.*)|SCB|weight_format)$"
)
"""In the names of tensors of quantised weights: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, MLX."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a causal language model, as far as its files say."""

    folder: Path
    """The folder."""
    config: dict[str, Any]
    """The content of config.json."""
    tensors: dict[str, StoredTensor]
    """Name -> dtype and shape, of all files with weights."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return what the files of a language model's folder describe.

    Raises:
        UserError: a file is missing or damaged, or the folder contains something else.
    """
    config = read_config(folder)
    tensors = read_headers(folder, weight_files(folder))
    check_tensors(folder, config, tensors)
    return Checkpoint(folder, config, tensors)


# ---- config.json


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder with a plain causal language model.

    Raises:
        UserError: the file is missing or damaged, or the folder contains another kind of model.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(_adapter_message(folder))
    if (folder / "model_index.json").exists():
        raise UserError(f"{folder}: an image generator (diffusers), no language model; {WAY_OUT}")
    path = folder / CONFIG
    if not (path.exists() or path.is_symlink()):
        raise UserError(f"{folder}: no {CONFIG}, so no language model{_instead(folder)}; {WAY_OUT}")
    config = read_object(path)
    if problem := quantised(config) or _other_kind(config):
        raise UserError(f"{path}: {problem}")
    return config


def _instead(folder: Path) -> str:
    """Say what a folder without config.json contains."""
    for pattern in ("*/config.json", "snapshots/*/config.json", "stage?/final/config.json"):
        if found := sorted(folder.glob(pattern)):
            return f" (there is one in {found[-1].parent})"
    if any(folder.glob("*.gguf")):
        return " (GGUF files are llama.cpp's: take the model that they were made from)"
    if any(folder.glob("adapter_model.*")):
        return " (adapter_model without adapter_config.json: merge the adapter into its model)"
    if (folder / "params.json").exists():
        return " (params.json: weights in their maker's own format; take those in Hugging Face's)"
    return ""


def _adapter_message(folder: Path) -> str:
    """Say what an adapter is, and how to merge it."""
    if (folder / "nanomolmo2.json").exists():
        return (
            f"{folder}: adapters that train.run --lora saved, not a whole model; start from that run, with "
            f"its connector: --from {shlex.quote(str(folder))}"
        )
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    whole = ""
    if (folder / CONFIG).exists() and any(folder.glob("model*.safetensors")):
        whole = " If model.safetensors is already merged, remove adapter_config.json."
    merged = _merge_command(folder, base if isinstance(base, str) and base else str(folder))
    return (
        f"{folder}: an adapter (adapter_config.json), not a whole model; merge it (pip install peft): "
        f"{merged}; then give --llm {shlex.quote(f'{folder}-merged')}.{whole}"
    )


def _merge_command(folder: Path, base: str) -> str:
    target = json.dumps(f"{folder}-merged")
    code = (
        "from peft import AutoPeftModelForCausalLM as P; from transformers import AutoTokenizer as T; "
        f"P.from_pretrained({json.dumps(str(folder))}).merge_and_unload().save_pretrained({target}); "
        f"T.from_pretrained({json.dumps(base)}).save_pretrained({target})"
    )
    return f"python -c {shlex.quote(code)}"


def quantised(config: Mapping[str, Any]) -> str:
    """Say how weights are quantised, '' if they are not."""
    for key in ("quantization_config", "quantization", "compression_config"):
        if values := config.get(key):
            values = values if isinstance(values, dict) else {}
            bits = values.get("bits") or ("4" if values.get("load_in_4bit") else "")
            name = values.get("quant_method") or ("MLX" if key == "quantization" else "")
            how = " ".join(
                x for x in (one_line(name, 30) if name else "", f"{bits}-bit" * bool(bits)) if x
            )
            return (
                f"quantised weights ({how or key}), which cannot be trained; "
                "take the unquantised weights of the same model"
            )
    return ""


def _other_kind(config: Mapping[str, Any]) -> str:
    """Say what a model is if it is not a plain causal language model, else ''."""
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        return f"architectures {one_line(classes, 40)}, not a list of names; {AGAIN}"
    if not isinstance(kind, str) or not kind:
        return f"no model_type, so not a model of transformers; {WAY_OUT}"
    named = one_line(", ".join((kind, *classes)), 80)
    sees = next((key for key in VISION_KEYS if config.get(key)), "")
    image_text = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    by_name = (kind in image_text and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or re.search(
        r"llava|molmo|_vl\b|vlm|vision", " ".join((kind, *classes)).lower()
    )
    if sees or by_name:
        return (
            f"a vision-language or multimodal model ({named}{f'; {sees}' if sees else ''}), not a language "
            "model alone; give the language model that it was built on: --llm PATH"
        )
    if config.get("is_encoder_decoder"):
        return f"an encoder with a decoder ({named}), not a causal language model; {WAY_OUT}"
    if kind not in CONFIG_MAPPING_NAMES:
        own = (
            "; it needs Python code of its own, which is never run"
            if config.get("auto_map")
            else ""
        )
        return (
            f"model_type {one_line(kind, 40)!r} is unknown to transformers {transformers_version}{own}; "
            f"{WAY_OUT}"
        )
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    known = causal if isinstance(causal, (list, tuple)) else (causal,)
    if causal is None:
        return f"{named}: not a causal language model; {WAY_OUT}"
    if classes and not any(one.removeprefix("FSDP") in (*known, *WRAPPERS) for one in classes):
        return (
            f"{named}: not a causal language model, which would be {known[0]} (an encoder, a classifier, "
            f"or a model without its output layer); {WAY_OUT}"
        )
    if not classes and re.search("bert|electra|ernie$|data2vec", kind):
        return f"an encoder ({named}), not a causal language model; {WAY_OUT}"
    return ""


# ---- weights


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: one, or the shards that the index names.

    Raises:
        UserError: there are none, or some are missing.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_symlink() or single.exists():
        return [single]
    if not (index.is_symlink() or index.exists()):
        raise UserError(f"{folder}: no {WEIGHTS}{_other_weights(folder)}")
    shards = shard_names(index)
    files = [folder / name for name in shards]
    if absent := [path.name for path in files if not (path.exists() or path.is_symlink())]:
        raise UserError(
            f"{folder}: {len(absent)} of {len(shards)} shards are missing: {_some(absent)}; {AGAIN}"
        )
    return files


def shard_names(index: Path) -> list[str]:
    """Return the names of the files with weights, from their index.

    Raises:
        UserError: the index is damaged, or a name is not that of a safetensors file beside it.
    """
    shards = sorted(set(_weight_map(index).values()))
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {one_line(name, 60)!r} is not the name of a shard; {AGAIN}")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: no weight_map; {AGAIN}")
    if not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: weight_map does not name files; {AGAIN}")
    return places


def _other_weights(folder: Path) -> str:
    """Say what there is instead of model.safetensors, and what to do."""
    found = sorted(path.name for path in folder.iterdir())

    def some(pattern: str) -> list[str]:
        return [name for name in found if re.fullmatch(pattern, name)]

    if bins := some(r"pytorch_model.*\.bin"):
        return (
            f"; {bins[0]} is a pickle, which can run code and is not read; convert it: "
            f"{conversion_command(folder)}"
        )
    if some(r".*\.gguf"):
        return (
            "; GGUF files are llama.cpp's, mostly quantised: take the model that they were made from, in "
            "safetensors"
        )
    if shards := some(r"model-\d+-of-\d+\.safetensors"):
        return f" and no {INDEX} for {_some(shards)}; download the index"
    if some(r"zero_to_fp32\.py") or some("global_step.*"):
        whole = shlex.quote(f"{folder}-whole")
        return (
            "; DeepSpeed's checkpoint: put it together, and copy config.json and the tokenizer there: python "
            f"{shlex.quote(str(folder / 'zero_to_fp32.py'))} {shlex.quote(str(folder))} {whole} "
            "--safe_serialization"
        )
    if some(r".*\.distcp"):
        return (
            "; shards of torch.distributed.checkpoint: save the model with save_pretrained instead"
        )
    if others := some(r".*\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|npz)"):
        return (
            f" (there is {_some(others)}); save the model with save_pretrained, or rename its file"
        )
    return f", so no weights; {AGAIN}"


def conversion_command(folder: Path) -> str:
    """Return a command that makes model.safetensors of pytorch_model*.bin, tensor by tensor."""
    code = (
        "import torch, pathlib; from safetensors.torch import save_file; "
        f"f = pathlib.Path({json.dumps(str(folder))}); "
        'w = [torch.load(p, map_location="cpu", weights_only=True) for p in f.glob("pytorch_model*.bin")]; '
        "save_file({k: v.contiguous().clone() for x in w for k, v in x.items()}, "
        'f / "model.safetensors")'
    )
    return f"python -c {shlex.quote(code)}"


def read_headers(folder: Path, files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of all files, after a check against the index if there is one.

    Raises:
        UserError: a file is damaged, or the index and the files disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise UserError(
                    f"{path}: tensor {one_line(name)} is also in {tensors[name].path.name}; {AGAIN}"
                )
            tensors[name] = tensor
    if not tensors:
        raise UserError(f"{folder / WEIGHTS}: contains no tensor; {AGAIN}")
    if not (folder / WEIGHTS).exists():
        for name, place in _weight_map(folder / INDEX).items():
            if name not in tensors or tensors[name].path.name != place:
                raise UserError(
                    f"{folder / place}: lacks tensor {one_line(name)}, which {INDEX} places there; {AGAIN}"
                )
    return tensors


def check_tensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise UserError if tensors belong to an adapter, are quantised, or are fewer than the layers."""
    if lora := [name for name in tensors if LORA.search(name)]:
        raise UserError(
            f"{tensors[lora[0]].path}: {len(lora)} tensors of an adapter (LoRA) that is not merged, such as "
            f"{_some(lora)}; save the merged model: model.merge_and_unload().save_pretrained(PATH)"
        )
    if sees := [name for name in tensors if VISION.search(name)]:
        raise UserError(
            f"{tensors[sees[0]].path}: a whole vision-language model ({_some(sees, 1)}), not a language "
            "model alone; give the language model that it was built on: --llm PATH"
        )
    coded = [name for name in tensors if QUANTISED.search(name)]
    coded += [n for n, t in tensors.items() if n.endswith("weight") and t.dtype not in FLOATS]
    if coded:
        kinds = Counter(tensors[name].dtype for name in coded)
        raise UserError(
            f"{tensors[coded[0]].path}: quantised weights ({', '.join(kinds)}; {_some(coded)}), which "
            "cannot be trained; take the unquantised weights of the same model"
        )
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        layers = config.get(key, 0)
        if type(layers) is int and layers > len(tensors):
            raise UserError(
                f"{folder / CONFIG}: {key} {layers:,}, but the weights have only "
                f"{len(tensors):,} tensors; {AGAIN}"
            )


def _some(names: Iterable[str], most: int = 2) -> str:
    """Return the first names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(one_line(name, 80) for name in listed[:most]) + more
