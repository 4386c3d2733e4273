"""Commands with a damaged model: one line, exit code 2, and no run folder.

python -m train.run --llm /models/half-downloaded
python -m model.verify --llm /models/half-downloaded
python -m model.generate --run damaged --prompt "What is it?"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import configs
from cache.errors import CacheError
from cache.store.paths import CacheRoot
from configs import UserError
from model.generate import __main__ as generate
from model.io.saved_model import load_final
from model.language.tokenizer import byte_tokenizer
from model.verify import __main__ as verify
from tests.support import trained_runs
from tests.support.trained_runs import BASE, losses
from train.run import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1192135096\n"
OPTIONS = [w for i, w in enumerate(BASE) if w != "--llm" and BASE[i - 1] != "--llm"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    return trained_runs.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, **heads, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "llm")
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def words(cache: CacheRoot, llm: Path, *more: str) -> list[str]:
    return [*OPTIONS, "--features", str(cache.path), "--llm", str(llm), "--max-steps", "3", *more]


@pytest.fixture
def one_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`one_error(main, *words)` runs a command that fails with one line and exit code 2; returns the line."""

    def run(main: Callable[[Sequence[str]], int], *arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            configs.command(lambda: main(arguments), errors=(CacheError,))
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        lines = error.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), error
        return lines[0]

    return run


def test_commands_say_one_line_and_exit_with_2(
    cache: CacheRoot, llm: Path, one_error: Callable[..., str]
) -> None:
    whole = (llm / "model.safetensors").read_bytes()
    (llm / "model.safetensors").write_text(POINTER)
    assert "Git LFS pointer" in one_error(main, *words(cache, llm))
    (llm / "model.safetensors").write_bytes(whole[:5000])
    asked = ("--encoder", "demo", "--llm", str(llm), "--device", "cpu")
    assert "is truncated" in one_error(verify.main, *asked)
    assert not Path("runs").exists()


@pytest.mark.parametrize("inspect", [(), ("--inspect",)])
def test_no_run_is_begun_with_a_damaged_model(
    cache: CacheRoot, llm: Path, inspect: tuple[str, ...]
) -> None:
    tensors = load_file(llm / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llm / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing .*model\.layers\.1\.mlp\.up_proj"):
        main(words(cache, llm, *inspect))
    (llm / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model\.layers\.1|no tokenizer\.json"):
        main(words(cache, llm, *inspect))
    assert not Path("runs").exists()


def test_a_run_of_another_persons_model_ends_in_a_folder_that_transformers_loads(
    cache: CacheRoot, llm: Path
) -> None:
    assert main(words(cache, llm, "--connector", "mlp")) == 0
    final = Path("runs/default/stage1/final")
    theirs, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(report.values())
    ours, tokenizer, _ = load_final(final)
    ours.language.set_attn_implementation("sdpa")
    ids = AutoTokenizer.from_pretrained(final)("What is it?", return_tensors="pt").input_ids
    assert ids.tolist() == tokenizer("What is it?", return_tensors="pt").input_ids.tolist()
    with torch.inference_mode():
        assert torch.equal(theirs.eval()(ids).logits, ours.language(ids).logits)
    # It is a language model of its own: a new stage 1 may start from it.
    assert main(words(cache, final, "--run", "again")) == 0
    assert losses(Path("runs/again/stage1"))[0] < losses(Path("runs/default/stage1"))[0]


def test_a_damaged_final_folder_is_one_line(
    cache: CacheRoot, llm: Path, one_error: Callable[..., str]
) -> None:
    assert main(words(cache, llm)) == 0
    final = Path("runs/default/stage1/final")
    path = final / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 1.0}))
    said = one_error(generate.main, "--prompt", "What?", "--device", "cpu")
    assert "config.json: " in said
    with pytest.raises(UserError, match=r"config\.json: .* train the stage again"):
        main([*OPTIONS, "--stage", "2", "--features", str(cache.path)])
    assert not Path("runs/default/stage2").exists()
