"""Records of a run: the line on the screen, and metrics.jsonl after a resume.

screen_line(window, last_step=1000)    # "step   10/1000  loss 1.5000  lr 1.00e-04 ..."
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from configs import UserError
from tests.configs.screen import Terminal
from tests.support import trained_runs
from train import metrics
from train.metrics import (
    METRICS,
    RunLog,
    StepRecord,
    cut_metrics,
    open_trackers,
    read_metrics,
    screen_line,
)


def record(step: int, loss: float, step_s: float) -> StepRecord:
    rates = {"lr": 1e-4, "connector_lr": 0.0, "grad_norm": 2.0, "epoch": 0.0}
    sizes = {"samples": 8, "tokens": 500, "wait_s": 0.1, "memory_gib": 1.5}
    return StepRecord(step=step, loss=loss, step_s=step_s, **rates, **sizes)


def test_the_line_on_the_screen_averages_the_steps_since_the_previous_one() -> None:
    line = screen_line([record(9, 1.0, 0.5), record(10, 2.0, 1.5)], 3610)
    assert line == (
        "step   10/3610  loss 1.5000  lr 1.00e-04  grad 2.00  500 tok/s  8.0 samples/s  wait 10.0%  "
        "1000 ms  1.5 GiB  ETA 1 h 00 min"
    )


@pytest.mark.parametrize("kind", ["terminal", "file"])
def test_a_bar_is_below_the_lines_on_a_terminal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    for name in ("FIRST_BAR_S", "FIRST_LINE_S", "UPDATE_S"):
        monkeypatch.setattr(f"configs.progress.{name}", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "")
    with contextlib.ExitStack() as stack:
        terminal = stack.enter_context(Terminal(columns=160))
        if kind == "terminal":
            stack.enter_context(contextlib.redirect_stdout(terminal.stream))
            stack.enter_context(contextlib.redirect_stderr(terminal.stream))
        log = RunLog(tmp_path, every=10, last_step=1000, start=400)
        for step in range(401, 415):
            log.step(record(step, 1.0, 0.5))
        log._bar._display.paint()
        if kind == "terminal":
            line, bar = terminal.screen().text()
            assert bar.startswith("train  41% [=") and "  414/1,000" in bar
        log.close()
        assert kind == "file" or terminal.screen().fresh
        said = capsys.readouterr()
        (line,) = terminal.screen().text() or said.out.splitlines()
    assert line.startswith("step  410/1000  loss 1.0000  ") and said.err == ""


def test_metrics_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 2, "held_out_loss": 1.5}\n{"step": 3}\n{"st'
    )
    assert len(read_metrics(tmp_path)) == 4  # the incomplete last line is ignored
    assert cut_metrics(tmp_path, 2) == 3  # the last step that was recorded
    expected = '{"step": 1}\n{"step": 2}\n{"step": 2, "held_out_loss": 1.5}\n'
    assert (tmp_path / METRICS).read_text() == expected


@pytest.mark.parametrize(
    "value", ["-1", "1e300", "NaN", "1" + "0" * 400, "true", '"4"', "[]"], ids=lambda v: v[:9]
)
@pytest.mark.parametrize("name", ["loss", "samples", "tokens", "step_s", "wait_s", "memory_gib"])
def test_a_value_that_no_run_records_is_named(tmp_path: Path, name: str, value: str) -> None:
    if name == "loss" and value in ("-1", "1e300", "NaN"):
        return
    line = {"step": "1", "loss": "1.0"} | {name: value}
    text = ", ".join(f'"{key}": {one}' for key, one in line.items())
    (tmp_path / METRICS).write_text(f"{{{text}}}\n")
    with pytest.raises(
        UserError, match=r"metrics.jsonl:1: cannot be read .*; remove it"
    ) as refused:
        read_metrics(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


# ---- trackers


def opened(*names: str, folder: Path, start: int = 0, recorded: int = 0) -> list[metrics.Tracker]:
    run = folder / "runs" / "first" / "stage1"
    config = {"config": Path("mine.yaml"), "betas": (0.9, 0.95)}
    return open_trackers(names, run, run_id="abc123", start=start, recorded=recorded, config=config)


def test_wandb_gets_the_project_the_options_and_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = trained_runs.record_tracker(monkeypatch, "wandb")
    (tracker,) = opened("wandb", folder=tmp_path, start=4, recorded=6)
    for step in (5, 6, 7):  # 5 and 6 were sent by the process that was killed
        tracker.log({"loss": 1.5}, step)
    tracker.close()
    (run,) = calls["init"]
    assert (run["project"], run["name"], run["id"]) == ("nanoMolmo2", "first-stage1", "abc123")
    assert run["resume"] == "allow"
    assert run["dir"] == str(tmp_path / "runs" / "first" / "stage1")
    assert run["config"] == {"config": "mine.yaml", "betas": [0.9, 0.95]}
    assert calls["log"] == [{"values": {"loss": 1.5}, "step": 7}]
    assert calls["finish"] == [{}]


def test_a_new_run_never_continues_another_one_of_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = trained_runs.record_tracker(monkeypatch, "trackio")
    for start in (0, 4):
        opened("trackio", folder=tmp_path, start=start)[0].close()
    new, resumed = calls["init"]
    assert new["name"] == resumed["name"] == "first-stage1-abc123"
    assert (new["resume"], resumed["resume"]) == ("never", "allow")
    assert len(calls["finish"]) == 2


def test_a_tracker_that_fails_is_one_warning_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no login\nfor you.")

    broken = trained_runs.record_tracker(monkeypatch, "wandb", log=fail)
    works = trained_runs.record_tracker(monkeypatch, "trackio")
    trackers = opened("wandb", "trackio", folder=tmp_path)
    for tracker in trackers:
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 0.5}, 2)
        tracker.close()
    assert caplog.messages == ["--log wandb: no login for you; the training goes on without it"]
    assert broken["finish"] == [] and len(works["log"]) == 2
    caplog.clear()
    trained_runs.record_tracker(monkeypatch, "wandb", init=fail)
    assert opened("wandb", folder=tmp_path) == []
    assert "keep the curves on this machine: WANDB_MODE=offline" in caplog.messages[0]
    assert len(caplog.messages) == 1


def test_a_tracker_that_never_ends_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    trained_runs.record_tracker(monkeypatch, "wandb", finish=lambda: released.wait(60))
    monkeypatch.setattr(metrics, "CLOSE_S", 0.05)
    opened("wandb", folder=tmp_path)[0].close()
    released.set()
    assert len(caplog.messages) == 1 and "its last points may be missing" in caplog.messages[0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_folder_with_the_name_of_a_tracker_is_none(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setitem(sys.modules, name, None)  # removed again at the end of the test
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=f"not installed: pip install {name}"):
        opened(name, folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "function"), [(n, f) for n, of in trained_runs.TRACKERS.items() for f in of]
)
def test_the_stand_ins_have_the_parameters_of_the_real_trackers(name: str, function: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    module: Any = importlib.import_module(name)
    real = inspect.signature(getattr(module, function)).parameters
    assert set(trained_runs.TRACKERS[name][function].split()) <= set(real)
