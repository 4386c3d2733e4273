"""Adapters on disk belong to a model that is somewhere else: found, compared, merged, or refused in one line.

save_final(folder, vlm, tokenizer, meta | {"base": language_base("Qwen/Qwen3-0.6B", seed=0, checksum=...)})
vlm, tokenizer, meta = load_final(folder)       # merged
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cache.format.checksums import sealed_json
from configs import UserError
from model.io.base_model import POINTER, Base, final_base, language_base
from model.io.run_files import META
from model.io.runs import read_meta
from model.io.saved_model import check_files, load_final, save_final, saved_tokenizer
from model.language.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADDED,
    Adapters,
    adapter_parameters,
    merge_saved,
)
from model.language.tokenizer import byte_tokenizer
from model.vlm import VLM, build_vlm
from tests.support.trained_runs import VISION, one_sample, random_features

RANDOM = "random:qwen3-tiny"
NOTED: dict[str, Any] = {"connector": "linear", "space": {}, "stage": 1, "step": 5}


def llm_folder(folder: Path, seed: int = 0, *, full: bool = False, tied: bool = True) -> Path:
    """Write a language model; a `full` one has a row for each id, and no `<image>`."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    if full:
        state = tokenizer.backend_tokenizer.to_str().replace('"<image>"', '"<|image_pad|>"')
        backend = type(tokenizer.backend_tokenizer).from_str(state)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    config = Qwen3Config(
        vocab_size=len(tokenizer) if full else 320,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(vlm: VLM, seed: int = 1) -> VLM:
    """Give a model adapters that do something, and change its connector."""
    vlm.add_adapters(4, 0)
    generator = torch.Generator().manual_seed(seed)
    for value in (*adapter_parameters(vlm.language).values(), *vlm.connector.parameters()):
        value.data = torch.randn(value.shape, generator=generator) * 0.1
    return vlm.eval()


def save(folder: Path, llm: str, seed: int = 0) -> tuple[Path, VLM]:
    """Save a model with adapters on a language model; return its folder, and it."""
    vlm, tokenizer = build_vlm(VISION, llm, "linear", seed)
    train(vlm)
    base = language_base(llm, seed=seed, checksum=vlm.base_checksum)
    save_final(folder, vlm, tokenizer, NOTED | {"llm": llm, "base": base})
    return folder, vlm


def loss_of(vlm: VLM) -> float:
    with torch.inference_mode():
        return float(vlm.loss(one_sample(), random_features())[0])


@pytest.fixture
def on_a_folder(tmp_path: Path) -> tuple[Path, VLM, Path]:
    """Adapters on the language model in a folder: the saved model, the model, the language model's folder."""
    llm = llm_folder(tmp_path / "llm")
    return *save(tmp_path / "run/final", str(llm)), llm


def test_adapters_are_saved_without_the_base_and_loaded_merged(tmp_path: Path) -> None:
    folder, vlm = save(tmp_path / "final", RANDOM, seed=7)
    names = {path.name for path in folder.iterdir()}
    assert {ADAPTER, ADAPTER_CONFIG, "connector.safetensors", META, "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    again, tokenizer, meta = load_final(folder)
    assert again.adapters is None and not again.training
    assert loss_of(again) == pytest.approx(loss_of(vlm), abs=1e-5)
    assert tokenizer.get_vocab() == byte_vocabulary()
    assert meta["lora"] == {
        "rank": 4,
        "alpha": 8,
        "target_modules": [f"{one}_proj" for one in ("down", "gate", "k", "o", "q", "up", "v")],
        "load_in_4bit": False,
    }
    assert meta["base"]["llm"] == RANDOM and meta["base"]["seed"] == 7
    embedding = vlm.language.get_input_embeddings().weight
    assert torch.equal(again.language.get_input_embeddings().weight, embedding)
    assert again.language.lm_head.weight is again.language.model.embed_tokens.weight


def byte_vocabulary() -> dict[str, int]:
    return build_vlm(VISION, RANDOM, "linear", 0)[1].get_vocab()


def test_adapters_are_merged_before_they_are_rounded(tmp_path: Path) -> None:
    folder, _ = save(tmp_path / "final", RANDOM)
    whole, _, _ = load_final(folder)
    half, _, _ = load_final(folder, dtype=torch.bfloat16)
    for (name, value), other in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(value.to(torch.bfloat16), other), name


def test_a_finished_model_is_a_base_and_so_is_one_with_adapters(tmp_path: Path) -> None:
    """Stages 1 to 3, the last two with adapters."""
    vlm, tokenizer = build_vlm(VISION, RANDOM, "linear", 0)
    first = tmp_path / "run/stage1/final"
    save_final(first, vlm, tokenizer, NOTED | {"llm": RANDOM})
    for stage in (2, 3):
        before = tmp_path / f"run/stage{stage - 1}/final"
        vlm, tokenizer, _ = load_final(before)
        train(vlm, seed=stage)
        folder = tmp_path / f"run/stage{stage}/final"
        base = final_base(before, folder, read_meta(before)["seal"])
        save_final(folder, vlm, tokenizer, NOTED | {"llm": RANDOM, "base": base})
    expected = loss_of(vlm)
    assert loss_of(load_final(folder)[0]) == pytest.approx(expected, abs=1e-5)
    # Moved together, they are found by the relative path.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved/stage3/final"
    assert loss_of(load_final(moved)[0]) == pytest.approx(expected, abs=1e-5)
    # Trained again, the base is another model.
    other, _ = build_vlm(VISION, RANDOM, "linear", 1)
    save_final(tmp_path / "moved/stage1/final", other, tokenizer, NOTED | {"llm": RANDOM})
    refused = refuse(moved)
    assert "moved/stage2/final: its adapters belong to the model" in refused
    assert (
        "is another one now" in refused
        and str(moved.parents[1] / "stage2/final" / POINTER) in refused
    )


def refuse(folder: Path) -> str:
    """Return the line that refuses to load a model, in full and by a look at its files."""
    with pytest.raises(UserError) as caught:
        load_final(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_base_that_moved_is_named_in_one_line_and_found_by_a_pointer(
    on_a_folder: tuple[Path, VLM, Path],
) -> None:
    folder, vlm, llm = on_a_folder
    expected = loss_of(vlm)
    assert loss_of(load_final(folder)[0]) == pytest.approx(expected, abs=1e-5)
    llm.rename(llm.with_name("elsewhere"))
    says = (
        f"{folder}: its adapters belong to the model {llm}, which is not there any more; put it back, or "
        f"write where it is into {folder / POINTER}"
    )
    assert refuse(folder) == says
    with pytest.raises(UserError, match="is not there any more"):
        check_files(folder, read_meta(folder), contents=False)
    (folder / POINTER).write_text(f"{llm.with_name('elsewhere')}\n")
    assert loss_of(load_final(folder)[0]) == pytest.approx(expected, abs=1e-5)
    (folder / POINTER).write_text(f"{llm.with_name('nowhere')}\n")
    assert f"{llm.with_name('nowhere')}, which is not there" in refuse(folder)
    for text in ("", "one\ntwo\n"):
        (folder / POINTER).write_text(text)
        assert "not one line with the place of a model" in refuse(folder)


def test_a_finished_base_is_found_by_a_pointer(tmp_path: Path) -> None:
    vlm, tokenizer = build_vlm(VISION, RANDOM, "linear", 0)
    first, folder = tmp_path / "one/final", tmp_path / "two/final"
    save_final(first, vlm, tokenizer, NOTED | {"llm": RANDOM})
    train(vlm)
    base = final_base(first, folder, read_meta(first)["seal"])
    save_final(folder, vlm, tokenizer, NOTED | {"llm": RANDOM, "base": base})
    shutil.move(first, tmp_path / "kept")
    assert f"the model {first}, which is not there any more" in refuse(folder)
    (folder / POINTER).write_text(str(tmp_path / "kept"))
    assert loss_of(load_final(folder)[0]) == pytest.approx(loss_of(vlm), abs=1e-5)


def test_other_weights_under_the_same_name_are_refused(on_a_folder: tuple[Path, VLM, Path]) -> None:
    folder, _, llm = on_a_folder
    shutil.rmtree(llm)
    llm_folder(llm, seed=1)
    assert f"its adapters were trained on other weights than {llm} has now" in refuse(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_were_added_to_the_base_are_those_of_training(tmp_path: Path, tied: bool) -> None:
    """Other machines, and other numbers of threads, draw other values for them."""
    llm = llm_folder(tmp_path / "llm", full=True, tied=tied)
    folder, vlm = save(tmp_path / "final", str(llm))
    assert load_file(folder / ADDED).keys() == ({"embedding"} if tied else {"embedding", "output"})
    change(folder, base=read_meta(folder)["base"] | {"seed": 9})  # drawn otherwise
    again, _, _ = load_final(folder)
    for one in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(again.language, one)().weight
        assert torch.equal(weight, getattr(vlm.language, one)().weight)
    assert loss_of(again) == pytest.approx(loss_of(vlm), abs=1e-5)
    # A later stage has them in its base.
    train(again, seed=4)
    later = tmp_path / "later/final"
    base = final_base(folder, later, read_meta(folder)["seal"])
    save_final(later, again, tokenizer_of(folder), NOTED | {"llm": str(llm), "base": base})
    assert not (later / ADDED).exists()
    assert loss_of(load_final(later)[0]) == pytest.approx(loss_of(again), abs=1e-5)
    rows = load_file(folder / ADDED)
    save_file({"embedding": rows["embedding"][1:].contiguous()}, folder / ADDED)
    with pytest.raises(UserError, match="its rows are not those that the base lacks"):
        merge_saved(
            build_vlm(VISION, str(llm), "linear", 0)[0].language,
            folder,
            Adapters.from_meta(read_meta(folder)["lora"]),
        )


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return saved_tokenizer(folder, read_meta(folder))


def test_a_hub_id_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder, _ = save(tmp_path / "final", RANDOM)
    change(folder, base={"llm": "nobody/nothing", "seed": 0, "crc32c": 1})
    refused = refuse(folder)
    assert refused.startswith(
        "nobody/nothing: no such folder, not downloaded before, HF_HUB_OFFLINE"
    )
    assert refused.endswith(f"write where it is into {folder / POINTER}")


def change(folder: Path, **values: Any) -> None:
    """Change what a saved model records, and seal it again, as a stranger can."""
    meta = {**read_meta(folder), **values}
    del meta["seal"]
    kept = {name: value for name, value in meta.items() if value is not ...}
    (folder / META).write_bytes(sealed_json(kept))


LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj"], "load_in_4bit": False}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base": ...}, "only one of lora and base"),
        ({"lora": ...}, "only one of lora and base"),
        ({"base": {"llm": RANDOM}}, "base has llm"),
        ({"base": {}}, "base has nothing"),
        ({"base": {"llm": RANDOM, "seed": 0, "crc32c": -1}}, r"\$\.base\.crc32c"),
        ({"base": {"final": "runs", "relative": "..", "seal": "sha256:" + "0" * 64}}, "final"),
        ({"base": {"llm": "\0", "seed": 0, "crc32c": 1}}, "llm"),
        ({"lora": {**LORA, "rank": 0}}, "rank"),
        ({"lora": {**LORA, "rank": 10**9}}, "rank"),
        ({"lora": {**LORA, "target_modules": ["../x"]}}, "target_modules"),
        ({"lora": {**LORA, "alpha": "two"}}, "alpha"),
        ({"lora": LORA}, "tensors are not those of rank 4"),
    ],
)
def test_what_a_stranger_wrote_is_refused_in_one_line(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    folder, _ = save(tmp_path / "final", RANDOM)
    change(folder, **values)
    with pytest.raises(UserError, match=says):
        load_final(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [ADAPTER, ADAPTER_CONFIG, "tokenizer.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damage_is_one_line(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder, _ = save(tmp_path / "final", RANDOM)
    damage(folder / name)
    assert str(folder / name) in refuse(folder)


def test_a_folder_is_recorded_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llm").mkdir()
    expected: Base = {"llm": str(tmp_path / "llm"), "seed": 0, "crc32c": 1}
    assert language_base("llm", seed=0, checksum=1) == expected
    assert language_base("Qwen/Qwen3-0.6B", seed=0, checksum=1)["llm"] == "Qwen/Qwen3-0.6B"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_and_transformers_load_it(on_a_folder: tuple[Path, VLM, Path]) -> None:
    folder, _, llm = on_a_folder
    merged = load_final(folder)[0].language
    merged.set_attn_implementation("sdpa")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(llm)
    base = AutoModelForCausalLM.from_pretrained(llm)
    ids = torch.arange(40, 60)[None]
    with torch.inference_mode():
        expected = merged(ids).logits
        for theirs in (
            PeftModel.from_pretrained(base, str(folder)),
            AutoModelForCausalLM.from_pretrained(folder),  # finds the base by its name
        ):
            assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
