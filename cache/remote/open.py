"""`--features` is a folder, or a URL of one that lies elsewhere: the one door to both.

    reader = open_reader("https://host/features", space=None, elsewhere=Elsewhere())
    reader = open_reader("s3://bucket/features", ...)          # needs nanomolmo2[s3]
    reader = open_reader("hf://datasets/ORG/NAME", ...)
    root = root_of(reader)                                     # samples and media, always local files

The tables of a cache elsewhere are copied (a few percent of its bytes), its rows are read as they are needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, NotFoundError
from cache.remote.listing import dataset_of, space_names, space_of
from cache.remote.mirror import Mirror
from cache.remote.reader import RemoteReader
from cache.remote.retry import RetryPolicy
from cache.remote.row_cache import RowCache
from cache.remote.stores import open_store
from cache.store.paths import CacheRoot, is_url
from cache.store.reader import FeatureReader
from cache.store.space import find_space


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """How a cache that lies elsewhere is read. A concern of every command that only reads."""

    mirror: Path = Path("~/.cache/nanomolmo2")
    """Where a cache that lies elsewhere has its tables, and the rows that were read, on this machine."""
    mirror_gb: float = 50.0
    """Of one such cache, rows kept on this machine take so much at most, GB; 0: none are kept."""
    allow_private: bool = False
    """Also read features over plain http, and from addresses of private networks."""

    def __post_init__(self) -> None:
        if self.mirror_gb < 0:
            raise ValueError(f"mirror_gb {self.mirror_gb} is below 0")


class RemoteCache:
    """A cache that lies elsewhere."""

    def __init__(
        self, url: str | Path, elsewhere: Elsewhere, rules: RetryPolicy | None = None
    ) -> None:
        """Connect to nothing yet (hf:// asks which commit a branch stands at).

        Args:
            url: where it lies, as `cache.store.paths.is_url` finds it to be.
            elsewhere: the user's choices.
            rules: limits, for tests; by default those of RetryPolicy, with `elsewhere.allow_private`.
        """
        self.url = str(is_url(url)).rstrip("/")
        self._elsewhere = elsewhere
        self._rules = rules or RetryPolicy(allow_private=elsewhere.allow_private)
        self._store = open_store(self.url, self._rules)
        self._mirror = Mirror(self._store, self._rules, elsewhere.mirror.expanduser().absolute())

    def tables(self, datasets: Collection[str] = (), space: str | None = None) -> CacheRoot:
        """The tables, copied or brought up to date: samples (of these data sets, or all), media, and of the
        spaces what they are; of those whose name begins with `space`, or all, the commits too.

        Raises:
            CacheError: they cannot be had, or not intact.
        """

        def wanted(name: str) -> bool:
            dataset, of = dataset_of(name), space_of(name)
            if dataset is not None:
                return not datasets or dataset in datasets
            if of is not None and not name.endswith("/space.json"):
                return of.startswith(space or "")
            return True

        self._mirror.refresh(wanted)
        return self._mirror.root

    def reader(self, space: str | None, datasets: Collection[str] = ()) -> RemoteReader:
        """One space, opened; and the tables beside it, as `tables`.

        Raises:
            CacheError: there is none, or there are several; or as `tables`.
        """
        if not space_names(self._mirror.entries):
            raise NotFoundError(f"no feature space at {self.url} (looked for spaces/*/space.json)")
        # What the user can mend is said before anything large is copied.
        self._mirror.refresh(lambda name: name.endswith("/space.json"))
        root = self._mirror.root
        try:
            paths = find_space(root, space)
        except CacheError as error:
            raise CacheError(str(error).replace(f"{root.path}/", f"{self.url}/")) from None
        self.tables(datasets, paths.name)
        folder = self._mirror.folder / "rows" / paths.name
        rows = RowCache(folder, round(self._elsewhere.mirror_gb * 1e9))
        return RemoteReader(paths, self._store, self._rules, rows)


def open_reader(
    features: str | Path,
    space: str | None,
    elsewhere: Elsewhere,
    *,
    datasets: Collection[str] = (),
) -> FeatureReader:
    """The space to read features from, wherever it is.

    Args:
        features: a folder or a URL.
        space: its name, or the start of it; None: the only one.
        elsewhere: how to read what is not here.
        datasets: whose samples are needed; all of them when empty. A folder has what it has.

    Raises:
        CacheError: there is none, or several and none is named; or it cannot be reached.
    """
    if is_url(features):
        return RemoteCache(features, elsewhere).reader(space, datasets)
    # Not mapped: training never waits for a copy, and `memory_gib` should be what training takes.
    return FeatureReader(find_space(CacheRoot(Path(features)), space), mapped=False)


def local_root(features: str | Path, elsewhere: Elsewhere) -> CacheRoot:
    """The tables of a cache as local files, wherever it is: enough for all that reads no row.

    Raises:
        CacheError: they cannot be had.
    """
    if is_url(features):
        return RemoteCache(features, elsewhere).tables()
    return CacheRoot(Path(features))


def root_of(reader: FeatureReader) -> CacheRoot:
    """The samples and media beside an open space."""
    return CacheRoot(reader.path.parent.parent)
