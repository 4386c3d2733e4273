"""What the parts share: the sizes of a run, the lines they print, and the clock of a device.

lines = Lines()
lines.at_most("int8: rows that differ", 0, 0)     # int8: rows that differ   0  <= 0  ok
lines.note("tower alone, batch of 8, images/s", "812")
print(lines.table(SCALE_GPU))
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from tests.benchmarks.bench import Requirements

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.1, "RTX 4090": 165.2}
"""Part of a card's name -> its dense bfloat16 peak in TFLOP/s with float32 sums, as the vendor states it."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes of a run."""

    device: torch.device
    """Where the code under test runs. The reference is always the CPU in float32."""
    encoder: str
    """An entry of configs/encoders.yaml."""
    llm: str
    """The language model of the speed lines, `random:<preset>`."""
    window: int
    """Tokens of a micro-batch in the speed lines."""
    images: int
    """Images in the caches of the speed lines."""
    videos: int
    """Videos in these caches."""
    frames: int
    """Frames of a video."""
    steps: int
    """Steps that are timed in one turn."""
    rounds: int
    """Turns of each variant."""

    @property
    def on_gpu(self) -> bool:
        """Whether CUDA is under test."""
        return self.device.type == "cuda"


GPU = Scale(
    device=torch.device("cuda"),
    encoder="clip-vit-l14-336",
    llm="random:qwen3-0.6b",
    window=16384,
    images=192,
    videos=16,
    frames=64,
    steps=4,
    rounds=2,
)
CPU = Scale(
    device=torch.device("cpu"),
    encoder="demo",
    llm="random:qwen3-tiny",
    window=1024,
    images=12,
    videos=4,
    frames=4,
    steps=1,
    rounds=1,
)


class Lines(Requirements):
    """Print lines as they are measured, and keep them for the table."""

    def __init__(self) -> None:
        super().__init__("gpu")
        self.rows: list[tuple[str, str, str, str]] = []

    def note(self, name: str, measured: str) -> None:
        """Print a figure that nothing is required of."""
        print(f"{name:<60}{measured:>12}", flush=True)
        self.rows.append((name, measured, "", ""))

    def _add(self, name: str, measured: str, required: str, ok: bool) -> None:
        super()._add(name, measured, required, ok)
        self.rows.append((name, measured, required, "ok" if ok else "short"))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Turn an exception of a part into a line that falls short; the next part goes on."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # whatever a card or a library may raise
            traceback.print_exc()
            self._add(name, type(error).__name__, "no error", False)
        print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)

    def table(self, device: torch.device) -> str:
        """Return all lines as a Markdown table below the names of card, driver and libraries."""
        head = f"{describe(device)}\n\n| | measured | required | |\n|---|---|---|---|\n"
        return head + "\n".join(f"| {' | '.join(row)} |" for row in self.rows)


def describe(device: torch.device) -> str:
    """Return card, driver and versions in one line."""
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    if device.type != "cuda":
        return f"CPU, {versions}"
    card = torch.cuda.get_device_properties(device)
    return (
        f"{card.name}, {card.total_memory / 2**30:.1f} GiB, driver {_driver()}, "
        f"CUDA {torch.version.cuda}, {versions}"
    )


def _driver() -> str:
    """Return the version of NVIDIA's kernel module."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # the table is worth more than this number
        return "unknown"


def peak_tflops(device: torch.device) -> float | None:
    """Return the bfloat16 peak of a card; None for one that is not listed, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(work: Callable[[], object], device: torch.device, rounds: int, each: int = 1) -> float:
    """Return the median seconds of one call, over `rounds` rounds of `each` calls, after one warm-up."""
    work()
    return statistics.median(turn_s(work, device, each) for _ in range(rounds))


def turn_s(work: Callable[[], object], device: torch.device, each: int) -> float:
    """Return the seconds of one of `each` calls."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(each):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / each


def difference(ours: Tensor, reference: Tensor) -> float:
    """Return |ours - reference| / |reference|, computed in float64; NaN if a value is NaN."""
    a, b = ours.detach().cpu().double(), reference.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def largest_difference(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return the largest `difference` of any tensor; infinite if a name is missing."""
    if ours.keys() != reference.keys():
        return float("inf")
    values = [difference(ours[name], reference[name]) for name in reference]
    return max(values, key=lambda v: float("inf") if v != v else v)


def unequal_rows(ours: Tensor, reference: Tensor) -> int:
    """Return how many first-axis rows differ in a bit."""
    a = ours.detach().cpu().contiguous().view(torch.uint8).flatten(1)
    b = reference.detach().cpu().contiguous().view(torch.uint8).flatten(1)
    return int((a != b).any(1).sum()) if a.shape == b.shape else max(len(a), len(b))
