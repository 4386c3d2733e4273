"""Find the media that records name: files below named folders, URLs, and data: URIs in the records.

    files = MediaFiles([Path("/photos")], account)
    files.resolve(MediaName(text="a.jpg"), Path("/photos"))   # MediaRef("/photos/a.jpg", kind="image")
    files.refuse_if_all_are_missing("a.jsonl", advice)   # UserError with the first path that was tried

A path is relative to the folder of its record, or absolute, and never leaves the named folders: not by `..`,
not by a link. Whether a file is an image or a video is decided by its first bytes. A file that is missing is
kept, because the ledger records it; the account counts it.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

from cache.errors import EmbeddedMediaError
from cache.format.embedded.names import decode_data_uri
from cache.format.gate import open_regular
from cache.store.samples import MediaRef
from configs import UserError
from encode.download.urls import is_url, parse_url
from encode.errors import DownloadError
from encode.plan.numbering import TextMap, TextSet
from encode.records.account import Account, FaultError
from encode.records.record import MediaName
from model.media.kinds import HEAD_BYTES, Recognised, recognise
from model.media.video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = frozenset(
    {
        ".apng",
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".mpo",
    }
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of images. They decide for files without a readable beginning."""

_SUFFIXES = sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES)

Kind = Literal["image", "video"]
_KINDS: tuple[Kind, ...] = get_args(Kind)

MISSING = "no such file"
MAX_BYTES = 1 << 30
"""Bytes of the largest media item in a record."""
MOST_NAME = 4096
"""Longest path or URL, characters. Linux opens no longer paths."""

