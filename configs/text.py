"""Text from outside on a terminal: names, captions, answers and messages that a stranger may have chosen.

    visible("photo\\x1b]0;x\\x07.jpg")       # the same text with backslashes: it acts on no terminal
    say(f"merged {name}")                   # prints one line, whatever is in the name
    quoted("a\\nb.jpg")                      # 'a\\nb.jpg' in one line; a plain name has no quotes
    configs.one_line(error)                 # spaces for line breaks, and at most 160 characters

`guard_streams`, which `configs.command` calls, is the second check: standard output and standard error pass
no character that acts on a terminal but line breaks and tabs, whatever is printed, also by a traceback or a
log. What a command itself draws over its own line is written to `unguarded`.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

KEPT = "\n\t\u00a0\u1680\u2002\u2003\u2007\u2009\u202f\u3000"
"""What stays in text of several lines: also the spaces of French, Ogham, Chinese and Japanese."""

_OTHER = re.compile(r"[^ -~]")

_BLANK = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Characters that show nothing: they hide text, or change the order of what is around them."""

_JOINERS = "\u200c\u200d"
"""ZWNJ and ZWJ. Persian and Indic words, and drawings of families, need one between two of their letters."""

_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Choose one of several shapes of the character before them."""


def visible(text: object, longest: int | None = None, *, keep: str = "") -> str:
    """Return text with escapes, as in Python's literals, for what acts on a terminal or shows nothing.

    Escaped are control characters (C0, DEL, C1), line and paragraph separators, marks that change the
    direction of writing, characters without width, unassigned ones, spaces that are no U+0020, and lone
    surrogates, by which Python represents the bytes of a file name that is not UTF-8. Printable characters
    of every script stay.

    Args:
        text: any value; its `str`.
        longest: characters at most; a longer text ends in `...`.
        keep: control characters that stay, such as line breaks.
    """
    text = str(text)
    if longest is not None:
        text = text[: longest + 1]  # escapes only lengthen it
    if not (text.isascii() and text.isprintable()):
        text = _OTHER.sub(lambda found: _shown(found, keep), text)
    return text if longest is None or len(text) <= longest else text[: longest - 3] + "..."


def _shown(found: re.Match[str], keep: str) -> str:
    character, text, at = found[0], found.string, found.start()
    if character in keep or _is_visible(character):
        return character
    before, after = text[max(0, at - 1) : at], text[at + 1 : at + 2]
    if character in _JOINERS and _is_letter(before) and _is_letter(after):
        return character
    has_shapes = before in set("0123456789#*") or (not before.isascii() and _is_visible(before))
    if has_shapes and _SELECTOR.match(character):
        return character
    return character.encode("unicode_escape").decode()


def _is_visible(character: str) -> bool:
    return character.isprintable() and not _BLANK.match(character)


def _is_letter(character: str) -> bool:
    """Whether a joiner may be beside this character: one that is visible, or chooses a shape; not ASCII."""
    return (
        bool(character)
        and not character.isascii()
        and (_is_visible(character) or bool(_SELECTOR.match(character)))
    )


def quoted(name: str) -> str:
    """Return a name for a message: as it is, or in quotes and with escapes where it needs any."""
    shown = visible(name)
    return shown if shown == name else f"'{shown}'"


def lines_text(lines: Iterable[object]) -> str:
    """Return lines as one text, each as `visible` returns it."""
    return "\n".join(map(visible, lines))


def say(*lines: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print each argument in one line, as `visible` returns it."""
    print(lines_text(lines), file=file, flush=flush)


def json_text(values: Any, indent: int | None = None, **options: Any) -> str:
    """Return JSON in ASCII without control characters. `json.dumps` leaves DEL as it is."""
    return json.dumps(values, indent=indent, **options).replace("\x7f", "\\u007f")


# ---- standard output and standard error


class _Guard:
    """A text stream that writes to another one, with `visible`. Lines and tabs stay."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(visible(text, keep=KEPT))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_streams() -> None:
    """Let `sys.stdout` and `sys.stderr` pass only text as `visible` returns it, until the process ends."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guard):
            setattr(sys, name, _Guard(stream))


def unguarded(stream: TextIO) -> TextIO:
    """Return the stream itself: for what a command draws on a terminal, which holds no text from outside."""
    return stream.stream if isinstance(stream, _Guard) else stream


@contextlib.contextmanager
def without_guard() -> Iterator[None]:
    """Let a library draw on the terminal, from our own text alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (unguarded(cast(TextIO, stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
