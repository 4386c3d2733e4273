"""Probe some sources of a plan: what reading, decoding and downloading them costs, how long videos are.

    found = probe(plan, spec, max_frames=128, download=DownloadConfig())
    found.kinds["video"].rows(128)          # frames of a video, on average

The sources are spread over the plan, always the same ones. URLs are downloaded with the limits of the job,
and not kept. Files are decoded in a process of their own, one at a time. A damaged file counts as one that
fails. A file that crashes its decoder or hangs is left behind after a few seconds.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

import encode
from cache.errors import CorruptError
from cache.format.frame_sampling import sample_times
from cache.format.spec import FeatureSpec
from encode.download.client import Fetched, Fetcher
from encode.download.config import DownloadConfig
from encode.download.media_store import MediaStore
from encode.download.urls import is_url
from encode.plan.plan import Plan
from encode.plan.probe_items import Item, Request
from encode.worker.messages import SourceTask
from model.media.fit import InputFit
from model.media.images import BadMediaError

PROBED = 200
"""Sources that are probed, at most."""

DECODE_S = 4.0
"""Seconds after which no further file is read and decoded."""

FETCH_S = 5.0
"""Seconds after which no further download is waited for."""

HANG_S = 15.0
"""Seconds beyond `DECODE_S` after which a file that is being decoded is left behind."""

STARTS = 3
"""Times that the process which decodes is started, if files crash it."""

KEPT_BYTES = 256 << 20
"""Downloaded bytes that are decoded, at most."""

DONE_SHARE = 0.8
"""Share of the downloads whose time counts. The last ones leave connections unused, which a job does not."""


@dataclass(frozen=True, kw_only=True)
class KindCost:
    """What the probed media of one kind cost, on average."""

    probed: int = 0
    """Media that were read."""
    failed: int = 0
    """Those that cannot be used."""
    read_s: float = 0.0
    """Seconds to open, read and hash one."""
    cpu_s: float = 0.0
    """Processor seconds to read and decode one; of a video, without its frames."""
    frame_cpu_s: float = 0.0
    """Processor seconds to decode one frame of a video."""
    durations: tuple[float, ...] = ()
    """Lengths of videos, seconds."""

    @property
    def usable(self) -> float:
        """Share of the media that can be used; 1 if none was probed."""
        return 1 - self.failed / self.probed if self.probed else 1.0

    def rows(self, max_frames: int) -> float | None:
        """Return the frames of a video that can be used, on average; None if no length is known."""
        counts = [len(sample_times(duration, max_frames)) for duration in self.durations]
        return float(np.mean(counts)) if counts else None


@dataclass(frozen=True, kw_only=True)
class DownloadCost:
    """What the probed downloads cost."""

    probed: int
    """URLs whose download ended, well or not."""
    failed: int
    """Those that failed."""
    slot_s: float
    """Seconds for which a download occupies one connection, on average, while all of them are in use."""
    cpu_s: float
    """Processor seconds of one download."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the probed sources cost."""

    kinds: dict[str, KindCost] = field(default_factory=dict)
    """Kind -> its cost."""
    downloads: DownloadCost | None = None
    """None if no URL was downloaded."""
    kept: float = 0.0
    """Share of the URLs whose bytes are in the media store."""
    share: float = 1.0
    """Share of a core that the probe had: less than 1 if other programs use the cores."""

    @property
    def probed(self) -> int:
        """Sources that were probed."""
        failed = self.downloads.failed if self.downloads else 0
        return failed + sum(cost.probed for cost in self.kinds.values())


