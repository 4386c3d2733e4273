"""Ctrl-C once: the job commits what is encoded and ends. Twice: it ends immediately."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which the first SIGINT or SIGTERM is recorded, and the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The recorded signal, if any."""
        self._before: dict[int, Any] = {}

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
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
