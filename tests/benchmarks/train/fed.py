"""Are devices fed at a GPU's pace? Sleeping devices take rows of the real sizes; loaders must keep up.

Each of 1, 4 and 8 ranks takes 300 images/s of 576 tokens, or 800 of 144 tokens (pooled), in micro-batches of
16,384 tokens, from the trainer's own loader and schedule (ranks.py). Where the rows are:

    warm      in the page cache
    cold      on the disk: written out, and dropped from the page cache by posix_fadvise(DONTNEED)
    remote    on a web server, 30 ms away, on the same machine; the loader keeps what it fetches, as always

`waits` is the share of a rank's time in its loader's `next`, of the rank that waits most; `idle` that in
which its device has nothing to do, also because the host wakes late. The latter is required: a rank may wait
while its device computes. A device that takes no time shows the most that 8 loaders can do.

A request fetches one row, since a schedule's rows are in random places. With 30 ms to an answer, 800 rows/s
keep 24 of a reader's 32 connections busy (`RetryPolicy.connections`); 16 could not fetch more than 533. The
server takes its share of the same cores.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from cache.format.spec import FeatureSpec
from cache.remote.open import RemoteCache, RemoteOptions
from cache.share import share
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from model.language.model import load_tokenizer
from tests.benchmarks.bench import Requirements, forget
from tests.benchmarks.train import ranks as processes
from tests.benchmarks.train.far_server import serve
from tests.benchmarks.train.models import Scale
from tests.benchmarks.train.ranks import Fed, Feed
from tests.gpu.worlds import World
from train.config import Options as TrainOptions
from train.training import REMOTE_AHEAD, REMOTE_THREADS

LATENCY_S = 0.03
"""Seconds before each answer of the remote server."""
ALLOWED = 0.01
"""The share of waiting, and of idling, that is allowed."""
BUSY = 0.9
"""Share of the cores from which on the processor counts as the limit."""
LLM = "random:qwen3-tiny"
"""Its tokenizer spells text in bytes: 132 tokens for each image."""
PLACES = ("warm", "remote", "cold")
RAW = "raw preadv"


@dataclass(frozen=True, kw_only=True)
class Size:
    """The rows of one image, and how fast a device takes them."""

    name: str
    spec: FeatureSpec
    rate: int
    """Images a second of one device."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    place: str
    ranks: int
    paced: bool
    """Whether the device takes its time."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn of a case measured."""

    fed: list[Fed]
    busy: float
    """Share of all cores that was busy, other jobs and the server included."""
    server_s: float = 0.0
    """Seconds of processor time of the remote server, its start included."""

    @property
    def rate(self) -> float:
        """Images a second of all ranks together."""
        return sum(one.images / one.wall_s for one in self.fed)

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of processor time of the loaders for each image."""
        return 1e3 * sum(one.cpu_s for one in self.fed) / sum(one.images for one in self.fed)

    @property
    def disk_mb(self) -> float:
        """Megabytes a second that came from the disk."""
        return sum(one.disk_bytes / one.wall_s for one in self.fed) / 1e6


def sizes(scale: Scale) -> list[Size]:
    """Return the sizes of the rows that are fed."""
    made = []
    for codec, pool in scale.fed:
        spec = replace(scale.fed_spec, codec=codec, pool_image=pool)
        name = f"{spec.tokens('image')} tokens, {codec}"
        made.append(Size(name=name, spec=spec, rate=300 if pool == 1 else 800))
    return made


def measure_fed(scale: Scale, folder: Path, requirements: Requirements) -> None:
    """Measure all sizes, one after the other, since each takes gigabytes of disk."""
    print(f"fed: {os.cpu_count()} cores", flush=True)
    tables = []
    for size in sizes(scale):
        place = folder / "fed"
        try:
            tables.append(measure_size(scale, size, place, requirements))
        finally:
            shutil.rmtree(place, ignore_errors=True)
    print(
        "\n| rows | from | ranks | asked, images/s | got | waits | idle | CPU ms an image "
        "| cores busy | disk, MB/s | limit |\n|" + "---|" * 11
    )
    print("\n".join(line for table in tables for line in table), flush=True)


def measure_size(scale: Scale, size: Size, folder: Path, requirements: Requirements) -> list[str]:
    """Measure one size of rows in every place, with 1, 4 and 8 ranks; return lines of a table."""
    count = max(scale.fed_rows, int(scale.gigabytes * 1e9 / size.spec.row_bytes("image")))
    started = time.monotonic()
    world = World.make(folder, size.spec, "image", count)
    share(world.root)
    print(f"{size.name}: {count:,} rows written in {time.monotonic() - started:.0f} s", flush=True)
    feeder = Feeder(scale, size, world, count)
    turns: dict[Case, list[Turn]] = defaultdict(list)
    raw: list[float] = []
    cases = [Case(place, ranks, True) for place in PLACES for ranks in scale.ranks]
    cases += [Case(place, max(scale.ranks), False) for place in PLACES]
    cases.sort(key=lambda case: PLACES.index(case.place))
    for number in range(scale.rounds):
        for case in cases[:: -1 if number % 2 else 1]:
            turns[case].append(feeder.turn(case))
        raw.append(feeder.raw_cold())
    return report(size, turns, raw, requirements)


class Feeder:
    """Runs the cases of one size."""

    def __init__(self, scale: Scale, size: Size, world: World, count: int) -> None:
        self.scale, self.size, self.world, self.count = scale, size, world, count
        self.space = find_space(world.root, None)
        self.files = [path for path in self.space.root.rglob("c/**/*") if path.is_file()]
        self.schedules = {
            n: world.schedule(load_tokenizer(LLM), scale.window, n)[0] for n in scale.ranks
        }

    def turn(self, case: Case) -> Turn:
        """Run one case once."""
        if case.place == "cold":
            forget(self.files)
        else:
            warm(self.files)
        with contextlib.ExitStack() as stack:
            server, mirror = None, self.world.folder / "mirror"
            open_reader: Callable[[], FeatureReader] = partial(FeatureReader, self.space)
            if case.place == "remote":
                server = stack.enter_context(serve(self.world.root.path, LATENCY_S))
                stack.callback(shutil.rmtree, mirror, ignore_errors=True)
                cache = RemoteCache(server.url, RemoteOptions(mirror=mirror))
                processes.in_a_process(lambda: cache.open_reader(None))  # copies the tables
                open_reader = partial(cache.open_copied, self.space.name)
            fed, busy = processes.feed(self.feed(case, open_reader))
            return Turn(fed=fed, busy=busy, server_s=server.cpu_seconds() if server else 0.0)

    def feed(self, case: Case, open_reader: Callable[[], FeatureReader]) -> Feed:
        """Return what the ranks do in a case."""
        schedule = self.schedules[case.ranks]
        defaults = TrainOptions()
        threads, ahead = defaults.read_threads, defaults.read_ahead
        if case.place == "remote":  # as train.run has it
            threads, ahead = max(threads, REMOTE_THREADS), max(ahead, REMOTE_AHEAD)
        steps = self.count // schedule.samples_per_step
        if case.place == "warm":  # rows may be read again
            steps = 1_000_000
        return Feed(
            schedule=schedule,
            open_reader=open_reader,
            ranks=case.ranks,
            rate=self.size.rate if case.paced else None,
            window=self.scale.window,
            threads=threads,
            ahead=ahead,
            seconds=self.scale.seconds,
            steps=steps,
        )

    def raw_cold(self) -> float:
        """Return the rows a second of bare `preadv` calls from the disk, random rows, by as many threads."""
        forget(self.files)
        reader = FeatureReader(self.space)
        geometry, threads = reader.geometry["image"], max(self.scale.ranks) * 2
        rows = np.random.default_rng(0).permutation(self.count)
        with contextlib.ExitStack() as stack:
            shards: dict[int, int] = {}
            for shard in range(-(-self.count // geometry.slots)):
                file = self.space.shard("image", shard).open("rb")
                shards[shard] = stack.enter_context(file).fileno()
            until = time.perf_counter() + self.scale.seconds

            def read(part: np.ndarray) -> int:
                out = bytearray(geometry.row_bytes)
                for done, row in enumerate(part.tolist()):
                    if time.perf_counter() > until:
                        return done
                    shard, slot = divmod(row, geometry.slots)
                    os.preadv(shards[shard], [out], geometry.row_offset(slot))
                return len(part)

            started = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                done = sum(pool.map(read, np.array_split(rows, threads)))
            return done / (time.perf_counter() - started)


def warm(files: list[Path]) -> None:
    """Read files, so that the page cache has them."""
    buffer = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# ---- figures


def report(
    size: Size, turns: dict[Case, list[Turn]], raw: list[float], requirements: Requirements
) -> list[str]:
    """Print the requirements of one size; return the lines of the table."""
    lines = []
    for case, taken in sorted(turns.items(), key=lambda item: order(item[0])):
        waits = statistics.median(max(one.waits for one in turn.fed) for turn in taken)
        idle = statistics.median(max(one.idle for one in turn.fed) for turn in taken)
        asked = size.rate * case.ranks
        # Where the disk or the network must hold out, one device is required, and more are shown.
        if case.paced and (case.place == "warm" or case.ranks == 1):
            name = f"{size.name}, {case.place}, {case.ranks} x {size.rate}/s"
            requirements.at_most(f"{name}: idle", idle, ALLOWED)
        cells = [size.name, case.place, str(case.ranks)]
        cells += [f"{asked:,}" if case.paced else "all", f"{median(taken, 'rate'):,.0f}"]
        cells += [f"{waits:.1%}", f"{idle:.1%}"] if case.paced else ["", ""]
        cells += [f"{median(taken, 'cpu_ms'):.2f}", f"{median(taken, 'busy'):.0%}"]
        cells += [f"{median(taken, 'disk_mb'):,.0f}", limit(case, taken, waits, idle)]
        lines.append("| " + " | ".join(cells) + " |")
    (free,) = ([t.rate for t in turns[case]] for case in turns if is_free_from(case, "cold"))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(free, raw, strict=True))
    requirements.at_least(f"{size.name}, cold: loaders / {RAW}, rows/s", ratio, 0.8)
    megabytes = statistics.median(raw) * size.spec.row_bytes("image") / 1e6
    cells = [size.name, "cold", RAW, "all", f"{statistics.median(raw):,.0f}", *[""] * 4]
    lines.append("| " + " | ".join([*cells, f"{megabytes:,.0f}", "disk"]) + " |")
    return lines


def median(taken: list[Turn], name: str) -> float:
    """Return the median of a property of turns."""
    return statistics.median(float(getattr(turn, name)) for turn in taken)


def order(case: Case) -> tuple[int, bool, int]:
    """Sort by place, then ranks, with a device that takes no time at the end."""
    return PLACES.index(case.place), not case.paced, case.ranks


def is_free_from(case: Case, place: str) -> bool:
    """Whether a case shows the most that can be read from a place."""
    return case.place == place and not case.paced


def limit(case: Case, taken: list[Turn], waits: float, idle: float) -> str:
    """Return what more rows a second would need; nothing, if the device is fed."""
    if case.paced and idle <= ALLOWED:
        return ""
    if median(taken, "busy") >= BUSY:
        return "processor"
    if case.paced and waits <= ALLOWED:
        return "late wake-ups"
    return {"warm": "loader", "cold": "disk", "remote": "network"}[case.place]
