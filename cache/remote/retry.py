"""Set the limits of reading a remote cache, and repeat requests that fail for a passing reason."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cache.errors import RequestError, UnreachableError

log = logging.getLogger(__name__)

T = TypeVar("T")

PROGRESS_BYTES = 64 << 10
"""An attempt that received this many bytes before it failed made progress: pauses and limits start again."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Limits of reading from one store."""

    connections: int = 32
    """Requests at the same time, each for one row or adjacent ones. With 30 ms to an answer these are at most
    1,066 rows a second; a GPU that takes 800 images a second keeps 24 requests busy."""
    connect_s: float = 10
    """Seconds to connect to one address, TLS included."""
    read_s: float = 20
    """Seconds without a byte, before or during the answer."""
    request_s: float = 120
    """Seconds that one request may take, redirects included."""
    max_redirects: int = 5
    """Redirects followed for one request."""
    give_up_after_s: float = 300
    """Seconds without progress after which a read fails, and with it the training run."""
    backoff_s: float = 0.25
    """Seconds before the second attempt, plus or minus half; doubled for each further one."""
    max_backoff_s: float = 15
    """The longest such pause, in seconds."""
    max_retry_after_s: float = 30
    """The longest `Retry-After` that is obeyed, in seconds; a longer one is cut to this."""
    damage_tries: int = 4
    """Times that a damaged row or table is fetched before it counts as damaged at its source."""
    allow_private: bool = False
    """Permit plain http and addresses of private networks. Link-local and multicast are never permitted."""


NOTICE_AFTER_S = 1.0
"""Seconds of repeating a request after which that is said. A hiccup is over by then."""
SILENCE_S = 3.0
"""Seconds without an answer to the first request of a store, after which that is said."""
NOTICE_EVERY_S = 30.0
"""Seconds between two lines about requests that are being repeated: many threads may repeat theirs."""


class _Notices:
    """Says that requests fail and are repeated, in a line now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = -NOTICE_EVERY_S

    def say(self, policy: RetryPolicy, what: str, reason: str) -> None:
        """Log a line, unless another was logged just now."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < NOTICE_EVERY_S:
                return
            self._last = now
        log.warning("%s: %s; trying for %.0f s", what, reason, policy.give_up_after_s)


_notices = _Notices()


@contextlib.contextmanager
def first_contact(policy: RetryPolicy, what: str) -> Iterator[None]:
    """Log a line if the block, which makes the first request of a store, has no answer for SILENCE_S."""
    timer = threading.Timer(SILENCE_S, _notices.say, (policy, what, "no answer yet"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def with_retries(
    policy: RetryPolicy,
    what: str,
    attempt: Callable[[], T],
    stop: threading.Event | None = None,
) -> T:
    """Call `attempt` until it raises no RequestError, with growing pauses between the calls.

    Args:
        policy: pauses and limits.
        what: the URL to name in errors.
        attempt: makes one request.
        stop: ends the pauses when it is set, because nobody needs the result any more.

    Raises:
        UnreachableError: a failure that repeating cannot cure, no progress for too long, or `stop`.
    """
    stop = stop or threading.Event()
    tries, since = 0, time.monotonic()
    while True:
        try:
            return attempt()
        except RequestError as error:
            if not error.again:
                raise UnreachableError(f"{what}: {error.reason}", missing=error.missing) from None
            if stop.is_set():  # so the request failed, and nobody tries any longer
                raise UnreachableError(f"{what}: the read was cancelled") from None
            if error.got >= PROGRESS_BYTES:
                tries, since = 0, time.monotonic()
            waited = time.monotonic() - since
            if waited > policy.give_up_after_s:
                raise UnreachableError(
                    f"{what}: {error.reason} (tried {tries + 1} times in {waited:.0f} s)"
                ) from None
            if waited >= NOTICE_AFTER_S:
                _notices.say(policy, what, error.reason)
            retry_after_s = min(error.wait_s, policy.max_retry_after_s)
        pause_s = min(policy.backoff_s * 2.0**tries, policy.max_backoff_s)
        pause_s *= random.uniform(0.5, 1.5)  # noqa: S311 - spreads the requests of many readers
        tries += 1
        if stop.wait(max(pause_s, retry_after_s)):
            raise UnreachableError(f"{what}: the read was cancelled")


def retry_after(text: str | None) -> float:
    """Return the wait that a `Retry-After` header asks for, in seconds.

    Args:
        text: the header: whole seconds, or an HTTP date (a date without a time zone is UTC). None: absent.

    Returns:
        seconds from now; 0.0 for a missing or malformed header and for a date in the past.
    """
    text = (text or "").strip()
    if re.fullmatch("[0-9]{1,18}", text):  # longer numbers would lose precision or become infinite
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, date.timestamp() - time.time())
