"""The trainer's options: presets by stage and hardware, and the number of samples of a step.

preset({"stage": "1", "hardware": "40gb"})["learning_rate"]    # 1e-4
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

import configs
from configs import UserError, dump, parse
from tests.support import ROOT
from train.config import (
    COMMON_KEYS,
    MACHINE_KEYS,
    SELECTORS,
    Options,
    common_options,
    parse_mix,
    preset,
)
from train.distributed import group


def test_presets_depend_on_stage_and_hardware() -> None:
    first = preset({"stage": "1", "hardware": "40gb"})
    assert (first["learning_rate"], first["connector_learning_rate"]) == (1e-4, 1e-3)
    assert (first["batch_size_per_gpu"], first["gradient_accumulation_steps"]) == (32, 4)
    assert (first["max_steps"], first["warmup_steps"]) == (100_000, 2000)
    assert first["max_tokens"] == 16384
    third = preset({"stage": "3", "hardware": "24gb"})
    assert third["max_sequence_length"] == third["max_tokens"] == 36864  # raised to the window
    assert (third["max_steps"], third["learning_rate"]) == (2000, 3e-5)
    small = preset({"stage": "2", "hardware": "cpu"})
    assert (small["batch_size_per_gpu"], small["max_sequence_length"]) == (1, 2048)
    short = preset({"stage": "1", "hardware": "cpu", "max_steps": "1000"})
    # In proportion to max_steps.
    assert (short["warmup_steps"], short["connector_warmup_steps"]) == (20, 2)
    longer = preset({"stage": "1", "hardware": "cpu", "max_sequence_length": "3037"})
    assert (
        longer["max_sequence_length"] == longer["max_tokens"] == 3037
    )  # a refusal names one option
    less = preset({"stage": "1", "hardware": "cpu", "max_sequence_length": "many"})
    assert less["max_tokens"] == 2048  # refused later, with the option's name


def test_torchrun_accepts_the_commands_in_the_documentation() -> None:
    import train.run

    text = f"{train.run.__doc__}\n{group.__doc__}\n"
    text += (ROOT / "docs" / "TRAINING_PIPELINE.md").read_text()
    shown = re.findall(r"^ *torchrun (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(shown) >= 4
    for line in shown:
        parsed = parse_args(line.split())
        assert parsed.training_script == "train.run"
        parse(Options, [w for w in parsed.training_script_args if w != "--"], prog="train.run")


def test_a_step_has_the_batches_of_all_processes_and_a_resumed_run_keeps_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(batch_size_per_gpu=32, gradient_accumulation_steps=4)
    assert options.samples_per_step == 128
    assert Options(**{**vars(options), "processes": 4}).samples_per_step == 512
    with pytest.raises(ValueError, match="processes -1 is below 0"):
        Options(processes=-1)
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "runs" / "default" / "stage1" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text(dump(Options(processes=4)))
    assert preset({"resume": "true"})["processes"] == 4  # whatever number of processes resumes it


def test_processes_have_in_common_what_decides_what_they_do_together() -> None:
    ours = common_options(Options())
    for name, value in {"shard": "full", "offload": True, "max_tokens": 9000, "seed": 1}.items():
        theirs = common_options(Options(**{name: value}))
        assert {key for key in ours if ours[key] != theirs[key]} == {name}
    own = {"device": "cpu", "read_threads": 7, "features": "elsewhere", "log_every": 3}
    assert common_options(Options(**own)) == ours
    assert COMMON_KEYS <= MACHINE_KEYS


def read(words: list[str]) -> Options:
    return parse(Options, words, prog="x", preset=preset, selectors=SELECTORS)


def test_the_users_file_changes_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stages: {2: {learning_rate: 2e-5, max_steps: 400, warmup_steps: 10}}\n")
    words = ["--config", str(file), "--hardware", "cpu", "--run", str(tmp_path / "none"), "--stage"]
    monkeypatch.setattr(configs, "_user", None)
    second, first = read([*words, "2"]), read([*words, "1"])
    assert (second.learning_rate, second.max_steps, second.warmup_steps) == (2e-5, 400, 10)
    assert second.connector_warmup_steps == 8, "1,000 of ours, for 400 steps instead of 50,000"
    assert second.save_every == first.save_every, "what the file does not say is ours"
    assert (first.learning_rate, first.max_steps) == (1e-4, 100_000)
    assert read([*words, "2", "--learning-rate", "1e-3"]).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: {4: {max_steps: 1}}", "stages: 4: there are stages 1, 2, 3"),
        ("stages: {2: {max_step: 1}}", "stages: 2: unknown key 'max_step'; nearest: max_steps"),
        ("stages: {2: {max_steps: many}}", "stages: 2: max_steps: expected int, found 'many'"),
        ("stages: {2: {max_steps: -1}}", "stages: 2: max_steps -1"),
        ("stages: {2: 7}", "stages: 2: expected options of train.run"),
        ("stages: [2]", "stages: expected names"),
        ("encoders: {}\nstage: {}", "unknown section 'stage'"),
    ],
)
def test_an_error_in_the_users_stages_names_the_file(
    tmp_path: Path, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_user", None)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        read(["--config", str(file), "--stage", "1", "--hardware", "cpu"])
    assert str(refused.value).startswith(f"{file}: {says}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "option", ["learning-rate", "weight-decay", "max-grad-norm", "adam-eps", "held-out"]
)
def test_numbers_that_are_not_finite_are_refused(option: str, value: str) -> None:
    """No rate helps a run whose own options are NaN, so no command would go on from it."""
    with pytest.raises(UserError, match="is not finite"):
        parse(Options, [f"--{option}", value], prog="train.run")


@pytest.mark.parametrize("share", ["nan", "inf", "", "half"])
def test_a_share_of_a_mix_is_a_finite_number(share: str) -> None:
    with pytest.raises(UserError, match="is no number; write NAME=SHARE"):
        parse_mix(f"a={share},b=0.5")
