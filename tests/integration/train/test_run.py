"""The trainer's command: it trains, its errors name a remedy, and a killed run resumes with equal bits.

python -m train.run --stage 1 --features cache --run first
python -m train.run --run first --resume
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache.errors import CacheError, NotFoundError
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import Sample, read_samples, write_samples
from cache.store.space import find_space
from configs import UserError
from model.io.saved_model import load_final
from tests.support import trained_runs
from tests.support.trained_runs import BASE, ENVIRONMENT, losses, turns
from train.config import Options
from train.data.join import join
from train.metrics import StepRecord, read_metrics
from train.run import main
from train.stage import checkpoint, run_folder, setup


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheRoot:
    """Return a cache that no test changes."""
    return trained_runs.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def train(
    cache: CacheRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Return a function: `train("--max-steps", "3")` trains a stage below tmp_path and returns its folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, features: Path = cache.path) -> Path:
        words = [*BASE, "--features", str(features), *arguments]
        assert main(words) == 0
        given = {"--run": "default", "--stage": "1"} | dict(pairwise(words))
        return tmp_path / "runs" / given["--run"] / f"stage{given['--stage']}"

    yield run


def change_model(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Change the connector of every model that is built from here on."""
    build = setup.build_model

    def changed(*arguments: Any) -> Any:
        vlm = build(*arguments)
        change(vlm.connector)
        return vlm

    monkeypatch.setattr(setup, "build_model", changed)


# ---- training


def test_it_learns_to_name_the_colour_of_images_it_has_not_seen(train: Callable[..., Path]) -> None:
    folder = train("--max-steps", "150", "--eval-every", "50")
    lines = read_metrics(folder)
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert losses(folder)[-1] < 0.05 < 3 < losses(folder)[0]
    # Without looking, the loss of a held-out image's colour is at least ln(4) / tokens.
    assert held_out[-1] < 0.05
    assert [line["step"] for line in lines if "held_out_loss" in line] == [50, 100, 150]
    _, _, meta = load_final(folder / "final")
    assert (meta["stage"], meta["step"]) == (1, 150)
    assert meta["space"]["fingerprint"] == trained_runs.spec().fingerprint


def test_every_line_of_the_metrics_is_complete(train: Callable[..., Path], capsys: Any) -> None:
    folder = train("--max-steps", "3", "--log-every", "1")
    for number, line in enumerate((x for x in read_metrics(folder) if "loss" in x), 1):
        StepRecord(**line)  # raises if a field is missing or unknown
        assert line["step"] == number
        assert line["samples"] == 8
        assert 0 <= line["wait_s"] <= line["step_s"]
        assert line["tokens"] > 0 and line["memory_gib"] > 0.01 and math.isfinite(line["grad_norm"])
    shown = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step 3/3  loss")]
    for word in ("lr", "grad", "tok/s", "samples/s", "wait", "ms", "GiB", "ETA under a second"):
        assert word in shown[0], word


# ---- memory settings do not change what is learned


@pytest.mark.parametrize(
    "settings",
    [
        ["--max-tokens", "64", "--max-sequence-length", "64"],
        ["--batch-size", "2", "--gradient-accumulation-steps", "4"],
        ["--use-gradient-checkpointing"],
        ["--read-threads", "1", "--read-ahead", "1"],
    ],
    ids=lambda settings: settings[0],
)
def test_micro_batches_and_memory_settings_do_not_change_the_losses(
    train: Callable[..., Path], settings: list[str]
) -> None:
    whole = losses(train("--max-steps", "6", "--run", "whole"))
    parts = losses(train("--max-steps", "6", "--run", "parts", *settings))
    assert parts == pytest.approx(whole, rel=2e-4)


def test_the_seed_decides_the_losses(train: Callable[..., Path]) -> None:
    one = losses(train("--max-steps", "3", "--run", "one"))
    same = losses(train("--max-steps", "3", "--run", "same"))
    other = losses(train("--max-steps", "3", "--run", "other", "--seed", "1"))
    assert one == same
    assert one != other


