"""Read data sets: print what was understood, choose samples, write them into the cache; and list data sets.

    counter = read_datasets(root, datasets, words, Reading(limit=1000))     # counts the media to encode

A data set is read to its end before it is written, and all of them before anything is encoded. One with lines
that cannot be used is refused, unless these are to be left out.
"""

from __future__ import annotations

import hashlib
import heapq
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    read_origin,
    read_samples,
    write_samples,
)
from configs import UserError
from encode.plan import MediaCounter
from encode.records.account import Account
from encode.sources.catalogue import FROM_SOURCE, WITH_MEDIA, Choice, Dataset


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
    source: Path | None = None
    """`--source`, for the words."""
    media: Path | None = None
    """`--media`, for the words."""

    def words(self, choice: Choice) -> tuple[str, ...]:
        """Return the options of encode.run that read a data set in this way, from any folder."""
        options: dict[str, object] = {"--dataset": choice.word, "--config": configs.user_file()}
        if choice.entry.source in FROM_SOURCE:
            options["--source"] = self.source and self.source.expanduser().absolute()
        if choice.entry.source in WITH_MEDIA:
            options["--media"] = self.media and self.media.expanduser().absolute()
        options["--bad-lines"] = "leave-out" if self.leave_out else None
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
        account = Account(name=dataset.name, leave_out=reading.leave_out)
        samples = counter.count(_chosen(dataset, sizes, account, reading))
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


def _origin(words: tuple[str, ...], account: Account) -> Origin:
    return Origin(words=words, account=account.to_json())


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
    again = Account(name=dataset.name, leave_out=True)  # the first pass has counted
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
