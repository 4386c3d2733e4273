"""Train a stage on cached features. No encoder is loaded; images are not opened.

python -m train.run --stage 1 --features cache                    # Qwen3-0.6B on every data set in the cache
python -m train.run --stage 2                                     # starts from stage 1 of the same run
python -m train.run --resume                                      # after a crash, from the newest checkpoint
python -m train.run --datasets cap=0.6,points=0.3,text=0.1        # a mix
python -m train.run --inspect                                     # the first packed batches as text
python -m train.run --lora 16                                     # adapters, on a GPU with less memory
python -m train.run --llm random:qwen3-tiny --max-steps 20        # a laptop, offline
torchrun --nproc-per-node 4 -m train.run -- --stage 1             # four GPUs of one machine
torchrun --nproc-per-node 4 -m train.run -- --shard full          # which share the weights
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import configs
from cache.errors import CacheError
from cache.store.paths import CacheRoot, is_url
from cache.store.space import find_space
from configs.signals import importing, orderly_sigterm
from train.config import SELECTORS, Options, preset, stage_folder

PROG = "python -m train.run"


def main(argv: Sequence[str] | None = None, *, flush_denormal: bool = False) -> int:
    """Run the command in one process, or in each of several that torchrun started.

    Args:
        argv: the command line; None: that of this process.
        flush_denormal: whether this whole process computes with 0 instead of numbers below 1e-38. A memorised
            batch has tiny gradients. AdamW squares them to such numbers, with which a CPU is 60 times slower
            (8 s instead of 0.14 s a step, measured 2026-11-23); 0 loses nothing.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--"]:  # ends torchrun's own options; some versions of Python pass it on
        words = words[1:]
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    options = None
    if alone:
        options = read_options(words)
        check_cache(options)
    with importing():
        import torch

        if flush_denormal:
            torch.set_flush_denormal(True)  # torch's threads inherit it, and have not started yet
        from train import training
        from train.distributed.group import process_group

    with orderly_sigterm(), process_group() as group:
        level = logging.INFO if group.is_main else logging.ERROR
        logging.basicConfig(format="%(message)s", level=level)
        # Of several processes, one reports a mistake: process_group sees to it.
        options = options or read_options(words)
        processes = options.processes or group.world_size
        return training.run(dataclasses.replace(options, processes=processes), PROG, words, group)


def read_options(words: Sequence[str]) -> Options:
    """Return the options that a command line gives, over those of the presets that it selects."""
    return configs.parse(
        Options, words, prog=PROG, description=__doc__, preset=preset, selectors=SELECTORS
    )


def check_cache(options: Options) -> None:
    """Look for the space of a new stage before torch is imported, which takes seconds.

    Raises:
        CacheError: there is none, or there are several and no `--space`.
    """
    # A stage that has begun has its own options, and one that is finished needs no cache.
    begun = options.resume or stage_folder(options.run, options.stage).exists()
    # `training.run` knows what to say about a remote cache, and where the tower of a LLaVA is.
    if not (begun or options.from_ or is_url(options.features)):
        find_space(CacheRoot(Path(options.features)), options.space)


if __name__ == "__main__":
    configs.command(partial(main, flush_denormal=True), errors=(CacheError,))
