"""One encode job as `encode.run` runs it, and the speed of its parts, each measured alone."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml

from cache.store.paths import CacheRoot
from cache.store.space import Space
from cache.store.writer import NewRow, ShardWriter
from encode.driver import resources
from encode.plan import plan
from encode.plan.probe import run
from encode.plan.probe_items import Request
from encode.run import main as encode_run
from encode.worker.config import WorkerConfig
from encode.worker.local_files import read_local
from encode.worker.messages import SourceTask
from model.quantize import pack
from model.vision.config import EncoderConfig
from model.vision.encoder import VisionEncoder
from tests.benchmarks.bench import seconds

CODEC = "int8"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast something encodes photographs."""

    image_s: float
    """Seconds that one more image takes."""
    start_s: float
    """Seconds before and after the images."""

    @staticmethod
    def of(short: tuple[int, float], long: tuple[int, float]) -> Speed:
        """Return the speed by (images, seconds) of a short and a long job."""
        image_s = (long[1] - short[1]) / (long[0] - short[0])
        return Speed(image_s=image_s, start_s=short[1] - short[0] * image_s)


def median(speeds: Sequence[Speed]) -> Speed:
    """Return the median of the speeds, and of the start-ups."""
    return Speed(
        image_s=statistics.median(speed.image_s for speed in speeds),
        start_s=statistics.median(speed.start_s for speed in speeds),
    )


@dataclass(frozen=True, kw_only=True)
class Photos:
    """The photographs of the short and of the long jobs, in folders; the long ones contain the short ones."""

    folder: Path
    short: Sequence[Path]
    long: Sequence[Path]

    @staticmethod
    def of(folder: Path, paths: Sequence[Path], short: int, long: int) -> Photos:
        """Link photographs into the folders `short` and `long` of `folder`."""
        lists = []
        for name, count in (("short", short), ("long", long)):
            (folder / name).mkdir(parents=True)
            for path in paths[:count]:
                (folder / name / path.name).hardlink_to(path)
            lists.append(sorted((folder / name).iterdir()))
        return Photos(folder=folder, short=lists[0], long=lists[1])

    def measure(self, work: Callable[[str], object]) -> Speed:
        """Call `work` with `short` and `long`; return the speed."""
        taken = {name: seconds(lambda name=name: work(name)) for name in ("short", "long")}
        return Speed.of((len(self.short), taken["short"]), (len(self.long), taken["long"]))


def worker_speed(photos: Photos, run: Callable[[str], str]) -> Speed:
    """Return the speed by what workers report: planning, probing and starting count as the start.

    Args:
        photos: of the jobs.
        run: runs the job `short` or `long`; returns what it printed.
    """
    counts = {"short": len(photos.short), "long": len(photos.long)}
    worked: dict[str, float] = {}

    def job(name: str) -> None:
        worked[name] = work_seconds(run(name), counts[name])

    whole = photos.measure(job)
    short, long = ((counts[name], worked[name]) for name in counts)
    return replace(Speed.of(short, long), start_s=whole.start_s)


def work_seconds(said: str, count: int) -> float:
    """Return the seconds from the first report of a worker to the last, by the last line of a job."""
    found = re.search(r"images/s=([\d.]+)", said)
    assert found is not None, said
    return count / float(found[1])


