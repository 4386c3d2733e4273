"""The store compared with raw `preadv` and with other stores: rows per second, reading and writing.

python -m tests.benchmarks.store                                  # about 5 minutes, 5 GB of disk
python -m tests.benchmarks.store --rows 40 --rounds 3 --no-peers  # seconds
python -m tests.benchmarks.store --markdown table.md              # also writes tables for docs/BENCHMARKS.md

Everything is measured in one run, in which the stores take turns batch by batch. A ratio is the median over
turns of the ratio within a turn. The other libraries are in the `[bench]` extra. MosaicML's MDS needs an
older transformers, so it gets an environment of its own, once. A library that is not available prints
`skipped`.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, forget, run
from tests.benchmarks.peers import stores
from tests.benchmarks.peers.stores import BATCH, Ours, Raw, Store

SHAPES = {
    "fp16": (576, 1024),
    "int8": (576, 528),
    "int4": (576, 272),
    "frames": (64, 1024),
}
"""Tokens and float16 values of rows of 1.18, 0.61, 0.31 and 0.13 MB: about the sizes of 576 x 1024 values in
each codec, and of a pooled fp16 frame. Reading does not look at values, so all are stored as fp16."""

PEERS = (
    stores.ZarrPython,
    stores.Zarrs,
    stores.TensorStore,
    stores.WebDataset,
    stores.Mds,
    stores.LitData,
    stores.Lance,
    stores.SafeTensors,
)
COLUMNS = ("single", "batch", "sequential", "single, cold", "batch, cold", "write")
WARM = COLUMNS[:3]
HEAD = ("| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|")
"""The first two lines of a table in Markdown."""
READ_BYTES = 96 << 20
"""About the bytes that one store reads in one round of one column."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    rows: int = 384
    """Rows of the largest size; there are more of the smaller ones, which take as much disk."""
    rounds: int = 15
    """Rounds of warm reads; there are two thirds as many of cold reads, and a third of writing."""
    peers: bool = True
    """Also measure the other stores."""
    environments: Path = Path("~/.cache/nanomolmo2/bench")
    """Where the environment of MDS is kept."""
    markdown: Path | None = None
    """File for the tables."""


class Figures:
    """Measured seconds: (size, column) -> store -> one for each turn; and the rows of a turn."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.rows: dict[tuple[str, str], int] = {}
        self.names: list[str] = []
        """Names of the stores, in the order of the tables."""

    def add(self, size: str, column: str, store: Store, seconds: float) -> None:
        """Add one measurement."""
        self.seconds[size, column][store.name].append(seconds)

    def ratio(self, size: str, column: str, one: str, other: str) -> float:
        """Return how many times faster `one` is than `other`, median over turns."""
        found = self.seconds[size, column]
        return statistics.median(b / a for a, b in zip(found[one], found[other], strict=True))

    def to_raw(self, size: str, column: str, name: str) -> float:
        """Return the ratio to `preadv`; when writing, checked and unchecked are the same."""
        return self.ratio(size, column, "ours" if column == "write" else name, "raw preadv")

    def rate(self, size: str, column: str, name: str) -> tuple[float, float]:
        """Return rows/s and MB/s of one store."""
        rows = self.rows[size, column] / statistics.median(self.seconds[size, column][name])
        tokens, width = SHAPES[size]
        return rows, rows * tokens * width * 2 / 1e6


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    """Return the seconds that `work` takes, or the seconds that it returns."""
    started = time.perf_counter()
    result = work(*arguments)
    return result if isinstance(result, float) else time.perf_counter() - started


def make_rows(shape: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """Return a function row number -> bytes: normal float16 values, which compress badly."""
    values = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float16)
    data = values.reshape(8, -1).view(np.uint8)
    return lambda number: data[number % 8]


def fsync(files: Sequence[Path]) -> None:
    """Make files as durable as ours."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def our_readers(folder: Path, shape: tuple[int, int]) -> list[Store]:
    """Return raw reading, and our reader in every configuration."""
    return [
        Raw(folder, shape),
        Ours(folder, shape, checked=False),
        Ours(folder, shape),
        Raw(folder, shape, threads=2),
        Ours(folder, shape, checked=False, threads=2),
        Ours(folder, shape, threads=2),
    ]


