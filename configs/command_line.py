"""Command lines to print: the user's own words with some options changed, runnable as printed.

    with_options(["--features", "my cache", "--lr", "1"], lr=0.1, resume=True)
                                            # ["--features", "my cache", "--lr", "0.1", "--resume"]
    command_text("python -m train.run", words)
                                            # python -m train.run --features 'my cache' --lr 0.1 --resume

A message ends with its command, so that a user can copy the rest of the line.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CommandLine:
    """The command that a user gave."""

    program: str
    """As users type it: `python -m train.run`."""
    words: tuple[str, ...]
    """The arguments after it."""

    def text(self, **changes: object) -> str:
        """Return the command with some options changed, as `with_options` changes them."""
        return command_text(self.program, with_options(self.words, **changes))

    def only(self, *names: str, **changes: object) -> str:
        """Return the command with no other options than `names`, and with `changes`."""
        kept = with_options(only(self.words, names), **changes)
        return command_text(self.program, kept)


def with_options(words: Sequence[str], **changes: object) -> list[str]:
    """Return the words of a command line with some options changed.

    Args:
        words: as a user typed them, after the program's name.
        changes: field name -> new value. None and False leave the option out, True makes it a flag, a tuple
            gives several values.
    """
    changes = {name.rstrip("_"): value for name, value in changes.items()}  # from_ is --from
    kept = [word for name, group in _options(words) if name not in changes for word in group]
    for name, value in changes.items():
        if value is None or value is False:
            continue
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        kept += ["--" + name.replace("_", "-"), *map(_text, values)]
    return kept


def merge(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Return the words of `before` and `now`; an option in both has the values of `now`."""
    again = {name for name, _ in _options(now)}
    return [w for name, group in _options(before) if name not in again for w in group] + [*now]


def only(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the options of `words` that are among `names` (of fields)."""
    return [word for name, group in _options(words) if name in names for word in group]


def command_text(program: str, words: Iterable[str]) -> str:
    """Return a command line for a shell, with quotes where they are needed."""
    return f"{program} {shlex.join(words)}".rstrip()


def _options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return (name of the field, its words) for each option; words before the first one have the name ''."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
            found.append((name, [word]))
        else:
            found[-1][1].append(word)
    return found


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
