"""Checkpoints: complete or absent, and a resumed training has the same bits.

path = checkpoint.save(folder, 7, model, optimizer, {})
state = checkpoint.load(checkpoint.newest(folder), model, optimizer)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import UserError
from tests.support.trained_runs import Toy
from train.config import Options
from train.optim import build_optimizer, rate_schedules, set_rates
from train.stage import checkpoint

OPTIONS = Options(max_steps=50, warmup_steps=3, connector_warmup_steps=3, learning_rate=1e-2)


def train(model: Toy, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        set_rates(optimizer, rate_schedules(OPTIONS), step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(llm: bool = True) -> tuple[Toy, torch.optim.Optimizer]:
    model = Toy()
    model.language.requires_grad_(llm)
    return model, build_optimizer(model, OPTIONS)


@pytest.mark.parametrize("llm", [True, False])
def test_training_from_a_checkpoint_equals_uninterrupted_training(
    tmp_path: Path, llm: bool
) -> None:
    model, optimizer = build(llm)
    train(model, optimizer, 0, 7)
    path = checkpoint.save(tmp_path, 7, model, optimizer, {"samples": 56})
    expected = train(model, optimizer, 7, 15)

    again, optimizer_again = build(llm)
    state = checkpoint.load(path, again, optimizer_again)
    assert state == {"step": 7, "samples": 56}
    assert train(again, optimizer_again, 7, 15) == expected
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_frozen_parameters_are_not_saved_and_no_file_is_a_pickle(tmp_path: Path) -> None:
    model, optimizer = build(llm=False)
    train(model, optimizer, 0, 2)
    path = checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert sorted(load_file(path / checkpoint.MODEL)) == ["connector.bias", "connector.weight"]
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json", ""}
    for file in path.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = build()
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, model, optimizer, {})
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000010", "step-00000100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_folder_without_the_marker_is_ignored_and_removed(tmp_path: Path) -> None:
    model, optimizer = build()
    first = checkpoint.save(tmp_path, 1, model, optimizer, {})
    second = checkpoint.save(tmp_path, 2, model, optimizer, {})
    (second / checkpoint.COMMITTED).unlink()
    assert checkpoint.newest(tmp_path) == first
    checkpoint.save(tmp_path, 3, model, optimizer, {})
    assert not second.exists()  # as after a kill


def test_a_kill_at_any_step_of_writing_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before each flush and rename in turn: the newest checkpoint can be loaded every time."""

    class Killed(BaseException):
        pass

    model, optimizer = build()
    reference = checkpoint.save(tmp_path, 1, model, optimizer, {})

    def run(stop_at: int) -> bool:
        calls = itertools.count(1)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: object) -> None:
                if next(calls) == stop_at:
                    raise Killed
                real(*args)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "rename", counted(Path.rename))
            checkpoint.save(tmp_path, 2, model, optimizer, {})
            return True
        return False

    stopped = 0
    while not run(stopped + 1):
        stopped += 1
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        checkpoint.load(newest, model, optimizer)  # the old one or the new one, but complete
        if newest != reference:  # stopped after the rename
            shutil.rmtree(newest)
    assert stopped >= 6  # flushes of three files, the marker and two folders, and a rename


def test_a_truncated_file_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    model, optimizer = build()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    file = path / checkpoint.MODEL
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"model.safetensors: \d+ bytes, should be \d+; remove .*step-00000001"
    ):
        checkpoint.load(path, model, optimizer)


def test_a_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    model, optimizer = build()
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    other, other_optimizer = build(llm=False)
    with pytest.raises(UserError, match="another model"):
        checkpoint.load(path, other, other_optimizer)
    wide = Toy(width=5)
    with pytest.raises(UserError, match="another model"):
        checkpoint.load(path, wide, build_optimizer(wide, OPTIONS))


def test_the_steps_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """It wrote AdamW's steps as tensors beside the moments."""
    model, optimizer = build()
    train(model, optimizer, 0, 3)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {})
    as_earlier(path, torch.tensor(3.0))
    again, optimizer_again = build()
    assert checkpoint.load(path, again, optimizer_again) == {"step": 3}
    assert train(again, optimizer_again, 3, 6) == train(model, optimizer, 3, 6)


@pytest.mark.parametrize("step", [torch.tensor(torch.nan), torch.tensor(torch.inf), torch.ones(2)])
def test_a_step_that_is_no_number_of_steps_is_refused(tmp_path: Path, step: torch.Tensor) -> None:
    model, optimizer = build()
    train(model, optimizer, 0, 3)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {})
    as_earlier(path, step)
    with pytest.raises(UserError, match="remove it, and --resume") as refused:
        checkpoint.load(path, model, optimizer)
    assert "\n" not in str(refused.value)


def as_earlier(path: Path, step: torch.Tensor) -> None:
    """Change a checkpoint into one of the earlier version."""
    state = json.loads((path / checkpoint.STATE).read_text())
    names = state.pop(checkpoint.OPTIMIZER_STEPS)
    (path / checkpoint.STATE).write_text(json.dumps(state))
    steps = {f"{name}/step": step.clone() for name in names}
    save_file(load_file(path / checkpoint.OPTIMIZER) | steps, path / checkpoint.OPTIMIZER)
    files = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    sizes = {name: (path / name).stat().st_size for name in files}
    (path / checkpoint.COMMITTED).write_text(json.dumps(sizes))
