"""Somebody else's LLaVA, as transformers' own classes save it: what is read, and what is refused in one line.

llava = open_llava(folder)
language, connector, tokenizer = llava.load()
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, MistralConfig, Qwen2Config

from configs import UserError
from model.io.llava_folder import is_llava, open_llava, other_model
from model.language.folder_template import attached
from model.language.tokenizer import eos_ids, image_id
from tests.support.tiny_clip import TEMPLATES, write_llava

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaForConditionalGeneration]:
    folder = tmp_path_factory.mktemp("written") / "llava"
    return folder, write_llava(folder, "vicuna")


@pytest.fixture
def folder(written: tuple[Path, LlavaForConditionalGeneration], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "llava"))


def change(path: Path, **values: Any) -> None:
    """Set values of a JSON file; None removes a key. `a__b` is b of a."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({rename(k): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def check_equal(folder: Path, model: LlavaForConditionalGeneration) -> None:
    language, connector, _ = open_llava(folder).load()
    theirs = dict(model.named_parameters())
    for name, value in language.named_parameters():
        other = (
            name.replace("model.", "model.language_model.", 1) if "lm_head" not in name else name
        )
        assert torch.equal(value, theirs[other]), name
    features = torch.randn(3, connector.linear_1.in_features)
    with torch.inference_mode():
        expected = model.model.multi_modal_projector(features)
        assert torch.equal(connector(features), expected)


NAMES: dict[str, Callable[[str], str]] = {
    "as transformers 5 saves it": lambda name: name,
    "as published": lambda name: (
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal_projector.", "multi_modal_projector.")
        .replace("lm_head.", "language_model.lm_head.")
    ),
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_tensors_are_found_by_either_name(
    written: tuple[Path, LlavaForConditionalGeneration],
    folder: Path,
    rename: Callable[[str], str],
) -> None:
    def new(name: str) -> str:
        plain = name.replace("language_model.model.", "model.language_model.")
        plain = plain.replace("language_model.lm_head.", "lm_head.")
        plain = plain.replace("vision_tower.vision_model.", "vision_tower.")
        for part in ("vision_tower.", "multi_modal_projector."):
            plain = f"model.{plain}" if plain.startswith(part) else plain
        return rename(plain)

    renamed(folder, new)
    check_equal(folder, written[1])


def test_weights_in_shards(
    written: tuple[Path, LlavaForConditionalGeneration], tmp_path: Path
) -> None:
    shutil.copytree(written[0], tmp_path / "llava")
    (tmp_path / "llava/model.safetensors").unlink()
    written[1].save_pretrained(tmp_path / "llava", max_shard_size="40KB")
    assert len(list((tmp_path / "llava").glob("model-*.safetensors"))) > 2
    check_equal(tmp_path / "llava", written[1])


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu", "linear"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_every_projector_computes_the_same(act: str, bias: bool, tmp_path: Path) -> None:
    model = write_llava(
        tmp_path / "llava", "chatml", act=act, multimodal_projector_bias=bias, layers=[-1, 1]
    )
    check_equal(tmp_path / "llava", model)
    name = "mlp" if act == "gelu" else f"mlp:{act}"
    assert str(open_llava(tmp_path / "llava").kind) == name + ",no-bias" * (not bias)


@pytest.mark.parametrize("bias", [True, False])
def test_an_identity_behind_a_linear_map_is_no_layer(bias: bool, tmp_path: Path) -> None:
    place = tmp_path / "llava"
    write_llava(place, "chatml", act="linear", multimodal_projector_bias=bias)
    state = load_file(place / "model.safetensors")
    for name, value in state.items():
        if "linear_2.weight" in name:
            state[name] = torch.eye(len(value))
        elif "linear_2.bias" in name:
            state[name] = torch.zeros(len(value))
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    _language, connector, _ = open_llava(place).load()
    assert isinstance(connector, torch.nn.Linear) and (connector.bias is not None) is bias
    assert str(open_llava(place).kind) == "linear" + ",no-bias" * (not bias)


def test_tied_and_untied_models(tmp_path: Path) -> None:
    for tied in (True, False):
        place = tmp_path / str(tied)
        write_llava(place, "chatml", llm=Qwen2Config, tied=tied)
        language, _, _ = open_llava(place).load()
        head, words = language.get_output_embeddings(), language.get_input_embeddings()
        assert (head.weight.data_ptr() == words.weight.data_ptr()) is tied


def test_marks_and_template_are_the_folders_own(folder: Path) -> None:
    llava = open_llava(folder)
    tokenizer = llava.check()
    template = attached(tokenizer)
    assert template is not None and template.text == TEMPLATES["vicuna"]
    assert image_id(tokenizer) == llava.config.image_token_index
    assert eos_ids(tokenizer) == (tokenizer.eos_token_id,)
    change(folder / "generation_config.json", eos_token_id=[7, tokenizer.eos_token_id, 10**9])
    assert eos_ids(open_llava(folder).check()) == (7, tokenizer.eos_token_id)


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "named"])
def test_templates_of_older_folders(folder: Path, place: str) -> None:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": text}))
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
        change(folder / "tokenizer_config.json", chat_template=named if place == "named" else text)
    template = attached(open_llava(folder).check())
    assert template is not None and template.text == text