def written(
    folder: Path, shape: tuple[int, int], count: int, options: Options
) -> Iterator[Store | str]:
    """Yield the other stores with their rows written, or a line that says why one is skipped."""
    row = make_rows(shape)
    for kind in PEERS if options.peers else ():
        try:
            if kind is stores.Mds:
                place = options.environments.expanduser() / "mds"
                stores.Mds.python = stores.mds_python(place, timeout_s=600)
            same_files = issubclass(kind, stores.ZarrPython)
            store = kind(folder / "ours" if same_files else folder / kind.__name__, shape)
            if not same_files:
                store.prepare()
                store.write(row, count)
                fsync(store.files())
            store.open()
            if store.random:
                store.singles(np.array([0, count - 1]))
            store.close()
        except Exception as error:
            # An error of one library must not stop the measurement of the others.
            yield f"{kind.name or kind.__name__}: skipped: {str(error).splitlines()[0][:160]}"
            continue
        yield store


def read_warm(
    figures: Figures, size: str, readers: Sequence[Store], count: int, rounds: int
) -> None:
    """Read random rows one by one and in batches, and all rows in order, from the page cache.

    The files are dropped from the page cache and read once before, as a run finds them after an earlier run.
    """
    tokens, width = SHAPES[size]
    batch = min(count, BATCH)
    some = max(1, min(count, READ_BYTES // (2 * tokens * width)) // batch) * batch
    for column in WARM:
        figures.rows[size, column] = batch
    for store in readers:
        forget(store.files())
    for store in readers:
        store.open()
        for start in range(0, count // batch * batch, batch):
            store.sequential(start, batch)
    for number in range(rounds):
        draw = np.random.default_rng(number)
        orders = [draw.permutation(count)[:some] for _ in range(2)]
        # The stores take turns batch by batch, so other work of the machine slows all of them. Their order is
        # random, because a thread that has just waited gets the processor for longer.
        for start in range(0, some, batch):
            one, together = (order[start : start + batch] for order in orders)
            for store in draw.permutation(np.array(readers, object)):
                if store.random:
                    figures.add(size, "single", store, seconds_of(store.singles, one))
                    figures.add(size, "batch", store, seconds_of(store.batches, together))
                took = seconds_of(store.sequential, start, batch)
                figures.add(size, "sequential", store, took)
    for store in readers:
        store.close()


def read_cold(
    figures: Figures, size: str, readers: Sequence[Store], count: int, rounds: int
) -> None:
    """Read random rows that are not in the page cache."""
    tokens, width = SHAPES[size]
    some = max(2, min(count // 2, READ_BYTES // (2 * tokens * width)))
    for number in range(rounds):
        rows = np.random.default_rng(number).permutation(count)[:some]
        for column in ("single, cold", "batch, cold"):
            figures.rows[size, column] = some
            for store in [*readers[number % len(readers) :], *readers[: number % len(readers)]]:
                if store.random:
                    forget(store.files())
                    store.open()
                    read = store.singles if column.startswith("single") else store.batches
                    figures.add(size, column, store, seconds_of(read, rows))
                    store.close()


def write_all(
    figures: Figures,
    size: str,
    writers: Sequence[type[Store]],
    folder: Path,
    count: int,
    rounds: int,
) -> None:
    """Write rows with each store, and fsync."""
    shape, row = SHAPES[size], make_rows(SHAPES[size])
    figures.rows[size, "write"] = count
    for number in range(rounds):
        turn = number % len(writers)
        for kind in [*writers[turn:], *writers[:turn]]:
            store = kind(folder / "written", shape)
            if kind is Ours:
                store.name = "ours"
            store.prepare()
            seconds = seconds_of(store.write, row, count)
            if type(store) is not Ours:  # ours fsyncs what it commits
                seconds += seconds_of(fsync, store.files())
            figures.add(size, "write", store, seconds)
            store.end()
            shutil.rmtree(folder / "written")


def measure(options: Options, folder: Path) -> tuple[Figures, list[Store]]:
    """Measure everything, size by size; return the figures and the other stores."""
    figures, peers = Figures(), []
    largest = 2 * SHAPES["fp16"][0] * SHAPES["fp16"][1]
    for size, shape in SHAPES.items():
        started = time.monotonic()
        count = options.rows * largest // (2 * shape[0] * shape[1])
        ours = Ours(folder / "ours", shape)
        ours.prepare()
        ours.write(make_rows(shape), count)
        ours.space.grow("image")
        slots = ours.space.rows_per_shard("image")
        readers = our_readers(ours.folder, shape)
        few = max(2, options.rounds // 3)
        writers: list[type[Store]] = [Raw, Ours]
        if size == "fp16":
            for peer in written(folder, shape, count, options):
                if isinstance(peer, str):
                    print(peer, flush=True)
                else:
                    peers.append(peer)
            readers += peers
            writers += map(type, peers)
            figures.names = ["ours", *(reader.name for reader in readers)]
        read_warm(figures, size, readers, count, options.rounds)
        read_cold(figures, size, readers, count, 2 * few)
        for reader in readers:
            reader.end()
        for used in folder.iterdir():
            shutil.rmtree(used)
        write_all(figures, size, writers, folder, min(count, slots), few)
        seconds = time.monotonic() - started
        print(f"{size}: {count} rows, {seconds:.0f} s", flush=True)
    return figures, peers


def requirements(figures: Figures, peers: Sequence[Store]) -> list[tuple[str, float, float]]:
    """Return (name, measured, required) of every requirement."""
    lines = []
    for size in SHAPES:
        for column in COLUMNS[:-1]:
            for name, required in (("unchecked", 0.9), ("checked", 0.7)):
                ratio = figures.to_raw(size, column, f"ours, {name}")
                lines.append((f"{size}, {column}, {name} / raw", ratio, required))
        ratio = figures.to_raw(size, "write", "ours")
        lines.append((f"{size}, write + fsync + commit / raw", ratio, 0.8))
    for peer in peers:
        for column in COLUMNS:
            if peer.name in figures.seconds["fp16", column]:
                # A store that compares checksums is compared with our reader comparing them. Others may use
                # several threads, so ours is the faster of one and two threads.
                name = "ours, checked" if peer.checks else "ours, unchecked"
                names = ["ours"] if column == "write" else [name, f"{name}, 2 threads"]
                ratio, name = max(
                    (figures.ratio("fp16", column, name, peer.name), name) for name in names
                )
                lines.append((f"fp16, {column}, {name} / {peer.name}", ratio, 1.0))
    return lines


def tables(figures: Figures) -> str:
    """Return the figures as Markdown tables."""
    cores = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
    lines = [f"{datetime.now(UTC):%Y-%m-%d}, {cores}, Python {platform.python_version()}.", ""]
    for size, (tokens, width) in SHAPES.items():
        lines += [f"{size}: rows of {2 * tokens * width:,} bytes; rows/s (MB/s).", "", *HEAD]
        measured = {name for column in COLUMNS for name in figures.seconds[size, column]}
        for name in filter(measured.__contains__, figures.names):
            cells = []
            for column in COLUMNS:
                if name in figures.seconds[size, column]:
                    rows, megabytes = figures.rate(size, column, name)
                    cells.append(f"{rows:,.0f} ({megabytes:,.0f})")
                else:
                    cells.append("–")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Ratios to raw `preadv`, and to raw write + fsync.", "", *HEAD]
    for size in SHAPES:
        for name in ("unchecked", "checked"):
            cells = [f"{figures.to_raw(size, c, f'ours, {name}'):.2f}" for c in COLUMNS]
            lines.append(f"| {size}, {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def report(options: Options, folder: Path, printed: Requirements) -> None:
    """Measure everything; print the tables and the requirements."""
    figures, peers = measure(options, folder)
    text = tables(figures)
    print("\n" + text)
    if options.markdown is not None:
        options.markdown.write_text(text)
    for name, ratio, required in requirements(figures, peers):
        printed.at_least(name, ratio, required)


if __name__ == "__main__":
    run("store", __doc__, report, Options)
