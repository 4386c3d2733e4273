"""The fingerprint changes with every field that can change a value, and with nothing else.

dataclasses.replace(spec, codec="int4").fingerprint != spec.fingerprint
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cache.format.spec import FeatureSpec

SPEC = FeatureSpec(
    encoder="clip",
    architecture="open_clip:ViT-L-14-336-quickgelu",
    weights="ab" * 32,
    activation="quick_gelu",
    blocks=(22,),
    image_size=336,
    patch_size=14,
    width=1024,
    fit="squash",
    resize="pillow:bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    compute_dtype="bfloat16",
    batch_size=8,
    codec="int8",
)

CHANGES: dict[str, Any] = {
    "architecture": "open_clip:ViT-B-32-quickgelu",
    "weights": "cd" * 32,
    "activation": "gelu",
    "blocks": (21,),
    "keep_cls": True,
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "fit": "pad",
    "resize": "torch:bicubic",
    "mean": (0.5, 0.5, 0.4),
    "std": (0.25, 0.25, 0.2),
    "pool_image": 2,
    "pool_frame": 2,
    "compute_dtype": "float32",
    "batch_size": 1,
    "codec": "fp16",
    "format": 2,
    "container": "webdataset",
    "decode": "reduced",
}


def test_every_field_but_the_display_name_is_hashed() -> None:
    names = {f.name for f in dataclasses.fields(FeatureSpec)} - {"encoder", "tail"}
    assert names == set(CHANGES)
    assert dataclasses.replace(SPEC, encoder="other").fingerprint == SPEC.fingerprint
    one = dataclasses.replace(SPEC, pool_frame=1)  # without pooling, every change is possible
    for name, value in CHANGES.items():
        assert dataclasses.replace(one, **{name: value}).fingerprint != one.fingerprint, name


def test_the_fingerprint_is_part_of_the_format() -> None:
    """The names of spaces contain it. If this fails, no existing cache is found any more."""
    older = {k: v for k, v in SPEC.to_json().items() if k not in ("container", "decode", "tail")}
    assert FeatureSpec.from_json(older) == SPEC
    assert SPEC.fingerprint == "096dfc73ec5fdb7ddbd1a0cd3de1988a8ebbd3ff4b7b6d97121a1f4b4d6955f1"
    assert SPEC.name == "clip-int8-" + SPEC.fingerprint[:8]


def test_a_spec_survives_json_and_unknown_keys_are_refused() -> None:
    values = SPEC.to_json()
    assert FeatureSpec.from_json(values) == SPEC
    with pytest.raises(ValueError, match="unknown keys shiny"):
        FeatureSpec.from_json({**values, "shiny": 1})
    del values["weights"]
    with pytest.raises(ValueError, match="missing keys weights"):
        FeatureSpec.from_json(values)


def test_row_sizes_are_the_documented_ones() -> None:
    assert SPEC.tokens("image") == 576
    assert SPEC.tokens("frame") == 64
    assert SPEC.row_bytes("image") == 610_304  # 0.61 MB
    assert SPEC.row_bytes("frame") == 64 * (1024 + 32) + 2048
    fp16 = dataclasses.replace(SPEC, codec="fp16")
    assert fp16.row_bytes("image") == 1_179_648  # 1.18 MB
    int4 = dataclasses.replace(SPEC, codec="int4")
    assert int4.row_bytes("image") == 315_392  # 0.32 MB


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "zip"},
        {"container": "rar"},
        {"fit": "stretch"},
        {"decode": "half"},
        {"patch_size": 15},
        {"pool_image": 5},
        {"pool_image": 0},
        {"blocks": ()},
        {"keep_cls": True},  # with frames pooled
    ],
)
def test_invalid_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(SPEC, **change)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/b",
        "a..b",
        ".x",
        "-x",
        "a b",
        "a\n",
        "\x1b[2J",
        "é",
        "a" * 101,
        3,
    ],
    ids=ascii,
)
def test_the_name_of_an_encoder_can_name_a_folder(name: str) -> None:
    values = {**SPEC.to_json(), "encoder": name}
    with pytest.raises(
        ValueError, match=r"^encoder '[^\n]*at most 100 characters$|got `int` - at `\$.encoder`$"
    ) as caught:
        FeatureSpec.from_json(values)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    for fine in ("a", "clip-vit-l14-336", "hf-Qwen2.5_x.y", "a" * 100):
        assert FeatureSpec.from_json({**values, "encoder": fine}).name.startswith(f"{fine}-")
