"""Ctrl-C and SIGTERM: during the imports of a command, and during a job that should end in order.

    with Interrupts() as interrupts:
        while not interrupts.stopping():
            ...                                  # the first signal is recorded, the second ends the job

A command imports for seconds before its `main` is called, and Python would answer Ctrl-C with a traceback of
those imports. So each of our packages imports this module first, which calls `end_quietly`; `configs.command`
calls `restore`. What a `main` imports later, because it takes seconds, it imports in `importing`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn, Self

HANDLED = (signal.SIGINT, signal.SIGTERM)
PACKAGES = ("cache", "encode", "model", "train")
"""Packages whose modules are commands."""


# ---- while a command imports


def end_quietly(*, always: bool = False) -> None:
    """Until `restore`, end the process with exit code 130 on Ctrl-C, if it is `python -m` of our commands.

    Nothing changes in a program that imports our packages, where Ctrl-C was ignored from the start (as by
    nohup), or where a handler has been installed.

    Args:
        always: whether the process is a command of ours that was started in another way.
    """
    if (always or started_as_command()) and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


def restore() -> bool:
    """Let Ctrl-C raise KeyboardInterrupt again. Return whether `end_quietly` had changed that."""
    if signal.getsignal(signal.SIGINT) is not _end:
        return False
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return True


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """End the process quietly on Ctrl-C while the block imports, if one of our commands runs in it.

    `main` reads the command line first, and then imports what computes: torch and transformers take 5 to 9
    seconds, which help, a mistyped option or an unknown run do not wait for.
    """
    if runs_command():
        end_quietly(always=True)
    try:
        yield
    finally:
        restore()


def runs_command() -> bool:
    """Whether the main module of this process is one of our commands."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] in PACKAGES


def started_as_command() -> bool:
    """Whether Python is about to run `python -m PACKAGE...`, for one of ours."""
    if sys.argv[:1] != [
        "-m"
    ]:  # what runpy sets until it has found the module and imported its package
        return False
    for word, following in zip(sys.orig_argv[1:], [*sys.orig_argv[2:], ""], strict=True):
        if word.startswith("-m"):
            return (word[2:] or following).partition(".")[0] in PACKAGES
    return False


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    # Without cleaning up: an exception could surface anywhere in the imports, and be printed or swallowed.
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


@contextlib.contextmanager
def orderly_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- during a job


class Interrupts:
    """A context in which the first SIGINT or SIGTERM is recorded, and the second raises KeyboardInterrupt.

    Args:
        note: text for standard error when the first signal is received.
        same_press_s: seconds in which a signal counts as the first one again. torchrun passes on the Ctrl-C
            that a terminal has already sent to every process.
    """

    def __init__(self, note: str = "", same_press_s: float = 0.0) -> None:
        self.received: int | None = None
        """The recorded signal, if any."""
        self._before: dict[int, Any] = {}
        self._note_text, self._same_press_s = note, same_press_s
        self._since = 0.0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in HANDLED}
            self.install()
        return self

    def install(self) -> None:
        """Install the signal handlers. Needed again after Ray has started, which replaces that of SIGTERM."""
        for number in self._before:
            signal.signal(number, self._note)

    def stopping(self) -> bool:
        """Return whether the job should end."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """The exit code of a program that a signal ended: 130 after Ctrl-C."""
        return 128 + (self.received or 0)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            with contextlib.suppress(OSError):  # standard error may be closed
                # On a terminal there is `^C` before it, and perhaps a bar.
                start = "\n" if self._note_text and os.isatty(2) else ""
                os.write(
                    2, (start + self._note_text).encode()
                )  # a print() within a print() may fail
        elif now - self._since >= self._same_press_s:
            raise KeyboardInterrupt

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


end_quietly()
