"""How a training ends early: the command it prints, the rates it suggests, the checkpoints it gives up.

integration/train/test_ways_out.py runs the printed commands.
"""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import torch

from configs import UserError
from configs.command_line import CommandLine
from train.config import Options, free_name
from train.distributed.group import ProcessGroup
from train.stage import ending

COMMAND = CommandLine("python -m train.run", ("--features", "my cache"))


def test_the_command_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    one = ending.command_line("python -m train.run", ["--run", "a b"], ProcessGroup())
    assert one.text(resume=True) == "python -m train.run --run 'a b' --resume"
    group = ProcessGroup()
    group.world_size = 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of two machines
    many = ending.command_line("python -m train.run", ["--run", "a"], group)
    assert many.text() == "torchrun --nproc-per-node 4 -m train.run -- --run a"


def test_rates_are_a_tenth_and_at_most_those_of_the_stage() -> None:
    high = Options(stage=1, learning_rate=1e12, connector_learning_rate=5e-3)
    assert ending.lower_rates(high) == {"learning_rate": 1e-4, "connector_learning_rate": 5e-4}
    usual = ending.lower_rates(Options(stage=1, learning_rate=1e-4))
    assert usual["learning_rate"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("loss", "first", "diverged"),
    [
        *((3.0, 11.0, False), (12.0, 11.0, False), (21.0, 11.0, False), (23.0, 11.0, True)),
        *((0.9, 0.05, False), (1e20, 0.05, True), (math.nan, 11.0, True), (math.inf, 11.0, True)),
    ],
)
def test_weights_that_have_diverged(loss: float, first: float, diverged: bool) -> None:
    """A loss that is high for one hard step of a trained model is no reason to give up its checkpoint."""
    assert ending.has_diverged(loss, math.log(151_936), first) == diverged


def test_a_new_name_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("r", "r-2", "2026-11-26", "a/b"):
        (Path("runs") / name).mkdir(parents=True)
    Path("a/b").mkdir(parents=True)
    assert free_name("r") == free_name("r-2") == "r-3"
    assert free_name("2026-11-26") == "2026-11-26-2"
    assert free_name("a/b/") == "a/b-2"
    assert free_name("new") == "new-2"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            OSError(errno.ENOSPC, "x"),
            "run: the disk is full; no checkpoint was saved yet. Make room, then",
        ),
        (OSError(errno.ENOSPC, "x", "a.bin"), "a.bin: the disk is full"),
        (Exception("No space left on device (os error 28)"), "run: the disk is full"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up"),
        (OSError(errno.EIO, "x"), "the disk fails (I/O error)"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory (CUDA out of memory.)"),
    ],
    ids=str,
)
def test_one_line_for_what_a_user_can_solve(error: Exception, what: str) -> None:
    with pytest.raises(UserError) as said, ending.one_line(Path("run"), COMMAND, Options()):
        raise error
    assert what in str(said.value)
    assert "python -m train.run --features 'my cache'" in str(said.value).splitlines()[-1]


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("a bug"), FileNotFoundError(2, "x")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), ending.one_line(Path("run"), COMMAND, Options()):
        raise error
