"""Create, open, find and describe spaces.

    space = Space.create(root, spec, load)             # for writers; readers use FeatureReader
    paths = find_space(root, "clip-int8")              # by name, or by the beginning of it
    present = Present.of(space)                        # for encode jobs: which media have all their rows

A space is everything encoded exactly one way. space.json describes it, and the spec in it names it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cache.errors import CacheError, CorruptError, NotFoundError, command_line, nearest
from cache.format.checksums import read_sealed_json
from cache.format.frame_sampling import FULL, MAX_FRAMES, frame_views
from cache.format.gate import open_file, parse_json, read_file
from cache.format.space_info import (
    MAX_INFO_BYTES,
    MAX_SLOTS,
    SHARD_BYTES,
    SpaceInfo,
    info_bytes,
    info_of,
    new_info,
)
from cache.format.spec import ARRAY_OF, ARRAYS, FORMAT, FeatureSpec
from cache.format.tail import Tail, read_tail_bytes
from cache.format.zarr.shard import GROUP_JSON, array_json
from cache.store.commits import commit_space, read_commit
from cache.store.files import make_folder, write_atomic
from cache.store.index_file import open_index
from cache.store.paths import MAX_SHARD, CacheRoot, SpacePaths
from cache.store.row_index import Identities, RowIndex
from cache.store.samples import DEMO_WORDS, dataset_words


class Space:
    """One space, for writers. Readers use `cache.store.reader.FeatureReader`."""

    def __init__(self, paths: SpacePaths, info: SpaceInfo):
        self.paths = paths
        self.info = info
        self.spec = info.spec
        self.load = info.load

    @staticmethod
    def create(
        root: CacheRoot,
        spec: FeatureSpec,
        load: Mapping[str, Any],
        *,
        shard_bytes: int = SHARD_BYTES,
        tail: bytes | None = None,
    ) -> Space:
        """Return the space of `spec`; create it, or complete it after a crash, where files are missing.

        Args:
            root: the cache.
            spec: how pixels become rows. It names the space.
            load: JSON values from which the encoder can be loaded again. An existing space keeps its own,
                unless it is given a tail.
            shard_bytes: approximate size of a shard. An existing space keeps its own.
            tail: the bytes of the tail that `spec` has; None: it has none, or its file exists.

        Raises:
            CorruptError: the folder holds another space.
            CacheError: the space has another tail.
        """
        paths = root.space(spec.name)
        if tail is not None:
            write_tail(paths, spec, load, tail)
        if not paths.space_json.exists():
            info = fitting_info(paths, new_info(spec, load, shard_bytes))
            write_atomic(paths.space_json, info_bytes(info), root=root.path)
        space = Space.open(paths)
        if space.spec.fingerprint != spec.fingerprint:
            raise CorruptError(
                paths.space_json, "it describes another space than its folder's name says"
            )
        make_folder(paths.commits_dir, root.path)
        for array in ARRAYS:
            make_folder(paths.shards_dir(array), root.path)
            space.grow(array)
        if (group := space.group_json()) is not None:
            write_if_changed(paths.group_json, group, paths.cache_root)
        return space

    @staticmethod
    def open(paths: SpacePaths) -> Space:
        """Return the existing space at `paths`."""
        return Space(paths, read_info(paths))

    def rows_per_shard(self, array: str) -> int:
        """Return the number of rows in a full shard of `array`."""
        return self.info.slots[array]

    def index(self, array: str) -> RowIndex:
        """Return the index of all committed rows."""
        return open_index(self.paths, self.info, array)

    def keys(self, array: str) -> Set[tuple[str, str]]:
        """Return the (key, view) of all committed rows."""
        return Identities(self.index(array))

    def shard_keys(self, array: str, number: int) -> set[tuple[str, str]]:
        """Return the (key, view) of the rows of one shard; none if it is not committed."""
        if not self.paths.commit(array, number).exists():
            return set()
        table = read_commit(self.paths, self.info, array, number).table
        keys = (key.hex() for key in table["key"].to_pylist())
        return set(zip(keys, table["view"].to_pylist(), strict=True))

    def next_shard(self, array: str) -> int:
        """Return a number above that of every shard that was ever begun.

        Raises:
            CacheError: every number up to MAX_SHARD counts as used.
        """
        used = [*self.paths.committed(array), *self.paths.started(array)]
        number = max(used, default=-1) + 1
        if number > MAX_SHARD:
            root = self.paths.cache_root
            raise CacheError(
                f"{self.paths.shard_dir(array, number - 1)}: no shard can have a higher number; copy the "
                "rows to a new cache: "
                + command_line("cache.merge", "--source", root, "--features", f"{root}-new")
            )
        return number

    def array_json(self, array: str) -> bytes | None:
        """Return the zarr.json of an array; None if the container has none.

        It covers every committed shard, and never fewer rows than the existing file.
        """
        if self.spec.container != "zarr":
            return None
        slots = self.rows_per_shard(array)
        rows = max((number + 1 for number in self.paths.committed(array)), default=0) * slots
        # Where the file is damaged or describes something else, the commits alone count.
        with contextlib.suppress(CorruptError, KeyError, IndexError, TypeError, ValueError):
            path = self.paths.array_json(array)
            stated = read_sealed_json(path, self.paths.cache_root, most=MAX_INFO_BYTES)["shape"][0]
            if type(stated) is int and stated <= slots * (MAX_SHARD + 1):
                rows = max(rows, stated)
        return array_json(self.spec, array, slots, rows)

    def group_json(self) -> bytes | None:
        """Return the zarr.json of the group of arrays; None if the container has none."""
        return GROUP_JSON if self.spec.container == "zarr" else None

    def grow(self, array: str) -> None:
        """Make zarr.json cover every committed shard. Only the driver may call this."""
        if (data := self.array_json(array)) is not None:
            write_if_changed(self.paths.array_json(array), data, self.paths.cache_root)


def write_tail(paths: SpacePaths, spec: FeatureSpec, load: Mapping[str, Any], data: bytes) -> None:
    """Write the file of a tail, and then name it in space.json if that exists; see `Space.create`."""
    assert spec.tail is not None, "bytes of a tail that the spec does not have"
    info = read_info(paths) if paths.space_json.exists() else None
    have = None if info is None else info.spec.tail
    if have is not None and have != spec.tail:
        raise CacheError(f"{paths.space_json}: {tail_difference(have, spec.tail)}")
    try:
        read_tail_bytes(paths.tail, paths.cache_root, spec.tail, spec.width)
    except CorruptError:  # missing, damaged, or of a run that ended before space.json named it
        write_atomic(paths.tail, data, root=paths.cache_root)
    if info is not None and have is None:
        info = replace(info, spec=replace(info.spec, tail=spec.tail), load=load)
        write_atomic(paths.space_json, info_bytes(info), root=paths.cache_root)


def tail_difference(have: Tail, wanted: Tail) -> str:
    """Return how the tail of a space differs from another one, and what to do about it."""
    ours, others = have.to_json(), wanted.to_json()
    words = [
        f"{name} {str(ours[name])[:12]} there, {str(others[name])[:12]} here"
        for name in ours
        if ours[name] != others[name]
    ]
    return (
        f"the space has another tail ({'; '.join(words)}); use the encoder, weights and options that made "
        "it, or another folder: --features DIR"
    )


def tail_bytes(paths: SpacePaths, spec: FeatureSpec) -> bytes | None:
    """Return the bytes of a space's tail; None if its spec has none.

    Raises:
        CorruptError: the file is missing, or is not the one that space.json names.
    """
    if spec.tail is None:
        return None
    return read_tail_bytes(paths.tail, paths.cache_root, spec.tail, spec.width)


def write_if_changed(path: Path, data: bytes, root: Path) -> bool:
    """Write `data` to `path` atomically, unless it is the content already. Return whether it was written."""
    with contextlib.suppress(FileNotFoundError), open_file(path, root) as file:
        if file.read(len(data) + 1) == data:
            return False
    write_atomic(path, data, root=root)
    return True


def rebuild_info(paths: SpacePaths) -> SpaceInfo | None:
    """Return what a damaged space.json said, as far as the commits prove it: all of the spec.

    The spec must have the fingerprint that all intact commits carry, and the rows per shard are those of the
    commits. How to load the encoder is not part of the fingerprint: where that text is wrong, loading fails,
    or gives an encoder with another fingerprint, which is refused.

    Returns:
        None when the text is not understood, or describes another space.
    """
    try:
        values = parse_json(read_file(paths.space_json, paths.cache_root, most=MAX_INFO_BYTES))
        spec, slots = FeatureSpec.from_json(values["spec"]), values["rows_per_shard"]
        stated = {
            "format": FORMAT,
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "spec": values["spec"],
            "load": values["load"],
            "rows_per_shard": {array: min(max(1, slots[array]), MAX_SLOTS) for array in ARRAYS},
            "seal": "",
        }
        if spec.fingerprint != _commits_fingerprint(paths):
            return None
        tail_bytes(
            paths, spec
        )  # proves what the fingerprint does not: the file has all of it but its hash
        return fitting_info(paths, info_of(stated))
    except (ValueError, LookupError, TypeError, AttributeError, CorruptError, OSError):
        return None


def _commits_fingerprint(paths: SpacePaths) -> str | None:
    """Return the fingerprint that all intact commits of a space carry; None if there are none, or several."""
    found = set()
    for array in ARRAYS:
        for number in paths.committed(array):
            with contextlib.suppress(CorruptError):
                found.add(commit_space(paths, array, number))
    return found.pop() if len(found) == 1 else None


def fitting_info(paths: SpacePaths, info: SpaceInfo) -> SpaceInfo:
    """Return `info` with the rows per shard that the existing commits were made with.

    This restores the description of a space whose space.json was lost while its rows were not.

    Raises:
        CorruptError: the commits belong to another space.
    """
    for array, usual in info.slots.items():
        newest = paths.committed(array)[-1:]
        for guess in (usual, *(1 << power for power in range(MAX_SLOTS.bit_length()))):
            guessed = replace(info, slots={**info.slots, array: guess})
            with contextlib.suppress(CorruptError):
                for number in newest:
                    read_commit(paths, guessed, array, number)
                info = guessed
                break
        else:
            read_commit(paths, info, array, newest[0])  # raises what is wrong with it
    return info


def find_space(root: CacheRoot, name: str | None) -> SpacePaths:
    """Return the space that is called `name`, or the only one whose name begins with it.

    Args:
        root: the cache.
        name: the name, or its beginning; None: the only space of the cache.

    Raises:
        CacheError: there is none, or there are several.
    """
    names = root.space_names()
    if not names:
        if root.path.is_file():
            raise NotFoundError(f"{root.path}: a file; features are in a folder: --features DIR")
        words = dataset_words(root, None)
        words += ("--encoder", "demo") if words == DEMO_WORDS else ()
        raise NotFoundError(
            f"no feature space under {root.path}/ (looked for spaces/*/space.json). "
            "Make one: " + command_line("encode.run", *words, "--features", root.path)
        )
    matches = [n for n in names if n == name] or [n for n in names if n.startswith(name or "")]
    if not matches:
        assert name is not None  # None matches every name
        raise NotFoundError(
            f"no space {name!r} under {root.path}/; there: {', '.join(names)}{nearest(name, names)}"
        )
    if len(matches) > 1:
        raise CacheError(
            f"{len(matches)} spaces under {root.path}/, say which: --space {' | '.join(matches)}"
        )
    return root.space(matches[0])


def read_info(paths: SpacePaths) -> SpaceInfo:
    """Read and check space.json.

    Raises:
        NotFoundError: there is no space at `paths`.
        CacheError: the space has another format, or a field that this version does not know.
        CorruptError: the file has changed since it was written.
    """
    if not os.path.lexists(paths.space_json):
        raise NotFoundError(
            f"no feature space at {paths.root} (looked for {paths.space_json.name})"
        )
    values = read_sealed_json(paths.space_json, paths.cache_root, most=MAX_INFO_BYTES)
    if isinstance(version := values.get("format"), int) and version != FORMAT:
        raise CacheError(
            f"{paths.space_json}: format {version:.0f}, this version reads {FORMAT}; "
            "use the version of nanomolmo2 that wrote it"
        )
    try:
        return info_of(values)
    except ValueError as error:
        if "written by a newer version" in str(error):
            raise CacheError(f"{paths.space_json}: {error}") from None
        raise CorruptError(paths.space_json, str(error)[:300]) from None


# ---- what a space has, one media item at a time


class ImageKeys(Collection[str]):
    """The keys of the images in an index. It holds no string for any of them."""

    def __init__(self, index: RowIndex):
        self._index, self._identities = index, Identities(index)

    def __contains__(self, key: object) -> bool:
        return (key, FULL) in self._identities

    def __iter__(self) -> Iterator[str]:
        return (key for key, view in self._identities if view == FULL)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def have(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return which keys (k, 32) are here, as (k,)."""
        return np.asarray(self._index.lookup(keys, FULL) >= 0)


