"""Entries of configs/encoders.yaml: each builds, and invalid ones are refused in one line.

config = encoder_config("clip-vit-l14-336", pool_image=2)
"""

from __future__ import annotations

import pytest

from configs import UserError, load
from model.vision.config import DemoTowerConfig, EncoderConfig, encoder_config
from model.vision.encoder import load_encoder
from tests.support import tiny_clip
from tests.support.tiny_clip import refusal


@pytest.mark.parametrize("name", load("encoders"))
def test_every_entry_builds(name: str) -> None:
    encoder = encoder_config(name)
    assert encoder.name == name
    if encoder.library == "open_clip":
        from model.vision.activation_check import check_entry
        from model.vision.clip_tower import ClipTower

        own = encoder if encoder.tower else None  # states its sizes: open_clip has no such model
        tower = ClipTower(encoder.model, encoder.blocks, demo=own)  # on the meta device: no weights
        if own is None:
            check_entry(tower, encoder)
        assert all(tensor.is_meta for tensor in tower.tensors().values())
        assert tower.image_size // tower.patch_size % encoder.pool_frame == 0
        assert tower.width % 64 == 0
    else:
        assert load_encoder(encoder, device="cpu").spec("int8").tokens("frame")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks": (9,)}, "has 4 blocks, 0 to 3"),
        ({"model": "tiny-quickgelo"}, "nearest: tiny-quickgelu"),
        ({"model": "RN50-quickgelu"}, "not a Vision Transformer"),
        ({"model": "hf-hub:org/name"}, "no model 'hf-hub:org/name'"),
        ({"pool_image": 3}, "does not divide"),
        ({"model": "ViT-B-32-quickgelu", "pretrained": "opneai"}, "it has: openai"),
    ],
)
def test_invalid_encoders_are_refused_before_weights_are_loaded(
    overrides: dict[str, object], message: str
) -> None:
    assert message in refusal(tiny_clip.entry(**overrides))


def test_demo_blocks_are_checked_and_codecs_fit() -> None:
    with pytest.raises(UserError, match="the demo tower has"):
        load_encoder(encoder_config("demo", blocks=(99,)), device="cpu")
    with pytest.raises(UserError, match="multiple of 64"):
        sizes = DemoTowerConfig(image_size=16, patch_size=8, width=8, depth=1, heads=2)
        config = EncoderConfig(
            name="x", library="demo", activation="gelu", blocks=(0,), pool_frame=1, tower=sizes
        )
        load_encoder(config, device="cpu").spec("int8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fitt": "pad"}, "unknown key 'fitt'; nearest: fit"),
        ({"fit": "pda"}, "none of squash, pad, crop"),
        ({"blocks": [-2]}, "count from 0"),
        ({"blocks": []}, "at least one"),
        ({"blocks": [1, 1]}, "each block once"),
        ({"batch_size": 0}, "at least 1"),
        ({"library": "timm"}, "none of open_clip, transformers, demo"),
        ({"activation": "quick_gelu"}, "the demo tower computes gelu"),
    ],
)
def test_invalid_values_in_an_entry_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_config("demo", **overrides)


def test_a_tower_of_stated_sizes_is_a_demo_tower() -> None:
    sizes = encoder_config("demo").tower
    given = {"name": "x", "blocks": (0,), "activation": "gelu"}
    with pytest.raises(ValueError, match="library demo needs a tower"):
        EncoderConfig(library="demo", **given)
    with pytest.raises(ValueError, match=r"tower is for demo towers"):
        EncoderConfig(library="transformers", model="x", tower=sizes, **given)
    small = encoder_config("demo-clip")
    assert (small.library, small.tower is not None) == ("open_clip", True)
    with pytest.raises(UserError, match="encoder demo-clip has random weights and loads none"):
        small.check_weights("/x", random_weights=False)


def test_unknown_encoders_are_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="nearest: clip-vit-l14-336"):
        encoder_config("clip-vit-l14-366")
    assert encoder_config("demo", fit=None, seed=None) == encoder_config("demo")


def test_weights_that_would_not_be_loaded_are_refused() -> None:
    demo, clip = encoder_config("demo"), encoder_config("clip-vit-b32")
    with pytest.raises(UserError, match="--weights /x: encoder demo has random weights and loads"):
        demo.check_weights("/x", random_weights=False)
    with pytest.raises(UserError, match="--weights /x: --random-weights loads none"):
        clip.check_weights("/x", random_weights=True)
    clip.check_weights("/x", random_weights=False)
    for encoder in (demo, clip):
        encoder.check_weights(None, random_weights=True)
    with pytest.raises(UserError, match="encoder demo has random weights"):
        load_encoder(demo, device="cpu", weights="/x")