class Jobs:
    """Runs `encode.run` in this process, with one encoder that is loaded once."""

    def __init__(self, folder: Path, config: EncoderConfig, encoder: VisionEncoder | None = None):
        """Write the entry of the encoder.

        Args:
            folder: for the caches; each is removed after its job.
            config: the encoder's entry.
            encoder: loaded, for jobs without Ray; None: each job loads its own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._encoder, self._name = folder, encoder, config.name
        self._numbers = itertools.count()
        self._settings = folder / "encoders.yaml"
        entry = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(config).items()
            if value not in (None, (), "") and key != "name"
        }
        self._settings.write_text(yaml.safe_dump({"encoders": {config.name: entry}}))

    def run(self, photos: Path, count: int, *words: str) -> str:
        """Encode the images of a folder into a new cache; return what the job printed.

        Raises:
            SystemExit: not all of them were encoded.
        """
        cache = self._folder / f"cache-{next(self._numbers)}"
        argv = ["--dataset", f"folder:{photos}", "--features", str(cache), "--codec", CODEC]
        argv += ["--encoder", self._name, "--config", str(self._settings), *words]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), self._loaded(), long_jobs():
            encode_run(argv)
        shutil.rmtree(cache)
        if f"encoded={count} " not in said.getvalue():
            raise SystemExit(said.getvalue())
        return said.getvalue()

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[None]:
        if self._encoder is None:
            yield
            return
        with mock.patch.object(WorkerConfig, "load", lambda _self: self._encoder):
            yield


@contextlib.contextmanager
def long_jobs() -> Iterator[None]:
    """Let short jobs decode and resize as long ones do: the slope between two jobs is that of one way."""
    with (
        mock.patch.object(resources, "DECODE_APART_S", 0.0),
        mock.patch.object(plan, "WORTH_INPUTS", 0),
    ):
        yield


def encode_seconds(encoder: VisionEncoder, batches: int) -> float:
    """Return the seconds of an image in bare forward passes on all cores."""
    spec = encoder.spec(CODEC)
    side = spec.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (spec.batch_size, side, side, 3), np.uint8)
    encoder.encode(pixels).cpu()  # warm
    taken = [seconds(lambda: encoder.encode(pixels).cpu()) for _ in range(batches)]
    return statistics.median(taken) / spec.batch_size


def decode_cpu_s(encoder: VisionEncoder, paths: Sequence[Path], *, compiled: bool = True) -> float:
    """Return the processor time of an image to read, hash, decode and fit it, in one thread."""
    fit = replace(encoder.input, compiled=compiled)
    fit.compile()

    def work() -> None:
        for path in paths:
            data, _ = read_local(SourceTask(source=str(path)))
            assert isinstance(data, bytes)
            fit.prepare(fit.decode(data))

    return seconds(work, time.process_time) / len(paths)


def decoders_alone(encoder: VisionEncoder, paths: Sequence[Path]) -> Speed:
    """Return how fast a process a core, all at once, reads, hashes, decodes and fits images."""
    cores, fit = resources.cores(), replace(encoder.input, compiled=True)

    def work(core: int) -> float:
        items = [(str(path), "image") for path in paths[core::cores]]
        request = Request(items=items, fit=fit, max_frames=1, stop_s=3600.0)
        return sum(item.cpu_s for item in run(request))

    with ThreadPoolExecutor(cores) as threads:
        cpu_s = sum(threads.map(work, range(cores)))
    return Speed(image_s=cpu_s / cores / len(paths), start_s=0.0)


def store_cpu_s(encoder: VisionEncoder, folder: Path, batches: int) -> float:
    """Return the processor time of an image to pack its features, and to write and commit its row."""
    spec = encoder.spec(CODEC)
    features = torch.randn(spec.batch_size, spec.tokens("image"), spec.width, device=encoder.device)
    space = Space.create(CacheRoot(folder), spec, encoder.load_info())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads would count
    try:
        started = time.process_time()
        with contextlib.closing(_Shards(space)) as shards:
            for batch in range(batches):
                rows = pack(features, CODEC).rows.cpu().numpy()
                shards.add(
                    [
                        NewRow(key=f"{batch * spec.batch_size + i:064x}", view="full", payload=row)
                        for i, row in enumerate(rows)
                    ]
                )
        return (time.process_time() - started) / (batches * spec.batch_size)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder)


class _Shards:
    """Fills one shard after another."""

    def __init__(self, space: Space) -> None:
        self._space, self._open = space, ShardWriter(space, "image", 0)
        self._number = 0

    def add(self, rows: Sequence[NewRow]) -> None:
        if self._open.left < len(rows):
            self.close()
            self._number += 1
            self._open = ShardWriter(self._space, "image", self._number)
        self._open.extend(rows)

    def close(self) -> None:
        self._open.commit()
