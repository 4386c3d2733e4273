"""JSON files of folders with vision towers: what they say, and those that are refused.

read_tower_config(Path("dinov2-small")).blocks
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import UserError
from model.io.tower_config import read_tower_config
from tests.support import ROOT

CLIP = {"model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 6}
CLIP |= {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
LLAVA = {"model_type": "llava", "vision_config": CLIP}


def write(folder: Path, config: Any, images: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if images is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ({}, (4,)),
        ({"vision_feature_layer": -1}, (5,)),
        ({"vision_feature_layer": 3}, (2,)),
        ({"vision_feature_layer": [-2, -5, 6]}, (4, 1, 5)),
    ],
)
def test_layers_of_llava_are_blocks(
    values: dict[str, Any], blocks: tuple[int, ...], tmp_path: Path
) -> None:
    found = read_tower_config(write(tmp_path, {**LLAVA, **values}))
    assert found.blocks == blocks and found.class_name == "CLIPVisionModel"


@pytest.mark.parametrize(
    ("images", "fit", "side"),
    [
        (None, "squash", 32),
        ({"size": {"height": 32, "width": 32}}, "squash", 32),
        ({"size": 32, "do_center_crop": False}, "squash", 32),
        ({"size": {"shortest_edge": 32}, "crop_size": 32}, "crop", 32),
        ({"size": {"height": 32, "width": 32}, "crop_size": 32}, "squash", 32),
        ({"size": {"shortest_edge": 36}, "crop_size": {"height": 30, "width": 30}}, "crop", 30),
        ({"do_pad": True, "size": {"height": 32, "width": 32}, "do_center_crop": False}, "pad", 32),
    ],
)
def test_the_fit_is_the_processors(images: Any, fit: str, side: int, tmp_path: Path) -> None:
    found = read_tower_config(write(tmp_path, CLIP, images))
    assert (found.fit, found.image_size) == (fit, side)


def test_the_processors_own_file_is_read_first(tmp_path: Path) -> None:
    write(tmp_path, CLIP, {"image_mean": [0.1] * 3, "image_std": [1] * 3})
    nested = {"image_processor": {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_tower_config(tmp_path).mean == (0.5, 0.25, 0.5)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    assert read_tower_config(tmp_path).mean == (0.1, 0.1, 0.1)


def test_what_is_done_in_another_way_is_noted(tmp_path: Path) -> None:
    images = {"size": {"shortest_edge": 40}, "crop_size": 32, "resample": 2}
    (note,) = read_tower_config(write(tmp_path, CLIP, images)).notes
    assert "resizes with filter 2" in note
    assert read_tower_config(tmp_path).shorter_side == 40
    assert read_tower_config(write(tmp_path, CLIP, {"resample": 3})).notes == ()


def test_colours_that_are_not_normalised(tmp_path: Path) -> None:
    found = read_tower_config(write(tmp_path, CLIP, {"do_normalize": False}))
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))
    assert read_tower_config(write(tmp_path, CLIP, {})).mean is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "a JSON list"),
        ({}, "no model_type"),
        ({"model_type": ["x"]}, "no model_type"),
        ({"model_type": "bert"}, "a bert, whose tower is none of CLIPVisionModel"),
        ({"model_type": "siglip2", "vision_config": {}}, "a siglip2, whose tower is none of"),
        ({"model_type": "llava"}, "no vision_config"),
        ({**LLAVA, "vision_config": {"model_type": "pixtral"}}, "a pixtral, whose tower"),
        ({**LLAVA, "vision_feature_layer": 0}, "does not name outputs of its 6 blocks"),
        ({**LLAVA, "vision_feature_layer": -8}, "does not name outputs"),
        ({**LLAVA, "vision_feature_layer": [-2, 5]}, "each once"),
        ({**LLAVA, "vision_feature_layer": "-2"}, "vision_feature_layer"),
        (
            {**LLAVA, "vision_feature_select_strategy": "full"},
            "not give the features of its patches",
        ),
        (
            {**LLAVA, "vision_config": {**CLIP, "model_type": "siglip_vision_model"}},
            "'default' on a SiglipVisionModel",
        ),
        ({**CLIP, "hidden_act": "relu"}, "hidden_act 'relu' is none of quick_gelu"),
        ({**CLIP, "hidden_size": 10**12}, "hidden_size 1000000000000"),
        ({**CLIP, "num_hidden_layers": True}, "num_hidden_layers True"),
        ({**CLIP, "image_size": [32, 64]}, "squares only"),
        ({**CLIP, "layer_norm_eps": "x"}, "layer_norm_eps x"),
        ({**CLIP, "num_attention_heads": 0}, "num_attention_heads 0"),
        ({**CLIP, "intermediate_size": 10**9}, "intermediate_size 1000000000"),
        ({**CLIP, "num_channels": 4}, "images have 3"),
        (
            {**CLIP, "model_type": "dinov2_with_registers", "num_register_tokens": "4"},
            "num_register",
        ),
    ],
)
def test_other_models_are_refused_in_one_line(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_tower_config(write(tmp_path, config))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"do_rescale": False}, "do_rescale false"),
        ({"do_resize": False}, "do_resize false"),
        ({"rescale_factor": 1 / 127.5}, "divided by 255"),
        ({"size": {"height": 32, "width": 48}}, "not the side of a square"),
        ({"size": "32"}, "not the side of a square"),
        ({"size": {"height": 40, "width": 40}, "crop_size": 32}, "set do_center_crop false"),
        ({"size": {"shortest_edge": 24}, "crop_size": 32}, "set do_center_crop false"),
        ({"image_mean": [0.5, 0.5]}, "three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "three numbers"),
        ({"image_std": [0.5, 0.5, "x"]}, "three numbers"),
    ],
)
def test_other_processors_are_refused_in_one_line(
    images: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_tower_config(write(tmp_path, CLIP, images))
    assert "\n" not in str(caught.value) and "preprocessor_config.json" in str(caught.value)


def test_reading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write(tmp_path, CLIP)
    code = (
        "import sys; from model.vision.config import encoder_config; "
        f"encoder_config('hf:{tmp_path}', mean=(0.5,) * 3, std=(0.5,) * 3); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
