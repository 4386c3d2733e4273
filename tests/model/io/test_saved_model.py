"""Trained models on disk: saved whole, loaded equal, found by run and stage.

save_final(folder, vlm, tokenizer, meta)
vlm, tokenizer, meta = load_final(find_run("demo"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import UserError
from model.io import saved_model
from model.io.saved_model import find_run, load_final, read_meta, save_final, weights_of
from model.vlm import VLM, build_vlm
from tests.support.trained_runs import VISION, one_sample, random_features

META = {"connector": "linear", "llm": "random:qwen3-tiny", "space": {}, "stage": 1, "step": 5}


def loss_of(vlm: VLM) -> Tensor:
    return vlm.loss(one_sample(), random_features())[0]


@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_a_loaded_model_equals_the_saved_one(tmp_path: Path, connector: str) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", connector, 4)
    folder = tmp_path / "stage1" / "final"
    save_final(folder, vlm, tok, META | {"connector": connector, "note": "kept"})
    again, tok_again, meta = load_final(folder)
    state = again.state_dict()
    assert state.keys() == vlm.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in vlm.state_dict().items())
    assert again.language.lm_head.weight is again.language.model.embed_tokens.weight
    assert not again.training
    assert tok_again.get_vocab() == tok.get_vocab()
    assert (meta["vision_width"], meta["note"], meta["step"]) == (VISION, "kept", 5)
    assert torch.equal(loss_of(again), loss_of(vlm.eval()))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, VLM]:
    """Save a model; return its folder and the model."""
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    save_final(tmp_path / "final", vlm, tok, META)
    return tmp_path / "final", vlm


def test_each_weight_is_stored_once_by_part(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    stored = load_file(folder / saved_model.WEIGHTS)
    assert "language.lm_head.weight" not in stored  # tied
    assert {name.split(".")[0] for name in stored} == {"connector", "language"}
    assert sum(x.numel() for x in stored.values()) == sum(p.numel() for p in vlm.parameters())
    modes = {p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert len(modes) == 1, "all files have one mode"


def test_an_untied_head_is_stored(tmp_path: Path) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    vlm.language.config.tie_word_embeddings = False
    vlm.language.lm_head.weight = torch.nn.Parameter(vlm.language.lm_head.weight + 1)
    save_final(tmp_path / "final", vlm, tok, META)
    again, _, _ = load_final(tmp_path / "final")
    assert torch.equal(again.language.lm_head.weight, vlm.language.lm_head.weight)
    embedding = vlm.language.get_input_embeddings().weight
    assert torch.equal(again.language.get_input_embeddings().weight, embedding)


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 0)
    (tmp_path / "final.partial").mkdir()
    (tmp_path / "final.partial" / "half").write_text("left by a crash")
    for step in (1, 2):
        save_final(tmp_path / "final", vlm, tok, META | {"step": step})
    assert read_meta(tmp_path / "final")["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "half").exists()


def test_a_model_with_missing_weights_is_refused(saved: tuple[Path, VLM]) -> None:
    """transformers would fill the gap with random values."""
    folder, vlm = saved
    weights = weights_of(vlm)
    del weights["language.model.norm.weight"]
    save_file(weights, folder / saved_model.WEIGHTS)
    with pytest.raises(UserError, match=r"not the weights of this model: language\.model\.norm"):
        load_final(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this version reads 1"),
        ({"template": "chatml-0"}, "chat template chatml-0"),
    ],
)
def test_other_versions_are_refused(
    saved: tuple[Path, VLM], change: dict[str, Any], message: str
) -> None:
    path = saved[0] / saved_model.META
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_final(saved[0])


def test_damaged_and_missing_files_are_refused(saved: tuple[Path, VLM]) -> None:
    weights = saved[0] / saved_model.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_final(saved[0])
    with pytest.raises(UserError, match=r"train one: python -m train\.run --stage 1"):
        load_final(saved[0].parent)


def test_the_last_finished_stage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in (1, 2):
        (tmp_path / f"runs/cats/stage{stage}/final").mkdir(parents=True)
        (tmp_path / f"runs/cats/stage{stage}/final" / saved_model.META).write_text("{}")
    (tmp_path / "runs/cats/stage3").mkdir()
    (tmp_path / "runs/dogs/stage1").mkdir(parents=True)
    assert find_run("cats") == Path("runs/cats/stage2/final")
    assert find_run("cats", stage=1) == Path("runs/cats/stage1/final")
    assert find_run(str(tmp_path / "runs/cats")).resolve() == tmp_path / "runs/cats/stage2/final"
    assert find_run("runs/cats/stage1/final") == Path("runs/cats/stage1/final")
    with pytest.raises(UserError, match=r"stage 3 is not finished .*--stage 3 --run cats --resume"):
        find_run("cats", stage=3)
    with pytest.raises(UserError, match="run dogs: stage 1 is not finished"):
        find_run("dogs")
    with pytest.raises(UserError, match=r"no run cets .*nearest: cats; there are: cats, dogs"):
        find_run("cets")
    monkeypatch.chdir(tmp_path / "runs/dogs")
    with pytest.raises(UserError, match=r"train one: python -m train\.run --stage 1"):
        find_run("cats")
