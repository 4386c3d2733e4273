"""Ctrl-C once: come to an end and keep what is encoded. Twice: leave at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context manager. While it is open, the first SIGINT or SIGTERM is only noted."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that came, if one did."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in HANDLED}
            self.install()
        return self

    def install(self) -> None:
        """Take the signals over (again: starting Ray takes SIGTERM for itself)."""
        for number in self._before:
            signal.signal(number, self._note)

    def stopping(self) -> bool:
        """Whether the job should come to an end."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program ended by this signal: 130 after Ctrl-C."""
        return 128 + (self.received or 0)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
