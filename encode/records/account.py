"""Account for everything that a source reads: each line, file and key is used, or counted here.

    account = Account("photos")
    account.lines["LLaVA"] += 1                   # a line that was read, by its format
    account.left_out[".heic"] += 1                # a file or line that is not used, by its reason
    account.ignored["data_source"] += 1           # a key that is harmless to ignore
    account.notes["no such file"] += 1            # a remark about a media item that is used all the same
    account.fault("photos/metadata.jsonl:7", FaultError("unknown key", "unknown key 'captoin'"))
    account.close()                               # raises UserError with the first faults, if there are any
    account.text()                                # "photos: 12 lines (10 LLaVA, 2 captions), 11 images, ..."

A fault is a line that would lose text or media. All lines are read before the data set is refused, so that
one run shows every kind of fault. With `leave_out`, such lines are left out and counted instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from cache.store.samples import Sample
from configs import UserError
from configs.command_line import CommandLine
from configs.text import visible
from encode.plan.numbering import AT_ONCE, Numbers

SHOWN = 20
"""Faults that an error shows whole; all others are counted by kind."""


MOST_KEYS = 200
"""Ignored keys that are counted by name. Some files have keys that are ids, another one in each line."""
OTHER_KEYS = "other keys"


class FaultError(Exception):
    """What is wrong with one line or row. The caller knows where it is."""

    def __init__(self, kind: str, message: str = "", *, key: str = "") -> None:
        super().__init__(message or kind)
        self.kind = kind
        """A few words, equal for all faults of this kind."""
        self.key = key
        """Path of the key without which the line could be read; empty if there is none."""


@dataclass(kw_only=True)
class Account:
    """What one data set's reader used, ignored, left out and refused."""

    name: str
    """Name of the data set."""
    leave_out: bool = False
    """Whether lines with faults are left out and counted, instead of ending the job."""
    command: CommandLine | None = None
    """The user's command, for the errors that suggest it with other options."""
    ignore_keys: frozenset[str] = frozenset()
    """Keys, or paths of keys, that the user leaves out: they are counted and not used."""
    lines: Counter[str] = field(default_factory=Counter)
    """Format -> lines or rows read."""
    media: Counter[str] = field(default_factory=Counter)
    """Kind -> distinct media that the samples mention."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> files or lines that are not used."""
    columns: Counter[str] = field(default_factory=Counter)
    """Column of media, with what it is used as -> files."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Key -> times it was ignored, because it changes nothing."""
    notes: Counter[str] = field(default_factory=Counter)
    """Remark -> media it is about. They are used, though what is written is odd, or the file is missing."""
    faults: Counter[str] = field(default_factory=Counter)
    """Kind of fault -> lines."""
    samples: int = 0
    """Samples that the data set has."""
    first_faults: list[str] = field(default_factory=list)
    """The first `SHOWN` faults, each with file and line."""

    _last_line: tuple[str, Counter[str]] = ("", Counter())
    """Format and ignored keys of the last line that was read."""
    refused_keys: dict[str, None] = field(default_factory=dict)
    """Keys without which lines with faults could be read, the first `SHOWN`, in the order they were found."""

    def fault(self, where: str, error: FaultError) -> None:
        """Count one fault; `where` is the file and line."""
        self.faults[error.kind] += 1
        # A comma in a key would make two of it in the option.
        if error.key and "," not in error.key and len(self.refused_keys) < SHOWN:
            self.refused_keys[error.key] = None
        if len(self.first_faults) < SHOWN:
            self.first_faults.append(f"{where}: {error}")

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield `samples`, count them and their distinct media, then close the account."""
        seen, waiting = Numbers(), dict[str, str]()  # source -> kind
        try:
            for sample in samples:
                self.samples += 1
                for ref in sample.media:
                    waiting.setdefault(ref.source, ref.kind)
                if len(waiting) >= AT_ONCE:
                    self._count_media(seen, waiting)
                yield sample
        finally:  # also if the caller stops early
            self._count_media(seen, waiting)
        self.close()

    def _count_media(self, seen: Numbers, waiting: dict[str, str]) -> None:
        """Count the media that are new, and empty `waiting`."""
        before = len(seen)
        at = seen.add(list(waiting))
        self.media.update(
            kind for kind, number in zip(waiting.values(), at, strict=True) if number >= before
        )
        waiting.clear()

    def add_line(self, name: str, ignored: Mapping[str, int]) -> None:
        """Count one line of the format `name`, and its keys that are not used."""
        self.lines[name] += 1
        self._last_line = (name, self.ignore(ignored))

    def take_back(self) -> None:
        """Count the last line of `add_line` no more: it is a fault after all."""
        name, ignored = self._last_line
        self.lines -= Counter({name: 1})  # `-=` leaves no zeros
        self.ignored -= ignored
        self._last_line = ("", Counter())

    def ignore(self, keys: Mapping[str, int]) -> Counter[str]:
        """Count keys that are not used; return the counts as they were added."""
        added: Counter[str] = Counter()
        for key, times in keys.items():
            known = key in self.ignored or len(self.ignored) + len(added) < MOST_KEYS
            added[key if known else OTHER_KEYS] += times
        self.ignored.update(added)
        return added

    def close(self) -> None:
        """Raise UserError with the first faults and the totals by kind, unless lines may be left out."""
        if not self.faults or self.leave_out:
            return
        total = sum(self.faults.values())
        more = [f"... and {total - len(self.first_faults):,} more"] if total > SHOWN else []
        command = self.command or CommandLine("", ())
        before = self.ignore_keys if self.command else ()  # the new option replaces theirs
        keys = ",".join([*sorted(before), *self.refused_keys])
        ways = []
        if self.samples or self.lines:
            leave_out = command.text(bad_lines="leave-out").lstrip()
            ways.append(f"go on without them: {leave_out}")
        if self.refused_keys:
            without = command.text(ignore_keys=keys).lstrip()
            ways.append(f"{'' if ways else 'go on '}without these keys: {without}")
        raise UserError(
            *self.first_faults,
            *more,
            f"{self.name}: {_lines(self.faults)} cannot be used ({_by_kind(self.faults)}); "
            + ", or ".join(["correct them", *ways]),
        )

    def text(self) -> str:
        """Return what was understood, in one line."""
        parts = []
        if self.lines:
            formats = ", ".join(f"{times:,} {name}" for name, times in self.lines.most_common())
            if len(self.lines) == 1:
                (formats,) = self.lines
            parts.append(f"{_lines(self.lines)} ({formats})")
        parts += [
            f"{times:,} {kind}{'s' * (times != 1)}" for kind, times in self.media.most_common()
        ]
        unused = [f"{times:,} {why}" for why, times in self.left_out.most_common()]
        if self.faults:
            unused.append(f"{_lines(self.faults)} ({_by_kind(self.faults)})")
        line = f"{self.name}: {', '.join(parts) or 'nothing'}"
        if self.columns:
            line += f"; columns of media: {', '.join(self.columns)}"
        if unused:
            line += f"; left out: {', '.join(unused)}"
        if self.notes:
            notes = ", ".join(f"{times:,} {note}" for note, times in self.notes.most_common())
            line += f"; noted: {notes}"
        if self.ignored:
            shown = self.ignored.most_common(SHOWN)
            keys = ", ".join(f"{key} ({times:,})" for key, times in shown)
            more = len(self.ignored) - len(shown)
            line += f"; keys ignored: {keys}" + (f" and {more:,} more" if more else "")
        return visible(line)

    def to_json(self) -> dict[str, Any]:
        """Return the counts, as a samples table stores them."""
        names = ("lines", "media", "columns", "left_out", "ignored", "notes", "faults")
        return {"samples": self.samples, **{name: dict(getattr(self, name)) for name in names}}

    @classmethod
    def from_json(cls, name: str, values: dict[str, Any]) -> Self:
        """Return the account of a stored data set."""
        counts: dict[str, Any] = {k: Counter(v) for k, v in values.items() if k != "samples"}
        return cls(name=name, samples=values["samples"], **counts)


def _lines(counts: Counter[str]) -> str:
    """Return the total of some counts of lines: 1 line, 1,234 lines."""
    total = sum(counts.values())
    return f"{total:,} line{'s' * (total != 1)}"


def _by_kind(faults: Counter[str]) -> str:
    """Return the kinds of faults, most frequent first, each with its lines."""
    return ", ".join(f"{kind}: {times:,}" for kind, times in faults.most_common())
