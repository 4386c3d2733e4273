"""Towers of transformers: features are its hidden states, and everything that changes them is in the spec.

encoder = load_encoder(encoder_config("hf:dinov2-small"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from configs import UserError, use_file
from model.io.tower_folder import tower_hash
from model.language.loading import quiet
from model.vision.config import EncoderConfig, encoder_config
from model.vision.encoder import VisionEncoder, load_encoder, rebuild_encoder
from tests.support.tiny_clip import (
    DEPTH,
    PATCH,
    SIDE,
    TOWERS,
    llava,
    noise,
    save_tower,
    transformers_tower,
)

FIRST = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2-gated": 1, "dinov2-registers": 4, "dinov3": 3}
"""Tokens before the patches; dinov3-gated has none but CLS."""


def entry(folder: Path, **overrides: Any) -> EncoderConfig:
    values = {"compute_dtype": "float32", "batch_size": 3, **overrides}
    return encoder_config(f"hf:{folder}", **values)


def load(folder: Path, **overrides: Any) -> VisionEncoder:
    return load_encoder(entry(folder, **overrides), device="cpu")


def hidden_states(model: Any, encoder: VisionEncoder, pixels: np.ndarray) -> Any:
    with torch.no_grad():
        return model(encoder.normalize(pixels), output_hidden_states=True).hidden_states


def refused(folder: Path, **overrides: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_hidden_states_of_transformers(kind: str, tmp_path: Path) -> None:
    model = transformers_tower(kind)
    folder = save_tower(tmp_path / "tower", model)
    with quiet():  # as a user of transformers loads it
        model = type(model).from_pretrained(folder).eval()
    encoder = load(folder, blocks=(2, 0))
    pixels = noise(4, SIDE)
    states = hidden_states(model, encoder, pixels)
    first = FIRST.get(kind, 1)
    wanted = torch.cat([states[3][:, first:], states[1][:, first:]], dim=-1)
    found = encoder.encode(pixels)
    assert found.shape == wanted.shape == (4, (SIDE // PATCH) ** 2, 128)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    last = load(folder, blocks=(DEPTH - 1,)).encode(pixels)  # before the norm behind it
    torch.testing.assert_close(last, states[DEPTH][:, first:], atol=1e-5, rtol=0)
    used = sum(p.numel() for name, p in encoder.tower.named_parameters() if ".3." not in name)
    assert encoder.parameters_used == used < encoder.parameters
    assert encoder.spec("int8").architecture.startswith(f"transformers:{type(model).__name__}-")


def test_the_default_is_the_last_block_but_one_and_the_folders_processor(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "my tower (v2)", transformers_tower("clip"), do_pad=True)
    config = encoder_config(f"hf:{folder}")
    assert (
        config.blocks == (DEPTH - 2,) and config.fit == "pad" and config.activation == "quick_gelu"
    )
    assert config.mean == (0.48, 0.46, 0.41) and config.std == (0.27, 0.26, 0.28)
    assert config.name == f"hf:{folder}" and config.model == str(folder)
    assert config.pool_frame == 2  # 3 does not divide a grid of 4
    spec = load(folder).spec("int8")
    assert spec.name.startswith("hf-my-tower-v2-int8-") and spec.activation == "quick_gelu"


def test_names_of_folders_become_safe_names_of_spaces() -> None:
    def name(path: str) -> str:
        return EncoderConfig(
            name=f"hf:{path}", library="transformers", model="x", blocks=(0,)
        ).space_name

    assert name("facebook/dinov2-small") == "hf-dinov2-small"
    assert name("/c/models--facebook--dinov2-small/snapshots/1a2b3c") == "hf-dinov2-small"
    assert name("/x/..") == name("/") == "hf-tower"
    assert name("/x/a\nb;$(c) ‘é’") == "hf-a-b-c"
    assert len(name("/x/" + "y" * 300)) == 63


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_the_tower_of_a_llava_is_that_tower(kind: str, prefix: str, tmp_path: Path) -> None:
    tower = transformers_tower(kind)
    alone = save_tower(tmp_path / "tower", tower)
    strategy = "full" if kind == "siglip" else "default"
    layers = {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": strategy}
    whole = llava(tower, **layers)
    folder = save_tower(tmp_path / "llava", whole, do_center_crop=True, size={"shortest_edge": SIDE},
                        crop_size={"height": SIDE, "width": SIDE})  # fmt: skip
    if prefix:  # names as some versions of transformers 5 write them
        save_file(whole.state_dict(), folder / "model.safetensors")
    encoder = load(folder)
    assert encoder.config.blocks == (DEPTH - 2, 0) and encoder.config.fit == "crop"
    pixels = noise(2, SIDE)
    with torch.no_grad():
        states = whole.model.vision_tower(encoder.normalize(pixels), output_hidden_states=True)
    first = FIRST[kind]
    wanted = [states.hidden_states[layer][:, first:] for layer in (-2, 1)]
    torch.testing.assert_close(encoder.encode(pixels), torch.cat(wanted, -1), atol=1e-5, rtol=0)
    # Alone it makes the same features, but for the fit.
    spec, other = encoder.spec("fp16"), load(alone, blocks=(DEPTH - 2, 0), fit="crop").spec("fp16")
    assert spec.fingerprint == other.fingerprint
    assert tower_hash(folder, (DEPTH - 2, 0)) == tower_hash(alone, (DEPTH - 2, 0)) == spec.weights


@pytest.mark.parametrize(("kind", "name"), [("clip", "CLIP"), ("siglip", "Siglip")])
def test_the_tower_of_a_whole_clip_or_siglip_is_that_tower(
    kind: str, name: str, tmp_path: Path
) -> None:
    tower = transformers_tower(kind)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 99}
    text |= {"num_attention_heads": 2, "projection_size": 32}
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower.config.to_dict(), text_config=text
    )
    whole = getattr(transformers, f"{name}Model")(config)
    part = whole.vision_model
    state = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    part.load_state_dict(state)
    folder = save_tower(tmp_path / "whole", whole)
    alone = save_tower(tmp_path / "alone", tower)
    assert load(folder).spec("fp16").fingerprint == load(alone).spec("fp16").fingerprint


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dinov2", "Dinov2ForImageClassification"),
        ("dinov2-registers", "Dinov2WithRegistersForImageClassification"),
        ("dinov3", "DINOv3ViTBackbone"),
        ("clip", "CLIPVisionModelWithProjection"),
    ],
)
def test_the_tower_in_a_classifier_or_a_backbone_is_that_tower(
    kind: str, name: str, tmp_path: Path
) -> None:
    model = getattr(transformers, name)(transformers_tower(kind).config).eval()
    encoder = load(save_tower(tmp_path / "tower", model), blocks=(1,))
    pixels = noise(2, SIDE)
    states = hidden_states(model, encoder, pixels)
    wanted = states[2][:, FIRST[kind] :]
    torch.testing.assert_close(encoder.encode(pixels), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-registers", "dinov3"])
def test_dino_takes_other_sizes_as_transformers_does(kind: str, tmp_path: Path) -> None:
    model = transformers_tower(kind)
    folder = save_tower(tmp_path / "tower", model, do_center_crop=True,
                        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48})  # fmt: skip
    encoder = load(folder)
    spec = encoder.spec("fp16")
    assert spec.image_size == 48 and encoder.config.fit == "crop" and spec.shorter_side == 64
    photograph = Image.fromarray(data.chelsea())
    theirs = LlavaImageProcessorPil(**json.loads((folder / "preprocessor_config.json").read_text()))
    wanted = theirs(photograph, return_tensors="pt")["pixel_values"]
    found = encoder.normalize(encoder.prepare(photograph)[None])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    pixels = noise(3, 48)
    states = hidden_states(model, encoder, pixels)
    wanted = states[DEPTH - 1][:, FIRST[kind] :]
    torch.testing.assert_close(encoder.encode(pixels), wanted, atol=1e-5, rtol=0)
    assert load(folder, image_size=96).spec("fp16").shorter_side == 128
    assert load(folder, fit="squash").spec("fp16").resize == "pillow:bicubic"
    assert (
        load(folder, image_size=SIDE).spec("fp16").fingerprint != encoder.spec("fp16").fingerprint
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_other_towers_have_one_size(kind: str, tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower(kind))
    assert "give the entry image_size: 32" in refused(folder, image_size=48)


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tensor_the_features_depend_on_is_hashed(kind: str, tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower(kind))
    file = folder / "model.safetensors"
    stored = load_file(file)
    first = tower_hash(folder, (1,))
    unused = ("post_layernorm", "layernorm.", "norm.", "head.", "embeddings.mask_token")
    for name, value in stored.items():
        if not value.numel():  # no registers
            continue
        changed = value.clone()
        changed.view(-1)[-1] += 1
        save_file({**stored, name: changed}, file)
        is_unused = name.startswith(unused) or ".2." in name or ".3." in name
        assert (tower_hash(folder, (1,)) == first) == is_unused, name


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("clip", "num_attention_heads", 4),
        ("siglip", "layer_norm_eps", 1e-3),
        ("clip", "hidden_act", "gelu"),
        ("dinov2", "num_attention_heads", 4),
        ("dinov3", "rope_theta", 50.0),
    ],
)
def test_values_of_the_config_are_in_the_fingerprint(
    kind: str, key: str, value: Any, tmp_path: Path
) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower(kind))
    first = load(folder).spec("fp16")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, key: value}))
    second = load(folder).spec("fp16")
    assert first.fingerprint != second.fingerprint and first.weights == second.weights


def test_an_encoder_is_rebuilt_from_what_its_space_records(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    encoder = load(folder, pool_image=2)
    pixels, spec = noise(2, SIDE), encoder.spec("fp16")
    info = json.loads(json.dumps(encoder.load_info()))
    again = rebuild_encoder(info, spec, device="cpu")
    assert torch.equal(again.encode(pixels), encoder.encode(pixels))
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no such folder; it moved\? --weights FOLDER"):
        rebuild_encoder(info, spec, device="cpu")
    for place in (moved, moved / "model.safetensors"):
        again = rebuild_encoder(info, spec, device="cpu", weights=str(place))
        assert torch.equal(again.encode(pixels), encoder.encode(pixels))
    save_tower(moved, transformers_tower("dinov2", seed=1))
    with pytest.raises(UserError, match="was made with weights"):
        rebuild_encoder(info, spec, device="cpu", weights=str(moved))


def test_tables_keep_their_precision_in_float16(tmp_path: Path) -> None:
    """The angles of DINOv3 are computed in float32, as transformers does for a model in bfloat16."""
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov3"))
    with quiet():
        model = transformers.DINOv3ViTModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    encoder = load(folder, compute_dtype="bfloat16")
    pixels = noise(3, SIDE)
    with torch.no_grad():
        given = encoder.normalize(pixels).bfloat16()
        states = model(given, output_hidden_states=True).hidden_states
    assert torch.equal(encoder.encode(pixels), states[DEPTH - 1][:, 3:].float())


def test_random_weights_need_no_file_with_weights(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    (folder / "model.safetensors").unlink()
    encoder = load_encoder(entry(folder), device="cpu", random_weights=True)
    assert encoder.spec("fp16").name.startswith("random-hf-tower-fp16-")
    features = encoder.encode(noise(2, SIDE))
    assert features.isfinite().all() and features.std() > 0.1
    assert "no model.safetensors" in refused(folder)


def test_colours_that_no_file_states_are_asked_for(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    (folder / "preprocessor_config.json").unlink()
    assert "mean and std are unknown, since" in refused(folder)
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert load(folder, **colours).spec("fp16").mean == (0.5, 0.5, 0.5)


def test_an_entry_of_the_users_file_names_a_folder_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = "encoders: {mine: {library: transformers, model: tower, blocks: [0], pool_image: 4%s}}"
    try:
        (tmp_path / "my.yaml").write_text(text % ", activation: gelu, compute_dtype: float32")
        use_file(tmp_path / "my.yaml")
        config = encoder_config("mine")
        assert config.blocks == (0,) and config.pool_image == 4 and config.fit == "squash"
        spec = load_encoder(config, device="cpu").spec("fp16")
        assert spec.name.startswith("mine-fp16-") and spec.tokens("image") == 1
        (tmp_path / "my.yaml").write_text(text % ", activation: quick_gelu")
        use_file(tmp_path / "my.yaml")
        with pytest.raises(UserError, match=r"activation quick_gelu, but .*config\.json says gelu"):
            load_encoder(encoder_config("mine"), device="cpu")
    finally:
        use_file(None)


def test_what_is_no_folder_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    for source, message in {
        tmp_path / "none": "no such folder; give one with config.json",
        tmp_path / "file": f"a file; give its folder: --encoder hf:{tmp_path}",
        "": "no such folder",
        tmp_path: "no config.json, so no model of transformers",
        "facebook/none-of-these": "is not on this machine, and HF_HUB_OFFLINE is set; give facebook/none-of-"
        "these as a local folder: --encoder hf:FOLDER",
        "../none/x": "no such folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            encoder_config(f"hf:{source}")
        assert "\n" not in str(caught.value)
