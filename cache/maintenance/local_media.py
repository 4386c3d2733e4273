"""Open the media that a cache names: files below folders that this machine encoded, and no others.

    remember(root, [Path("/photos")])                   # encode.run: data sets have their media there
    local = LocalMedia(root, media=options.media)       # those folders, the cache itself, and --media DIR
    data = local.read(source, key, most=64 << 20)       # the bytes whose sha256 is `key`

What a cache says of its origin is a stranger's claim. So encode.run records the folders outside of it, in
the user's own state folder, under the path of the cache and a random id that is in the cache too. A cache
that was moved, or that somebody else made at this path, has no such record. Nothing outside the folders is
touched, not even to ask whether it exists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import msgspec

from cache.errors import CacheError, CorruptError, EmbeddedMediaError
from cache.format.embedded.names import container_of, in_container, is_embedded, read_embedded
from cache.format.gate import decode, open_file, read_file
from cache.store.files import write_atomic
from cache.store.paths import CacheRoot

log = logging.getLogger(__name__)

ID = "id"
"""Name of the file in the cache's `locks` with its random id. `cache.share` and `cache.merge` leave it."""
_WEB = re.compile("https?://", re.IGNORECASE)
_ID = re.compile(r"[0-9a-f]{32}")

MAX_VIDEO_BYTES = 1 << 40
"""Bytes of the largest video that is hashed: the encoder refuses larger ones."""


class MediaFileError(Exception):
    """A media item was not opened, or is not what was encoded."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        """Why, after the words `image` or `video of 5.0 s`."""
        self.detail = detail or f"file {reason}"
        """Why, in a report without pictures."""


class NotAllowedError(MediaFileError):
    """The cache names a file outside the folders whose media are opened."""

    def __init__(self, source: str) -> None:
        name = source if len(source) <= MOST_NAME else f"{source[:MOST_NAME]}..."
        line = f"the cache names {name}, which was not opened; --media DIR allows it"
        super().__init__(line, line)


MOST_NAME = 1000
"""Characters of a name in a message, at most."""


# ---- what this machine encoded


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """One cache, in the user's state folder."""

    cache: str
    """Its path, without links."""
    id: str
    """The random id that it has, too."""
    folders: list[str]
    """Folders below which its data sets have their media, and files that contain some."""


def remember(root: CacheRoot, folders: Iterable[Path]) -> None:
    """Record that data sets of a cache have their media below these folders of this machine.

    Without a state folder that can be written, the record is left out with a warning.

    Raises:
        CorruptError: a link or special file has the name of the cache's `locks`, or of the id in it.
    """
    wanted = {name for folder in folders for name in _names(folder)} - set(_names(root.path))
    if not wanted:
        return
    own = _own_id(root) or _new_id(root)
    try:
        file = _state_file(root)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(file.parent):
            known = set(_recorded(root, file, own))
            if wanted <= known:
                return
            place = os.path.realpath(root.path)
            record = {"cache": place, "id": own, "folders": sorted(known | wanted)}
            write_atomic(file, json.dumps(record, indent=1).encode())
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.warning(
            "the folders of these media are not recorded (%s), so cache.view, train.report and encode.run "
            "--check will need --media DIR to show them",
            error,
        )


def remembered(root: CacheRoot) -> list[Path]:
    """Return the folders of this machine from which data sets of this cache were encoded."""
    own = _own_id(root)
    if own is None:
        return []
    try:
        return [Path(name) for name in _recorded(root, _state_file(root), own)]
    except (OSError, RuntimeError) as error:
        log.warning("the recorded folders of media cannot be read: %s", error)
        return []


def _recorded(root: CacheRoot, file: Path, own: str) -> list[str]:
    try:
        record = decode(read_file(file), _Record, file)
    except FileNotFoundError:
        return []
    except CorruptError as error:
        log.warning("%s: %s; it is not used, and the next encode.run replaces it", file, error.what)
        return []
    is_this = (record.cache, record.id) == (os.path.realpath(root.path), own)
    return record.folders if is_this else []


