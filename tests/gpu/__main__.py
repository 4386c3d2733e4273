"""Check every CUDA path against the CPU, then measure its speed: under ten minutes on one NVIDIA GPU.

python -m tests.gpu                      # make gpu
python -m tests.gpu --cpu                # the same code, tiny, without a GPU
python -m tests.gpu --only encoding,attention,training

It needs torch, transformers, timm, pyarrow and pytest, and what docs/BENCHMARKS.md names; no network, no Ray,
no video library. The last lines are a Markdown table. Weights are random, of the real sizes: neither bits nor
speed depend on what a model has learned.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from cache.errors import CacheError
from model.io.device import pick_device
from tests.gpu.attention import check_attention
from tests.gpu.encode_speed import measure_encoding
from tests.gpu.encoding import check_encoding
from tests.gpu.lines import CPU, GPU, Lines, describe
from tests.gpu.train_memory import measure_memory
from tests.gpu.train_speed import measure_training
from tests.gpu.training import check_training

PROG = "python -m tests.gpu"
PARTS = ("encoding", "attention", "training", "train-memory", "encode-speed", "train-speed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check and measure the CUDA paths."""

    cpu: bool = False
    """Run the same code, tiny, on the CPU."""
    only: str = ""
    """Parts to run, separated by commas: encoding, attention, training, train-memory,
    encode-speed, train-speed."""
    folder: Path | None = None
    """Where caches and runs are made, and removed afterwards; the system's temporary folder by default."""

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"--only {part}: there are {', '.join(PARTS)}")

    @property
    def parts(self) -> list[str]:
        """The chosen parts."""
        return [part for part in self.only.split(",") if part] or list(PARTS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; return 0 also where a line falls short, as benchmarks do."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    scale = CPU if options.cpu else GPU
    pick_device(str(scale.device))
    print(describe(scale.device), flush=True)
    lines, started, steps = Lines(), time.monotonic(), ""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "encoding" in options.parts:
            check_encoding(lines, scale, folder)
        if "attention" in options.parts:
            check_attention(lines, scale)
        if "training" in options.parts:
            check_training(lines, scale, folder / "training")
        if "train-memory" in options.parts:  # before an encoder takes memory
            with lines.part("train: memory"):
                measure_memory(lines, scale, folder / "train-memory")
        if "encode-speed" in options.parts:
            measure_encoding(lines, scale, folder / "encode-speed")
        if "train-speed" in options.parts:
            steps = measure_training(lines, scale, folder / "train-speed")
    print(f"\n{lines.table(scale.device)}\n\n{steps}\n")
    lines.summary()
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
