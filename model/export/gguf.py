"""The pair of files that llama.cpp loads: the language model here, tower and projector by mmproj.py.

    check_gguf(spec)                                             # before anything is computed
    pair = write_gguf(folder, "mine", vlm, tokenizer, tower, spec, kind="f32")
    # folder/mine-F32.gguf, folder/mmproj-mine.gguf; both read back and compared

Names of tensors and keys are those of llama.cpp's own converter, which refuses LLaVA folders with Qwen.

The chat template is plain ChatML: llama.cpp tokenises a whole prompt as one string, so the two code points
with which `template.py` keeps a text apart from control tokens are not in it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from cache.format.spec import FeatureSpec
from configs import UserError
from model.export.compare import MismatchError
from model.export.folder import language_tensors
from model.export.mmproj import check_projector, write_mmproj
from model.export.options import Kind
from model.export.template import BREAK, CUT
from model.export.towers import ExportedTower
from model.inference import generation_config
from model.language.folder_template import attached
from model.language.tokenizer import IM_END, IM_START, eos_ids
from model.vlm import VLM

if TYPE_CHECKING:
    from gguf import GGUFWriter

F16_MAX = float(np.finfo(np.float16).max)
ARCHITECTURES = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "mistral": "llama"}
"""transformers' model types -> llama.cpp's architectures."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)
"""ChatML, which llama.cpp recognises as its built-in template `chatml`."""
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (QWEN2, "bytes"): "qwen2",
    (LLAMA3, "bytes"): "llama-bpe",
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
}
"""How a tokenizer cuts text before it merges -> llama.cpp's name for it."""


def check_gguf(spec: FeatureSpec) -> None:
    """Refuse what needs no model to be seen: a missing package, and images that llama.cpp cannot pool.

    Raises:
        UserError: `gguf` is not installed, or the images are pooled.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--gguf needs the package gguf; install it: pip install 'nanomolmo2[gguf]'")
    if spec.pool_image > 1:
        size = f"{spec.pool_image} x {spec.pool_image}"
        raise UserError(
            f"--gguf: space {spec.name}: {size} patches of an image are averaged into one token, and "
            "llama.cpp's LLaVA projector does not pool; export without --gguf, or train on a space with "
            "pool_image: 1"
        )


def write_gguf(
    folder: Path,
    name: str,
    vlm: VLM,
    tokenizer: PreTrainedTokenizerFast,
    tower: ExportedTower,
    spec: FeatureSpec,
    *,
    kind: Kind,
) -> tuple[Path, Path]:
    """Write both files, read them back, and compare them with the model.

    Args:
        folder: where the files are written.
        name: of the model, for the names of the files.
        vlm: the trained model, on the CPU in float32.
        tokenizer: its tokenizer.
        tower: its vision tower.
        spec: of the features that it was trained on.
        kind: type of the matrices.

    Returns:
        The file of the language model, and that of tower and projector.

    Raises:
        UserError: llama.cpp cannot compute this model.
        MismatchError: a file does not hold what was written.
    """
    language = folder / f"{name}-{kind.upper()}.gguf"
    projector = folder / f"mmproj-{name}.gguf"
    tensors = llm_tensors(vlm)
    writer = _writer(language, ARCHITECTURES[vlm.language.config.model_type], name, kind)
    _add_sizes(writer, vlm.language.config)
    add_tokenizer(writer, tokenizer, vlm)
    _write(writer, tensors, language, kind)
    writer = _writer(projector, "clip", name, kind)
    tensors = write_mmproj(writer, vlm.connector, tower, spec)
    _write(writer, tensors, projector, kind)
    check_projector(projector, vlm.connector, tower)
    return language, projector


def _writer(path: Path, architecture: str, name: str, kind: Kind) -> GGUFWriter:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("mmproj" if architecture == "clip" else "model")
    writer.add_name(name)
    types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_file_type(types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(writer: GGUFWriter, tensors: Mapping[str, np.ndarray], path: Path, kind: Kind) -> None:
    """Write a file, read it, and compare every tensor bit for bit."""
    import gguf

    values = {name: _converted(name, value, kind) for name, value in tensors.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, value in values.items():
        if name not in found or not np.array_equal(found[name], value, equal_nan=True):
            raise MismatchError(f"{path.name}: tensor {name} is not what was written")


def _converted(name: str, value: np.ndarray, kind: Kind) -> np.ndarray:
    """Return a tensor in the type of the file: vectors, positions and the projector are float32 always."""
    if kind == "f32" or value.ndim == 1 or name.startswith(("mm.", "v.position_embd")):
        return np.ascontiguousarray(value)
    largest = float(np.abs(value).max())
    if not largest <= F16_MAX:
        raise UserError(
            f"--gguf-type f16: tensor {name} has a value of {largest:.3g}, above the largest of float16; "
            "write float32: --gguf-type f32"
        )
    return value.astype(np.float16)


def llm_tensors(vlm: VLM) -> dict[str, np.ndarray]:
    """Return the tensors of the language model by llama.cpp's names, float32.

    Raises:
        UserError: llama.cpp does not compute this language model, or not in this form.
    """
    import gguf

    config = vlm.language.config
    _check_language(config)
    kind = ARCHITECTURES[config.model_type]
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == kind)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    result = {}
    for own, tensor in language_tensors(vlm.language).items():
        name = names.get_name(own, (".weight", ".bias"))
        if name is None or (kind == "qwen3" and name.endswith(".bias")):
            raise UserError(
                f"--gguf: llama.cpp's {kind} has no tensor {own}; export without --gguf, or train on another "
                "--llm"
            )
        value = tensor.float().numpy()
        if kind == "llama" and ".attn_q." in name:
            value = interleave(value, config.num_attention_heads)
        if kind == "llama" and ".attn_k." in name:
            value = interleave(value, config.num_key_value_heads)
        result[name] = value
    return result


def _check_language(config: Any) -> None:
    kind = config.model_type
    reason = ""
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if kind not in ARCHITECTURES:
        reason = f"{kind} is none of {', '.join(ARCHITECTURES)}"
    elif windows or (kind == "mistral" and getattr(config, "sliding_window", None)):
        reason = "it attends within a sliding window, which is not written"
    elif (rope := config.rope_parameters.get("rope_type", "default")) != "default":
        reason = f"its positions are scaled ({rope}), which is not written"
    elif config.hidden_act != "silu":
        reason = f"llama.cpp's {kind} computes silu, not {config.hidden_act}"
    if reason:
        raise UserError(
            f"--gguf: language model {kind}: {reason}; export without --gguf, or train on another --llm"
        )


def interleave(value: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix (heads x width, ...) as llama.cpp's `llama` wants them.

    transformers turns dimension i of a head together with i + width / 2, llama.cpp with its neighbour.
    """
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, vlm: VLM) -> None:
    """Write vocabulary, merges, kinds of tokens, ids with a meaning, and the chat template.

    Raises:
        UserError: llama.cpp has no tokenizer that gives these tokens.
    """
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(state))
    rows = vlm.language.config.vocab_size
    # Rows of the embedding without a token have a name, which no text contains.
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    for text, number in state["model"]["vocab"].items():
        tokens[number], kinds[number] = text, gguf.TokenType.NORMAL
    for token in state["added_tokens"]:
        tokens[token["id"]] = token["content"]
        special, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
        kinds[token["id"]] = special if token["special"] else user
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp refuses a file without merges. The built-in tokenizer has none: the result of this one is no
    # token, so that the two bytes stay two.
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]
    ]
    writer.add_token_merges(merges or ["Ā Ā"])
    template = attached(tokenizer)
    end, *others = eos_ids(tokenizer)
    writer.add_eos_token_id(end)
    # llama.cpp has one name for a second end; training and transformers take all.
    if template is None and tokenizer.eos_token_id not in (None, end):
        writer.add_eot_token_id(tokenizer.eos_token_id)
    elif template is not None and others:
        writer.add_eot_token_id(others[0])
    writer.add_pad_token_id(tokenizer.pad_token_id)
    adds_bos = template is not None and template.adds_bos
    if adds_bos:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    never = generation_config(vlm.language, tokenizer, 1, 0.0).suppress_tokens
    writer.add_array("tokenizer.ggml.suppress_tokens", list(never or ()))
    writer.add_chat_template(CHAT_TEMPLATE if template is None else template.text)


