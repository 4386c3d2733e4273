"""Read data sets: print what was understood, choose samples, write them into the cache; and list data sets.

    counter = read_datasets(root, datasets, words, Reading(limit=1000))     # counts the media to encode

A data set is read to its end before it is written, and all of them before anything is encoded. One with lines
that cannot be used is refused, unless these are to be left out.
"""

from __future__ import annotations

import hashlib
import heapq
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import configs
from cache.store.ledger import media_sizes
from cache.store.paths import CacheRoot
from cache.store.samples import (
    Origin,
    Sample,
    dataset_names,
    read_media_refs,
    read_origin,
    read_samples,
    write_samples,
)
from configs import UserError
from configs.command_line import CommandLine
from configs.console import bytes_text, table_text
from configs.progress import Meter, counted, number_text
from encode.plan.media import MediaCounter, Part
from encode.records.account import Account
from encode.sources.catalogue import (
    FROM_SOURCE,
    SPEC_KINDS,
    WITH_MEDIA,
    Choice,
    Dataset,
    Entry,
    read_catalogue,
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which samples of each data set are used."""

    limit: int | None = None
    """Only this many, the first ones."""
    sample: int | None = None
    """Only this many, chosen by the hash of their ids."""
    seed: int = 0
    """Which ones `sample` chooses."""
    leave_out: bool = False
    """Whether lines that cannot be used are left out, instead of refusing the data set."""
    ignore_keys: frozenset[str] = frozenset()
    """Keys of records that are counted and not used."""
    source: Path | None = None
    """`--source`, for the words."""
    media: Path | None = None
    """`--media`, for the words."""
    command: CommandLine | None = None
    """The user's command, for the errors that suggest it with other options."""

    def words(self, choice: Choice) -> tuple[str, ...]:
        """Return the options of encode.run that read a data set in this way, from any folder."""
        options: dict[str, object] = {"--dataset": choice.word, "--config": configs.user_file()}
        if choice.entry.source in FROM_SOURCE:
            options["--source"] = self.source and self.source.expanduser().absolute()
        if choice.entry.source in WITH_MEDIA:
            options["--media"] = self.media and self.media.expanduser().absolute()
        options["--bad-lines"] = "leave-out" if self.leave_out else None
        options["--ignore-keys"] = ",".join(sorted(self.ignore_keys)) or None
        options |= {"--limit": self.limit, "--sample": self.sample}
        options["--seed"] = self.seed if self.sample and self.seed else None
        given = ((name, str(value)) for name, value in options.items() if value is not None)
        return tuple(word for pair in given for word in pair)


def read_datasets(
    root: CacheRoot,
    datasets: Sequence[Dataset],
    choices: Mapping[str, Choice],
    reading: Reading,
    *,
    write: bool = True,
    quiet: bool = False,
) -> MediaCounter:
    """Read data sets, and count the media that their samples mention.

    Args:
        root: the cache.
        datasets: what to read.
        choices: name -> how `--dataset` named it.
        reading: which samples are used.
        write: whether the samples are written into the cache.
        quiet: whether the accounts are not printed.

    Raises:
        UserError: a data set has lines that cannot be used, or its name has another's samples.
    """
    counter = MediaCounter()
    sizes = media_sizes(root) if any(d.needs_sizes for d in datasets) else {}
    for dataset in datasets:
        choice = choices[dataset.name]
        account = Account(
            name=dataset.name,
            leave_out=reading.leave_out,
            ignore_keys=reading.ignore_keys,
            command=reading.command,
        )
        with Meter(f"read {dataset.name}", None, text=number_text) as meter:
            samples = counter.count(counted(_chosen(dataset, sizes, account, reading), meter))
            if write:
                _refuse_others(root, choice)
                write_samples(
                    root, dataset.name, samples, partial(_origin, reading.words(choice), account)
                )
            else:
                for _ in samples:
                    pass
        if not quiet:
            print(account.text(), flush=True)
    return counter


def parts(root: CacheRoot, names: Sequence[str], first: MediaCounter) -> Iterator[MediaCounter]:
    """Yield the parts of the media of data sets, each when the job is done with the one before.

    Args:
        root: the cache.
        names: of the data sets, whose samples are there if there are several parts.
        first: the first part.
    """
    yield first
    for number in range(1, first.part.parts):
        counter = MediaCounter(Part(number, first.part.bits))
        counter.samples = first.samples
        for name in names:
            for ref in read_media_refs(root, name):
                counter.add(ref)
        yield counter


def _origin(words: tuple[str, ...], account: Account) -> Origin:
    return Origin(words=words, account=account.to_json(), said=account.text())


def _chosen(
    dataset: Dataset, sizes: Mapping[str, tuple[int, int]], account: Account, reading: Reading
) -> Iterator[Sample]:
    """Yield the samples that are used; raise UserError after the last if lines cannot be."""
    if reading.sample is None:
        samples: Iterable[Sample] = dataset.samples(sizes, account)
    else:
        samples = _sampled(dataset, sizes, account, reading.sample, reading.seed)
    yield from islice(account.watch(samples), reading.limit)
    account.close()  # with a limit, `watch` does not reach its end


def _sampled(
    dataset: Dataset, sizes: Mapping[str, tuple[int, int]], account: Account, wanted: int, seed: int
) -> Iterator[Sample]:
    """Yield the `wanted` samples whose ids have the smallest hashes, in the data set's order.

    The data set is read twice. Memory holds that many hashes.
    """
    smallest = heapq.nsmallest(
        wanted, (_hash(sample, seed) for sample in dataset.samples(sizes, account))
    )
    account.close()
    # The first pass has counted.
    again = Account(name=dataset.name, leave_out=True, ignore_keys=account.ignore_keys)
    for sample in dataset.samples(sizes, again):
        if smallest and _hash(sample, seed) <= smallest[-1]:
            yield sample


def _hash(sample: Sample, seed: int) -> bytes:
    text = f"{seed} {sample.id}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _refuse_others(root: CacheRoot, choice: Choice) -> None:
    """Refuse a data set whose name another's samples have: they would be replaced.

    Raises:
        UserError: the samples there came from elsewhere.
    """
    if not choice.entry.spec or choice.name not in dataset_names(root):
        return
    origin = read_origin(root, choice.name)
    if origin is not None:
        other = dict(zip(origin.words[::2], origin.words[1::2], strict=False)).get("--dataset")
        if other in (choice.word, f"{choice.name}={choice.entry.spec}"):
            return
        came = f"the samples of {other}"
    else:
        if choice.entry.source != "folder":
            return
        first = next(read_samples(root, choice.name), None)
        source = first.media[0].source if first and first.media else choice.entry.path
        if Path(source).is_relative_to(choice.entry.path):
            return
        came = f"the samples of {Path(source).parent}"
    folder, spec = root.samples(choice.name).parent, choice.entry.spec
    raise UserError(
        f"{folder} has {came}; give {spec} a name of its own: --dataset "
        f"{shlex.quote(f'{choice.name}-2={spec}')}, or remove that folder if the files have moved: "
        f"rm -r {shlex.quote(str(folder))}"
    )


# ---- --list

A100_IMAGES_S = 300.0
"""Assumed: images a second of CLIP ViT-L/14@336 on one A100, 382 GFLOP each at 37 % of 312 TFLOP/s."""
CORES_IMAGES_S = 0.33
"""Measured: images a second of the same on 2 CPU cores (docs/BENCHMARKS.md)."""

KINDS = {
    "folder": "images and videos in a folder, with captions, questions or conversations beside them",
    "json": "conversations in a file: LLaVA, ShareGPT, messages, questions, COCO; JSON, JSONL, CSV, Parquet",
    "hf": "a data set of the Hugging Face hub, with its images in the files",
    "webdataset": "tars of images and texts, as img2dataset writes them",
}

LEGEND = f"""\
rows, images, bytes: as published, rounded; ?: not known, +: and what is not known
A100, 2cores: hours of encoding with CLIP ViT-L/14@336, at {A100_IMAGES_S:.0f} images/s on one A100 (assumed)
and {CORES_IMAGES_S} on 2 CPU cores (measured). Images from the web arrive as fast as their hosts answer.
An image that several data sets have is encoded once. What a job needs: --plan.
Molmo2's video sets name YouTube videos: fetch them yourself, then --dataset folder:PATH"""


def listing() -> str:
    """Return the data sets and groups by name, with rows, bytes and hours, one on a line."""
    entries, groups = read_catalogue()
    table = [_row(name, [entry], entry.about or entry.spec) for name, entry in entries.items()]
    table += [
        _row(name, [entries[member] for member in members], f"group: {', '.join(members)}")
        for name, members in groups.items()
    ]
    header = ("data set", "rows", "images", "text", "media", "A100", "2cores", "about")
    lines = [table_text(header, table, right="rows images text media A100 2cores"), LEGEND]
    width = max(map(len, SPEC_KINDS.values()))
    lines += [f"{SPEC_KINDS[kind]:<{width}}  {about}" for kind, about in KINDS.items()]
    return "\n".join(lines)


def _row(name: str, entries: Sequence[Entry], about: str) -> tuple[str, ...]:
    images = _total([entry.images for entry in entries])
    return (
        name,
        _figure(_total([entry.rows for entry in entries]), "{:,.0f}".format),
        _figure(images, "{:,.0f}".format),
        _figure(_total([entry.text_bytes for entry in entries]), bytes_text),
        _figure(_total([entry.media_bytes for entry in entries]), bytes_text),
        _figure(images, lambda number: _hours(number / A100_IMAGES_S)),
        _figure(images, lambda number: _hours(number / CORES_IMAGES_S)),
        about,
    )


def _total(values: Sequence[float | None]) -> tuple[float | None, bool]:
    """Return the sum of the known values, None if there are none, and whether all are known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None, len(known) == len(values)


def _figure(total: tuple[float | None, bool], text: Callable[[float], str]) -> str:
    value, complete = total
    return "?" if value is None else text(value) + ("" if complete else "+")


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return "<0.1" if 0 < hours < 0.1 else f"{hours:,.1f}" if 0 < hours < 10 else f"{hours:,.0f}"
