"""What reading a cache that lies elsewhere may cost, how a read fails, and how often it is tried again."""

from __future__ import annotations

import datetime
import email.utils
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cache.errors import RequestError, UnreachableError

T = TypeVar("T")

SPURT_BYTES = 64 << 10
"""A try that brought so much has got on: patience begins anew, and so do the pauses."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Limits of one store."""

    connections: int = 16
    """Requests under way at once."""
    connect_s: float = 10
    """Seconds to connect to one address (TLS included)."""
    read_s: float = 20
    """Seconds without a byte, before the answer or amid it."""
    request_s: float = 120
    """Seconds one request may take, redirects included."""
    redirects: int = 5
    """Redirects followed for one request."""
    patience_s: float = 300
    """A read that does not get on is tried again for so long; then the training ends, with one line."""
    backoff_s: float = 0.25
    """Seconds before the second try, give or take half; doubled before each further one."""
    backoff_most_s: float = 15
    """And never more than this."""
    retry_after_s: float = 30
    """The longest `Retry-After` that is waited for, seconds: who asks for more is asked again then."""
    damage_tries: int = 4
    """Times a row, or a table, is fetched before its damage counts as the source's own."""
    allow_private: bool = False
    """Read over plain http, and from private addresses, too. Link-local, multicast, reserved: never."""


class Store(Protocol):
    """Where the files of a cache lie. All methods may be called from many threads at a time."""

    place: str
    """What the user called it, for messages."""
    needs_listing: bool
    """Whether nothing but its `listing.json` says which files there are."""

    def names(self) -> dict[str, Entry]:
        """Every file below the cache's root, by its name relative to it. Raises RequestError."""

    def read(self, name: str, offset: int, target: memoryview, size: int | None) -> None:
        """Fill `target` with what stands at `offset` of a file of `size` bytes. One try. Raises
        RequestError."""

    def whole(self, name: str, most: int) -> bytes:
        """A file of at most `most` bytes. One try. Raises RequestError."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file elsewhere."""

    nbytes: int
    """Its size."""
    tag: str
    """What changes with its content: `sha256:<64 hex>` where that is known, else the store's own word."""


class Patience:
    """Tries again, with growing pauses, until something succeeds or has not got on for too long."""

    def __init__(self, rules: RetryPolicy, place: str, stop: threading.Event) -> None:
        """`stop` ends every wait: nobody wants the result any more."""
        self._rules, self._place, self._stop = rules, place, stop
        self._tries, self._since = 0, time.monotonic()

    def after(self, trouble: RequestError) -> None:
        """Wait before the next try.

        Raises:
            UnreachableError: there is to be none.
        """
        if trouble.got >= SPURT_BYTES:
            self._tries, self._since = 0, time.monotonic()
        waited = time.monotonic() - self._since
        if not trouble.again:
            raise UnreachableError(
                f"{self._place}: {trouble.reason}", missing=trouble.missing
            ) from None
        if waited > self._rules.patience_s:
            raise UnreachableError(
                f"{self._place}: {trouble.reason} (tried {self._tries + 1} times in {waited:.0f} s); "
                "once it is reachable again, the same command with --resume goes on"
            ) from None
        pause = min(self._rules.backoff_s * 2.0**self._tries, self._rules.backoff_most_s)
        pause *= random.uniform(0.5, 1.5)  # noqa: S311 - so that many readers do not come back at once
        self._tries += 1
        if self._stop.wait(max(pause, min(trouble.wait_s, self._rules.retry_after_s))):
            raise UnreachableError(f"{self._place}: given up") from None


def patiently(
    rules: RetryPolicy, place: str, do: Callable[[], T], stop: threading.Event | None = None
) -> T:
    """What `do` returns, once it raises no RequestError.

    Raises:
        UnreachableError: it did, for good or for too long.
    """
    patience = Patience(rules, place, stop or threading.Event())
    while True:
        try:
            return do()
        except RequestError as trouble:
            patience.after(trouble)


def read_range(
    store: Store,
    rules: RetryPolicy,
    name: str,
    offset: int,
    target: memoryview,
    size: int | None,
    stop: threading.Event | None = None,
) -> None:
    """Fill `target` with what stands at `offset` of a file; a body that broke off goes on where it ended.

    Raises:
        UnreachableError: for good, or for too long.
    """
    patience = Patience(rules, f"{store.place}/{name}", stop or threading.Event())
    got = 0
    while True:
        try:
            return store.read(name, offset + got, target[got:], size)
        except RequestError as trouble:
            got += trouble.got
            patience.after(trouble)


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
