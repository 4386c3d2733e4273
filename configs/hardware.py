"""The cores of this machine, memory that is kept, and the presets of configs/train.yaml for cards.

    on_hardware(stage, presets["2x40gb"])["gradient_accumulation_steps"]    # twice the stage's

Torch is not imported here, so that reading a command line stays fast.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError
from configs.command_line import CommandLine, command_text

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of cores in each period, as `docker run --cpus` sets them for a container."""

DEVICES = Path("/dev")
GPU_DEVICES = ("nvidia", "nvhost", "nvmap", "dxg", "kfd")
"""Beginnings of the names that drivers of GPUs show there: Nvidia (two on small boards), Windows, AMD."""

KEPT_BYTES = 128 << 20
"""Freed memory that `keep_memory` lets a process keep, at most."""
BUFFER_BYTES = 32 << 20
"""Larger buffers go back to the system in any case: the most that glibc accepts."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>

BATCHES_FOR = 4
"""GPUs for which configs/train.yaml states the batches of the stages."""


def cores() -> int:
    """Return the number of CPU cores that this process may use: by its affinity, or its container's quota."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or `max`: no quota
        return count


def may_have_gpu() -> bool:
    """Return whether a driver of GPUs shows a device here; without one torch finds no GPU either."""
    return any(path.name.startswith(GPU_DEVICES) for path in DEVICES.glob("*"))


def keep_memory() -> None:
    """Let the C library keep freed buffers for the next ones, if it is glibc; unless MALLOC_... is set.

    Otherwise it returns them to the system, and a job gets thousands of fresh pages for each image that it
    decodes and encodes: 8 of 66 ms of processor time (small tower, virtual machine, 2026-11-27).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, BUFFER_BYTES)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU."""

    name: str
    """As its vendor calls it."""
    gib: int
    """Memory, GiB."""
    tflops: float
    """Dense bfloat16 peak with float32 sums, TFLOP/s, as the vendor states it."""


CARDS = {
    "16gb": Card(name="RTX 4080", gib=16, tflops=97.5),
    "24gb": Card(name="RTX 4090", gib=24, tflops=165.2),
    "40gb": Card(name="A100-40", gib=40, tflops=312.0),
    "80gb": Card(name="A100-80", gib=80, tflops=312.0),
}
"""Hardware preset of one card -> a card of that size."""


def card_of(preset: str) -> Card | None:
    """Return the card of a preset, `40gb` or `2x40gb`; None for the CPU."""
    return CARDS.get(preset.rpartition("x")[2])


def gpus_of(preset: str) -> int | None:
    """Return the number of GPUs that a preset is for; None: it is for any number."""
    count, times, _ = preset.partition("x")
    return int(count) if times else None


def one_card(memory_bytes: int) -> str:
    """Return the preset for a GPU with this much memory."""
    # A card reports less than its name says (an A100-40 39.4 GiB), so the limits are below 80, 40 and 24.
    gib = memory_bytes / 2**30
    return "80gb" if gib > 70 else "40gb" if gib > 35 else "24gb" if gib > 20 else "16gb"


def check_processes(preset: str, processes: int, command: CommandLine) -> None:
    """Check that a preset for a number of GPUs has as many processes.

    Raises:
        UserError: it has not. The message has the command that starts them.
    """
    gpus = gpus_of(preset)
    if gpus in (None, processes):
        return
    card = preset.partition("x")[2]
    start = command_text(f"torchrun --nproc-per-node {gpus} -m train.run --", command.words)
    raise UserError(
        f"--hardware {preset} is for {gpus} processes, one for each GPU, and here is {processes}; give "
        f"--hardware {card}, or start them: {start}"
    )


def on_hardware(stage: Mapping[str, Any], name: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage with those of the hardware preset `name`.

    A preset for a number of GPUs accumulates so that a step has the samples of the stage. Where the language
    model does not train, it has no adapters.
    """
    values = {**stage, **preset}
    if not stage["train_llm"]:
        values["lora"] = 0
    if gpus := gpus_of(name):
        accumulation = stage["gradient_accumulation_steps"] * BATCHES_FOR
        values["gradient_accumulation_steps"] = max(1, accumulation // gpus)
    return values