def test_bfloat16_losses_equal_float32_losses_to_its_precision(train: Callable[..., Path]) -> None:
    exact = losses(train("--max-steps", "6", "--run", "exact"))
    rough = losses(train("--max-steps", "6", "--run", "rough", "--precision", "bfloat16"))
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("frozen", ["connector", "llm"])
def test_frozen_parameters_do_not_change(
    train: Callable[..., Path], frozen: str, capsys: Any
) -> None:
    folder = train("--max-steps", "2", f"--no-train-{frozen}")
    after = dict(load_final(folder / "final")[0].named_parameters())
    fresh = setup.build_model(
        Options(llm="random:qwen3-tiny", connector="linear"),
        None,
        trained_runs.spec(),
        torch.device("cpu"),
    )
    changed = {n.split(".")[0] for n, p in fresh.named_parameters() if not torch.equal(p, after[n])}
    part = {"connector": "connector", "llm": "language"}[frozen]
    assert changed == {"connector", "language"} - {part}
    assert f"{part} frozen: 0 of" in capsys.readouterr().out
    line = read_metrics(folder)[0]
    assert line["lr" if frozen == "llm" else "connector_lr"] == 0


# ---- stages


def test_stage_2_starts_from_stage_1(train: Callable[..., Path]) -> None:
    with pytest.raises(
        UserError, match=r"stage1 does not exist; .*: python -m train.run .*--features .*--stage 1$"
    ):
        train("--stage", "2", "--max-steps", "2")
    first = train("--max-steps", "20")
    second = train("--stage", "2", "--max-steps", "1", "--learning-rate", "0", "--seed", "7")
    assert losses(second)[0] < losses(first)[0] - 0.3
    before, after = (load_file(s / "final" / "model.safetensors") for s in (first, second))
    assert all(torch.equal(before[n], after[n]) for n in before)  # its learning rate is 0
    before, after = (load_file(s / "final" / "connector.safetensors") for s in (first, second))
    assert not torch.equal(before["weight"], after["weight"])
    assert json.loads((second / "final" / "nanomolmo2.json").read_text())["stage"] == 2


def test_a_stage_can_start_from_another_run(train: Callable[..., Path]) -> None:
    first = train("--max-steps", "20", "--run", "one", "--connector", "mlp")
    for origin in ("one", str(first / "final")):
        name = f"from-{len(origin)}"
        second = train("--run", name, "--stage", "2", "--from", origin, "--max-steps", "1")
        assert losses(second)[0] < losses(first)[0] - 0.3
        meta = json.loads((second / "final" / "nanomolmo2.json").read_text())
        assert meta["connector"] == "mlp"  # taken from the checkpoint
    with pytest.raises(UserError, match="its connector is mlp, not linear; leave --connector out"):
        train("--run", "x", "--from", "one", "--connector", "linear")
    with pytest.raises(UserError, match="no run nothing"):
        train("--run", "x", "--from", "nothing")


