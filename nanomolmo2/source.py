"""An open space that travels to other processes: each one that unpickles it opens the cache for itself.

A forked process shares the reader of its parent: reads are positioned, and connections are its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from cache.store.paths import CacheRoot, is_url
from cache.store.reader import FeatureReader
from cache.store.space import find_space

IN_PYTHON = {
    "say which: --space ": "say which, space=: ",
    "--allow-private": "allow_private=True",
    "--mirror DIR": "mirror=DIR",
}
"""Options as messages of commands name them -> as a caller of this package gives them."""

MOST_THREADS = 4
"""Threads that read the rows of one batch from a local disk. Workers of a DataLoader use one each."""


class Source:
    """One space of a cache, opened."""

    def __init__(
        self,
        where: str | os.PathLike[str],
        space: str | None,
        *,
        datasets: Collection[str] = (),
        mirror: str | os.PathLike[str],
        mirror_gb: float,
        allow_private: bool,
    ) -> None:
        """Open a space; see `nanomolmo2.open`."""
        with in_python():
            url = is_url(where if isinstance(where, Path) else os.fspath(where))
            # Another process may have another working directory.
            self.where = url or str(Path(where).expanduser().absolute())
            self._remote: dict[str, Any] = {
                "mirror": Path(mirror),
                "mirror_gb": mirror_gb,
                "allow_private": allow_private,
            }
            if url:
                self._reader: FeatureReader | None = self._remote_cache().open_reader(
                    space, datasets
                )
            else:
                self._reader = _local_reader(self.where, space)
        self.space = self._reader.path.name

    @property
    def reader(self) -> FeatureReader:
        """The reader of the space, opened when it is first needed in this process."""
        if self._reader is None:
            with in_python():
                if is_url(self.where):
                    # The tables as they were copied: they decide what a row number means.
                    self._reader = self._remote_cache().open_copied(self.space)
                else:
                    self._reader = _local_reader(self.where, self.space)
        return self._reader

    @property
    def root(self) -> CacheRoot:
        """The folder with the samples and the media table."""
        return CacheRoot(self.reader.path.parent.parent)

    def _remote_cache(self) -> Any:
        from cache.remote.open import RemoteCache, RemoteOptions  # a local cache needs none of it

        return RemoteCache(self.where, RemoteOptions(**self._remote))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}


def _local_reader(where: str, space: str | None) -> FeatureReader:
    # Not mapped: mapped shards would count as memory of the process.
    paths = find_space(CacheRoot(Path(where)), space)
    return FeatureReader(paths, mapped=False, threads=min(MOST_THREADS, os.cpu_count() or 1))


@contextmanager
def in_python() -> Iterator[None]:
    """Let errors of the cache name arguments of this package instead of options of commands."""
    try:
        yield
    except CacheError as error:
        text = str(error)
        for option, argument in IN_PYTHON.items():
            text = text.replace(option, argument)
        error.args = (text,)
        raise