def probe(
    plan: Plan,
    spec: FeatureSpec,
    *,
    max_frames: int,
    download: DownloadConfig,
    media_store: Path | None = None,
    count: int = PROBED,
    urls: int = PROBED,
    nice: int = 0,
) -> Probe:
    """Probe some sources of a plan.

    Args:
        plan: whose sources to do are probed.
        spec: how an image is fitted to the encoder's input.
        max_frames: frames of one video, at most.
        download: limits of the downloads.
        media_store: folder of kept downloads.
        count: sources that are probed, at most.
        urls: URLs that are downloaded, at most.
        nice: niceness of the processes that decode in the job.

    Raises:
        OSError: there is no room for a temporary file, or for another process.
    """
    chosen = sample(plan.todo, count)
    web = [task for task in chosen if is_url(task.source)][:urls]
    local = [task for task in chosen if not is_url(task.source)]
    with tempfile.TemporaryDirectory() as folder:
        kept = _kept(web, media_store, Path(folder))
        there = {task.source for task, _ in kept}
        asked = [task for task in web if task.source not in there]
        downloads, bodies = _download(asked, download, Path(folder))
        files = [*local, *(body for _, body in kept), *bodies]
        fit = InputFit.of(spec, compiled=plan.compiles)
        kinds, share = _decode(files, fit, max_frames, nice)
        return Probe(
            kinds=kinds,
            share=share,
            downloads=downloads,
            kept=len(kept) / len(web) if web else 0.0,
        )


def sample(tasks: Sequence[SourceTask], count: int = PROBED) -> list[SourceTask]:
    """Return some tasks, spread over all, so that any beginning of them is spread over all, too."""
    count = min(count, len(tasks))
    places = (np.arange(count) + 0.5) * len(tasks) / max(1, count)
    # Multiples of the golden ratio: each next one is in the largest gap.
    ranks = np.argsort(np.argsort(np.arange(count) * 0.618033988749895 % 1.0))
    return [tasks[int(place)] for place in places[ranks]]


# ---- downloads


def _kept(
    tasks: Sequence[SourceTask], media_store: Path | None, folder: Path
) -> list[tuple[SourceTask, SourceTask]]:
    """Return (task, task for a copy in `folder`) of the URLs whose bytes are in the media store."""
    if media_store is None or not media_store.is_dir():
        return []
    store, found = MediaStore(media_store), []
    for number, task in enumerate(tasks):
        key = task.sha256 or task.key
        with contextlib.suppress(OSError, CorruptError):
            if key is not None and (data := store.get(key)) is not None:
                path = folder / f"kept-{number}"
                path.write_bytes(data)
                found.append((task, replace(task, source=str(path), sha256=None)))
    return found


def _download(
    tasks: Sequence[SourceTask], config: DownloadConfig, folder: Path
) -> tuple[DownloadCost | None, list[SourceTask]]:
    """Download URLs; return what that cost, and tasks for the files with their bodies in `folder`."""
    if not tasks:
        return None, []
    start, cpu = time.monotonic(), time.process_time()
    ended: list[float] = []
    fetcher = Fetcher(config)
    try:
        futures = [fetcher.submit(task.source, sha256=task.sha256) for task in tasks]
        for future in futures:
            future.add_done_callback(lambda _: ended.append(time.monotonic() - start))
        done, _ = wait(futures, timeout=FETCH_S)
        bodies = list(_bodies(tasks, futures, folder, done))
    finally:
        elapsed, cpu = time.monotonic() - start, time.process_time() - cpu
        fetcher.close()
    if not done:
        return DownloadCost(probed=0, failed=0, slot_s=FETCH_S, cpu_s=0.0), []
    failed = sum(future.exception() is not None for future in done)
    enough = max(1, round(DONE_SHARE * len(tasks)))
    times = sorted(ended)[: len(done)]
    seconds, count = (times[enough - 1], enough) if len(times) >= enough else (elapsed, len(done))
    hosts = len({task.source.split("/", 3)[2] for task in tasks})
    slots = min(config.connections, config.per_host * hosts, len(tasks))
    cost = DownloadCost(
        probed=len(done), failed=failed, slot_s=slots * seconds / count, cpu_s=cpu / len(done)
    )
    return cost, bodies


