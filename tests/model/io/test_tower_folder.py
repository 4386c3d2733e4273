"""Tensors of towers in folders: read whole, hashed by published names, and refused if odd.

tower_hash(Path("llava"), blocks=(22,))
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import UserError
from model.io.tower_folder import open_tower, read_tensors, tower_hash
from tests.support.tiny_clip import DEPTH, TOWERS, save_tower, transformers_tower


def message(folder: Path, blocks: tuple[int, ...] = (1,)) -> str:
    with pytest.raises(UserError) as caught:
        tower_hash(folder, blocks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", TOWERS)
def test_names_of_the_class_give_the_same_hash_as_published_names(
    kind: str, tmp_path: Path
) -> None:
    model = transformers_tower(kind)
    folder = save_tower(tmp_path / "tower", model)
    file = folder / "model.safetensors"
    published = set(load_file(file))
    first = tower_hash(folder, (0, 2))
    save_file(model.state_dict(), file)  # as the class has them
    assert tower_hash(folder, (0, 2)) == first
    if kind.startswith("din"):
        assert set(load_file(file)) != published
    assert open_tower(folder).stored.keys() == published


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    first = tower_hash(folder, (1,))
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    places = {}
    for part, some in enumerate((names[::2], names[1::2])):
        places |= dict.fromkeys(some, f"model-{part}.safetensors")
        save_file({name: stored[name] for name in some}, folder / f"model-{part}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert tower_hash(folder, (1,)) == first
    index.write_text(json.dumps({"weight_map": {**places, "x": "../model-0.safetensors"}}))
    assert "is not the name of a shard" in message(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformers_tower("siglip").to(dtype)
    folder = save_tower(tmp_path / "tower", model)
    first = tower_hash(folder, (1,))
    tensors = read_tensors(open_tower(folder), None)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    save_tower(folder, model.float())
    assert tower_hash(folder, (1,)) == first


BLOCK = "encoder.layer.0.norm1.weight"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.pop(BLOCK), f"missing: {BLOCK}"),
        (lambda t: t.update({"encoder.layer.9.x": torch.ones(1)}), "left over: encoder.layer.9.x"),
        (lambda t: t.update({"lora_A": torch.ones(1)}), "left over: lora_A"),
        (
            lambda t: t.update({BLOCK: torch.ones(3)}),
            "is [(]3,[)], and by config.json it is [(]64,[)]",
        ),
        (lambda t: t.update({BLOCK: torch.ones(64).to(torch.int8)}), "I8: quantised"),
        (lambda t: t.update({BLOCK: torch.full((64,), float("nan"))}), "not finite"),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "no weights of a Dinov2Model"),
    ],
)
def test_odd_tensors_are_refused(change: Any, wanted: str, tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=wanted) as caught:
        tower_hash(folder, (1,))
    assert "\n" not in str(caught.value)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("clip"))
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "trapped",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "is a pickle, which can run code and is not read; convert it" in message(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    assert "not a safetensors file (a pickle" in message(folder)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"num_hidden_layers": 10**6}, "1,000,000 blocks, but the weights have only"),
        ({"num_hidden_layers": DEPTH + 1}, "missing: encoder.layer.4."),
        ({"num_hidden_layers": DEPTH - 1}, "left over: encoder.layer.3."),
        ({"num_attention_heads": 5}, "not a config of Dinov2Model|config.json it is"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps x"),
    ],
)
def test_a_config_of_other_sizes_is_refused(values: Any, wanted: str, tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UserError, match=wanted):
        tower_hash(folder, (1,))


def test_code_and_kernels_that_a_config_names_are_not_used(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("dinov2"))
    first = tower_hash(folder, (1,))
    path = folder / "config.json"
    more = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "evil/kernel"}
    more |= {"_attn_implementation": "evil/kernel", "quantization_config": {"quant_method": "x"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    assert tower_hash(folder, (1,)) == first
    assert not (tmp_path / "trapped").exists()


def test_blocks_that_do_not_exist_are_named(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", transformers_tower("clip"))
    assert message(folder, (4,)) == f"blocks [4]: {folder} has 4 blocks, 0 to 3"
