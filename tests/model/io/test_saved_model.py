"""Trained models on disk: saved whole, loaded equal by us and by transformers, found by run and stage.

save_final(folder, vlm, tokenizer, meta)
vlm, tokenizer, meta = load_final(find_run("demo"))
AutoModelForCausalLM.from_pretrained(find_run("demo"))      # its language model
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache.format.checksums import sealed_json
from configs import UserError
from model.io import saved_model
from model.io.runs import find_run, read_meta
from model.io.saved_model import load_final, save_final
from model.language.chat_template import prompt_ids
from model.language.model import load_language
from model.language.tokenizer import encode_text, eos_ids
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


def test_each_weight_is_stored_once(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    language, connector = (
        load_file(folder / n) for n in ("model.safetensors", "connector.safetensors")
    )
    assert "lm_head.weight" not in language  # tied
    assert connector.keys() == vlm.connector.state_dict().keys()
    stored = [*language.values(), *connector.values()]
    assert sum(x.numel() for x in stored) == sum(p.numel() for p in vlm.parameters())
    modes = {p.stat().st_mode & 0o777 for p in folder.iterdir()}
    assert len(modes) == 1, "all files have one mode"


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_language_model_exactly(tmp_path: Path, tied: bool) -> None:
    """It loaded random weights once, with a warning."""
    vlm, tok = build_vlm(VISION, "random:qwen3-tiny", "linear", 7)
    if not tied:
        vlm.language.config.tie_word_embeddings = False
        vlm.language.lm_head.weight = torch.nn.Parameter(vlm.language.lm_head.weight + 0.1)
    save_final(tmp_path / "final", vlm, tok, META)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    text = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nred é 12"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == tok(text, return_tensors="pt").input_ids.tolist()
    assert theirs.dtype == torch.float32
    ours, _, _ = load_final(tmp_path / "final")
    ours.language.set_attn_implementation("sdpa")
    with torch.inference_mode():
        expected = ours.language(ids).logits
        assert torch.equal(theirs.eval()(ids).logits, expected)
    assert set(theirs.generation_config.eos_token_id) == set(eos_ids(tok))
    talk = [{"role": "user", "content": "What is it?"}]
    asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert asked == prompt_ids(tok, [("user", "What is it?", 1.0)], media=0)


def test_a_new_stage_1_starts_from_the_language_model_of_a_run(saved: tuple[Path, VLM]) -> None:
    folder, vlm = saved
    (folder / "connector.safetensors").unlink()  # it is not needed
    language, tok = load_language(str(folder))
    trained = vlm.language.state_dict()
    assert all(torch.equal(trained[k], v) for k, v in language.state_dict().items())
    assert encode_text(tok, "red é")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 1, this version reads 2"),
        ({"template": "chatml-0"}, "chat template chatml-0"),
    ],
)
def test_other_versions_are_refused(
    saved: tuple[Path, VLM], change: dict[str, Any], message: str
) -> None:
    meta = read_meta(saved[0]) | change
    del meta["seal"]
    (saved[0] / saved_model.META).write_bytes(sealed_json(meta))
    with pytest.raises(UserError, match=message):
        load_final(saved[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path)


FILES = ("model.safetensors", "connector.safetensors", "config.json", "tokenizer.json", "META")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, Path.touch, drop_a_tensor])
def test_damage_is_one_line(
    saved: tuple[Path, VLM], name: str, damage: Callable[[Path], None]
) -> None:
    """transformers would fill gaps with random values."""
    path = saved[0] / (saved_model.META if name == "META" else name)
    if damage is Path.touch:
        path.write_bytes(b"")
    elif damage is drop_a_tensor and path.suffix != ".safetensors":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    else:
        damage(path)
    with pytest.raises(UserError) as caught:
        load_final(saved[0])
    assert "\n" not in str(caught.value)
    assert (str(path) if path.exists() or name != "META" else "train one:") in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(saved: tuple[Path, VLM]) -> None:
    with pytest.raises(UserError, match=r"train one: python -m train\.run --stage 1"):
        load_final(saved[0].parent)
    shutil.copy(
        saved[0] / "config.json", saved[0] / "README.md"
    )  # files beside are not its business
    load_final(saved[0])


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
    (tmp_path / "runs/cats/stage2/config.yaml").write_text("features: /data/my cache\n")
    with pytest.raises(
        UserError, match=r"--stage 3 --run cats --features '/data/my cache' --resume$"
    ):
        find_run("cats", stage=3)  # with the cache of the stage before
    assert find_run("runs/cats/stage1") == Path("runs/cats/stage1/final")
    with pytest.raises(UserError, match="run dogs: stage 1 is not finished"):
        find_run("dogs")
    with pytest.raises(UserError, match=r"no run cets .*nearest: cats; there are: cats, dogs"):
        find_run("cets")
    monkeypatch.chdir(tmp_path / "runs/dogs")
    with pytest.raises(UserError, match=r"train one: python -m train\.run --stage 1"):
        find_run("cats")
