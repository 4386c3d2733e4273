"""Too little memory: how an error says so, and which settings need less, in the order in which to try them.

    if is_out_of_memory(error):
        now, another = less_memory(options, processes=4, gpu=on_gpu(error))
    # {"max_tokens": 4096, "use_gradient_checkpointing": True, "shard": "full", "offload": True}, {"lora": 16}

Settings that change nothing that is learned are first, by what they cost: smaller micro-batches, computing
layers twice, sharing the model among processes, keeping it in the CPU's memory. A run can go on with them.
Adapters change what is learned, so they need another run. What is in force already is left out.
"""

from __future__ import annotations

import re

import torch

from train.config import Options

NO_MEMORY = re.compile(
    r"out of memory|(can(no|')t|unable to) (allocate|mmap)|not enough memory|bad_alloc|_ALLOC_FAILED",
    re.IGNORECASE,
)
"""In the message of a RuntimeError or OSError: how torch, CUDA's libraries, the kernel and C++ say it."""
DEVICE = re.compile(r"CUDA|CUBLAS|CUDNN|NCCL|HIP")
"""In the message of an error about a GPU's memory."""
RANK = 16
"""Rank of the adapters that a message suggests."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is too little memory, of a GPU or of this machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error)) is not None


def on_gpu(error: BaseException) -> bool:
    """Return whether the memory of a GPU was too small, not that of this machine."""
    return isinstance(error, torch.OutOfMemoryError) or DEVICE.search(str(error)) is not None


def less_memory(
    options: Options, *, processes: int, gpu: bool
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the options that need less memory, in the order in which to try them.

    Args:
        options: of the run.
        processes: that train together.
        gpu: whether the memory of a GPU was too small.

    Returns:
        Name -> value of options with which the run can go on, and of those that another run would need; each
        may be empty.
    """
    now: dict[str, object] = {}
    smaller = max(options.max_sequence_length, options.max_tokens // 2)
    if smaller < options.max_tokens:
        now["max_tokens"] = smaller
    if not options.use_gradient_checkpointing:
        now["use_gradient_checkpointing"] = True
    if processes > 1 and options.shard != "full":
        now["shard"] = "full"
    if gpu and not options.offload:
        now["offload"] = True
    another: dict[str, object] = {}
    if options.train_llm and not options.lora:
        another["lora"] = RANK
    elif options.lora and gpu and not options.load_in_4bit:
        another["load_in_4bit"] = True
    return now, another


def shorter(options: Options) -> dict[str, object]:
    """Return the options of a run with sequences half as long, cut between turns; {} if they are short."""
    window = options.max_sequence_length // 2
    if window < 1:
        return {}
    return {"max_sequence_length": window, "max_tokens": window, "over_long": "split"}
