"""The files of an exported folder: names of tensors, configs, and the model that stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from configs import UserError
from model.connector import build_connector
from model.export.folder import (
    check_exportable,
    language_tensors,
    projector_tensors,
    write_folder,
)
from model.export.towers import export_tower
from model.language.tokenizer import eos_ids
from model.vision.encoder import load_encoder
from model.vlm import build_vlm
from tests.support import tiny_clip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An exported folder without its card, and the model in it."""
    folder = tmp_path_factory.mktemp("written")
    eyes = load_encoder(tiny_clip.entry(fit="pad"), device="cpu", random_weights=True)
    vlm, tokenizer = build_vlm(64, "random:qwen3-tiny", "linear", seed=0)
    before = json.dumps(vlm.language.config.to_dict(), default=str)
    write_folder(folder, vlm, tokenizer, export_tower(eyes), eyes.spec("fp16"))
    assert json.dumps(vlm.language.config.to_dict(), default=str) == before
    return folder, vlm


def read(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values


def test_tensors_have_the_names_of_published_checkpoints(written: tuple[Path, Any]) -> None:
    folder, vlm = written
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {str(file.get_slice(name).get_dtype()) for name in shapes} == {"F32"}
    assert shapes["language_model.model.embed_tokens.weight"] == (320, 64)
    assert "language_model.lm_head.weight" not in shapes, "it is tied"
    assert "language_model.model.layers.1.mlp.down_proj.weight" in shapes
    tower = "vision_tower.vision_model."
    assert shapes[f"{tower}embeddings.patch_embedding.weight"] == (64, 3, 8, 8)
    assert f"{tower}pre_layrnorm.bias" in shapes
    assert f"{tower}encoder.layers.3.self_attn.v_proj.weight" in shapes, "all blocks"
    assert shapes["multi_modal_projector.linear_1.weight"] == (64, 64)
    assert shapes["multi_modal_projector.linear_2.bias"] == (64,)
    groups = {name.split(".")[0] for name in shapes}
    assert groups == {"language_model", "vision_tower", "multi_modal_projector"}
    count = len(vlm.language.state_dict()) - 1
    assert sum(name.startswith("language_model.") for name in shapes) == count


def test_configs_say_what_was_trained(written: tuple[Path, Any]) -> None:
    folder, _ = written
    config = read(folder, "config.json")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["image_seq_length"], config["projector_hidden_act"]) == (16, "linear")
    assert config["tie_word_embeddings"] and config["text_config"]["tie_word_embeddings"]
    assert config["text_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    images = read(folder, "processor_config.json")["image_processor"]
    older = read(folder, "preprocessor_config.json")
    assert images.items() <= older.items()
    assert images["do_pad"] and not images["do_center_crop"]
    assert images["size"] == images["crop_size"] == {"height": 32, "width": 32}
    assert images["image_mean"] == [0.48, 0.46, 0.41]
    tokenizer = read(folder, "tokenizer_config.json")
    assert tokenizer["padding_side"] == "left"
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    answers = read(folder, "generation_config.json")
    _, own = build_vlm(64, "random:qwen3-tiny", "linear", seed=0)
    assert answers["eos_token_id"] == list(eos_ids(own))
    assert answers["pad_token_id"] == own.pad_token_id
    assert config["image_token_index"] in answers["suppress_tokens"]
    assert answers["do_sample"] is False and "max_new_tokens" not in answers


def test_every_file_can_be_read_by_all(written: tuple[Path, Any]) -> None:
    """safetensors writes files that only their owner can read."""
    modes = {path.stat().st_mode for path in written[0].iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_projector_computes_what_the_connector_computes(kind: str) -> None:
    torch.manual_seed(0)
    connector = build_connector(kind, 24, 16)
    state = projector_tensors(connector)
    projector = nn.ModuleDict({"linear_1": nn.Linear(24, 16), "linear_2": nn.Linear(16, 16)})
    projector.load_state_dict(state)
    between = nn.Identity() if kind == "linear" else nn.GELU()
    features = torch.randn(5, 24)
    found = projector["linear_2"](between(projector["linear_1"](features)))
    assert torch.equal(found, connector(features))


def test_a_language_model_of_other_names_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"gpt2: has a tensor transformer\.wte\.weight"):
        language_tensors(model)


def test_the_cls_token_is_refused() -> None:
    spec = load_encoder(tiny_clip.entry(pool_frame=1), device="cpu", random_weights=True)
    with pytest.raises(UserError, match="keeps the CLS token"):
        check_exportable(type(spec.spec("fp16"))(**vars(spec.spec("fp16")) | {"keep_cls": True}))
