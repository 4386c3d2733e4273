"""End everything that waits for another machine: at a time, or when nobody needs the result any more.

    deadline = Deadline(policy.request_s, stop)
    addresses = apart(lambda: socket.getaddrinfo(host, 443), deadline)

What waits does so in slices of POLL_S seconds, and looks between them whether it should end. Calls that
cannot be interrupted (name lookups, libraries with clients of their own) run in a thread that is left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from cache.errors import RequestError

T = TypeVar("T")

POLL_S = 0.2
"""Seconds between two looks whether a wait should end."""
TOO_SLOW = "too slow: the answer is not complete in time"
MAX_REASON = 160
"""Characters of another machine's text in a message, at most."""


class Deadline:
    """When one exchange ends, whatever the other side does."""

    def __init__(
        self, seconds: float, stop: threading.Event | None = None, late: str = TOO_SLOW
    ) -> None:
        """Begin now.

        Args:
            seconds: until the end.
            stop: ends the exchange earlier, when it is set.
            late: the reason to give at the end.
        """
        self._ends, self._stop, self._late = time.monotonic() + seconds, stop, late

    def within(self, seconds: float, late: str = TOO_SLOW) -> Deadline:
        """Return a deadline for a part of the exchange, which is never later than this one."""
        left = self.left()
        return Deadline(seconds, self._stop, late) if seconds < left else self

    def left(self) -> float:
        """Return the seconds until the end, above 0.

        Raises:
            RequestError: the time is over, or `stop` is set.
        """
        if self._stop is not None and self._stop.is_set():
            raise RequestError("the read was cancelled", again=True)
        left = self._ends - time.monotonic()
        if left <= 0:
            raise RequestError(self._late, again=True)
        return left

    def wait(self, ready: Callable[[float], bool], seconds: float = float("inf")) -> None:
        """Wait until `ready` returns True.

        Args:
            ready: waits for the seconds it is given, at most; returns whether the wait is over.
            seconds: the longest wait.

        Raises:
            RequestError: `seconds` are over, or the deadline, or `stop` is set.
        """
        until = time.monotonic() + seconds
        while not ready(min(self.left(), until - time.monotonic(), POLL_S)):
            if time.monotonic() >= until:
                raise RequestError("no byte for too long", again=True)


def apart(call: Callable[[], T], deadline: Deadline) -> T:
    """Return what `call` returns, from a thread of its own, which is left behind when time is over.

    Ctrl-C ends the wait, too: Python handles it between two slices. The thread ends with the process.

    Raises:
        RequestError: the deadline is over.
        Exception: what `call` raised.
    """
    result: Future[T] = Future()
    done = threading.Event()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)
        done.set()

    threading.Thread(target=work, name="remote", daemon=True).start()
    deadline.wait(done.wait)
    return result.result()


def plain_text(text: object) -> str:
    """Return another machine's text for a message: one short line of printable ASCII."""
    shown = " ".join(str(text)[: 4 * MAX_REASON].split()).encode("ascii", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown.decode())[
        :MAX_REASON
    ]
