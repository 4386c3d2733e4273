"""Damaged folders of language models, and folders with something else: one line each, before anything starts.

with pytest.raises(UserError, match="is truncated"):
    load_language("/models/half-downloaded")
"""

from __future__ import annotations

import json
import re
import shlex
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import UserError
from model.language.checkpoint import conversion_command
from model.language.model import load_language, max_positions
from tests.support import ROOT
from tests.support.trained_runs import ENVIRONMENT

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1192135096\n"
Damage = Callable[[Path], object]


# ---- ways to damage a folder


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def drop(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def config(**changes: Any) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return edit


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(change(data))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        changed = {k: v.contiguous().clone() for k, v in change(load_file(path)).items()}
        save_file(changed, path, metadata={"format": "pt"})

    return edit


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        values = json.loads(data[8 : 8 + length])
        change(values)
        encoded = json.dumps(values).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    return bytes_of("model.safetensors", edit)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def without(part: str) -> Damage:
    return tensors(lambda state: {k: v for k, v in state.items() if part not in k})


def plus(**more: Tensor) -> Damage:
    return tensors(lambda state: state | {k.replace("__", "."): v for k, v in more.items()})


def prefixed(prefix: str) -> Damage:
    return tensors(lambda state: {prefix + k: v for k, v in state.items()})


def link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")


def to_pickle(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    drop("config.json", "model.safetensors")(folder)
    text("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Q"}')(
        folder
    )


def inside(folder: Path) -> None:
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "config.json").rename(folder / "snapshots/abc/config.json")


def index_names(place: str) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        values["weight_map"]["model.norm.weight"] = place
        path.write_text(json.dumps(values))

    return edit


def a_shard(folder: Path) -> str:
    return sorted(p.name for p in folder.glob("model-0*"))[1]


WEIGHTS, TOKENIZER, INDEX = "model.safetensors", "tokenizer.json", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"
LLAVA = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}