def drop(folder: Path, part: str, **added: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if part not in k}
    save_file(kept | added, path, metadata={"format": "pt"})


def cut_rows(folder: Path, rows: int) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, value in state.items():
        if "embed_tokens" in name or "lm_head" in name:
            state[name] = value[:rows].clone()
    save_file(state, path, metadata={"format": "pt"})
    change(folder / "config.json", text_config__vocab_size=rows)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another class": (
        lambda f: change(f / "config.json", model_type="llava_next"),
        "config.json: a llava_next; only a LlavaForConditionalGeneration",
    ),
    "LLaVA's own format": (
        lambda f: change(
            f / "config.json", vision_config=None, text_config=None, mm_vision_tower="x"
        ),
        "config.json: a model in the format of LLaVA's own repository",
    ),
    "no text_config": (
        lambda f: change(f / "config.json", text_config=None),
        "no vision_config and text",
    ),
    "activation": (
        lambda f: change(f / "config.json", projector_hidden_act="xielu"),
        "projector_hidden_act 'xielu' is none of gelu, ",
    ),
    "bias": (
        lambda f: change(f / "config.json", multimodal_projector_bias=False),
        "multi_modal_projector.linear_1.bias is (32,), by config.json it is not there",
    ),
    "width": (
        lambda f: change(f / "config.json", vision_feature_layer=[-2, -1]),
        "multi_modal_projector.linear_1.weight is (32, 32), by config.json it is (32, 64)",
    ),
    "unknown language model": (
        lambda f: change(f / "config.json", text_config__model_type="clip"),
        "text_config has model_type 'clip', which is no causal language model",
    ),
    "value of a wrong type": (
        lambda f: change(f / "config.json", image_token_index="x"),
        "config.json: not a config of a model",
    ),
    "quantised": (
        lambda f: change(
            f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
        ),
        "quantised weights (gptq 4-bit)",
    ),
    "missing tensor": (lambda f: drop(f, "layers.1.mlp"), "3 missing (of "),
    "no projector": (lambda f: drop(f, "projector"), "linear_1.bias is missing"),
    "a tensor of another class": (
        lambda f: drop(f, "nothing", image_newline=torch.zeros(4)),
        "tensor image_newline is none of a LlavaForConditionalGeneration",
    ),
    "a value that is not finite": (
        lambda f: drop(
            f,
            "linear_2.bias",
            **{"multi_modal_projector.linear_2.bias": torch.full((32,), torch.nan)},
        ),
        "tensor linear_2.bias has values that are not finite",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no template": (
        lambda f: (f / "chat_template.jinja").unlink(),
        "no chat template (chat_template.jinja, ",
    ),
    "broken template": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        "chat_template.jinja: not a chat template (Jinja)",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "another image token": (
        lambda f: change(f / "config.json", image_token_index=3),
        "image_token_index 3 is no added token of the tokenizer",
    ),
    "fewer rows than words": (lambda f: cut_rows(f, 380), "of another model: token"),
    "fewer rows than ids": (lambda f: cut_rows(f, 394), "ids up to 397 and the embedding 394 rows"),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "an adapter (adapter_config.json)",
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
}


@pytest.mark.parametrize(("break_it", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_imported_is_refused_in_one_line(
    folder: Path, break_it: Callable[[Path], Any], reason: str
) -> None:
    break_it(folder)
    with pytest.raises(UserError) as caught:
        open_llava(folder).load()
    message = str(caught.value)
    assert reason in message and "\n" not in message and str(folder) in message
    assert len(message) < 700


def test_a_sliding_window_is_refused_by_name(tmp_path: Path) -> None:
    write_llava(tmp_path / "llava", "mistral", llm=MistralConfig)
    change(tmp_path / "llava/config.json", text_config__sliding_window=4096)
    with pytest.raises(UserError, match="language model mistral with sliding_window=4096"):
        open_llava(tmp_path / "llava").check()


def test_code_of_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    change(folder / "config.json", auto_map={"AutoConfig": "evil.X", "AutoModel": "evil.X"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.X", "evil.X"]})
    open_llava(folder).load()
    assert not ran.exists()


def test_which_folders_are_one(folder: Path, tmp_path: Path) -> None:
    assert is_llava(folder) and not is_llava(tmp_path)
    change(folder / "config.json", model_type="pooled_llava")
    assert is_llava(folder) and open_llava(folder).pool == 1
    change(folder / "config.json", model_type="qwen2_vl")
    assert not is_llava(folder)
    assert other_model(folder).startswith("a qwen2_vl, and of vision-language models only a Llava")
