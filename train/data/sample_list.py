"""The frozen list of samples of a run, as flat arrays: everything a trainer needs except the texts.

    samples = join(root, reader, {"demo": None}, split="train", held_out=0.05, min_coverage=0.95)
    samples.name_of(0)                        # "demo/17"
    samples.rows_of(samples.media_of(0)[0])   # the feature rows of its first image or video
    samples.freeze(path)                      # which samples these are, for a resumed run

S samples, R media references of all samples together, K media items, W feature rows of all of them. A media
item is the bytes of one key, used as an image or as a video.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cache.format.checksums import GOLDEN, mix64
from cache.format.gate import check_regular
from cache.store.files import write_atomic
from cache.store.paths import CacheRoot
from cache.store.references import IMAGE, NOUNS, VIDEO, edges_of, within
from cache.store.samples import Split
from configs import UserError
from train.data.choices import first_answers

Ints = npt.NDArray[np.int64]


MOST_BYTES = 1 << 30
"""Bytes of the file with one bit for each sample, at most."""


class ChangedSamplesError(UserError):
    """The samples that a run was started on are not those in the cache any more."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many samples of one data set have all their features, all splits together."""

    dataset: str
    """Name of the data set."""
    samples: int
    """Samples in the data set."""
    present: int
    """Samples whose media all have their features."""
    failed: int
    """Samples with a media item that failed, according to the ledger; they do not count against coverage."""
    missing: int
    """Samples whose media should have features and do not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleList:
    """A frozen list of samples, in data set order, as flat arrays."""

    root: CacheRoot
    """The cache that has the texts."""
    split: Split
    """The split that they are of."""
    names: tuple[str, ...]
    """Data sets, in the order asked for."""
    mix: tuple[float, ...] | None
    """Share of each data set, sum 1; None: each data set counts by its size."""
    dataset: npt.NDArray[np.int16]
    """(S,) index into `names`."""
    index: Ints
    """(S,) row in the data set's samples table."""
    weight: npt.NDArray[np.float32]
    """(S,) factor on the loss of the whole sample."""
    task: npt.NDArray[np.int32]
    """(S,) index into `tasks`."""
    tasks: tuple[str, ...]
    """Question types."""
    choice: npt.NDArray[np.int32]
    """(S,) equal for the answers to one question, of which an epoch takes one; -1: the only answer."""
    first_turn: npt.NDArray[np.int32]
    """(S,) the first turn of a part of a sample, see `train.data.usable`; 0 for a whole sample."""
    end_turn: npt.NDArray[np.int32]
    """(S,) the first turn after the part; 0 for a whole sample."""
    offsets: Ints
    """(S + 1,) sample i has media[offsets[i]:offsets[i + 1]]."""
    media: npt.NDArray[np.int32]
    """(R,) index among the K media items."""
    keys: npt.NDArray[np.uint8]
    """(K, 32) sha256 of the bytes of each media item."""
    kinds: npt.NDArray[np.uint8]
    """(K,) index into MEDIA_KINDS."""
    starts: Ints
    """(K + 1,) media item k has rows[starts[k]:starts[k + 1]]: one for an image, one per frame of a video."""
    rows: Ints
    """(W,) row numbers in the space's array for the kind of the media item."""
    times: npt.NDArray[np.float64]
    """(W,) time of a frame, seconds after the video's first frame; NaN for images."""
    ids: tuple[Any, ...]
    """For each data set the id column (Arrow strings) of its whole table."""
    counts: tuple[Coverage, ...]
    """Coverage of each data set."""
    samples_digests: tuple[str, ...]
    """For each data set the hash of its texts."""
    digest: str
    """Hash of this list: texts, media keys, order. It leaves out row numbers, which may change."""

    @property
    def size(self) -> int:
        """Number of samples, S."""
        return len(self.index)

    @property
    def missing(self) -> int:
        """Number of samples left out because features are missing."""
        return sum(c.missing for c in self.counts)

    @property
    def failed(self) -> int:
        """Number of samples left out because a media item failed, according to the ledger."""
        return sum(c.failed for c in self.counts)

    @property
    def coverage(self) -> float:
        """Share of samples with all their features, not counting samples with failed media."""
        present = sum(c.present for c in self.counts)
        return present / (present + self.missing) if present + self.missing else 1.0

    def name_of(self, sample: int) -> str:
        """Return `<data set>/<id>` of the sample at a position of this list, and the turns of a part."""
        dataset = int(self.dataset[sample])
        name = f"{self.names[dataset]}/{self.ids[dataset][int(self.index[sample])].as_py()}"
        if not (end := int(self.end_turn[sample])):
            return name
        return f"{name} turns {int(self.first_turn[sample]) + 1}-{end}"

    def media_of(self, sample: int) -> npt.NDArray[np.int32]:
        """Return the media of one sample, (n,) indices of `keys`, `kinds` and `starts`."""
        return self.media[self.offsets[sample] : self.offsets[sample + 1]]

    def media_hash(self) -> npt.NDArray[np.uint64]:
        """Return (S,) hashes, equal for samples with equal media in equal order."""
        count = np.diff(self.offsets)
        place = within(np.zeros_like(count), count).astype(np.uint64)
        one = mix64(self.media.astype(np.uint64) + (place << np.uint64(32)) + GOLDEN)
        total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(one, dtype=np.uint64)])
        # The sums and their differences wrap around at 2**64; equal lists still get equal hashes.
        media: npt.NDArray[np.uint64] = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return mix64(media + GOLDEN)

    def take(
        self,
        chosen: Ints,
        turns: npt.NDArray[np.int32] | None = None,
        media_counts: Ints | None = None,
    ) -> SampleList:
        """Return the list of some of the samples, or of parts of them. It keeps the digest of this list.

        Args:
            chosen: (n,) positions in this list, ascending; a position may occur once for each part.
            turns: (n, 2) first turn of each part and the first after it, 0 and 0 for a whole sample. None:
                as in this list.
            media_counts: (n,) number of media of each part, the first ones of the sample. None: all.
        """
        if turns is None:
            turns = np.stack([self.first_turn[chosen], self.end_turn[chosen]], axis=1)
        if media_counts is None:
            media_counts = np.diff(self.offsets)[chosen]
        return replace(
            self,
            dataset=self.dataset[chosen],
            index=self.index[chosen],
            weight=self.weight[chosen],
            task=self.task[chosen],
            choice=self.choice[chosen],
            first_turn=turns[:, 0].copy(),
            end_turn=turns[:, 1].copy(),
            offsets=edges_of(media_counts),
            media=self.media[within(self.offsets[chosen], media_counts)],
        )

    def head(self, limit: int) -> SampleList:
        """Return the first `limit` questions of each data set, each with all its answers."""
        first = first_answers(self.choice)
        new = first == np.arange(self.size)
        number = np.cumsum(new) - 1  # of the questions, by their first answers
        before = np.searchsorted(self.dataset[new], np.arange(len(self.names)))
        return self.take(np.flatnonzero(number[first] - before[self.dataset] < limit))

    def is_video(self, item: int) -> bool:
        """Whether a media item is a video."""
        return int(self.kinds[item]) == VIDEO

    def rows_of(self, item: int) -> Ints:
        """Return the rows of a media item, in the array of its kind."""
        return self.rows[self.starts[item] : self.starts[item + 1]]

    def times_of(self, item: int) -> npt.NDArray[np.float64]:
        """Return the times of a video's frames, seconds after its first frame; NaN for an image."""
        return self.times[self.starts[item] : self.starts[item + 1]]

    def key(self, item: int) -> str:
        """Return the key of a media item, 64 hex digits."""
        return self.keys[item].tobytes().hex()

    def describe(self) -> str:
        """Return one line for each data set, for the log."""
        used = np.bincount(self.dataset, minlength=len(self.names))
        lines = [
            f"{c.dataset}: {used[i]:,} {self.split} samples of {c.samples:,}"
            f" ({c.failed:,} with failed media, {c.missing:,} not encoded)"
            + (f", share {self.mix[i]:.3f}" if self.mix else "")
            for i, c in enumerate(self.counts)
        ]
        return "\n".join(lines)

    def blind(self, seed: int) -> SampleList:
        """Return the samples with every image exchanged for another image, and every video for another video.

        A video keeps its number of frames and their times, because these are in its text; the frames are
        taken from the other video, spread over its whole length. So every sequence keeps its length, and
        only what can be answered without looking can be answered.

        Raises:
            UserError: there is only one image, or only one video.
        """
        donor = np.empty(len(self.kinds), dtype=np.int64)
        for kind, noun in enumerate(NOUNS):
            of_kind = np.flatnonzero(self.kinds == kind)
            if len(of_kind) == 1:
                raise UserError(
                    f"{self.split} split of {', '.join(self.names)}: one {noun}, so none to exchange it "
                    f"for in the blind baseline; leave it out (--no-blind) or encode more {noun}s"
                )
            order = of_kind[np.random.default_rng(seed).permutation(len(of_kind))]
            donor[order] = np.roll(order, 1)  # one cycle through all media, so none keeps its own
        count, given = np.diff(self.starts), np.diff(self.starts)[donor]
        place = within(np.zeros_like(count), count)  # 0, 1, ... for the rows of each media item
        last = np.repeat(np.maximum(count - 1, 1), count)
        # The nearest of the donor's frames, so that first maps to first and last to last.
        frame = (2 * place * np.repeat(given - 1, count) + last) // (2 * last)
        rows = self.rows[np.repeat(self.starts[donor], count) + frame]
        return replace(self, rows=rows, keys=self.keys[donor], digest="blind")

    def freeze(self, path: Path) -> None:
        """Write which samples these are, one bit per sample, for `join(..., frozen=path)` on resume."""
        arrays = {}
        for i, count in enumerate(self.counts):
            chosen = np.zeros(count.samples, dtype=bool)
            chosen[self.index[self.dataset == i]] = True
            arrays[self.names[i]] = np.packbits(chosen)
        write_atomic(path, save(arrays, {"digest": self.digest, "split": self.split}))