KINDS: dict[str, tuple[str, Damage, str]] = {
    # weights
    "pointer": ("tied", text(WEIGHTS, POINTER), "Git LFS pointer.*not downloaded.*git lfs pull"),
    "zero bytes": ("tied", text(WEIGHTS, ""), r"model\.safetensors: is empty"),
    "truncated by a byte": ("tied", bytes_of(WEIGHTS, lambda d: d[:-1]), "is truncated"),
    "half": ("tied", bytes_of(WEIGHTS, lambda d: d[: len(d) // 2]), "is truncated: .* of .* bytes"),
    "in the header": ("tied", bytes_of(WEIGHTS, lambda d: d[:300]), "truncated.*header alone"),
    "five bytes": ("tied", bytes_of(WEIGHTS, lambda d: d[:5]), "is truncated: 5 bytes"),
    "too long": ("tied", bytes_of(WEIGHTS, lambda d: d + b"\0"), "but its header describes"),
    "broken header": (
        "tied",
        bytes_of(WEIGHTS, lambda d: d[:8] + b"x" + d[9:]),
        "its header is damaged: ",
    ),
    "a huge header": (
        "tied",
        bytes_of(WEIGHTS, lambda d: b"\xff" * 8 + d[8:]),
        "not a safetensors file",
    ),
    "web page": ("tied", text(WEIGHTS, "<!DOCTYPE html><p>Log in</p>"), "a web page"),
    "overlap": (
        "tied",
        header(lambda h: h.update({"model.norm.weight": h["model.embed_tokens.weight"]})),
        "overlap or leave a gap",
    ),
    "an unknown dtype": ("tied", header(lambda h: h[f"{Q}.weight"].update(dtype="F7")), "F7"),
    "a negative size": (
        "tied",
        header(lambda h: h[f"{Q}.weight"].update(shape=[-32, -32])),
        "header is damaged",
    ),
    "no weights": ("tied", drop(WEIGHTS), r"no model\.safetensors, so no weights"),
    "a link to nothing": ("tied", link_to_nothing, "a link to a file that does not exist"),
    "a pickle": ("tied", to_pickle, "is a pickle.*convert it: python -c"),
    "GGUF beside config": (
        "tied",
        both(drop(WEIGHTS), text("m.gguf", "GGUF")),
        r"no model\.safetensors; GGUF",
    ),
    "GGUF alone": (
        "tied",
        both(drop(WEIGHTS, "config.json"), text("m.gguf", "GGUF")),
        r"no config\.json.*GGUF",
    ),
    "another name": (
        "tied",
        lambda f: (f / WEIGHTS).rename(f / "weights.safetensors"),
        r"there is weights\.safetensors",
    ),
    "DeepSpeed": (
        "tied",
        both(drop(WEIGHTS), text("zero_to_fp32.py", "")),
        r"DeepSpeed.*python \S*zero_to_fp32\.py",
    ),
    "a layer is missing": ("tied", without("layers.1."), r"11 missing \(of 25\): model\.layers\.1"),
    "a norm is missing": (
        "tied",
        without("model.norm"),
        r"1 missing \(of 25\): model\.norm\.weight",
    ),
    "the output layer is missing": (
        "untied",
        without("lm_head"),
        r"lm_head\.weight; is it tied\? Then write",
    ),
    "another output layer": (
        "tied",
        tensors(lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1}),
        r'write "tie_word_embeddings": false',
    ),
    "left over": (
        "tied",
        plus(value_head__weight=torch.ones(3)),
        r"1 left over: value_head\.weight",
    ),
    "an unknown prefix of some": (
        "tied",
        tensors(lambda s: {("student." if "norm" in k else "") + k: v for k, v in s.items()}),
        r"left over: student\.model",
    ),
    "two names become one": (
        "tied",
        tensors(lambda s: s | {"module.model.norm.weight": s["model.norm.weight"]}),
        "two tensors have one name|left over",
    ),
    "layers of more": ("tied", config(num_hidden_layers=3, layer_types=None), "11 missing"),
    "layers of fewer": ("tied", config(num_hidden_layers=1, layer_types=None), "left over"),
    "a billion layers": (
        "tied",
        config(num_hidden_layers=10**9, layer_types=None),
        "num_hidden_layers 1,000,000,000, but the weights have only",
    ),
    "another width": ("tied", config(hidden_size=64), r"is \(.*, by config\.json it is"),
    "another vocabulary": (
        "tied",
        config(vocab_size=512),
        r"embed_tokens\.weight is \(320, 32\), by config\.json it is \(512, 32\)",
    ),
    "LoRA inside": (
        "tied",
        tensors(
            lambda s: (
                {f"base_model.model.{k}": v for k, v in s.items()}
                | {f"base_model.model.{Q}.lora_A.default.weight": torch.ones(2, 32)}
            )
        ),
        "1 tensors of an adapter.*lora_A.*merge_and_unload",
    ),
    "a vision tower beside": (
        "tied",
        plus(model__visual__patch_embed__weight=torch.ones(3)),
        "a whole vision-language model",
    ),
    "GPTQ": ("tied", plus(**{f"{Q.replace('.', '__')}__qweight": torch.ones(2, 2)}), "quantised"),
    "bytes as weights": (
        "tied",
        tensors(lambda s: s | {f"{Q}.weight": torch.zeros(32, 32, dtype=torch.uint8)}),
        r"quantised weights \(U8",
    ),
    # shards
    "a missing shard": (
        "sharded",
        lambda f: (f / a_shard(f)).unlink(),
        "1 of .* shards are missing",
    ),
    "a shard is a pointer": (
        "sharded",
        lambda f: (f / a_shard(f)).write_text(POINTER),
        r"model-0000.*Git LFS pointer",
    ),
    "a shard is cut": (
        "sharded",
        lambda f: (f / a_shard(f)).write_bytes((f / a_shard(f)).read_bytes()[:-9]),
        "is truncated",
    ),
    "a shard lacks a tensor": (
        "sharded",
        index_names("model-00001-of-00002.safetensors"),
        "lacks tensor|shards are missing",
    ),
    "a shard outside": ("sharded", index_names("../../etc/passwd"), "is not the name of a shard"),
    "no index": ("sharded", drop(INDEX), r"no model\.safetensors\.index\.json"),
    "a broken index": ("sharded", text(INDEX, "{"), r"index\.json: not valid JSON"),
    "an empty index": ("sharded", text(INDEX, "{}"), "no weight_map"),
    "an index of numbers": ("sharded", text(INDEX, '{"weight_map": {"a": 1}}'), "does not name"),
    "twice in shards": (
        "sharded",
        lambda f: save_file({"model.norm.weight": torch.ones(32)}, f / a_shard(f)),
        "is also in|lacks tensor",
    ),
    # config.json
    "no config": ("tied", drop("config.json"), r"no config\.json, so no language model"),
    "config elsewhere": ("tied", inside, r"there is one in \S*snapshots/abc"),
    "broken config": ("tied", text("config.json", '{"model_type": "qwen3",'), "not valid JSON"),
    "a list": ("tied", text("config.json", "[]"), "a JSON list, not an object"),
    "a key twice": ("tied", text("config.json", '{"a": 1, "a": 2}'), "key 'a' twice"),
    "deep": ("tied", text("config.json", '{"a":' * 100_000), "not valid JSON"),
    "a long number": ("tied", text("config.json", '{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "NaN": ("tied", text("config.json", '{"a": NaN}'), "NaN is not JSON"),
    "Latin-1": ("tied", bytes_of("config.json", lambda d: b'{"a": "\xe9"}'), "not valid JSON"),
    "config pointer": ("tied", text("config.json", POINTER), "Git LFS pointer"),
    "empty config": ("tied", text("config.json", ""), "is empty"),
    "no model_type": ("tied", config(model_type=None), "no model_type"),
    "an unknown type": ("tied", config(model_type="qwen99"), "'qwen99' is unknown"),
    "own code": (
        "tied",
        config(model_type="mine", auto_map={"AutoModel": "modeling.M"}),
        "never run",
    ),
    "sizes as text": ("tied", config(hidden_size="many"), "not a config of a model"),
    "no heads": ("tied", config(num_attention_heads=0), "error|not a config|it is"),
    "BERT": (
        "tied",
        config(model_type="bert", architectures=["BertForMaskedLM"]),
        "not a causal language model",
    ),
    "a class without output layer": (
        "tied",
        config(architectures=["Qwen3Model"]),
        "would be Qwen3ForCausalLM",
    ),
    "a classifier": (
        "tied",
        config(architectures=["Qwen3ForSequenceClassification"]),
        "not a causal language model",
    ),
    "T5": (
        "tied",
        config(model_type="t5", is_encoder_decoder=True),
        "an encoder with a decoder",
    ),
    "CLIP": ("tied", config(model_type="clip", vision_config={"a": 1}), "vision-language"),
    "LLaVA": ("tied", config(**LLAVA, text_config={"model_type": "qwen3"}), "vision-language"),
    "old LLaVA": ("tied", config(model_type="llava_llama", mm_vision_tower="x"), "vision-language"),
    "Qwen2-VL": ("tied", config(model_type="qwen2_vl"), "a vision-language or multimodal model"),
    "bitsandbytes": ("tied", config(quantization_config=BNB), r"\(bitsandbytes 4-bit\)"),
    "AWQ": ("tied", config(quantization_config={"quant_method": "awq", "bits": 4}), "awq 4-bit"),
    "MLX": ("tied", config(quantization={"bits": 4, "group_size": 64}), "MLX 4-bit"),
    "an adapter": ("tied", adapter, "an adapter .*pip install peft.*python -c .*-merged"),
    "an adapter beside": (
        "tied",
        text("adapter_config.json", '{"base_model_name_or_path": "Qwen/Q"}'),
        "an adapter .*is already merged, remove",
    ),
    "adapters of ours": (
        "tied",
        both(adapter, text("nanomolmo2.json", "{}")),
        "adapters that train.run --lora saved, .*start from that run, with its connector: --from ",
    ),
    "diffusers": ("tied", text("model_index.json", "{}"), "an image generator"),
    # tokenizer
    "no tokenizer": ("tied", drop(TOKENIZER, "tokenizer_config.json"), r"no tokenizer\.json"),
    "only its config": ("tied", drop(TOKENIZER), r"no tokenizer\.json"),
    "tokenizer pointer": ("tied", text(TOKENIZER, POINTER), r"tokenizer\.json: a Git LFS pointer"),
    "empty tokenizer file": ("tied", text(TOKENIZER, ""), r"tokenizer\.json: is empty"),
    "half a tokenizer": ("tied", bytes_of(TOKENIZER, lambda d: d[:900]), "not valid JSON"),
    "another object": ("tied", text(TOKENIZER, '{"a": 1}'), "its tokenizer cannot be loaded"),
    "broken tokenizer_config": ("tied", text("tokenizer_config.json", "{"), "not valid JSON"),
    "a tokenizer of another model": (
        "tied",
        config(eos_token_id=310),
        "ends a text with id 310, which it does not have",
    ),
    "another tokenizer of more words": (
        "tied",
        bytes_of(TOKENIZER, lambda d: re.sub(rb'"assistant": ?\d+', b'"assistant": 999', d)),
        "of another model: token 'assistant' has id 999, and the embedding has 320 rows",
    ),
    "SentencePiece alone": (
        "tied",
        both(drop(TOKENIZER), text("tokenizer.model", "\n\x0b")),
        r"tokenizer\.model",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_line(kind: str, copy_of: Callable[[str], Path]) -> None:
    """The check before a run finds it, and loading finds it."""
    name, damage, message = KINDS[kind]
    folder = copy_of(name)
    damage(folder)
    for use in (load_language, max_positions):
        with pytest.raises(UserError, match=message) as caught:
            use(str(folder))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 800
        assert str(folder) in str(caught.value)


def test_the_conversion_of_a_pickle_runs_as_printed(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("untied")
    before = load_file(folder / WEIGHTS)
    to_pickle(folder)
    with pytest.raises(UserError) as caught:
        load_language(str(folder))
    command = str(caught.value).partition("convert it: ")[2]
    assert command == conversion_command(folder)
    words = shlex.split(command.replace("python", str(ROOT / ".venv/bin/python"), 1))
    subprocess.run(words, check=True, env=ENVIRONMENT)
    state = load_language(str(folder))[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_file_is_no_folder(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("tied")
    with pytest.raises(UserError, match=f"a file; give its folder: --llm {folder}"):
        load_language(str(folder / WEIGHTS))
    (folder / "model.gguf").write_text("GGUF")
    with pytest.raises(UserError, match=r"a GGUF file .*give a local folder"):
        load_language(str(folder / "model.gguf"))
