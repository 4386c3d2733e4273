"""Tars of images with texts, as img2dataset and the library webdataset write them.

python -m encode.run --dataset 'webdataset:cc3m/{00000..00331}.tar'
python -m encode.run --dataset 'webdataset:cc3m/*.tar'

Adjacent members whose names are equal up to the first dot are one sample: `000000001.jpg`, `.txt` and
`.json`. An image or video is recognised by its first bytes. `.txt` is a caption; the keys of `.json` are
those of a record (see `encode.records`), and those of img2dataset are counted and not used. Nothing is
unpacked: a sample names the place of its image in the tar.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import shlex
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from cache.format.embedded.names import member_source
from cache.format.gate import check_regular
from cache.store.samples import MediaRef, Sample
from configs import UserError
from encode.records.account import Account, FaultError
from encode.records.keys import FILE_KEYS, IMAGE_KEYS, NAME_KEYS, VIDEO_KEYS
from encode.records.reading import read_records
from encode.records.record import MediaName
from encode.records.samples import to_samples
from encode.records.strict_json import parse
from encode.sources.folder_files import why_unused
from model.media.kinds import HEAD_BYTES, recognise

BLOCK = 512
"""Bytes of a header. Every member begins at a multiple of it."""
MAX_HEADER_BYTES = 1 << 20
"""Bytes of a long name, or of pax records, at most."""
MAX_TEXT_BYTES = 64 << 20
"""Bytes of a text or a JSON file, at most."""
MAX_FILES = 1_000_000
"""Tars that a pattern with braces names, at most."""

TEXTS = frozenset({"txt", "text", "caption"})
"""Suffixes of captions."""
HARMLESS = frozenset({"cls", "cls2", "index", "inx", "id", "key"})
"""Suffixes of members that the library webdataset reads as a number or a name."""
UNPACK = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ": "unxz -k",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}
"""First bytes of a compressed file -> the command that unpacks it."""

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])")
_BRACES = re.compile(r"\{([^{}]*)\}")
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class InsideName(MediaName):
    """A member of the tar. A text of the data set never becomes one."""


class Member(NamedTuple):
    """One member of a tar."""

    name: str
    """As it is written; never used as a path."""
    offset: int
    """First byte of its content in the tar."""
    size: int
    """Bytes of its content."""
    problem: str = ""
    """Why it has no content that could be read: link, sparse file, ...; empty for a regular file."""


@dataclass(frozen=True, kw_only=True)
class WebDataset:
    """Some tars. Each call of `samples` reads their headers and texts again."""

    name: str
    """Name of the data set in the cache."""
    files: tuple[Path, ...]
    """Absolute paths of the tars, in the order of the samples."""

    needs_sizes: ClassVar[bool] = False
    """No text here depends on the size of an image."""

    @staticmethod
    def open(pattern: str, *, name: str) -> WebDataset:
        """Return the data set of the tars that a pattern names.

        Args:
            pattern: path with `*`, `?`, `[...]`, `{000..012}` or `{a,b}`; a folder means its `*.tar`.
            name: of the data set.

        Raises:
            UserError: no file, or one that braces name does not exist.
        """
        files = expand(pattern)
        return WebDataset(name=name, files=tuple(files))

    @property
    def folders(self) -> tuple[Path, ...]:
        """None but the tars themselves: they contain the media."""
        return self.files

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - part of the protocol
        account: Account | None = None,
    ) -> Iterator[Sample]:
        """Yield the samples of all tars.

        Raises:
            UserError: no sample can be used.
        """
        account = account or Account(name=self.name)
        common = Path(os.path.commonpath([path.parent for path in self.files]))
        stems = Counter(path.stem for path in self.files)
        found = False
        for path in self.files:
            name = path.stem
            if stems[name] > 1:
                name = path.relative_to(common).with_suffix("").as_posix()
            for sample in _Reader(self.name, path, _as_text(name), account).samples():
                found = True
                yield sample
        account.close()
        if not found:
            raise UserError(
                f"{self.name}: no member of {self.files[0]} is usable ({account.text()})"
            )


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern with braces and wildcards names, sorted.

    Raises:
        UserError: there are none, or a file that is named without a wildcard does not exist.
    """
    word = f"webdataset:{pattern}"
    if Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern)}/*.tar"
    paths: dict[str, None] = {}
    for one in itertools.islice(_braces(pattern), MAX_FILES):
        # A name may contain a bracket without being a pattern.
        found = [one] if Path(one).exists() else sorted(glob.glob(one))
        if not found and one != pattern and not glob.has_magic(one):
            raise UserError(f"--dataset {shlex.quote(word)}: no such file: {one}")
        paths.update(dict.fromkeys(found))
    files = [Path(path).absolute() for path in sorted(paths) if not Path(path).is_dir()]
    if not files:
        raise UserError(f"--dataset {shlex.quote(word)}: no such file; quote the pattern")
    return files


def _braces(pattern: str) -> Iterator[str]:
    """Yield the text for each choice of the braces, as a shell does."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    span = _RANGE.fullmatch(found[1])
    if span:
        first, last = int(span[1]), int(span[2])
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        width = max(len(span[1]), len(span[2])) if "0" in (span[1][0], span[2][0]) else 0
        choices: Iterator[str] = (f"{number:0{width}}" for number in numbers)
    elif letters := _LETTERS.fullmatch(found[1]):
        choices = map(chr, range(ord(letters[1]), ord(letters[2]) + 1))
    else:
        choices = iter(found[1].split(","))
    for choice in choices:
        yield from _braces(before + choice + after)


# ---- one tar


class _Reader:
    """Reads the samples of one tar."""

    def __init__(self, dataset: str, path: Path, name: str, account: Account) -> None:
        self._dataset, self._path, self._name, self._account = dataset, path, name, account
        self._times: Counter[str] = Counter()
        self._fd = -1

    def samples(self) -> Iterator[Sample]:
        """Yield the samples; count faults."""
        try:
            check_regular(self._path)
            self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            why = FaultError("damaged tar", f"cannot be read ({error.strerror})")
            self._account.fault(str(self._path), why)
            return
        try:
            yield from self._samples()
        finally:
            os.close(self._fd)

    def _samples(self) -> Iterator[Sample]:
        group: list[Member] = []
        key = ""
        try:
            for member in read_members(self._fd, self._path):
                name = _KEY.fullmatch(member.name)
                if member.problem or name is None:
                    self._account.left_out[
                        member.problem or "hidden member or without a suffix"
                    ] += 1
                    continue
                if name[1] != key and group:
                    yield from self._of_group(key, group)
                    group = []
                key = name[1]
                group.append(member)
        except (FaultError, OSError) as error:
            fault = (
                error if isinstance(error, FaultError) else FaultError("damaged tar", str(error))
            )
            self._account.fault(str(self._path), fault)
            if group:  # a text behind the damage may be missing
                self._account.left_out["sample cut off by damage"] += 1
            return
        if group:
            yield from self._of_group(key, group)

    def _of_group(self, key: str, group: Sequence[Member]) -> Iterator[Sample]:
        """Yield the samples of the members of one key."""
        account = self._account
        name = f"{self._name}/{_as_text(key)}"
        self._times[name] += 1
        sample_id = name if self._times[name] == 1 else f"{name}#{self._times[name] - 1}"
        try:
            value = self._value(group, again=self._times[name] > 1)
            if value is None:
                return
            records = read_records(value, account)
            try:
                samples = list(
                    to_samples(records, id=sample_id, dataset=self._dataset, resolve=_resolve)
                )
            except FaultError:
                account.take_back()
                raise
        except FaultError as error:
            account.fault(f"{self._path}: {_as_text(key)}", error)
            return
        yield from samples

    def _value(self, group: Sequence[Member], *, again: bool) -> dict[str, Any] | None:
        """Return the record that a group is; None if its media cannot be used, which is counted.

        Args:
            group: its members.
            again: whether the tar has had members of this name before, and others between.
        """
        value: dict[str, Any] = {}
        media: dict[str, InsideName] = {}
        unusable: list[str] = []
        for member in group:
            suffix = member.name.rpartition(".")[2].lower()
            if suffix == "json":
                _add(value, _as_object(parse(self._read(member, MAX_TEXT_BYTES)), member.name))
            elif suffix in TEXTS:
                text = _decode(self._read(member, MAX_TEXT_BYTES), member.name)
                if text:
                    _add(value, {"txt": text})
                else:
                    self._account.notes["empty text"] += 1
            elif suffix in HARMLESS:
                self._account.ignored[f".{suffix}"] += 1
            else:
                found = recognise(self._read(member._replace(size=min(member.size, HEAD_BYTES))))
                if found.kind:
                    source = member_source(str(self._path), member.offset, member.size, member.name)
                    media[member.name] = InsideName(text=source, kind=found.kind)
                else:
                    unusable.append(f"{why_unused(found, member.name)} member")
        self._account.left_out.update(unusable)
        if unusable and not media:
            return None  # its text is about what cannot be used
        if not media and str(value.get("status", "")).startswith("failed"):
            self._account.left_out["failed download"] += 1
            return None
        if again and not media:
            raise FaultError(
                "members of a sample are not adjacent",
                "other members of this name are before others; unpack the tar into a folder, and pack that "
                "in order: tar --sort=name -C FOLDER -cf sorted.tar .",
            )
        _place(value, media)
        return value

    def _read(self, member: Member, most: int = MAX_HEADER_BYTES) -> bytes:
        if member.size > most:
            raise FaultError(
                "too large", f"{member.name}: {member.size:,} bytes, more than {most:,}"
            )
        return os.pread(self._fd, member.size, member.offset)


def _resolve(name: MediaName) -> MediaRef:
    if not isinstance(name, InsideName):
        raise FaultError("media outside the tar", f"{name.text[:80]!r} is no member of its group")
    return MediaRef(source=name.text, kind=name.kind or "image")


def _add(value: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, item in more.items():
        if value.setdefault(key, item) != item:
            raise FaultError("two texts", f"two members say {key}; use one of them")


def _as_object(value: Any, name: str) -> Mapping[str, Any]:
    """Return a JSON object; a list of turns becomes one."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"messages" if "role" in value[0] else "conversations": value}
    raise FaultError("wrong type", f"{name}: expected an object, found {type(value).__name__}")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise FaultError("not UTF-8", f"{name}: not UTF-8 (byte {error.start + 1:,})") from None


def _place(value: dict[str, Any], media: Mapping[str, InsideName]) -> None:
    """Put the members that are media into a record, in the order in which it names them."""
    by_name = {PurePosixPath(name).name: item for name, item in media.items()}
    for key in (*IMAGE_KEYS, *VIDEO_KEYS, *FILE_KEYS, *NAME_KEYS):
        given = value.get(key)
        texts = [given] if isinstance(given, str) else given
        if not texts or not isinstance(texts, list):
            continue
        named = [PurePosixPath(text).name for text in texts if isinstance(text, str)]
        if set(named) == set(by_name) and len(named) == len(texts):
            value[key] = [by_name[name] for name in named]
            return
    for kind in ("image", "video"):
        items = [item for item in media.values() if item.kind == kind]
        if not items:
            continue
        if value.get(kind) is not None:
            raise FaultError("two keys of media", f"{kind} names other media than the group has")
        value[kind] = items


def _as_text(name: str) -> str:
    """Return a name with what is not UTF-8 replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


# ---- headers


def read_members(fd: int, path: Path) -> Iterator[Member]:
    """Yield the members of a tar, without reading their contents.

    Args:
        fd: the open file.
        path: its path, for messages.

    Raises:
        FaultError: it is no tar, or cut short or damaged at this place.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise FaultError("damaged tar", "not a regular file")
    at, long_name, pax = 0, "", dict[str, str]()
    while True:
        header = os.pread(fd, BLOCK, at)
        if not at:
            _check_uncompressed(header, path)
        if len(header) < BLOCK:
            raise FaultError("damaged tar", "without its end: cut short" if at else "no tar")
        if not any(header):
            return
        info = _header(header, at)
        start, size = at + BLOCK, int(pax.get("size", info.size))
        more = header[482] if info.type == b"S" else 0
        while more:  # blocks that say where the holes of a sparse file are
            block = os.pread(fd, BLOCK, start)
            more, start = (block[504] if len(block) == BLOCK else 0), start + BLOCK
        has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        has_content |= info.type in (b"L", b"K", b"x", b"g", b"X", b"S")
        at = start + (-(-size // BLOCK) * BLOCK if has_content else 0)
        if size < 0 or (has_content and start + size > status.st_size):
            raise FaultError("damaged tar", f"cut short in the member at byte {start - BLOCK:,}")
        if info.type in (b"L", b"K", b"x", b"g", b"X"):
            if size > MAX_HEADER_BYTES:
                raise FaultError(
                    "damaged tar", f"a header of {size:,} bytes at byte {start - BLOCK:,}"
                )
            text = os.pread(fd, size, start)
            if info.type == b"L":
                long_name = text.rstrip(b"\0").decode(errors="surrogateescape")
            elif info.type in (b"x", b"X"):
                pax = _pax(text)
            continue
        name = pax.get("path") or long_name or info.name
        problem = ""
        if info.type == b"S" or any(key.startswith("GNU.sparse") for key in pax):
            problem = "sparse file in a tar"
        elif info.type not in _REGULAR:
            problem = "link in a tar" if info.issym() or info.islnk() else "special file in a tar"
        long_name, pax = "", {}
        if not info.isdir():
            yield Member(name, start, size, problem)


def _header(header: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if at:
            raise FaultError("damaged tar", f"damaged at byte {at:,}") from None
    raise FaultError("damaged tar", "no tar")


def _check_uncompressed(start: bytes, path: Path) -> None:
    """Raise FaultError for a compressed tar, in which no member could be found without the ones before."""
    for magic, command in UNPACK.items():
        if start.startswith(magic):
            unpack = f"{command} {shlex.quote(str(path))}"
            raise FaultError("compressed tar", f"compressed; unpack it: {unpack}")


def _pax(text: bytes) -> dict[str, str]:
    """Return the records of a pax header: `length key=value` lines."""
    records = {}
    while found := re.match(rb"(\d{1,9}) ([^=]+)=", text):
        length = int(found[1])
        if not found.end() <= length <= len(text):
            break
        key = found[2].decode(errors="surrogateescape")
        records[key] = text[found.end() : length - 1].decode(errors="surrogateescape")
        text = text[length:]
    if not re.fullmatch(r"\d{1,15}", records.get("size", "0")):
        raise FaultError("damaged tar", "a pax header with a size that is no number")
    return records
