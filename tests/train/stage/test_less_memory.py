"""Too little memory: which errors say so, and the settings that a message names, in order.

less_memory(options, processes=4, gpu=True)
integration/train/test_ways_out.py runs the printed commands.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import UserError
from configs.command_line import CommandLine
from train.config import Options
from train.stage import checkpoint, ending
from train.stage.less_memory import is_out_of_memory, less_memory, on_gpu

COMMAND = CommandLine("python -m train.run", ("--features", "my cache"))
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HUGE = 1 << 55
"""More bytes than an address has."""
LEAST: dict[str, Any] = {
    "max_tokens": 4096,
    "max_sequence_length": 4096,
    "use_gradient_checkpointing": True,
}
"""Options that need little memory already."""


def huge_tensor() -> object:
    return torch.empty(HUGE, dtype=torch.uint8)


def huge_array() -> object:
    return np.ones(HUGE, np.uint8)


@pytest.mark.parametrize("allocate", [huge_tensor, huge_array, lambda: bytearray(HUGE)])
def test_allocations_that_fail_are_recognised(allocate: Any) -> None:
    """By torch on the CPU (a RuntimeError), by numpy and by Python (a MemoryError)."""
    with pytest.raises((RuntimeError, MemoryError)) as failed:
        allocate()
    assert is_out_of_memory(failed.value) and not on_gpu(failed.value)


@pytest.mark.parametrize(
    ("error", "gpu"),
    [
        (CUDA, True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("NCCL error: unhandled cuda error 2 'out of memory'"), True),
        (RuntimeError("MPS backend out of memory"), False),
        (RuntimeError("[enforce fail] not enough memory: DefaultCPUAllocator"), False),
        (RuntimeError("std::bad_alloc"), False),
        (RuntimeError("unable to mmap 1192 bytes from file </a>: x (12)"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False),
    ],
    ids=str,
)
def test_errors_of_memory(error: Exception, gpu: bool) -> None:
    assert is_out_of_memory(error) and on_gpu(error) == gpu


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(2, "x"), ValueError("out of memory")]
)
def test_other_errors_are_none_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_all_settings_in_order() -> None:
    options = Options(max_tokens=16384, use_gradient_checkpointing=False)
    now, another = less_memory(options, processes=4, gpu=True)
    assert list(now.items()) == [
        ("max_tokens", 8192),
        ("use_gradient_checkpointing", True),
        ("shard", "full"),
        ("offload", True),
    ]
    assert another == {"lora": 16}


@pytest.mark.parametrize(
    ("changes", "processes", "gpu", "names"),
    [
        ({}, 1, True, ["offload", "lora"]),
        ({}, 1, False, ["lora"]),
        ({}, 2, False, ["shard", "lora"]),
        ({"shard": "node"}, 2, False, ["shard", "lora"]),
        ({"shard": "full"}, 2, True, ["offload", "lora"]),
        ({"offload": True}, 1, True, ["lora"]),
        ({"lora": 8}, 1, True, ["offload", "load_in_4bit"]),
        ({"lora": 8}, 1, False, []),
        ({"train_llm": False}, 1, False, []),
        ({"max_tokens": 6000}, 1, False, ["max_tokens", "lora"]),
        ({"use_gradient_checkpointing": False}, 1, False, ["use_gradient_checkpointing", "lora"]),
    ],
)
def test_what_is_in_force_is_not_named(
    changes: dict[str, Any], processes: int, gpu: bool, names: list[str]
) -> None:
    now, another = less_memory(Options(**LEAST | changes), processes=processes, gpu=gpu)
    assert [*now, *another] == names


def message(error: Exception, folder: Path, processes: int = 1, **changes: Any) -> str:
    """Return the line of a training that ends with an error."""
    options = Options(**LEAST | changes)
    with (
        pytest.raises(UserError) as said,
        ending.one_line(folder, COMMAND, options, processes),
    ):
        raise error
    (line,) = str(said.value).splitlines()
    return line


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a stage with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/default/stage1")
    monkeypatch.setattr(checkpoint, "newest", lambda path: path / "step-00000008")
    folder.mkdir(parents=True)
    return folder


KEPT = "runs/default/stage1/checkpoints/step-00000008"


def test_the_line_of_a_gpu_with_everything_to_try(saved: Path) -> None:
    line = message(CUDA, saved, 4, max_tokens=16384, use_gradient_checkpointing=False)
    assert line == (
        f"out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); {KEPT} is kept. These need less "
        "memory, in this order: --max-tokens 8192, --use-gradient-checkpointing, --shard full, --offload; in "
        "another run, --lora 16. Go on with: python -m train.run --features 'my cache' --max-tokens 8192 "
        "--use-gradient-checkpointing --resume"
    )


def test_one_setting_after_the_other(saved: Path) -> None:
    """The command has one that moves the model at a time, because each costs time."""
    line = message(CUDA, saved, 4)
    assert "in this order: --shard full, --offload; in" in line
    assert line.endswith(
        "Go on with: python -m train.run --features 'my cache' --shard full --resume"
    )
    line = message(CUDA, saved, 4, shard="full")
    assert line.endswith("--features 'my cache' --offload --resume")


def test_adapters_are_another_run(saved: Path) -> None:
    line = message(MemoryError(), saved)
    assert re.search(r"\(MemoryError\); \S+ is kept\. In another run, --lora 16 needs less", line)
    command = "python -m train.run --features 'my cache' --run default-2"
    assert line.endswith(f"Start it with: {command} --from {KEPT} --lora 16")


def test_without_another_setting_sequences_are_shorter(saved: Path) -> None:
    line = message(MemoryError(), saved, lora=8)
    assert "Take a smaller --llm, or shorter sequences. Start another run with: " in line
    assert line.endswith("--max-sequence-length 2048 --max-tokens 2048 --over-long split")


def test_without_a_checkpoint_the_command_starts_again(tmp_path: Path) -> None:
    line = message(MemoryError(), tmp_path, max_tokens=8192)
    assert "; no checkpoint was saved yet. These need less memory" in line
    assert line.endswith(
        "Start again with: python -m train.run --features 'my cache' --max-tokens 4096"
    )
    line = message(MemoryError(), tmp_path)
    assert line.endswith(
        "saved yet. --lora 16 needs less memory. Start again with: python -m train.run --features 'my cache' "
        "--lora 16"
    )
    assert "resume" not in line and "--from" not in line


def test_the_options_of_the_line_are_options() -> None:
    names = {field.name for field in dataclasses.fields(Options)}
    assert {"max_tokens", "use_gradient_checkpointing", "shard", "offload", "lora"} <= names
    assert {"load_in_4bit", "over_long", "max_sequence_length"} <= names
