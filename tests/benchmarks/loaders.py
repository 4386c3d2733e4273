"""Batches of samples for a trainer: `nanomolmo2` in a DataLoader, our trainer's loader, and other libraries.

python -m tests.benchmarks.loaders                              # about 4 minutes, 2 GB of disk
python -m tests.benchmarks.loaders --rows 128 --rounds 2 --batches 8
python -m tests.benchmarks.loaders --no-peers                   # without Lance and `datasets`

The same rows and conversations in each. Samples are drawn at random, 64 a batch; the rows of a batch are
copied once into one buffer, as they would be copied to a GPU. Loaders take turns, in an order that is
reversed every second round. A turn starts a loader, takes what it has read ahead, and times the batches after
those; a rate is samples per second, a ratio the median over rounds of the ratio within a round. Ours compares
every row with its checksum, the others have none. Lance's workers may abort when they end, after their turn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import nanomolmo2 as nm
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Message, Sample, write_samples
from cache.store.space import Space, find_space
from model.language.model import load_tokenizer
from tests.benchmarks import bench
from tests.benchmarks.bench import CLIP, Requirements, run
from tests.benchmarks.peers import loaders as peers
from tests.support.spaces import key, write_rows
from train.data.join import join
from train.data.loader import FeatureLoader
from train.data.message_trees import build_message_trees
from train.data.placeholders import Placeholders
from train.data.schedule import TrainingSchedule
from train.data.tokens import TokenStore

BATCH = 64
LLM = "random:qwen3-tiny"
WARM_UP = 6
"""Batches taken before the clock starts: more than any loader here reads ahead."""
PEERS = (peers.Lance, peers.HuggingFace)
Batches = Callable[[], contextlib.AbstractContextManager[Iterator[Tensor]]]
"""Starts a loader, whose iterator gives the rows of each batch."""


@dataclass(frozen=True)
class Taken:
    """What some batches took."""

    wall_s: float
    """Seconds."""
    cpu_s: float
    """Seconds of processor time, those of workers included."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """Measure loaders on the same rows."""

    rows: int = 1024
    """Rows of 576 x 1024 values as int8, 0.61 MB each; each has one sample."""
    batches: int = 48
    """Batches of 64 samples that are timed in one turn."""
    rounds: int = 7
    """Turns of each loader."""
    workers: int = 2
    """Processes of each DataLoader, and threads of our trainer's loader."""
    peers: bool = True
    """Whether to measure Lance and `datasets` too."""


def text_of(number: int) -> tuple[str, str]:
    """Return question and answer about an image."""
    return (
        f"<image>What is in picture {number}?",
        f"A thing that nobody has named, number {number}.",
    )


def row_of(number: int) -> np.ndarray:
    """Return a row as stored. A hundred different ones suffice: no loader looks into them."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, CLIP.row_bytes("image"), np.uint8)


def make_cache(folder: Path, rows: int) -> CacheRoot:
    """Make a cache of `rows` rows with one sample each, and warm the page cache."""
    root = CacheRoot(folder)
    space = Space.create(root, CLIP, {"library": "none"})
    write_rows(space, map(row_of, range(rows)))
    records, samples = [], []
    for number in range(rows):
        source = f"/images/{number}.png"
        records.append(MediaRecord(source=source, key=key(number), width=336, height=336))
        question, answer = text_of(number)
        turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
        media = (MediaRef(source=source),)
        samples.append(Sample(id=str(number), dataset="d", messages=turns, media=media))
    append_media(root, records, "bench")
    write_samples(root, "d", samples)
    return root


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Make the rows, let the loaders take turns, and print rates and ratios."""
    root = make_cache(folder / "cache", options.rows)
    loaders: dict[str, Batches] = {
        "train.loader": trainer_loader(root, folder, options),
        "nanomolmo2": package_loader(root, options.workers),
        "nanomolmo2, no workers": package_loader(root, 0),
    }
    beside = []
    for peer in PEERS if options.peers else ():
        if importlib.util.find_spec(peer.module) is None:
            print(f"{peer.name}: skipped: {peer.module} is not installed", flush=True)
            continue
        loaders[peer.name] = peer_loader(make_peer(peer, folder, options), options)
        beside.append(peer.name)
    taken: dict[str, list[Taken]] = {name: [] for name in loaders}
    for number in range(options.rounds):
        for name in list(loaders)[:: -1 if number % 2 else 1]:
            taken[name].append(steady(loaders[name], options.batches))
        print(f"round {number + 1} of {options.rounds}", flush=True)
    samples = options.batches * BATCH
    for name, turns in taken.items():
        rates = sorted(samples / turn.wall_s for turn in turns)
        rate = statistics.median(rates)
        processor_ms = 1e3 * statistics.median(turn.cpu_s for turn in turns) / options.batches
        print(
            f"{name:<24}{rate:>7,.0f} samples/s ({rates[0]:,.0f} to {rates[-1]:,.0f})"
            f"{rate * CLIP.row_bytes('image') / 1e6:>7,.0f} MB/s{processor_ms:>7.1f} ms of CPU a batch"
        )
    for ours in ("nanomolmo2", "nanomolmo2, no workers"):
        requirements.at_least(f"{ours} / train.loader", ratio(taken, ours, "train.loader"), 0.8)
    for name in beside:
        requirements.at_least(f"nanomolmo2 / {name}", ratio(taken, "nanomolmo2", name), 1.0)


