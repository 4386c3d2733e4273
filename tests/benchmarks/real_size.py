"""Models of the real sizes on this machine: ViT-L/14@336 encodes photographs, Qwen3-0.6B trains on them.

python -m tests.benchmarks.real_size             # a few minutes, 13 GB of memory, 10 MB of disk

The weights are random: times, memory and shapes are those of the real models, answers are not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.benchmarks import bench
from tests.benchmarks.bench import Options, Requirements
from tests.support.photos import make_folder
from train.metrics import read_metrics

IMAGES = 16
TRAIN_STEPS = 3


def run(*argv: str) -> tuple[str, float, float]:
    """Run a command; return its output, seconds, and peak resident memory with its children, GiB."""
    print("$ python -m " + " ".join(argv), flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = Peak(process.pid)
    output, _ = process.communicate()
    seconds = time.monotonic() - started
    print(output, flush=True)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    return output, seconds, peak.stop()


class Peak:
    """Sample the memory of a process tree, because a parent does not wait for Ray's workers."""

    def __init__(self, pid: int) -> None:
        self.pid, self.largest, self.done = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.1):
            self.largest = max(self.largest, sum(map(resident_bytes, session_members(self.pid))))

    def stop(self) -> float:
        """Stop sampling; return the largest sum, GiB."""
        self.done.set()
        self.thread.join()
        return self.largest / 2**30


def session_members(root: int) -> list[int]:
    """Return the ids of a process and of all its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # the process has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    members, grown = {root}, True
    while grown:
        new = {pid for pid, parent in parents.items() if parent in members} - members
        grown = bool(new)
        members |= new
    return sorted(members)


def resident_bytes(pid: int) -> int:
    """Return the private and shared memory of a process now; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def measure(_: Options, folder: Path, requirements: Requirements) -> None:
    """Encode, verify and train, then compare the numbers of parameters."""
    features = str(folder / "features")
    photos = make_folder(folder / "photos")
    encoder = ("--encoder", "clip-vit-l14-336", "--random-weights")
    _, seconds, memory = run(
        "encode.run", "--dataset", f"folder:{photos}", "--features", features, *encoder,
        "--limit", str(IMAGES), "--codec", "fp16",
    )  # fmt: skip
    print(f"encode: {seconds:.0f} s in all, peak {memory:.1f} GiB\n")
    array = next(Path(features).glob("spaces/*/features/image/zarr.json"))
    requirements.equal("row shape", json.loads(array.read_text())["shape"][1:], [576, 1024])
    listed, _, _ = run("cache.verify", "--features", features, "--deep")
    rows = re.search(r"(\d+) image rows", listed)
    requirements.equal("rows stored", rows and int(rows[1]), IMAGES)

    _, seconds, memory = run(
        "train.run", "--stage", "1", "--llm", "random:qwen3-0.6b", "--hardware", "cpu",
        "--max-steps", str(TRAIN_STEPS), "--features", features, "--run", f"{folder}/run",
    )  # fmt: skip
    print(f"train: {seconds:.0f} s in all, peak {memory:.1f} GiB\n")
    metrics = read_metrics(folder / "run" / "stage1")
    taken = max((line["step"] for line in metrics if "loss" in line), default=0)
    requirements.equal("steps taken", taken, TRAIN_STEPS)

    table, _, _ = run("model.verify", "--random-weights", "--llm", "random:qwen3-0.6b")
    for figure in ("1,049,600", "596,049,920"):
        requirements.equal(f"parameters {figure} printed", figure in table, True)
    vision = re.search(r"303[,.][5-9]\d*|304[,.][0-3]\d*", table)
    print(f"parameters of the encoder: {vision[0] if vision else 'absent'}")
    requirements.equal("parameters of the encoder are 303.5-304.3 M", vision is not None, True)


if __name__ == "__main__":
    bench.run("real_size", __doc__, measure, Options)
