"""Checkpoints written while training goes on: of the step they are named after, whole, and none is lost.

saver = Saver(folder, group, background=True)
saver.save(7, model, optimizer, {})
saver.wait()

tests/train/stage/test_shards.py has several processes.
"""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs import UserError
from tests.support.trained_runs import Toy
from train.config import Options
from train.distributed.group import ProcessGroup
from train.optim import build_optimizer
from train.stage import checkpoint
from train.stage.saver import Saver


@pytest.fixture
def model() -> Toy:
    return Toy()


@pytest.fixture
def optimizer(model: Toy) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, Options())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


class Disk:
    """Holds each write until it is let go, or lets it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.error = threading.Event(), None
        self._write = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self)

    def __call__(self, *arguments: Any) -> None:
        self.go.wait(60)
        if self.error is not None:
            raise self.error
        self._write(*arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def weight(path: Path) -> torch.Tensor:
    return load_file(path / checkpoint.MODEL)["connector.weight"]


def test_training_changes_the_weights_while_they_are_written(
    tmp_path: Path, model: Toy, optimizer: torch.optim.Optimizer, disk: Disk
) -> None:
    before = model.connector.weight.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[model.connector.weight].items()}
    saver = Saver(tmp_path, ProcessGroup(), background=True)
    saver.save(1, model, optimizer, {"more": 5})
    assert checkpoint.newest(tmp_path) is None
    saver.check()  # still writing: returns
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    disk.go.set()
    saver.wait()
    path = checkpoint.newest(tmp_path)
    assert path is not None and torch.equal(weight(path), before)
    assert not torch.equal(model.connector.weight, before)
    assert checkpoint.load(path, model, optimizer) == {"more": 5, "step": 1}
    found = optimizer.state[model.connector.weight]
    assert all(torch.equal(found[k], value) for k, value in moments.items())
    saver.close()


def test_the_next_checkpoint_waits_for_the_one_before(
    tmp_path: Path, model: Toy, optimizer: torch.optim.Optimizer, disk: Disk
) -> None:
    saver = Saver(tmp_path, ProcessGroup(), background=True)
    saver.save(1, model, optimizer, {})
    threading.Timer(0.2, disk.go.set).start()
    saver.save(2, model, optimizer, {})
    assert checkpoint.committed(tmp_path)[0].name == "step-00000001"
    saver.close()  # the end waits too
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("then", ["check", "save", "wait"])
def test_a_failure_is_raised_once_and_the_checkpoint_before_is_kept(
    tmp_path: Path, model: Toy, optimizer: torch.optim.Optimizer, disk: Disk, then: str
) -> None:
    saver = Saver(tmp_path, ProcessGroup(), background=True)
    disk.go.set()
    saver.save(1, model, optimizer, {})
    saver.wait()
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    saver.save(2, model, optimizer, {})
    with pytest.raises(OSError, match="No space left") as raised:
        if then == "check":
            while True:
                saver.check()
        elif then == "save":
            saver.save(3, model, optimizer, {})
        saver.wait()
    assert raised.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    disk.error = None
    saver.check()
    saver.save(3, model, optimizer, {})
    saver.close()
    assert len(checkpoint.committed(tmp_path)) == 2


def test_after_another_error_the_failure_is_one_line_of_the_log(
    tmp_path: Path, model: Toy, optimizer: torch.optim.Optimizer, disk: Disk, caplog: Any
) -> None:
    caplog.set_level(logging.WARNING)
    saver = Saver(tmp_path, ProcessGroup(), background=True)
    disk.error = UserError("the disk\nis gone")
    saver.save(1, model, optimizer, {})
    disk.go.set()
    saver.close()
    assert caplog.messages == ["a checkpoint was not written: the disk is gone"]


def test_without_a_thread_a_checkpoint_is_there_when_save_returns(
    tmp_path: Path, model: Toy, optimizer: torch.optim.Optimizer, disk: Disk
) -> None:
    saver = Saver(tmp_path, ProcessGroup(), background=False)
    disk.go.set()
    saver.save(1, model, optimizer, {})
    assert checkpoint.newest(tmp_path) is not None
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        saver.save(2, model, optimizer, {})
    saver.check()
    saver.close()