def ratio(taken: dict[str, list[Taken]], ours: str, other: str) -> float:
    """Return how many times as fast `ours` is: the median over rounds."""
    pairs = zip(taken[ours], taken[other], strict=True)
    return statistics.median(b.wall_s / a.wall_s for a, b in pairs)


def steady(loader: Batches, batches: int) -> Taken:
    """Return what a loader takes for some batches, once it is running."""
    target = torch.zeros((BATCH, CLIP.row_bytes("image")), dtype=torch.uint8)  # its pages exist
    with loader() as iterator:
        for rows in itertools.islice(iterator, WARM_UP):
            target[: len(rows)].copy_(rows)  # a trainer's batch has each row once
        started, processor = time.perf_counter(), cpu_seconds()
        for rows in itertools.islice(iterator, batches):
            target[: len(rows)].copy_(rows)
        return Taken(time.perf_counter() - started, cpu_seconds() - processor)


def cpu_seconds() -> float:
    """Return the processor time of this process and of the workers that it has now."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # user and system
    return total


# ---- ours


def trainer_loader(root: CacheRoot, folder: Path, options: Options) -> Batches:
    """Return our trainer's loader: packed text and rows, by threads."""
    reader = FeatureReader(find_space(root, None))
    tokenizer = load_tokenizer(LLM)
    samples = join(root, reader, {"d": None}, split="train", held_out=0.0, min_coverage=1.0)
    tokens = TokenStore.open(root, samples.names, tokenizer, folder=folder / "tokens")
    trees = build_message_trees(
        samples,
        tokens,
        max_tokens=1024,
        max_branches=1,
        placeholders=Placeholders.of(reader.spec, tokenizer),
        over_long="refuse",
    )
    schedule = TrainingSchedule(trees, BATCH, seed=0)

    @contextlib.contextmanager
    def started() -> Iterator[Iterator[Tensor]]:
        threads = max(1, options.workers)
        with FeatureLoader(schedule, reader, max_tokens=BATCH * 1024, threads=threads) as loader:
            yield (micro.codes["image"] for micro in loader)

    return started


def package_loader(root: CacheRoot, workers: int) -> Batches:
    """Return a DataLoader over `nanomolmo2`: conversations and rows, by processes."""
    data = nm.open(root.path).dataset("d", held_out=0.0)
    return data_loader(data, len(data), data.collate, lambda batch: batch.codes["image"], workers)


def data_loader(
    data: Any,
    samples: int,
    collate: Any,
    codes: Callable[[Any], Tensor],
    workers: int,
    start: str = "fork",
) -> Batches:
    """Return a DataLoader that shuffles, pass after pass."""

    @contextlib.contextmanager
    def started() -> Iterator[Iterator[Tensor]]:
        loader = DataLoader(
            data,
            sampler=Endless(samples),
            batch_size=BATCH,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=start if workers else None,
        )
        iterator = iter(loader)
        try:
            yield map(codes, iterator)
        finally:
            del iterator  # stops the workers

    return started


class Endless:
    """Numbers of samples: permutation after permutation, without a pause between two passes."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(0)
        while True:
            yield from rng.permutation(self.count).tolist()


# ---- other libraries


def make_peer(kind: type[peers.Peer], folder: Path, options: Options) -> peers.Peer:
    """Write the same rows and conversations as another library stores them."""
    made = kind(folder / kind.__name__, CLIP.row_bytes("image"))
    texts = []
    for number in range(options.rows):
        question, answer = text_of(number)
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        texts.append(json.dumps(said))
    # In a process of its own: Lance's threads would break the forked workers of the others.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as writer:
        writer.submit(made.write, row_of, texts).result()
    return made


def peer_loader(peer: peers.Peer, options: Options) -> Batches:
    """Return a DataLoader over another library's data set, with workers."""
    workers = max(1, options.workers)
    return data_loader(peer, options.rows, peer.collate, peer.codes, workers, peer.start)


if __name__ == "__main__":
    run("loaders", __doc__, measure, Options)
