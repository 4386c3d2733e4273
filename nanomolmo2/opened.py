"""Open a cache and read features by name.

    cache = open("cache")
    cache["photos/cat.jpg"]              # (tokens, width) float16
    cache["videos/cat.mp4"].times        # a Clip: (frames, tokens, width), and its times
    cache.dataset("pixmo-cap")           # a torch Dataset, see dataset.py

A name is a path, a URL, or a key: the sha256 of the bytes in 64 hex digits. A file that exists counts by its
bytes: where it is not recorded, or has changed since, it is hashed.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from cache.errors import CacheError, command_line, nearest
from cache.format import codec
from cache.format.frame_sampling import MAX_FRAMES
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.maintenance.encode_command import encode_command, encoder_words
from cache.maintenance.local_media import LocalMedia
from cache.store.commits import KEY_BYTES, key_bytes
from cache.store.ledger import media_table
from cache.store.paths import is_url
from cache.store.references import MEDIA_KINDS, VIDEO, MediaItems, find_rows
from cache.store.samples import Split, dataset_names, samples_table
from nanomolmo2.clip import Clip
from nanomolmo2.media_names import MediaTable
from nanomolmo2.source import Source, in_python

if TYPE_CHECKING:
    from nanomolmo2.dataset import FeatureDataset

NAMES_SHOWN = 3
"""Sources that an error about an ambiguous or unknown name quotes."""


class MissingFeaturesError(CacheError, KeyError):
    """The space has no features of that name. The message says why, and the command that makes them."""

    __str__ = Exception.__str__  # that of KeyError would quote the message


def open(  # noqa: A001 - `nm.open(...)` reads as in gzip.open
    where: str | os.PathLike[str],
    space: str | None = None,
    *,
    datasets: Collection[str] = (),
    max_frames: int = MAX_FRAMES,
    mirror: str | os.PathLike[str] = "~/.cache/nanomolmo2",
    mirror_gb: float = 50.0,
    allow_private: bool = False,
) -> Cache:
    """Open one space of a feature cache.

    Args:
        where: a folder, or a URL: https://HOST/PATH, s3://BUCKET/PREFIX, hf://datasets/ORG/NAME.
        space: the name of the space, or the start of it; None: the only one.
        datasets: of a remote cache, copy the samples of these data sets; empty: of all.
        max_frames: most frames of one video, as `encode.run --max-frames` had it.
        mirror: folder for the tables and rows of remote caches on this machine.
        mirror_gb: the most that the rows of one remote cache take on this machine, in GB; 0 keeps none.
        allow_private: permit plain http, and addresses of private networks.

    Raises:
        NotFoundError: there is no such cache or space.
        CacheError: several spaces have that name, or the cache cannot be read.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames {max_frames} is below 1")
    source = Source(
        where,
        space,
        datasets=datasets,
        mirror=mirror,
        mirror_gb=mirror_gb,
        allow_private=allow_private,
    )
    return Cache(source, max_frames)


