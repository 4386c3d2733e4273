"""Training on a remote cache, compared with training on the same cache in a local folder.

python -m tests.benchmarks.remote                # two minutes, 0.5 GB of disk below --folder

Rows of the real size (576 x 1024, int8), a tiny language model, and two servers on the loopback interface: a
web server, and moto's S3. In the runs with errors 10 % of the requests fail: status 500 or 429, a connection
reset, or a short body.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from cache.format import codec
from cache.remote.open import RemoteCache, RemoteOptions
from cache.share import share
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space, find_space
from tests.benchmarks.bench import Options, Requirements, run, seconds
from tests.support import remote_servers, trained_runs
from tests.support.spaces import key, write_rows
from train.metrics import read_metrics

IMAGES = 192
BATCH = 8
STEPS = IMAGES // BATCH
BAD = 0.1
LATENCY_S = 0.03
BATCH_ROWS = 16
RUNS = 3
COMMAND = "import sys, train.run; print('ready'); sys.exit(train.run.main())"
"""`python -m train.run` that prints a line when everything is imported."""


def make_cache(folder: Path) -> CacheRoot:
    """Make a cache of rows of the real size, with one question for each."""
    root = CacheRoot(folder)
    spec = trained_runs.spec(image_size=336, patch_size=14, width=1024, codec="int8")
    space = Space.create(root, spec, {"library": "none"}, shard_bytes=32 * spec.row_bytes("image"))
    rng = np.random.default_rng(0)
    shape = (spec.tokens("image"), spec.width)
    rows = (codec.pack(rng.standard_normal(shape, np.float32), spec.codec) for _ in range(IMAGES))
    write_rows(space, rows)
    records, samples = [], []
    for number in range(IMAGES):
        source = f"/images/{number}.png"
        records.append(MediaRecord(source=source, key=key(number), width=336, height=336))
        asked = Message(role="user", content="<image>Which?")
        answer = Message(role="assistant", content=str(number))
        media = (MediaRef(source=source),)
        samples.append(Sample(id=str(number), dataset="d", messages=(asked, answer), media=media))
    append_media(root, records, "bench")
    write_samples(root, "d", samples)
    share(root)
    return root


@dataclass(frozen=True)
class Trained:
    """The figures of one run of `train.run`."""

    first_step_s: float
    """Seconds from the end of the imports to the end of the first step."""
    total_s: float
    """Seconds from the end of the imports to the end of the run."""
    losses: list[float]
    """Loss of every step."""


def train(folder: Path, name: str, features: str, *more: str) -> Trained:
    """Train one epoch in a process of its own."""
    words = [
        *("-c", COMMAND, "--features", features, "--run", name, "--log-every", "1"),
        *("--llm", "random:qwen3-tiny", "--hardware", "cpu", "--device", "cpu", "--held-out", "0"),
        *("--batch-size", str(BATCH), "--max-steps", str(STEPS), "--eval-every", "0"),
        *("--mirror", str(folder / f"mirror-{name}"), *more),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    first = 0.0
    with subprocess.Popen(
        [sys.executable, "-u", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "ready\n":
                started = time.monotonic()
            if not first and line.lstrip().startswith("step"):
                first = time.monotonic() - started
    if process.returncode:
        raise SystemExit("".join(lines[-20:]))
    total = time.monotonic() - started
    found = read_metrics(folder / "runs" / name / "stage1")
    return Trained(first, total, [line["loss"] for line in found if "loss" in line])


def trainings(requirements: Requirements, folder: Path, root: CacheRoot) -> None:
    """Train on the local folder, then over each server, without and with errors."""
    used = IMAGES * FeatureReader(find_space(root, None)).geometry["image"].row_bytes
    local = train(folder, "local", str(root.path))
    print(f"local folder: first step {local.first_step_s:.1f} s, all {local.total_s:.1f} s")
    with remote_servers.WebServer(root.path) as web, remote_servers.FaultyS3() as s3:
        aws = remote_servers.environment(s3.url)
        with mock.patch.dict(os.environ, aws):
            remote_servers.upload(root.path, "s3://features/real")
        places: dict[str, tuple[remote_servers.LocalServer, str]] = {
            "https": (web, web.url),
            "s3": (s3, "s3://features/real"),
        }
        for kind, (server, url) in places.items():
            for bad in (0.0, BAD):
                server.failure_rate, server.latency_s, server.row_bytes = bad, LATENCY_S, 0
                with mock.patch.dict(os.environ, aws) if kind == "s3" else nullcontext():
                    found = train(folder, f"{kind}-{bad}", url)
                name = f"{kind}, {bad:.0%} of requests fail"
                first = found.first_step_s
                requirements.at_most(f"{name}: first step, s", first, 10)
                print(f"  {first - local.first_step_s:+.1f} s to the local one's")
                requirements.at_most(f"{name}: bytes / rows used", server.row_bytes / used, 1.05)
                requirements.equal(f"{name}: losses as local", found.losses == local.losses, True)
                print(f"  all {found.total_s:.1f} s ({found.total_s / local.total_s:.2f} of local)")


def reading(requirements: Requirements, folder: Path, root: CacheRoot) -> None:
    """Measure the rows per second of one reader for several latencies, fetched and from the local copy."""
    with remote_servers.WebServer(root.path) as server:
        for latency in (0.0, 0.03, 0.1):
            server.latency_s = latency
            rates, kept = [], []
            for run in range(RUNS):
                options = RemoteOptions(mirror=folder / f"rows-{latency}-{run}")
                reader = RemoteCache(server.url, options).open_reader(None)
                rates.append(rate(reader, run))
                kept.append(rate(reader, run))
            size = reader.geometry["image"].row_bytes
            fetched, again = statistics.median(rates), statistics.median(kept)
            print(
                f"latency {latency * 1000:.0f} ms: {fetched:,.0f} rows/s ({fetched * size / 1e6:,.0f} MB/s) "
                f"fetched, {again:,.0f} rows/s ({again * size / 1e6:,.0f} MB/s) from the local copy"
            )
            if latency:
                # One request at a time gets at most 1 / latency rows per second.
                name = f"rows/s at {latency * 1000:.0f} ms / one at a time"
                requirements.at_least(name, fetched * latency, 4)


def rate(reader: FeatureReader, seed: int) -> float:
    """Read all rows once, in batches in random order; return rows per second."""
    rows = np.random.default_rng(seed).permutation(IMAGES)
    out = np.empty((BATCH_ROWS, reader.geometry["image"].row_bytes), np.uint8)

    def read() -> None:
        for at in range(0, IMAGES, BATCH_ROWS):
            reader.read_into("image", rows[at : at + BATCH_ROWS], out)

    return IMAGES / seconds(read)


def measure(_: Options, folder: Path, requirements: Requirements) -> None:
    """Measure trainings, then reading alone."""
    root = make_cache(folder / "cache")
    trainings(requirements, folder, root)
    reading(requirements, folder, root)


if __name__ == "__main__":
    run("remote", __doc__, measure, Options)