def test_stage_2_needs_a_finished_stage_1(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(train, monkeypatch, "--max-steps", "2")
    with pytest.raises(UserError, match=r"stage1 is not finished; .*--stage 1 --resume$"):
        train("--stage", "2")


# ---- errors, each with a remedy


def test_an_existing_run_is_an_error_without_resume(
    train: Callable[..., Path], capsys: Any
) -> None:
    train("--max-steps", "2")
    with pytest.raises(
        UserError, match=r"exists and is finished; choose another name: .*--run default-2$"
    ):
        train("--max-steps", "2")
    capsys.readouterr()
    train("--max-steps", "2", "--resume")
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_two_trainers_cannot_share_a_stage(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "default" / "stage1"
    with run_folder.lock(folder), pytest.raises(UserError, match="another trainer is at work"):
        train("--max-steps", "1")
    train("--max-steps", "1")


def test_a_cache_without_a_space_is_an_error(train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no feature space under .*python -m encode.run"):
        train(features=tmp_path / "nothing")


def test_with_two_spaces_one_must_be_named(train: Callable[..., Path], tmp_path: Path) -> None:
    root = trained_runs.make(tmp_path / "two", 20)
    trained_runs.make(tmp_path / "two", 20, codec="int8")
    with pytest.raises(CacheError, match=r"2 spaces under .*--space toy-fp16-\w+ \| toy-int8-\w+"):
        train(features=root.path)
    folder = train("--space", "toy-int8", "--max-steps", "1", features=root.path)
    assert json.loads((folder / "run.json").read_text())["space"].startswith("toy-int8-")


def test_a_checkpoint_of_another_space_names_the_differences(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    train("--max-steps", "1", "--run", "one")
    other = trained_runs.make(tmp_path / "other", 20, image_size=8, patch_size=4, codec="int8")
    with pytest.raises(
        UserError,
        match=r"trained on the space toy-fp16-\w+, not on toy-int8-\w+ \(image_size 4 there, 8 here; "
        r"patch_size 2 there, 4 here; codec fp16 there, int8 here\); encode with the same settings: "
        r"python -m encode\.run --dataset colors --encoder toy --codec fp16 ",
    ):
        train("--run", "two", "--from", "one", "--max-steps", "1", features=other.path)


def test_a_window_beyond_the_language_model_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as refused:
        train("--max-sequence-length", "5000", "--max-tokens", "5000")
    message = str(refused.value)
    assert (
        "max_sequence_length 5,000 is more than the 4,096 positions of random:qwen3-tiny" in message
    )
    assert "--max-sequence-length 4096" in message and "\n" not in message
    train("--max-sequence-length", "4096", "--max-tokens", "4096", "--max-steps", "1")


def test_invalid_options_are_errors_before_training(train: Callable[..., Path]) -> None:
    for words, message in (
        (["--no-freeze-vision-encoder"], "the frozen encoder made once"),
        (["--no-train-llm", "--no-train-connector"], "nothing would learn"),
        (["--max-tokens", "100"], "give --max-tokens 2048"),
        (["--held-out", "1.0"], "leaves nothing to train on"),
        (["--betas", "0.9", "1.0"], "must be in"),
        (["--seed", "-1"], "seed -1 is not between"),
        (["--max-steps", "0"], "max_steps 0 is below 1"),
        (["--max-frames", "0"], "max_frames 0 is below 1"),
        (["--hardware", "25gb"], "nearest: 24gb"),
        (["--stage", "4"], "there are stages 1, 2, 3"),
        (["--llm", "random:qwen3-tinny"], "nearest: qwen3-tiny"),
        (["--datasets", "cap"], r"none of the data sets cap is under .*encode.run"),
        (["--datasets", "colors=much"], "'much' is no number; write NAME=SHARE"),
        (["--max-sequence-length", "20"], r"sample colors/\d+-\w+ is \d+ tokens long"),
        (["--learning-rat", "1"], "nearest: --learning-rate"),
    ):
        with pytest.raises(UserError, match=message):
            train(*words)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed(
    train: Callable[..., Path], tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)  # makes `import` raise ImportError
    with pytest.raises(UserError, match=rf"--log {tracker} .* pip install {tracker}, or"):
        train("--log", tracker, "--max-steps", "1")


def test_a_nan_stops_training_before_the_step(train: Callable[..., Path], tmp_path: Path) -> None:
    root = trained_runs.make(tmp_path / "broken", 20, broken=11)
    with pytest.raises(
        UserError, match=r"step \d+: the loss is nan; samples .*colors/11-"
    ) as caught:
        train("--max-steps", "9", "--save-every", "1", "--held-out", "0", features=root.path)
    folder = tmp_path / "runs" / "default" / "stage1"
    stopped = int(str(caught.value).split()[1].rstrip(":"))
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, stopped))
    for path in checkpoint.committed(folder / "checkpoints"):
        tensors = load_file(path / checkpoint.MODEL).values()
        assert all(bool(t.isfinite().all()) for t in tensors)


def test_an_infinite_gradient_stops_training_before_the_step(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_model(
        monkeypatch, lambda part: part.weight.register_hook(lambda grad: grad * float("inf"))
    )
    with pytest.raises(
        UserError, match=r"step 1: the gradient is not finite in 1 .*connector.weight"
    ):
        train("--max-steps", "2")
    assert losses(tmp_path / "runs" / "default" / "stage1") == []


# ---- options


def test_inspect_prints_micro_batches_and_creates_no_run(
    train: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    train("--inspect")
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant" in shown and "x4 tokens]" in shown
    assert re.findall("^step .*?:", shown, re.MULTILINE) == [
        f"step {n}, micro-batch 0:" for n in (0, 1)
    ]
    train("--inspect", "--batch-size", "200", "--max-tokens", "20000")  # no second epoch
    heads = re.findall("^step .*?:", capsys.readouterr().out, re.MULTILINE)
    assert heads == ["step 0, micro-batch 0:"]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [".tokens"]


def test_tensorboard_curves(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--max-steps", "6", "--log", "tensorboard", "--log-every", "1", "--save-every", "4"]
    folder = interrupted(train, monkeypatch, *words)  # the newest checkpoint is that of step 4
    train(*words, "--resume")
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    points = [(e.step, e.value) for e in events.Scalars("loss")]
    expected = [(i, pytest.approx(x, rel=1e-6)) for i, x in enumerate(losses(folder), 1)]
    assert points == expected  # one point a step, although steps 5 and 6 were recorded twice
    assert "held_out_loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_resumed_run_continues_in_the_run_of_its_tracker(
    train: Callable[..., Path], tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = trained_runs.record_tracker(monkeypatch, tracker)
    words = ["--max-steps", "6", "--log", tracker, "--log-every", "1", "--save-every", "4"]
    folder = interrupted(
        train, monkeypatch, *words
    )  # after step 6; the checkpoint is that of step 4
    train(*words, "--resume")
    first, again = calls["init"]
    assert first["project"] == again["project"] == "nanoMolmo2"
    assert first["config"]["max_steps"] == 6
    same = "id" if tracker == "wandb" else "name"
    assert first[same] == again[same] and again["resume"] == "allow"
    points = [
        (one["step"], one["values"]["loss"]) for one in calls["log"] if "loss" in one["values"]
    ]
    assert points == list(enumerate(losses(folder), 1))  # each step once
    assert len(calls["finish"]) == 2


def test_training_goes_on_without_a_tracker_that_fails(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    for at in ("init", "log", "finish"):
        calls = trained_runs.record_tracker(monkeypatch, "wandb", **{at: fail})
        caplog.clear()
        folder = train("--max-steps", "3", "--log", "wandb", "--log-every", "1", "--run", at)
        warned = [record.getMessage() for record in caplog.records if "--log" in record.msg]
        assert len(warned) == 1 and "\n" not in warned[0]
        assert "--log wandb: no route to host; the training goes on without it" in warned[0]
        assert len(losses(folder)) == 3 and run_folder.is_finished(folder)
        assert len(calls["finish"]) == 0


def interrupted(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, *words: str, **options: Any
) -> Path:
    """Train a stage, stop it before its final model is saved, and remove its newest checkpoint."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.training.save_final", stop)
        train(*words, **options)
    folder = Path("runs/default/stage1")
    for path in checkpoint.committed(folder / "checkpoints")[1:]:
        (path / checkpoint.COMMITTED).unlink()
    return folder


# ---- resuming


def test_resume_continues_with_the_runs_own_options(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cache: CacheRoot, capsys: Any
) -> None:
    words = ["--max-steps", "6", "--save-every", "2", "--datasets", "colors=1", "--space", "toy"]
    whole = losses(train(*words, "--run", "whole"))
    folder = interrupted(train, monkeypatch, *words)
    with pytest.raises(
        UserError,
        match=r"stage 1 of this run exists \(6 steps\); .*continue with --resume: .*--resume$",
    ):
        train(*words)
    with pytest.raises(UserError, match=r"keeps its options, but learning_rate 0.003 -> 0.1"):
        train(*words, "--resume", "--learning-rate", "0.1")
    capsys.readouterr()
    # All other options are those of the run.
    assert main(["--resume", "--features", str(cache.path)]) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert losses(folder) == whole
    train(*words, "--resume")  # the command that began the run also resumes it


def test_dropout_is_equal_after_a_resume(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, 0.5, module.training)

    words = ["--max-steps", "6", "--save-every", "2"]
    without = losses(train(*words, "--run", "without"))
    change_model(monkeypatch, lambda part: part.register_forward_hook(drop))
    whole = losses(train(*words, "--run", "whole"))
    assert whole != without
    folder = interrupted(train, monkeypatch, *words)
    train(*words, "--resume")
    assert losses(folder) == whole


def test_a_run_keeps_its_samples_when_the_cache_has_grown(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    root = trained_runs.make(tmp_path / "growing", 20, answered=40)
    words = ["--max-steps", "6", "--save-every", "3", "--min-coverage", "0.1"]
    whole = losses(train(*words, "--run", "whole", features=root.path))
    folder = interrupted(train, monkeypatch, *words, features=root.path)
    trained_runs.make(tmp_path / "growing", 40, first=20)
    trained_runs.make(tmp_path / "growing", 40, first=39, dataset="more")  # a second data set
    train(*words, "--resume", features=root.path)
    assert "grown by 40 samples of colors since this run began; it keeps its list" in caplog.text
    assert losses(folder) == whole


def test_killed_and_resumed_training_equals_uninterrupted_training(
    train: Callable[..., Path],
    cache: CacheRoot,
    tmp_path: Path,
    soak: Callable[[int, int], int],
) -> None:
    """Kill a run at random moments and resume it: every loss and every byte of the model is equal."""
    steps, rng = 60, random.Random(0)
    words = ["--max-steps", str(steps), "--save-every", "4", "--eval-every", "10", "--resume"]

    def start_run(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "train.run", *BASE, "--features", str(cache.path)]
        return subprocess.Popen(
            [*command, *words, "--run", name],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def train_here(name: str) -> Path:
        torch.set_flush_denormal(True)  # as the command does
        try:
            return train(*words, "--run", name)
        finally:
            torch.set_flush_denormal(False)

    expected = train_here("whole")
    killed_at = []
    folder = tmp_path / "runs" / "killed" / "stage1"
    kills = soak(1, 20)
    for kill in range(kills):
        process = start_run("killed")
        # Later each time, or before the first step.
        aim = rng.randrange(steps * (kill + 1) // (kills + 1) + 1)
        while process.poll() is None and _steps_begun(folder) < aim:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        assert process.returncode == -signal.SIGKILL, "it ended before the kill"
        killed_at.append(_steps_begun(folder))
    assert train_here("killed") == folder

    def records(place: Path) -> list[dict[str, Any]]:
        timed = {"step_s", "wait_s", "memory_gib"}
        return [{k: v for k, v in x.items() if k not in timed} for x in read_metrics(place)]

    assert records(folder) == records(expected), killed_at
    model = Path("final") / "model.safetensors"
    assert (folder / model).read_bytes() == (expected / model).read_bytes(), killed_at
    assert max(killed_at) > 0, "no kill fell into the training"


def _steps_begun(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"grad_norm"') if path.exists() else 0


# ---- samples that cannot be trained on


def with_samples(root: CacheRoot, folder: Path, samples: list[Sample]) -> Path:
    """Return a copy of a cache in which data set `colors` is other samples."""
    shutil.copytree(root.path, folder / "copy")
    write_samples(CacheRoot(folder / "copy"), "colors", samples)
    return folder / "copy"


def conversations(cache: CacheRoot) -> list[Sample]:
    """Return every second sample as a conversation of several exchanges, and the others as they are."""
    return [
        replace(
            sample, messages=sample.messages * (2 + number % 3) if number % 2 else sample.messages
        )
        for number, sample in enumerate(read_samples(cache, "colors"))
    ]


def test_images_without_text_stop_no_training(
    train: Callable[..., Path], cache: CacheRoot, tmp_path: Path, caplog: Any
) -> None:
    samples = [
        replace(sample, messages=()) if number % 5 else sample
        for number, sample in enumerate(read_samples(cache, "colors"))
    ]
    features = with_samples(cache, tmp_path, samples)
    folder = train("--max-steps", "2", "--eval-every", "2", features=features)
    assert len(losses(folder)) == 2
    assert (
        "left out, because there is no answer to learn from; first colors/0-caption" in caplog.text
    )
    assert [line for line in read_metrics(folder) if "held_out_loss" in line]


@pytest.mark.parametrize("held_out_are", ["without text", "too long"])
def test_held_out_samples_that_cannot_be_used_stop_no_training(
    train: Callable[..., Path], cache: CacheRoot, tmp_path: Path, caplog: Any, held_out_are: str
) -> None:
    reader = FeatureReader(find_space(cache, None))
    val = join(cache, reader, {"colors": None}, split="val", held_out=0.25, min_coverage=0.9)
    held_out = {val.name_of(i) for i in range(val.size)}
    unusable = turns("?", "x" * 500) if held_out_are == "too long" else ()
    samples = [
        replace(sample, messages=unusable) if f"colors/{sample.id}" in held_out else sample
        for sample in read_samples(cache, "colors")
    ]
    features = with_samples(cache, tmp_path, samples)
    words = ["--max-sequence-length", "100", "--over-long", "split", "--held-out", "0.25"]
    folder = train("--max-steps", "2", "--eval-every", "2", *words, features=features)
    assert len(losses(folder)) == 2
    assert "no held-out sample can be used, so no held-out loss is measured" in caplog.text


def test_nothing_to_learn_is_one_line_and_leaves_no_run(
    train: Callable[..., Path], cache: CacheRoot, tmp_path: Path
) -> None:
    silent = [replace(sample, messages=()) for sample in read_samples(cache, "colors")]
    features = with_samples(cache, tmp_path, silent)
    with pytest.raises(UserError, match="colors: no sample has text to learn from") as refused:
        train("--max-steps", "2", features=features)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "runs").glob("*/stage1"))


def test_long_conversations_are_refused_then_split_and_resumed(
    train: Callable[..., Path], cache: CacheRoot, tmp_path: Path, caplog: Any
) -> None:
    features = with_samples(cache, tmp_path, conversations(cache))
    window = ["--max-sequence-length", "64", "--max-tokens", "128", "--save-every", "4"]
    with pytest.raises(
        UserError, match=r"do not fit\. Raise .*--over-long split.*--over-long leave-out"
    ):
        train(*window, "--max-steps", "8", features=features)
    assert losses(
        train("--max-sequence-length", "200", "--max-steps", "1", "--run", "a", features=features)
    )
    window += ["--over-long", "split"]
    whole = losses(train(*window, "--max-steps", "8", "--run", "whole", features=features))
    assert "cut between turns into" in caplog.text
    first = train(*window, "--max-steps", "8", "--run", "cut", features=features)
    for step in (first / "checkpoints").glob("step-*8"):
        shutil.rmtree(step)
    shutil.rmtree(first / "final")
    cut = train("--run", "cut", *window, "--max-steps", "8", "--resume", features=features)
    assert losses(cut) == whole
    shutil.rmtree(first / "final")
    with pytest.raises(UserError, match="over_long 'split' -> 'leave-out'"):
        train("--run", "cut", *window, "--over-long", "leave-out", "--resume", features=features)
    caplog.clear()
    folder = train(
        *window, "--over-long", "leave-out", "--max-steps", "2", "--run", "less", features=features
    )
    assert "left out (--over-long leave-out), first colors/" in caplog.text
    assert len(losses(folder)) == 2


def test_several_answers_are_drawn_alike_by_a_resumed_run(
    train: Callable[..., Path], cache: CacheRoot, tmp_path: Path, capsys: Any
) -> None:
    samples = [
        replace(
            sample,
            id=f"{sample.id}-{k}",
            choice=sample.id,
            messages=(sample.messages[0], replace(sample.messages[1], content="xyz"[k] * 3)),
        )
        for sample in read_samples(cache, "colors")
        for k in range(3)
    ]
    features = with_samples(cache, tmp_path, samples)
    whole = losses(train("--max-steps", "9", "--save-every", "5", "--run", "a", features=features))
    assert "answers to" in capsys.readouterr().out
    folder = train("--max-steps", "9", "--save-every", "5", "--run", "b", features=features)
    for step in (folder / "checkpoints").glob("step-*9"):
        shutil.rmtree(step)
    shutil.rmtree(folder / "final")
    again = train(
        "--max-steps", "9", "--save-every", "5", "--run", "b", "--resume", features=features
    )
    assert losses(again) == whole