def pre_tokenizer(state: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer cuts text.

    Args:
        state: tokenizer.json.

    Raises:
        UserError: llama.cpp has no name for it, or it is no byte-level BPE.
    """
    model = state["model"]
    steps = tuple(
        text for step in _steps(state["pre_tokenizer"], "pretokenizers") for text in _cuts(step)
    )
    normalizers = {step["type"] for step in _steps(state["normalizer"], "normalizers")}
    name = PRE_TOKENIZERS.get(steps)
    whole = bool(model.get("ignore_merges"))
    if name == "gpt-2" and whole and not model["merges"]:
        # The tokenizer of `random:` models: llama.cpp takes whole words with Llama 3's rules only. They cut
        # alike but for a word right behind punctuation.
        name = "llama-bpe"
    # Qwen composes characters (NFC), which llama.cpp leaves to whoever writes the text.
    if (
        model["type"] != "BPE"
        or model.get("byte_fallback")
        or name is None
        or whole is not (name == "llama-bpe")
        or not normalizers <= {"NFC"}
    ):
        raise UserError(
            "--gguf: the tokenizer cuts text in a way that is not known here (known are those of Qwen2 and "
            "Qwen3, Llama 3, GPT-2 and SmolLM); export without --gguf, or train on another --llm"
        )
    return name


def _steps(steps: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, less those that an export added."""
    every = [] if steps is None else list(steps[key]) if steps["type"] == "Sequence" else [steps]
    return [step for step in every if not {BREAK, CUT} & set(json.dumps(step, ensure_ascii=False))]


def _cuts(step: Mapping[str, Any]) -> list[str]:
    """Return a step of a pre-tokenizer as it is named in `PRE_TOKENIZERS`."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return ["words" if words else "bytes"]
        case {"type": "Digits", "individual_digits": True}:
            return ["digits"]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
            return [str(pattern)]
    return [json.dumps(step)]