class Present:
    """The rows of a space as they were when this was made."""

    def __init__(
        self,
        images: Collection[str] = frozenset(),
        frames: RowIndex | None = None,
        *,
        max_frames: int = MAX_FRAMES,
    ):
        """Use these rows; `of` takes those of a space.

        Args:
            images: keys of the images that have their row.
            frames: the rows of videos; None where there are none.
            max_frames: most frames of one video. With its duration, it decides which views are needed.
        """
        self.images = images
        self._frames, self._max_frames = frames, max_frames

    @classmethod
    def of(cls, space: Space, *, max_frames: int = MAX_FRAMES) -> Self:
        """Return what is committed in `space` now."""
        frames = space.index(ARRAY_OF["video"])
        return cls(
            ImageKeys(space.index(ARRAY_OF["image"])),
            frames if len(frames) else None,
            max_frames=max_frames,
        )

    @property
    def has_frames(self) -> bool:
        """Whether there are rows of videos."""
        return self._frames is not None

    def has(self, kind: str, key: str | None, duration_s: float | None) -> bool:
        """Return whether every view of a media item is here: never for a video of unknown duration."""
        if key is None:
            return False
        if kind == "image":
            return key in self.images
        return duration_s is not None and not self.missing(
            key, frame_views(duration_s, self._max_frames)
        )

    def have_images(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return which images have their row: keys (k, 32) -> (k,)."""
        if isinstance(self.images, ImageKeys):
            return self.images.have(keys)
        return np.array([key.tobytes().hex() in self.images for key in keys], bool)

    def count_missing(
        self, keys: npt.NDArray[np.uint8], durations: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """Return how many views of each video are not here: keys (k, 32), seconds (k,) -> (k,)."""
        views = [frame_views(duration, self._max_frames) for duration in durations.tolist()]
        missing = np.array([len(of_video) for of_video in views], np.int64)
        if self._frames is None or not len(keys):
            return missing
        names = [view for of_video in views for view in of_video]
        video = np.repeat(np.arange(len(keys)), missing)
        found = self._frames.lookup_pairs(keys[video], names) >= 0
        return missing - np.bincount(video[found], minlength=len(keys))

    def missing(self, key: str, views: Sequence[str]) -> list[str]:
        """Return the views of a video that are not here, in the order given."""
        if self._frames is None:
            return list(views)
        name = bytes.fromhex(key)
        return [view for view in views if not self._frames.contains(name, view)]
