"""Run encode jobs in tests: tiny images, a tiny encoder, and one function for a whole job.

python -m tests.support.encode_jobs FOLDER WORKERS     # a driver to be killed: FOLDER/images -> FOLDER/cache
python -m tests.support.encode_jobs FOLDER 0 ADDRESS   # on all nodes of a Ray cluster
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.store.ledger import MediaRecord, read_media
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.samples import write_samples
from cache.store.space import find_space
from configs.signals import Interrupts
from encode.driver.nodes import NodeLayouts
from encode.driver.resources import WorkerLayout
from encode.job import Job
from encode.plan.media import MediaCounter
from encode.plan.plan import Plan
from encode.sources.catalogue import open_datasets
from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from encode.worker.config import WorkerConfig
from encode.worker.worker import Worker
from model.media.images import DecodedImage
from model.vision.config import DemoTowerConfig, EncoderConfig
from tests.support import ROOT

TINY = EncoderConfig(
    name="tiny",
    library="demo",
    activation="gelu",
    blocks=(0,),
    pool_frame=1,
    batch_size=4,
    tower=DemoTowerConfig(image_size=28, patch_size=14, width=64, depth=1, heads=2),
)
"""An encoder with 4 tokens of 64 values for an image."""

CONFIG = WorkerConfig(encoder=TINY, device="cpu", commit_every_s=0.0)
"""Commits after every image, so a kill can hit between any two."""


def draw(folder: Path, count: int, *, first: int = 0, side: int = 24) -> list[Path]:
    """Write `count` different images of noise; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(first, first + count):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        paths.append(folder / f"{number:04d}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths


def shoot(folder: Path, lengths: Sequence[int]) -> None:
    """Write different videos with these numbers of frames, two a second."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate(lengths):
        video = draw_video(DemoWorld(images=9, side=24, video_frames=length), number)
        (folder / f"video{number:02}.y4m").write_bytes(video)


@dataclass(kw_only=True)
class Result:
    """What a job did, and the cache afterwards."""

    job: Job
    plan: Plan
    code: int
    paths: SpacePaths
    root: CacheRoot
    ledger: dict[str, MediaRecord]
    """File name -> its record after this job."""

    @property
    def reader(self) -> FeatureReader:
        return FeatureReader(self.paths)

    def failures(self) -> dict[str, tuple[str | None, str | None]]:
        """Return file name -> stage and error of each failed source."""
        return {n: (r.stage, r.error) for n, r in self.ledger.items() if r.status == "failed"}


def encode(
    root: Path,
    *specs: str,
    workers: int = 0,
    config: WorkerConfig = CONFIG,
    codec: str = "int8",
    container: str = "zarr",
    worker_class: type[Worker] = Worker,
    rehash: bool = False,
    timeout_s: float = 60.0,
    threads: int = 2,
    decode_apart: bool = False,
    interrupts: Interrupts | None = None,
    nodes: NodeLayouts | None = None,
) -> Result:
    """Run one job as `encode.run` does, with an encoder that is in no YAML file.

    With `nodes`, the workers are on the nodes of the Ray that this process is connected to.
    """
    cache = CacheRoot(root)
    counter = count(cache, specs)
    job = Job(
        cache,
        counter,
        codec=codec,
        container=container,
        config=config,
        worker_class=worker_class,
        on_cluster=nodes is not None,
    )
    with DriverLock(job.paths, "test") as lock, interrupts or Interrupts() as interrupts:
        plan = job.plan(rehash=rehash)
        job.show(plan)
        job.open_space(plan)
        if plan.todo:
            here = WorkerLayout(
                workers=workers,
                gpus=0,
                threads=threads,
                torch_threads=1,
                decode_apart=decode_apart,
            )
            job.run(nodes or here, lock.token, interrupts, timeout_s=timeout_s)
        code = job.close(1.0, interrupts)
    ledger = {Path(source).name: record for source, record in read_media(cache).items()}
    return Result(job=job, plan=plan, code=code, paths=job.paths, root=cache, ledger=ledger)


def count(cache: CacheRoot, specs: Sequence[str]) -> MediaCounter:
    """Write the samples tables of these data sets, and count their media."""
    counter = MediaCounter()
    for dataset in open_datasets(specs, cache.path):
        write_samples(cache, dataset.name, counter.count(dataset.samples()))
    return counter


class SlowWorker(Worker):
    """Slow, so that a kill hits it while it works."""

    def decode(self, data: bytes) -> DecodedImage:
        time.sleep(0.05)
        return super().decode(data)

    def prepare(self, image: Image.Image | DecodedImage) -> npt.NDArray[np.uint8]:
        time.sleep(0.002)
        return super().prepare(image)


def start(folder: Path, workers: int, address: str = "") -> subprocess.Popen[str]:
    """Start a driver in a process group of its own, and wait until it is ready."""
    words = [str(folder), str(workers), *([address] if address else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.encode_jobs", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_rows(
    folder: Path, process: subprocess.Popen[str], rows: int = 1, timeout_s: float = 120
) -> None:
    """Wait until this many shards of one row are committed, or the process has ended."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline and committed(folder) < rows:
        time.sleep(0.002)


def space(folder: Path) -> SpacePaths:
    """Return the only space of FOLDER/cache."""
    return find_space(CacheRoot(folder / "cache"), None)


def committed(folder: Path) -> int:
    """Return the number of commits in FOLDER/cache."""
    return len(list((folder / "cache").glob("spaces/*/commits/*.parquet")))


def main(folder: Path, workers: int, address: str = "") -> None:
    """Print `ready`, run a slow job over FOLDER/images, and exit with its code."""
    print("ready", flush=True)
    config = replace(CONFIG, torch_threads=1)
    job = partial(encode, folder / "cache", f"folder:{folder / 'images'}", config=config)
    if address:
        from encode.driver.ray_pool import cluster_session

        with cluster_session(address):
            layouts = NodeLayouts("auto", None, gpus=False, decode_apart=False)
            sys.exit(job(nodes=layouts, worker_class=SlowWorker).code)
    sys.exit(job(workers=workers, worker_class=SlowWorker).code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
