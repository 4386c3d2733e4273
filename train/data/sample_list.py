"""A frozen list of samples with everything a trainer needs of them but their texts, as flat arrays.

S samples, R media references of all samples together, K distinct media among them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from cache.store.paths import CacheRoot
from cache.store.references import IMAGE, NOUNS, VIDEO, within
from configs import UserError

Ints = npt.NDArray[np.int64]
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of one data set's samples, both splits together."""

    dataset: str
    samples: int
    """Samples in the data set."""
    present: int
    """Samples whose media all have their features."""
    failed: int
    """Samples that mention a media the ledger names as failed: they do not count against coverage."""
    missing: int
    """Samples whose media should be in the space and are not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Join:
    """A frozen list of samples, in data set order, as flat arrays."""

    root: CacheRoot
    """Where the texts are."""
    split: Split
    """Which side of the held-out threshold."""
    names: tuple[str, ...]
    """Data sets, in the order asked for."""
    mix: tuple[float, ...] | None
    """Share of each data set, sum 1; None: by size."""
    dataset: npt.NDArray[np.int16]
    """(S,) which of `names`."""
    index: Ints
    """(S,) row in the data set's samples table."""
    weight: npt.NDArray[np.float32]
    """(S,) factor on the loss of the whole sample."""
    task: npt.NDArray[np.int32]
    """(S,) which of `tasks`."""
    tasks: tuple[str, ...]
    """Types of question."""
    offsets: Ints
    """(S + 1,) sample i mentions media[offsets[i]:offsets[i + 1]]."""
    media: npt.NDArray[np.int32]
    """(R,) which of the K distinct media."""
    keys: npt.NDArray[np.uint8]
    """(K, 32) sha256 of the media's bytes."""
    kinds: npt.NDArray[np.uint8]
    """(K,) number in MEDIA_KINDS."""
    starts: Ints
    """(K + 1,) media k has rows[starts[k]:starts[k + 1]]: one for an image, one a frame for a video."""
    rows: Ints
    """(W,) rows of the space's array for the media's kind."""
    times: npt.NDArray[np.float64]
    """(W,) where in its video a frame is, seconds after the first; NaN for images."""
    ids: tuple[Any, ...]
    """Per data set the id column of its whole table."""
    counts: tuple[Coverage, ...]
    """Per data set."""
    samples_digests: tuple[str, ...]
    """Per data set: hash of its texts."""
    digest: str
    """Hash of this list: texts, media keys, order. Row numbers are not in it: they may change."""

    @property
    def size(self) -> int:
        """S."""
        return len(self.index)

    @property
    def missing(self) -> int:
        """Samples left out because features are missing."""
        return sum(c.missing for c in self.counts)

    @property
    def failed(self) -> int:
        """Samples left out because the ledger names their media as failed."""
        return sum(c.failed for c in self.counts)

    @property
    def coverage(self) -> float:
        """Share of the samples present, of those whose media could be had."""
        present = sum(c.present for c in self.counts)
        return present / (present + self.missing) if present + self.missing else 1.0

    def name_of(self, sample: int) -> str:
        """`<data set>/<id>` of the sample at a position of this list."""
        dataset = int(self.dataset[sample])
        return f"{self.names[dataset]}/{self.ids[dataset][int(self.index[sample])].as_py()}"

    def media_of(self, sample: int) -> npt.NDArray[np.int32]:
        """(n,) the media of one sample, as indices of `keys`, `kinds` and `starts`."""
        return self.media[self.offsets[sample] : self.offsets[sample + 1]]

    def is_video(self, media: int) -> bool:
        """Whether one distinct media is a video."""
        return int(self.kinds[media]) == VIDEO

    def rows_of(self, media: int) -> Ints:
        """Its rows, in the array of its kind."""
        return self.rows[self.starts[media] : self.starts[media + 1]]

    def times_of(self, media: int) -> npt.NDArray[np.float64]:
        """Where its frames are, seconds after the first; NaN of an image."""
        return self.times[self.starts[media] : self.starts[media + 1]]

    def key(self, media: int) -> str:
        """The key (64 hex) of one distinct media."""
        return self.keys[media].tobytes().hex()

    def describe(self) -> str:
        """One line a data set, for the log."""
        used = np.bincount(self.dataset, minlength=len(self.names))
        lines = [
            f"{c.dataset}: {used[i]:,} {self.split} samples of {c.samples:,}"
            f" ({c.failed:,} with failed media, {c.missing:,} not encoded)"
            + (f", share {self.mix[i]:.3f}" if self.mix else "")
            for i, c in enumerate(self.counts)
        ]
        return "\n".join(lines)

    def blind(self, seed: int) -> Join:
        """The same samples, every image exchanged for another, and every video for another video.

        A video keeps its own number of frames and their times, which stand in the text; what is seen at
        them comes from the other video, spread over its whole length. So all sequences stay as long as
        they were, and what is left is what can be known without looking.

        Raises:
            UserError: there is only one image, or one video, to exchange.
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
            donor[order] = np.roll(order, 1)  # one cycle through all: none stays in its place
        count, given = np.diff(self.starts), np.diff(self.starts)[donor]
        place = within(np.zeros_like(count), count)  # 0, 1, ... within each media
        last = np.repeat(np.maximum(count - 1, 1), count)
        # The nearest of the donor's frames: first to first, last to last.
        frame = (2 * place * np.repeat(given - 1, count) + last) // (2 * last)
        rows = self.rows[np.repeat(self.starts[donor], count) + frame]
        return replace(self, rows=rows, keys=self.keys[donor], digest="blind")

    def freeze(self, path: Path) -> None:
        """Write which samples these are (a bit a sample), for `join(..., frozen=path)` on resume."""
        arrays = {}
        for i, count in enumerate(self.counts):
            chosen = np.zeros(count.samples, dtype=bool)
            chosen[self.index[self.dataset == i]] = True
            arrays[self.names[i]] = np.packbits(chosen)
        temporary = path.with_name(f"{path.name}.partial")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, {"digest": self.digest, "split": self.split})
        temporary.replace(path)


def digest_of(joined: Join) -> str:
    """Hash of texts, media keys and order; of videos also how many frames they have, and when."""
    digest = hashlib.sha256(repr((joined.split, joined.names, joined.samples_digests)).encode())
    arrays: list[npt.NDArray[Any]] = [joined.dataset, joined.index, joined.offsets]
    arrays += [joined.media, joined.keys]
    if (joined.kinds != IMAGE).any():
        arrays += [joined.kinds, joined.starts, joined.times]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def read_frozen(path: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray[np.uint8]]:
    """Per data set, a bit a sample: what `Join.freeze` wrote.

    Raises:
        UserError: it cannot be read, or is of other data sets.
    """
    try:
        chosen = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            f"{path}: the run's sample list cannot be read ({error}); start a new run (--run NAME)"
        ) from None
    if sorted(chosen) != sorted(names):
        raise UserError(
            f"{path}: this run was started on {', '.join(sorted(chosen))}, now there are "
            f"{', '.join(sorted(names))}; resume with the same data sets or start a new run"
        )
    return chosen


def check_frozen(joined: Join, path: Path) -> None:
    """Refuse a list that is not the one `Join.freeze` wrote to `path`."""
    with safe_open(path, framework="numpy") as file:
        before = file.metadata()["digest"]
    if before != joined.digest:
        raise UserError(
            f"{path}: the samples this run was started on are not the same any more (texts edited, "
            "images changed or removed, or another --held-out); start a new run (--run NAME --from "
            "CHECKPOINT keeps what was learned)"
        )