class Cache:
    """One space of a feature cache, with the samples and the media table beside it.

    It may be pickled: each process opens the cache for itself. Forked processes and threads may share it.
    Rows that are committed later are not seen.
    """

    def __init__(self, source: Source, max_frames: int) -> None:
        """Read the space of `source`; use `nanomolmo2.open`."""
        self._source = source
        self.max_frames = max_frames
        """Most frames of one video."""

    @property
    def where(self) -> str:
        """The folder, absolute, or the URL."""
        return self._source.where

    @property
    def space(self) -> str:
        """Name of the space."""
        return self._source.space

    @property
    def spec(self) -> FeatureSpec:
        """How features were made: `spec.width`, `spec.tokens("image")`, `spec.tokens("frame")`, ..."""
        return self._source.reader.spec

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets, sorted."""
        return dataset_names(self._source.root)

    def __getitem__(self, name: str | os.PathLike[str]) -> npt.NDArray[np.float16] | Clip:
        """Return the features of an image, (tokens, width) float16, or of a video, a `Clip`.

        Args:
            name: a path, a URL, a name of `cache.format.embedded`, or a key of 64 hex digits. A relative path
                that does not exist here may be the end of a recorded path, if only one fits.

        Raises:
            MissingFeaturesError: (a KeyError) there are none.
            CorruptError: the row has changed since it was written.
            UnreachableError: a row of a remote cache cannot be fetched.
        """
        key, kind = self._find(os.fspath(name))
        if kind != "video":
            return self._source.reader.read(ARRAY_OF["image"], key)
        reader, array = self._source.reader, ARRAY_OF["video"]
        rows, times = self._frames(key)
        packed = np.empty((len(rows), self.spec.row_bytes(array)), np.uint8)
        reader.read_into(array, rows, packed)
        spec = self.spec
        return Clip(codec.unpack(packed, spec.codec, spec.tokens(array), spec.width), times)

    def __contains__(self, name: object) -> bool:
        """Return whether `cache[name]` would return features."""
        if not isinstance(name, str | os.PathLike):
            return False
        try:
            self._find(os.fspath(name))
        except MissingFeaturesError:
            return False
        return True

    def key(self, name: str | os.PathLike[str]) -> str:
        """Return the key of the features that `cache[name]` returns: 64 hex digits.

        Raises:
            MissingFeaturesError: (a KeyError) there are none.
        """
        return self._find(os.fspath(name))[0]

    def __iter__(self) -> Iterator[str]:
        """Yield the key of each image and video that has rows."""
        return (key.tobytes().hex() for key in self._keys)

    def __len__(self) -> int:
        """Return the number of images and videos that have rows."""
        return len(self._keys)

    def __repr__(self) -> str:
        reader, spec = self._source.reader, self.spec
        rows = [
            f"{len(reader.index[array]):,} {array}s of {spec.tokens(array)} x {spec.width}"
            for array in ARRAY_OF.values()
            if len(reader.index[array])
        ]
        names = ", ".join(self.datasets) or "none"
        return (
            f"<Cache {self.where} space={self.space!r}: {', '.join(rows) or 'no rows'}; "
            f"data sets: {names}>"
        )

    def dataset(
        self,
        names: str | Iterable[str] | None = None,
        split: Split = "train",
        *,
        held_out: float = 0.05,
        min_coverage: float = 0.95,
    ) -> FeatureDataset:
        """Return the samples of one split that have all their features, as a map-style torch Dataset.

        The split is that of `train.run`: by the keys of the media, so no image is in two splits. Needs torch.

        Args:
            names: a data set or several; None: all of the cache.
            split: `train`, `val` (to choose by) or `test` (to report).
            held_out: share of the media in `val`, and the same share in `test`.
            min_coverage: least share of samples with features, not counting those with failed media.

        Raises:
            NotFoundError: there is no such data set.
            CacheError: features are missing, or the split has no sample.
            CorruptError: a table is damaged.
        """
        try:
            from nanomolmo2.dataset import open_dataset
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                "Cache.dataset needs torch: pip install torch", name="torch"
            ) from None

        chosen = [names] if isinstance(names, str) else self.datasets if names is None else names
        return open_dataset(
            self._source,
            list(chosen),
            split,
            held_out=held_out,
            max_frames=self.max_frames,
            min_coverage=min_coverage,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "max_frames": self.max_frames}

    # ---- names

    @functools.cached_property
    def _keys(self) -> npt.NDArray[Any]:
        """(n,) the distinct keys of all rows, as 32 bytes each."""
        index = self._source.reader.index
        keys = np.concatenate([index[array].keys for array in ARRAY_OF.values()])
        return np.unique(np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").ravel())

    @functools.cached_property
    def _media(self) -> MediaTable:
        with in_python():
            return MediaTable(media_table(self._source.root))

    def _find(self, name: str) -> tuple[str, str]:
        """Return the key and the kind of the features that a name means."""
        key: str | None
        record: dict[str, Any] | None
        if len(name) == 2 * KEY_BYTES and not set(name.lower()) - set("0123456789abcdef"):
            key, record = name.lower(), None
        else:
            record = self._record(name)
            key = record["key"] if record else None
            path = Path(record["source"]) if record else Path(name).expanduser()
            if self._opens(name, record) and _is_file(path) and not _unchanged(path, record):
                with path.open("rb") as file:
                    key = hashlib.file_digest(file, "sha256").hexdigest()
        kinds = [record["kind"]] if record else []
        reader = self._source.reader
        for kind in [*kinds, *MEDIA_KINDS]:
            if key is None or not reader.rows(ARRAY_OF.get(kind, "image")):
                continue
            if kind == "video" and len(self._frames(key)[0]):
                return key, kind
            if kind == "image" and reader.contains(ARRAY_OF[kind], key):
                return key, kind
        raise MissingFeaturesError(self._why_missing(name, key, record))

    def _opens(self, name: str, record: dict[str, Any] | None) -> bool:
        """Return whether a file may be opened. A stranger may have chosen all but the end of its name."""
        if record is None or record["source"] in (name, _absolute(name)):
            return True
        return self._local.allows(record["source"])

    @functools.cached_property
    def _local(self) -> LocalMedia:
        with in_python():
            return LocalMedia(self._source.root)

    def _record(self, name: str) -> dict[str, Any] | None:
        """Return the row of the media table that a name means."""
        media = self._media
        if (row := media.find(name)) is not None or "://" in name:
            return media.row(row)
        if (row := media.find(_absolute(name))) is not None:
            return media.row(row)
        path = Path(name).expanduser()
        if path.is_absolute() or _is_file(path):
            return None
        fitting = media.ending(f"/{path.as_posix()}")
        if len(set(fitting["key"].to_pylist())) == 1:
            return media.row_of(fitting, 0)
        if len(fitting):
            shown = ", ".join(fitting["source"].slice(0, NAMES_SHOWN).to_pylist())
            raise MissingFeaturesError(
                f"{name}: {len(fitting):,} media of the cache have names that end so; name one in full: "
                f"{shown}{', ...' if len(fitting) > NAMES_SHOWN else ''}"
            )
        return None

    def _frames(self, key: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return rows and times of a video's frames; none where some are missing."""
        item = MediaItems(
            keys=key_bytes([key]),
            kinds=np.array([VIDEO], np.uint8),
            durations=np.array([self._media.duration(key)]),
        )
        found = find_rows(self._source.reader, item, self.max_frames)
        return found.rows, found.times

    def _why_missing(self, name: str, key: str | None, record: dict[str, Any] | None) -> str:
        """Return what is missing, why, and what to do."""
        reader = self._source.reader
        begin = f"{name}: no features in space {self.space} of {self.where}: "
        stored = self._stored_frames(key) if key else 0
        if stored and not np.isnan(self._media.duration(str(key))):
            return (
                f"{begin}it has {stored} frames, but not those for at most {self.max_frames}: encoded with "
                f"another limit; nm.open(..., max_frames={stored}), or encode again: "
                + self._command(name, record, "--max-frames", str(self.max_frames))
            )
        if stored:
            return f"{begin}encoding it did not finish. Go on: {self._command(name, record)}"
        if record and record["status"] == "failed":
            return (
                f"{begin}it failed at {record['stage']}: {record['error']}. Try again: "
                + self._command(name, record, "--retry-failed")
            )
        if record and key == record["key"]:
            return f"{begin}it is not encoded there. Encode it: {self._command(name, record)}"
        if record:
            changed = f"{begin}the file has changed since it was encoded. Encode it again: "
            return changed + self._command(name, record)
        if key and key == name.lower():
            hint = "no image or video has this key (the sha256 of its bytes)"
        else:
            sources = self._media.ending(f"/{Path(name).name}")["source"].to_pylist()
            hint = f"not among its {len(self._media):,} media{nearest(name, sources)}"
        if not reader.rows("image") and not reader.rows("frame"):
            hint = "the space is empty"
        way_out = (
            "Encode it" if _is_file(Path(name).expanduser()) else "Encode the data set that has it"
        )
        return f"{begin}{hint}. {way_out}: {self._command(name, record)}"

    def _stored_frames(self, key: str) -> int:
        """Return how many rows of frames a key has, complete or not."""
        index = self._source.reader.index[ARRAY_OF["video"]]
        return int(index.counting((index.keys == key_bytes([key])).all(axis=1)).sum())

    def _command(self, name: str, record: dict[str, Any] | None, *more: str) -> str:
        """Return the command that encodes what a name means."""
        reader, root = self._source.reader, self._source.root
        path = Path(name).expanduser().absolute()
        if record is None and _is_file(path) and not is_url(self.where):
            words = ["--dataset", f"folder:{path.parent}", *encoder_words(reader, {})]
            return command_line("encode.run", *words, "--features", self.where, *more)
        dataset = self._dataset_of(record["source"]) if record else None
        return encode_command(root, dataset, reader, {}, *more)

    def _dataset_of(self, source: str) -> str | None:
        """Return the first data set that mentions a source."""
        for dataset in self.datasets:
            media = samples_table(self._source.root, dataset, ["media"])["media"]
            sources = pc.struct_field(pc.list_flatten(media), "source")
            if pc.any(pc.equal(sources, source)).as_py():
                return dataset
        return None


def _absolute(name: str) -> str:
    return os.path.abspath(Path(name).expanduser())  # noqa: PTH100 - `..` is resolved


def _is_file(path: Path) -> bool:
    """Return whether a file exists; a name that no file can have is that of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _unchanged(path: Path, record: dict[str, Any] | None) -> bool:
    """Return whether a file is the one that was hashed, by size, times and inode."""
    if record is None or record["key"] is None:
        return False
    now = path.stat()
    return (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) == tuple(
        record[name] for name in ("size", "mtime_ns", "ctime_ns", "inode")
    )
