"""Every exception of the cache.

    Exception
    ├── CacheError              the user can act on it: a command prints it in one line and exits with 2
    │   ├── NotFoundError       no such cache, space or data set
    │   ├── InUseError          another job is writing there
    │   ├── DiskError           a disk is full, too small, or fails
    │   ├── LostProcessError    a process of the job has ended before its work
    │   ├── UnreachableError    a remote cache does not answer, or sends something else
    │   ├── CorruptError        a file does not have the bytes that were written
    │   └── StaleJobError       another job has taken over, so this process stops
    ├── RequestError            one attempt to read from a remote cache failed
    ├── EmbeddedMediaError      a media item inside a table, a tar or JSON cannot be read
    └── OSError
        └── RefusedAddressError an address that downloads must not connect to

A CacheError that is none of the seven is a request that cannot be met, with the reason. The three others
never reach a user: the caller retries, stops, or reports another error.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path

DATA_FOLDERS = ("samples", "media", "spaces", "locks", "damaged", "garbage")
"""The folders of a cache. The default root is also the folder `cache/` of the code, where `.gitignore` names
these and no module has such a name."""


def command_line(module: str, *words: object) -> str:
    """Return a command of ours with its words, as a shell runs it."""
    return shlex.join(["python", "-m", module, *map(str, words)])


def features_words(path: Path) -> tuple[str, ...]:
    """Return `--features` and the cache that a file is in, for a command line; nothing for other files."""
    for folder in path.parents:
        if folder.name in DATA_FOLDERS and folder.parent.name not in DATA_FOLDERS:
            return ("--features", str(folder.parent))
    return ()


def repair_advice(path: Path) -> str:
    """Return what to do about a damaged file of a cache: its content can be computed again."""
    command = command_line("cache.verify", "--deep", "--repair", *features_words(path))
    return f"{command} removes it, then encode.run creates it again"


def removal_advice(path: Path) -> str:
    """Return what to do about a file that a crash left behind."""
    return f"{command_line('cache.gc', '--delete', *features_words(path))} removes it"


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `; nearest: x`, the end of an error about `name`, or '' when no choice is similar."""
    # `configs` has the same for options. The cache below its commands must run without `configs`.
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; nearest: {found[0]}" if found else ""


class CacheError(Exception):
    """What happened, where, and what to do about it, in one line."""


class NotFoundError(CacheError):
    """There is no such cache, space or data set."""


class InUseError(CacheError):
    """Another job is writing to the space. The message names that job."""


class DiskError(CacheError):
    """The disk is full, too small, or fails. Committed rows are kept."""


class LostProcessError(CacheError):
    """A process of the job has ended before its work. Committed rows are kept."""


class UnreachableError(CacheError):
    """A file of a remote cache could not be read intact, after all retries."""

    def __init__(self, text: str, *, missing: bool = False) -> None:
        super().__init__(text)
        self.missing = missing
        """The file does not exist there, or not for these credentials."""


class CorruptError(CacheError):
    """A file does not have the bytes that were written."""

    def __init__(self, path: Path, what: str, way_out: str = ""):
        way_out = way_out or repair_advice(path)
        super().__init__(f"{path}: {what}; {way_out}")
        self.path, self.what, self.way_out = path, what, way_out

    def __reduce__(self) -> tuple[type[CorruptError], tuple[Path, str, str]]:
        return CorruptError, (self.path, self.what, self.way_out)


class StaleJobError(CacheError):
    """The space belongs to another job now, so this process must stop and write nothing."""


class RequestError(Exception):
    """One attempt to read from a remote cache failed."""

    def __init__(
        self, reason: str, *, again: bool, wait_s: float = 0.0, missing: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        """One line. It never contains a URL's query, which may be a signature."""
        self.again = again
        """Whether another attempt may succeed."""
        self.wait_s = wait_s
        """Seconds the server asks to wait before the next attempt."""
        self.missing = missing
        """The file does not exist there, or not for these credentials."""
        self.got = 0
        """Bytes received in order before the failure."""


class EmbeddedMediaError(Exception):
    """The bytes of a media item inside another file cannot be read. The message is the reason."""


class RefusedAddressError(OSError):
    """The rules forbid connecting to this address: `a private address 10.0.0.1`."""

    # An OSError, because aiohttp passes those through from a resolver.