def _state_file(root: CacheRoot) -> Path:
    """Return the record of a cache: by its path, so that a new cache there replaces it."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    state = given if given.is_absolute() else Path.home() / ".local" / "state"
    name = hashlib.sha256(os.fsencode(os.path.realpath(root.path))).hexdigest()[:32]
    return state / "nanomolmo2" / "caches" / f"{name}.json"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other jobs of this user from changing a record meanwhile."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _id_file(root: CacheRoot) -> Path:
    return root.path / "locks" / ID


def _own_id(root: CacheRoot) -> str | None:
    """Return the id in a cache; None if it has none."""
    file = _id_file(root)
    try:
        text = read_file(file, root.path, most=100).decode("ascii", "replace").strip()
    except (OSError, CorruptError):
        return None
    return text if _ID.fullmatch(text) else None


def _new_id(root: CacheRoot) -> str:
    new = secrets.token_hex(16)
    write_atomic(_id_file(root), new.encode(), root=root.path)
    return new


# ---- opening


def is_web(source: str) -> bool:
    """Return whether a source is a URL."""
    return _WEB.match(source) is not None


class LocalMedia:
    """The media files of this machine that a command may open for one cache."""

    def __init__(
        self, root: CacheRoot, *, media: Path | None = None, folders: Iterable[Path] = ()
    ) -> None:
        """Find the folders.

        Args:
            root: the cache. Files below it are opened, too: drawings, and downloads that are kept there.
            media: `--media` of the command.
            folders: others that the user named.

        Raises:
            CacheError: `media` is no folder.
        """
        given = [root.path, *remembered(root), *folders]
        if media is not None:
            given.append(Path(os.path.expanduser(media)))  # noqa: PTH111 - this one never raises
            if not given[-1].is_dir():
                raise CacheError(f"--media {media}: no such folder")
        names = [_names(folder) for folder in given]
        self._real = {real for _, real in names}
        self._named = {name for pair in names for name in pair}
        self.refused = 0
        """How many media were not opened."""
        self._first = ""

    def path(self, source: str) -> Path:
        """Return the path of a file without links, or of the file that contains a media item.

        Raises:
            NotAllowedError: it is outside the folders, or leads out of them by a link.
            MediaFileError: it is a URL.
        """
        if is_web(source):
            raise MediaFileError("came from the web and was not kept")
        name = container_of(source) if is_embedded(source) else source
        # Names are compared before anything is looked up: even that may wait, on a network mount.
        plain = os.path.normpath(name)
        if os.path.isabs(name) and "\0" not in name and _is_inside(plain, self._named):  # noqa: PTH117
            real = os.path.realpath(plain)
            if _is_inside(real, self._real):
                return Path(real)
        error = NotAllowedError(source)
        self._first = self._first or error.reason
        self.refused += 1
        raise error

    def allows(self, source: str) -> bool:
        """Return whether a file may be opened, or the one that contains a media item."""
        try:
            self.path(source)
        except MediaFileError:
            return False
        return True

    def read(self, source: str, key: str | None, *, most: int, size: int = 0) -> bytes:
        """Return the bytes of a media item, in a file of its own or inside another.

        Args:
            source: its name.
            key: sha256 (hex) that the bytes must have.
            most: bytes that it may have.
            size: recorded bytes; 0 if they are not known.

        Raises:
            MediaFileError: it is not opened, no regular file, not readable, too large, or other bytes.
        """
        path = self.path(source)
        with _explained():
            if key is None:
                raise MediaFileError("cannot be checked: the cache has no sha256 of it")
            if is_embedded(source):
                data = read_embedded(in_container(source, str(path)), most)
            else:
                with open_file(path, most=most) as file:
                    _check_size(file.fileno(), size)
                    # Python allocates all that `read` may return before it reads.
                    data = file.read(min(most, os.fstat(file.fileno()).st_size))
        if hashlib.sha256(data).hexdigest() != key:
            raise MediaFileError(CHANGED)
        return data

    def video(self, source: str, key: str | None, *, size: int = 0) -> Path:
        """Return the path of a video, whose bytes were compared with its sha256.

        Raises:
            MediaFileError: as for `read`.
        """
        path = self.path(source)
        with _explained():
            if key is None:
                raise MediaFileError("cannot be checked: the cache has no sha256 of it")
            with open_file(path, most=MAX_VIDEO_BYTES) as file:
                _check_size(file.fileno(), size)
                found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if found != key:
            raise MediaFileError(CHANGED)
        return path

    def note(self) -> str:
        """Return what was not opened first, in one line; empty if everything was."""
        return self._first


CHANGED = "has changed since it was encoded"


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except EmbeddedMediaError as error:
        detail = f"cannot be read from its file: {error}"
        raise MediaFileError("not on this machine", detail) from None
    except CorruptError as error:
        raise MediaFileError(f"cannot be read: {error.what}") from None
    except OSError as error:
        detail = f"file cannot be read: {error.strerror}"
        raise MediaFileError("not on this machine", detail) from None


def _check_size(fd: int, size: int) -> None:
    if size and os.fstat(fd).st_size != size:
        raise MediaFileError(CHANGED)


def _names(folder: Path) -> tuple[str, str]:
    """Return the absolute path of a folder as it is named, and without links."""
    path = os.path.abspath(folder)  # noqa: PTH100 - `..` is resolved
    return path, os.path.realpath(path)


def _is_inside(path: str, folders: Set[str]) -> bool:
    """Return whether a path is one of the folders, which may be a file too, or below one."""
    return any(str(one) in folders for one in (path, *Path(path).parents))