def digest_of(samples: SampleList) -> str:
    """Return the hash of texts, media keys and order; with videos also of their frame counts and times."""
    digest = hashlib.sha256(repr((samples.split, samples.names, samples.samples_digests)).encode())
    arrays: list[npt.NDArray[Any]] = [samples.dataset, samples.index, samples.offsets]
    arrays += [samples.media, samples.keys]
    if (samples.kinds != IMAGE).any():
        arrays += [samples.kinds, samples.starts, samples.times]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def read_frozen(path: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray[np.uint8]]:
    """Return what `SampleList.freeze` wrote: for each data set one bit per sample.

    Raises:
        ChangedSamplesError: the file cannot be read, or is of other data sets than `names`.
    """
    try:
        check_regular(path, most=MOST_BYTES)
        chosen = load_file(path)
        for name, bits in chosen.items():
            if bits.dtype != np.uint8 or bits.ndim != 1:
                raise ValueError(f"{name!r} is not one bit for each sample")
    except (OSError, ValueError, SafetensorError) as error:
        raise ChangedSamplesError(
            f"{path}: the run's sample list cannot be read ({error})"
        ) from None
    if sorted(chosen) != sorted(names):
        raise ChangedSamplesError(
            f"{path}: this run was started on {', '.join(sorted(chosen))}, now there are "
            f"{', '.join(sorted(names))}"
        )
    return chosen


def check_frozen(samples: SampleList, path: Path) -> None:
    """Raise ChangedSamplesError if `samples` is not the list that `SampleList.freeze` wrote to `path`."""
    with safe_open(path, framework="numpy") as file:
        before = (file.metadata() or {}).get("digest")
    if before != samples.digest:
        raise ChangedSamplesError(
            f"{path}: the samples this run was started on are not the same any more (samples added, texts "
            "edited, images changed or removed, or another --held-out)"
        )
