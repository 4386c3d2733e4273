"""How long a server asks a client to wait, and which requests are repeated.

retry_after("120")                                  # 120.0 seconds
retry_after("Wed, 21 Oct 2015 07:28:00 GMT")        # 0.0: in the past
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable

import pytest

from cache.errors import RequestError, UnreachableError
from cache.remote.retry import PROGRESS_BYTES, RetryPolicy, retry_after, with_retries


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        (" 7 ", 7),
        ("120", 120),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("²", 0),
        ("9" * 15, 999_999_999_999_999),
        ("9" * 4000, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float) -> None:
    assert retry_after(text) == seconds


def test_a_date_in_the_future_is_the_seconds_until_then() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 97 < retry_after(date) < 101


# ---- repeated requests

POLICY = RetryPolicy(backoff_s=0.001, max_backoff_s=0.002, give_up_after_s=0.05)


def failing(*failures: RequestError, seconds: float = 0) -> Callable[[], str]:
    """Return an attempt that fails with each of these in turn, after some seconds, then succeeds."""
    left = list(failures)

    def attempt() -> str:
        if left:
            time.sleep(seconds)
            raise left.pop(0)
        return "done"

    return attempt


def test_a_passing_failure_is_repeated() -> None:
    busy = RequestError("busy", again=True)
    assert with_retries(POLICY, "https://host/x", failing(busy, busy)) == "done"


def test_a_permanent_failure_is_not_repeated() -> None:
    attempt = failing(RequestError("404 Not Found", again=False, missing=True))
    with pytest.raises(UnreachableError, match=r"^https://host/x: 404 Not Found$") as error:
        with_retries(POLICY, "https://host/x", attempt)
    assert error.value.missing
    assert attempt() == "done", "one attempt was made"


def test_the_time_limit_starts_again_with_each_progress() -> None:
    def slow(got: int) -> Callable[[], str]:
        error = RequestError("the body ends early", again=True)
        error.got = got
        return failing(*[error] * 10, seconds=POLICY.give_up_after_s / 3)

    with pytest.raises(UnreachableError, match=r"tried \d+ times in .* s\); once it is reachable"):
        with_retries(POLICY, "https://host/x", slow(PROGRESS_BYTES - 1))
    assert with_retries(POLICY, "https://host/x", slow(PROGRESS_BYTES)) == "done"