_SUFFIX = re.compile(r"(?<=[^./])\.[a-z0-9]{1,12}\Z", re.IGNORECASE | re.ASCII)
"""Anything longer or other is a part of the name."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE | re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class MediaFiles:
    """The media of one data set, as its records name them."""

    def __init__(self, folders: Sequence[Path], account: Account, *, outside: str) -> None:
        """Look at nothing yet.

        Args:
            folders: absolute paths without links, the only ones from which files are read.
            account: counts remarks about names.
            outside: what to do about a file elsewhere, the end of an error; `DIR` in it becomes its folder.
        """
        self._folders = [str(folder) for folder in folders]
        self._account = account
        self._outside = outside
        self._inside: dict[str, bool] = {}
        self._found = TextMap()  # absolute path of each file that was resolved -> number in _KINDS
        self._missing = TextSet()
        self._first_missing = ""
        self._others = 0

    def set_kind(self, path: str, kind: Kind) -> None:
        """Say what the file at an absolute path is, so that `resolve` does not look at it."""
        self._found[path] = _KINDS.index(kind)

    def resolve(
        self, name: MediaName, base: Path, data_uri: Callable[[str], str] | None = None
    ) -> MediaRef:
        """Return the reference to a media item.

        Args:
            name: a path, a URL or a data: URI.
            base: folder to which paths are relative.
            data_uri: returns the source of a data: URI of the record; None: it cannot be read again there.

        Raises:
            FaultError: it is neither a URL to download nor a path below the named folders, or its bytes in
                the record are damaged.
        """
        text = name.text
        if not text.strip():
            raise FaultError("empty name of a media file")
        if text[:5].lower() == "data:":
            return self._in_record(name, data_uri)
        if len(text) > MOST_NAME or "\0" in text or not is_unicode(text):
            raise FaultError("not a name of a media file", f"{short(text)} is not a file name")
        sha256 = name.sha256
        if sha256 is not None and not _SHA256.fullmatch(sha256 := sha256.lower()):
            raise FaultError(
                "sha256 is not 64 hex digits", f"sha256 {short(sha256)} is not 64 hex digits"
            )
        if is_url(text.strip()):
            self._others += 1
            return MediaRef(
                source=checked_url(text), kind=name.kind or url_kind(text), sha256=sha256
            )
        scheme = _SCHEME.match(text)
        if scheme and scheme[1].lower() != "file":
            raise FaultError(
                f"{scheme[1].lower()}:// address",
                f"{short(text)}: only http and https are downloaded; copy the file to this disk",
            )
        path = self._existing(unquote(text[7:]) if scheme else text, base)
        known = self._found.get(path)
        if known is not None:
            kind = _KINDS[known]
        else:
            recognised = look(path)
            suffix_kind = kind_by_suffix(path)
            kind = (recognised and recognised.kind) or name.kind or suffix_kind or "image"
            self.set_kind(path, kind)
        return MediaRef(source=path, kind=kind, sha256=sha256)

    def refuse_if_all_are_missing(self, where: str, advice: Callable[[str], str]) -> None:
        """Raise UserError if files were named and none of them exists: their folder is wrong.

        Args:
            where: the file that names them.
            advice: returns what to do, for the first path that was tried.
        """
        if self._missing and len(self._missing) == len(self._found) and not self._others:
            first = self._first_missing
            count = len(self._missing)
            what = "the file" if count == 1 else f"none of the {count:,} files"
            does = "does not exist" if count == 1 else "exists"
            raise UserError(f"{where}: {what} it names {does} (first: {first}); {advice(first)}")

    def _in_record(self, name: MediaName, data_uri: Callable[[str], str] | None) -> MediaRef:
        if data_uri is None:
            raise FaultError(
                "data: URI outside JSON", "data: URIs are read from .json and .jsonl only"
            )
        try:
            data = decode_data_uri(name.text, MAX_BYTES)
        except EmbeddedMediaError as error:
            raise FaultError("damaged data: URI", f"data: URI: {error}") from None
        self._others += 1
        kind = recognise(data[:HEAD_BYTES]).kind or name.kind or "image"
        return MediaRef(source=data_uri(name.text), kind=kind, sha256=name.sha256)

    # ---- paths

    def _existing(self, text: str, base: Path) -> str:
        """Return the absolute path of the file that `text` means; it may not exist.

        Raises:
            FaultError: the path is outside the folders, is a folder, or differs from a file's in case only.
        """
        if text.startswith("/") and not Path(text).exists():
            inside = text.lstrip("/")  # of the data set's own root
            if (base / inside).is_file():
                self._note("path with / before it", self._checked(inside, base))
                text = inside
        written = self._checked(text, base)
        if written in self._found or Path(written).is_file():
            return written
        if Path(written).is_dir():
            raise FaultError("a folder instead of a file", f"{short(text)} is a folder, not a file")
        others = (("path relative to another named folder", text, Path(f)) for f in self._folders)
        spelt = ((note, spelling, base) for note, spelling in _spellings(text))
        for note, spelling, folder in chain(others, spelt):
            try:
                path = self._checked(spelling, folder)
            except FaultError:
                continue
            if Path(path).is_file():
                self._note(note, path)
                return path
        if near := self._near(written):
            raise FaultError(
                "name of a file that differs",
                f"{short(text)}: no such file; there is {short(near)}",
            )
        if written not in self._missing:
            self._missing.add(written)
            self._first_missing = self._first_missing or written
            self._account.notes[MISSING] += 1
        return written

    def _note(self, note: str, path: str) -> None:
        """Count a remark about a file, once for each file."""
        if path not in self._found:
            self._account.notes[note] += 1

    def _checked(self, text: str, base: Path) -> str:
        """Return the absolute path of `text`, which is below one of the folders, links followed."""
        path = os.path.normpath(base / text)
        if not self._is_inside(path) and Path(text).is_absolute():
            # The folder may be named by a path with links, and paths in the records, too.
            path = os.path.realpath(path)
        folder = path.rpartition("/")[0]
        inside = self._inside.get(folder)
        if inside is None:
            inside = self._inside[folder] = self._is_inside(os.path.realpath(folder) + "/.")
        real_is_inside = inside and (
            not Path(path).is_symlink() or self._is_inside(os.path.realpath(path))
        )
        if not real_is_inside or not self._is_inside(path):
            there = os.path.realpath(path).rpartition("/")[0] or "/"
            advice = self._outside.replace("DIR", shlex.quote(there))
            if not Path(there).is_dir():  # a path of another computer, as a rule
                advice = (
                    "there is no such folder here: write paths relative to the folder of the media"
                )
            raise FaultError(
                "file outside the folder",
                f"{short(text.removeprefix('./'))} is outside {' and '.join(self._folders)}; {advice}",
            )
        return path

    def _is_inside(self, path: str) -> bool:
        return any(path.startswith(folder.rstrip("/") + "/") for folder in self._folders)

    def _near(self, path: str) -> str:
        """Return the path of a file that differs from `path` in case or lacks a suffix in it, or ''."""
        folder = next(f for f in self._folders if path.startswith(f.rstrip("/") + "/"))
        here = Path(folder)
        for name in Path(path).relative_to(folder).parts:
            there = here / name
            if not there.exists():
                names, suffixes = _listing(here), ["", *([] if "." in name else _SUFFIXES)]
                actual = (names.get(f"{name}{suffix}".casefold()) for suffix in suffixes)
                there = here / next(filter(None, actual), name)
            here = there
        return here.relative_to(folder).as_posix() if here.is_file() else ""


@lru_cache(maxsize=4)  # a folder may have a million names
def _listing(folder: Path) -> dict[str, str]:
    try:
        return {path.name.casefold(): path.name for path in folder.iterdir()}
    except OSError:
        return {}


def _spellings(text: str) -> Iterator[tuple[str, str]]:
    """Yield how other programs and systems spell a path, each with the remark to count."""
    before = text
    for note, change in (
        ("path with spaces around it", str.strip),
        (r"path with \ read as /", lambda path: path.replace("\\", "/")),
        ("path with % escapes decoded", unquote),
        ("path in another Unicode form", lambda path: unicodedata.normalize("NFC", path)),
        ("path in another Unicode form", lambda path: unicodedata.normalize("NFD", path)),
    ):
        after = change(before)
        if after != before and "\0" not in after and is_unicode(after):
            yield note, after
            before = after


def look(path: str) -> Recognised | None:
    """Return what the first bytes of a file are; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return None
    return recognise(head, path.rpartition("/")[2])


def suffix_of(name: str) -> str:
    """Return the suffix in lower case with its dot; empty if there is none."""
    suffix = _SUFFIX.search(name)
    return suffix[0].lower() if suffix else ""


def kind_by_suffix(name: str) -> Kind | Literal[""]:
    """Return image or video by the suffix of a path; empty if it says neither."""
    suffix = suffix_of(name)
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else ""


# ---- URLs


def checked_url(text: str) -> str:
    """Return a URL that can be downloaded.

    Raises:
        FaultError: it cannot.
    """
    text = text.strip()
    if not text.isprintable():
        raise FaultError(
            "URL with control characters", f"{short(text)}: control characters in a URL"
        )
    try:
        parse_url(text)
    except DownloadError as error:
        raise FaultError("not a URL to download", f"{short(text)}: {error}") from None
    return text


def url_kind(text: str) -> Kind:
    """Return the kind of what a URL returns, by the suffix of its path; image if that says nothing."""
    return kind_by_suffix(urlsplit(text.strip()).path) or "image"


# ---- texts


def is_unicode(text: str) -> bool:
    """Return False for lone surrogates: file names that are not UTF-8, and broken JSON escapes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(text: str, most: int = 120) -> str:
    """Return `text` quoted, in one line of about `most` characters."""
    return repr(text if len(text) <= most else f"{text[:most]}...")