def _bodies(
    tasks: Sequence[SourceTask],
    futures: Sequence[Future[Fetched]],
    folder: Path,
    done: set[Future[Fetched]],
) -> Iterator[SourceTask]:
    """Yield tasks for files with the bodies that arrived, and release these."""
    nbytes = 0
    for number, (task, future) in enumerate(zip(tasks, futures, strict=True)):
        if future not in done:
            continue
        try:
            fetched = future.result()
        except (BadMediaError, CancelledError):
            continue
        nbytes += len(fetched.data)
        if nbytes < KEPT_BYTES:
            path = folder / str(number)
            path.write_bytes(fetched.data)
            yield replace(task, source=str(path), sha256=None)
        fetched.release()


# ---- files


def _decode(
    tasks: Sequence[SourceTask], fit: InputFit, max_frames: int, nice: int = 0
) -> tuple[dict[str, KindCost], float]:
    """Read and decode files; return the cost of each kind, and the share of a core that was used."""
    request = Request(
        items=[(task.source, task.kind) for task in tasks],
        fit=fit,
        max_frames=max_frames,
        stop_s=DECODE_S,
        nice=nice,
    )
    found: dict[str, list[Item]] = {}
    seconds = cpu_s = 0.0
    for item in run(request):
        found.setdefault(tasks[item.number].kind, []).append(item)
        seconds, cpu_s = seconds + item.decode_s, cpu_s + item.decode_cpu_s
    share = min(1.0, cpu_s / seconds) if cpu_s else 1.0
    return {kind: _cost(items) for kind, items in found.items()}, share


def _cost(items: Sequence[Item]) -> KindCost:
    timed = [item for item in items if item.duration_s is not None]
    return KindCost(
        probed=len(items),
        failed=sum(item.failed for item in items),
        read_s=float(np.mean([item.read_s for item in items])),
        cpu_s=float(np.mean([item.cpu_s for item in items])),
        frame_cpu_s=float(np.mean([item.frame_cpu_s for item in timed])) if timed else 0.0,
        durations=tuple(item.duration_s for item in timed if item.duration_s is not None),
    )


def run(request: Request) -> Iterator[Item]:
    """Yield what `probe_items` yields, from a process of its own. Files that crash it or hang are failed."""
    left, first = request.items, 0
    deadline = time.monotonic() + request.stop_s
    for _ in range(STARTS):
        stop_s = deadline - time.monotonic()
        if not left or stop_s <= 0:
            return
        answered = 0
        again = msgspec.structs.replace(request, items=left, stop_s=stop_s)
        ended = True
        for item in _answers(again):
            if item is None:
                ended = False
                break
            answered = item.number + 1
            yield msgspec.structs.replace(item, number=first + item.number)
        if ended or answered == len(left):
            return
        yield Item(number=first + answered, failed=True)
        left, first = left[answered + 1 :], first + answered + 1


def _answers(request: Request) -> Iterator[Item | None]:
    """Yield the items that the process answers; then None if it crashed or hung."""
    code = Path(encode.__file__).parents[1]
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without -P, a data folder called `cache` in the working directory would hide the package.
    command = [sys.executable, "-P", "-c", "from encode.plan.probe_items import main; main()"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(msgspec.json.encode(request))
            for line in _lines(process.stdout.fileno(), request.stop_s + HANG_S):
                with contextlib.suppress(msgspec.DecodeError):  # a library printed something
                    yield msgspec.json.decode(line, type=Item)
            process.wait(timeout=HANG_S)
            if process.returncode:
                yield None
        except (TimeoutError, subprocess.TimeoutExpired):
            yield None
        finally:
            process.kill()


def _lines(fd: int, seconds: float) -> Iterator[bytes]:
    """Yield the lines of a pipe until its end.

    Raises:
        TimeoutError: the next line does not come in time.
    """
    deadline, data = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            if not (more := os.read(fd, 1 << 16)):
                return
            *lines, data = (data + more).split(b"\n")
            yield from lines
