"""Open a cache from what `--features` names: a local folder, or the URL of a remote cache.

    reader = open_reader("https://host/features", space=None, options=RemoteOptions())
    reader = open_reader("s3://bucket/features", ...)          # needs nanomolmo2[s3]
    reader = open_reader("hf://datasets/ORG/NAME", ...)
    root = cache_root(reader)                                  # samples and media, always local files

The tables of a remote cache (a few percent of its bytes) are copied; its rows are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, NotFoundError
from cache.remote.listing import is_tail, owner_of
from cache.remote.mirror import Mirror
from cache.remote.reader import RemoteReader
from cache.remote.retry import RetryPolicy, first_contact
from cache.remote.row_cache import RowCache
from cache.remote.stores import open_store
from cache.store.paths import CacheRoot, SpacePaths, is_url
from cache.store.reader import FeatureReader
from cache.store.space import find_space


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How a remote cache is read. Every command that only reads a cache has these options."""

    mirror: Path = Path("~/.cache/nanomolmo2")
    """Folder for the tables and rows of remote caches on this machine."""
    mirror_gb: float = 50.0
    """The most that the rows of one remote cache take on this machine, in GB; 0 keeps none."""
    allow_private: bool = False
    """Permit features over plain http, and from addresses of private networks."""

    def __post_init__(self) -> None:
        if self.mirror_gb < 0:
            raise ValueError(f"mirror_gb {self.mirror_gb} is below 0")


class RemoteCache:
    """A feature cache behind a URL."""

    def __init__(
        self, url: str | Path, options: RemoteOptions, policy: RetryPolicy | None = None
    ) -> None:
        """Find the store; only for hf:// this makes a request.

        Args:
            url: a URL, in any spelling that `cache.store.paths.is_url` accepts.
            options: the user's choices.
            policy: limits, for tests; default: RetryPolicy() with `options.allow_private`.

        Raises:
            CacheError: see `cache.remote.stores.open_store`.
        """
        self.url = str(is_url(url)).rstrip("/")
        self._options = options
        self._policy = policy or RetryPolicy(allow_private=options.allow_private)
        with first_contact(self._policy, self.url):
            self._store = open_store(self.url, self._policy)
        self._mirror = Mirror(self._store, self._policy, options.mirror.expanduser().absolute())

    def copy_tables(self, datasets: Collection[str] = (), space: str | None = None) -> CacheRoot:
        """Copy the tables, or update the copies: samples, media, and the descriptions and commits of spaces.

        Args:
            datasets: copy the samples of these data sets; empty: of all.
            space: copy the commits of spaces whose name starts with this; None: of all.

        Returns:
            the folder of the copies.

        Raises:
            CacheError: see `cache.remote.mirror.Mirror.update`.
        """

        def wanted(name: str) -> bool:
            dataset, of = owner_of(name)
            if dataset is not None:
                return not datasets or dataset in datasets
            if is_tail(name):  # 0.15 GB for three blocks of ViT-L: of the space that is trained on
                return space is not None and of == space
            if of is not None and not name.endswith("/space.json"):
                return of.startswith(space or "")
            return True

        self._mirror.update(wanted)
        return self._mirror.root

    def open_reader(self, space: str | None, datasets: Collection[str] = ()) -> RemoteReader:
        """Open one space, and copy its tables.

        Args:
            space: its name, or the start of it; None: the only one.
            datasets: copy the samples of these data sets; empty: of all.

        Raises:
            NotFoundError: there is no space.
            CacheError: the name fits no space or several; see also `copy_tables`.
        """
        if not any(name.endswith("/space.json") for name in self._mirror.remote_tables):
            raise NotFoundError(f"no feature space at {self.url} (looked for spaces/*/space.json)")
        # The small space.json files first, so that a wrong name is reported before anything large is copied.
        self._mirror.update(lambda name: name.endswith("/space.json"))
        root = self._mirror.root
        try:
            paths = find_space(root, space)
        except CacheError as error:
            raise CacheError(str(error).replace(f"{root.path}/", f"{self.url}/")) from None
        self.copy_tables(datasets, paths.name)
        return self._reader(paths)

    def open_copied(self, space: str) -> RemoteReader:
        """Open a space by the copies of its tables as they are, without asking the store.

        Args:
            space: its name, which `open_reader` has opened before, here or in another process.
        """
        return self._reader(self._mirror.root.space(space))

    def _reader(self, paths: SpacePaths) -> RemoteReader:
        folder = self._mirror.folder / "rows" / paths.name
        rows = RowCache(folder, round(self._options.mirror_gb * 1e9))
        return RemoteReader(paths, self._store, self._policy, rows)


def open_reader(
    features: str | Path,
    space: str | None,
    options: RemoteOptions,
    *,
    datasets: Collection[str] = (),
) -> FeatureReader:
    """Open a space of a local or remote cache.

    Args:
        features: a folder or a URL.
        space: the name of the space, or the start of it; None: the only one.
        options: how to read a remote cache.
        datasets: of a remote cache, copy the samples of these data sets; empty: of all.

    Raises:
        CacheError: no space or several have that name, or the cache cannot be reached.
    """
    if is_url(features):
        return RemoteCache(features, options).open_reader(space, datasets)
    # Not mapped: mapped shards would count as memory of the training process.
    return FeatureReader(find_space(CacheRoot(Path(features)), space), mapped=False)


def local_root(features: str | Path, options: RemoteOptions) -> CacheRoot:
    """Return a folder with the tables of a local or remote cache, for readers that need no rows.

    Raises:
        CacheError: the tables of a remote cache cannot be copied.
    """
    if is_url(features):
        return RemoteCache(features, options).copy_tables()
    return CacheRoot(Path(features))


def cache_root(reader: FeatureReader) -> CacheRoot:
    """Return the folder with the samples and media beside an open space."""
    return CacheRoot(reader.path.parent.parent)
