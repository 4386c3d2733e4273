"""A stage that trains adapters: what changes, what is saved, how it goes on, and from where.

python -m train.run --features cache --run first --lora 16
python -m train.run --features cache --run first --stage 2            # starts from the merged weights
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import configs
from configs import UserError
from model.io.runs import read_meta
from model.io.saved_model import load_final
from model.language.lora import ADAPTER, ADAPTER_CONFIG
from model.language.model import load_language, save_language
from model.vlm import VLM, build_vlm
from tests.support import trained_runs
from tests.support.trained_runs import BASE, losses
from train import run
from train.config import SELECTORS, Options, preset
from train.evaluate import __main__ as evaluate
from train.stage.origin import find_origin

pytestmark = pytest.mark.slow

LORA = (
    *("--lora", "8", "--max-steps", "8", "--save-every", "4"),
    *("--learning-rate", "1e-2", "--connector-learning-rate", "1e-2"),
)


def train(*words: str) -> Path:
    """Train on the cache of this folder; return the folder of the stage."""
    named = dict(zip(words[::2], words[1::2], strict=False))
    assert run.main([*BASE[2:], "--features", "cache", *words]) == 0  # without its --llm
    return Path("runs") / named["--run"] / f"stage{named.get('--stage', 1)}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the language model `llm` and the run `first`, which trained adapters on it."""
    place = tmp_path_factory.mktemp("lora")
    trained_runs.make(place, 20)
    language, tokenizer = load_language("random:qwen3-tiny", seed=5)
    (place / "llm").mkdir()
    save_language(place / "llm", language, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train("--run", "first", "--llm", "llm", *LORA)
    return place


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the test runs."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def weights(vlm: VLM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vlm.named_parameters()}


def test_the_loss_falls_and_only_adapters_and_connector_change(place: Path) -> None:
    stage = place / "runs/first/stage1"
    measured = losses(stage)
    # The frozen base is random, embeddings and output layer too, so little can be learned.
    assert measured[-1] < measured[0] - 0.4, measured
    before = weights(build_vlm(64, str(place / "llm"), "linear", 0)[0])
    after = weights(load_final(stage / "final")[0])
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert changed == linear | {"connector.weight", "connector.bias"}
    with safe_open(stage / "checkpoints/step-00000008/model.safetensors", framework="pt") as stored:
        kept = set(stored.keys())
    assert all(".lora_" in name or name.startswith("connector.") for name in kept)
    assert len(kept) == 2 * len(linear) + 2


def test_the_adapters_are_saved_apart_and_recorded(place: Path) -> None:
    final = place / "runs/first/stage1/final"
    names = {path.name for path in final.iterdir()}
    assert {ADAPTER, ADAPTER_CONFIG, "connector.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    meta = read_meta(final)
    assert meta["base"]["llm"] == str(place / "llm")
    assert (meta["lora"]["rank"], meta["lora"]["alpha"]) == (8, 16)
    (stage,) = json.loads((final.parent / "card.json").read_text())["stages"]
    assert stage["lora"] == meta["lora"]
    config = json.loads((final / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(place / "llm")


def test_the_table_counts_adapters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--run", "second", "--llm", "random:qwen3-tiny", "--lora", "4", "--max-steps", "1")
    lines = capsys.readouterr().out.splitlines()
    vlm, _ = build_vlm(64, "random:qwen3-tiny", "linear", 0)
    whole = sum(p.numel() for p in vlm.language.parameters())
    vlm.add_adapters(4, 0)
    number = sum(p.numel() for p in vlm.language.parameters()) - whole
    assert f"model     language frozen: 0 of {whole:,} parameters" in lines
    assert f"model     adapters trained: {number:,} of {number:,} parameters" in lines
    targets = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    (line,) = (one for one in lines if one.startswith("model     adapters: "))
    assert line == f"model     adapters: {4 * number / 1000:.1f} kB, rank 4, alpha 8, on {targets}"


def test_a_resumed_run_equals_the_uninterrupted_one(here: Path) -> None:
    stage = here / "runs/first/stage1"
    expected, before = (
        losses(stage),
        {name: load_file(stage / "final" / name) for name in (ADAPTER, "connector.safetensors")},
    )
    shutil.rmtree(stage / "final")
    shutil.rmtree(stage / "checkpoints/step-00000008")
    train("--run", "first", "--llm", "llm", *LORA, "--resume")
    assert losses(stage) == expected
    for name, tensors in before.items():
        again = load_file(stage / "final" / name)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_another_rank_or_a_changed_base_is_no_resume(here: Path) -> None:
    stage = here / "runs/first/stage1"
    shutil.rmtree(stage / "final")
    with pytest.raises(UserError, match="lora 8 -> 4"):
        train("--run", "first", "--resume", *LORA, "--llm", "llm", "--lora", "4")
    language, tokenizer = load_language("random:qwen3-tiny", seed=6)
    save_language(here / "llm", language, tokenizer)
    with pytest.raises(UserError, match="llm has other weights than when this run began"):
        train("--run", "first", "--resume", *LORA, "--llm", "llm")


@pytest.mark.parametrize("source", ["first", "runs/first/stage1/checkpoints/step-00000008"])
@pytest.mark.parametrize("more", [[], ["--lora", "4"]], ids=["whole", "adapters"])
def test_the_next_stage_starts_from_the_merged_weights(
    here: Path, source: str, more: list[str]
) -> None:
    trained, _, _ = load_final(Path("runs/first/stage1/final"))
    loaded = weights(find_origin(source).load())
    for name, value in weights(trained).items():
        assert torch.allclose(loaded[name], value, atol=1e-6), name
    rates = ["--learning-rate", "0", "--connector-learning-rate", "0"]
    stage = train("--run", "next", "--from", source, "--max-steps", "1", *rates, *more)
    after, _, meta = load_final(stage / "final")
    for name, value in weights(after).items():
        assert torch.allclose(value, loaded[name], atol=1e-6), name
    assert ("lora" in meta) == bool(more)
    assert (stage / "final/model.safetensors").exists() != bool(more)
    if more:
        kind = "start" if "checkpoints" in source else "runs/first/stage1/final"
        assert meta["base"]["final"].endswith(kind)
        if kind == "start":  # the checkpoint may go; the run has a copy of whole weights
            shutil.rmtree("runs/first")
            assert (stage / "start/model.safetensors").exists()
            load_final(stage / "final")


def test_stage_2_of_a_run_and_its_scores(here: Path) -> None:
    """Adapters on adapters: evaluation sees all of them."""
    words = ("--lora", "4", "--max-steps", "2", "--learning-rate", "1e-2")
    stage = train("--run", "first", "--stage", "2", *words)
    assert read_meta(stage / "final")["base"]["relative"] == "../../stage1/final"
    one, two = (load_final(Path(f"runs/first/stage{n}/final"))[0] for n in (1, 2))
    assert one.language.config.vocab_size == two.language.config.vocab_size
    assert not torch.equal(
        one.language.model.layers[0].mlp.up_proj.weight,
        two.language.model.layers[0].mlp.up_proj.weight,
    )
    assert evaluate.main(["--run", "first", "--split", "train", "--device", "cpu"]) == 0
    assert (stage / "evaluation-train.json").exists()
    stages = json.loads((stage / "card.json").read_text())["stages"]
    assert [one["lora"]["rank"] for one in stages] == [8, 4]
    Path("runs/first/stage1/final/base.txt").write_text("/nowhere/llm\n")
    with pytest.raises(UserError, match=r"/nowhere/llm, which is not there any more; put it back"):
        train("--run", "first", "--stage", "3", *words)


# ---- options


def read(*words: str) -> Options:
    return configs.parse(
        Options, ["--hardware", "cpu", *words], prog="x", preset=preset, selectors=SELECTORS
    )


def test_adapters_have_ten_times_the_rate_unless_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configs, "_user", None)
    for stage, rate in ((1, 1e-3), (2, 5e-4), (3, 3e-4)):
        options = read("--stage", str(stage), "--lora", "16")
        assert options.learning_rate == rate
        plain = read("--stage", str(stage))
        assert plain.learning_rate == pytest.approx(rate / 10)
        assert options.connector_learning_rate == plain.connector_learning_rate
    assert read("--lora", "16", "--learning-rate", "2e-4").learning_rate == 2e-4
    assert read("--lora", "0").learning_rate == 1e-4
    file = tmp_path / "mine.yaml"
    file.write_text("stages: {2: {lora: 32}, 3: {lora: 32, learning_rate: 7e-5}}\n")
    mine = ("--config", str(file), "--stage")
    assert (read(*mine, "2").lora, read(*mine, "2").learning_rate) == (32, 5e-4)
    assert read(*mine, "2", "--lora", "0").learning_rate == 5e-5
    assert read(*mine, "3").learning_rate == 7e-5, "the user's own"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora", "-1"], "lora -1 is below 0"),
        (["--lora", "16", "--no-train-llm"], "lora 16 with train_llm false: .*--lora 0"),
        (["--load-in-4bit"], "load_in_4bit without lora: .*give --lora 16"),
        (["--lora", "many"], "--lora"),
    ],
)
def test_options_that_contradict(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read(*words)


def test_what_is_missing_is_said_before_the_data_are_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.chdir(place)
    monkeypatch.setattr("train.stage.setup.load_data", unread)
    with pytest.raises(
        UserError, match=r"^--load-in-4bit: weights of 4 bits need an NVIDIA GPU, not cpu; leave"
    ):
        train("--run", "none", "--llm", "llm", "--lora", "4", "--load-in-4bit")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else found(n))
    with pytest.raises(UserError, match=r"pip install 'nanomolmo2\[lora\]'$"):
        train("--run", "none", "--llm", "llm", "--lora", "4")
    assert not Path("runs/none").exists()
