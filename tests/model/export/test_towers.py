"""Exported towers: every tensor has its place in transformers' class, and other towers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, SiglipVisionModel

from configs import UserError
from model.export.towers import export_tower
from model.language.loading import quiet
from model.vision.config import encoder_config
from model.vision.encoder import load_encoder
from tests.support import tiny_clip


@pytest.mark.parametrize(
    ("changes", "kind", "layers"),
    [
        ({"blocks": (2,)}, CLIPVisionModel, -2),
        ({"blocks": (3, 0), "model": "tiny", "activation": "gelu"}, CLIPVisionModel, [-1, -4]),
        ({"model": "tiny-siglip", "activation": "gelu"}, SiglipVisionModel, -2),
    ],
)
def test_hidden_states_are_the_features(
    changes: dict[str, Any], kind: type[Any], layers: int | list[int], tmp_path: Any
) -> None:
    entry = tiny_clip.entry(**changes)
    weights = tiny_clip.write_weights(tmp_path, entry.model)
    eyes = load_encoder(entry, device="cpu", weights=str(weights))
    tower = export_tower(eyes)
    model = kind(tower.config).eval()
    assert set(model.state_dict()) == set(tower.tensors)
    model.load_state_dict(tower.tensors)
    assert tower.layers == layers
    pixels = tiny_clip.noise(3, tiny_clip.SIDE)
    with torch.inference_mode():
        hidden = model(eyes.normalize(pixels), output_hidden_states=True).hidden_states
    chosen = [hidden[i] for i in (layers if isinstance(layers, list) else [layers])]
    first = int(tower.select == "default")
    theirs = torch.cat([states[:, first:] for states in chosen], dim=-1)
    np.testing.assert_allclose(theirs, eyes.encode(pixels), atol=2e-5)


@pytest.mark.parametrize("kind", tiny_clip.TOWERS)
def test_a_tower_of_transformers_is_exported_whole(kind: str, tmp_path: Path) -> None:
    """Every tensor of its class is in it under its published name, the norm behind the last block too."""
    model = tiny_clip.transformers_tower(kind)
    folder = tiny_clip.save_tower(tmp_path / "tower", model)
    eyes = load_encoder(encoder_config(f"hf:{folder}", blocks=(0,)), device="cpu")
    tower = export_tower(eyes)
    stored = load_file(folder / "model.safetensors")
    without = {name: value for name, value in stored.items() if not name.startswith("head.")}
    assert tower.tensors.keys() == without.keys()
    assert all(torch.equal(tower.tensors[name], value) for name, value in without.items())
    assert tower.layers == -tiny_clip.DEPTH and tower.config.num_hidden_layers == tiny_clip.DEPTH
    assert tower.select == ("full" if kind == "siglip" else "default")
    assert tower.registers == {"dinov2-registers": 3, "dinov3": 2}.get(kind, 0)


def test_random_weights_of_a_folder_are_exported_whole(tmp_path: Path) -> None:
    model = tiny_clip.transformers_tower("dinov2")
    folder = tiny_clip.save_tower(tmp_path / "tower", model)
    (folder / "model.safetensors").unlink()
    config = encoder_config(f"hf:{folder}", blocks=(1,), compute_dtype="float32")
    eyes = load_encoder(config, device="cpu", random_weights=True)
    tower = export_tower(eyes)
    with quiet():
        made = type(model).from_pretrained(None, config=tower.config, state_dict=tower.tensors)
    pixels = tiny_clip.noise(3, tiny_clip.SIDE)
    with torch.inference_mode():
        given = eyes.normalize(pixels)
        hidden = made.eval()(given, output_hidden_states=True).hidden_states[tower.layers]
    np.testing.assert_allclose(hidden[:, 1:], eyes.encode(pixels), atol=2e-5)


def test_what_no_feature_depends_on_may_be_missing(tmp_path: Path) -> None:
    folder = tiny_clip.save_tower(tmp_path / "tower", tiny_clip.transformers_tower("dinov2"))
    file = folder / "model.safetensors"
    stored = load_file(file)
    gone = {name for name in stored if name.startswith("layernorm.") or "mask_token" in name}
    assert len(gone) == 3
    save_file({name: value for name, value in stored.items() if name not in gone}, file)
    eyes = load_encoder(encoder_config(f"hf:{folder}"), device="cpu")
    tensors = export_tower(eyes).tensors
    assert tensors.keys() == stored.keys() and bool((tensors["layernorm.weight"] == 1).all())


def test_another_kind_of_tower_is_refused_by_name() -> None:
    """It has a CLS token and layer scales, which SigLIP of transformers lacks."""
    changes = {"model": "vit_medium_patch16_gap_256", "activation": "gelu", "name": "gap"}
    eyes = load_encoder(tiny_clip.entry(**changes), device="cpu", random_weights=True)
    message = r"encoder gap: vit_medium_patch16_gap_256 has a tensor .*gamma.*cannot be exported"
    with pytest.raises(UserError, match=message):
        export_tower(eyes)
