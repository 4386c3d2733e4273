"""How long a server asks a client to wait.

retry_after("120")                                  # 120.0 seconds
retry_after("Wed, 21 Oct 2015 07:28:00 GMT")        # 0.0: in the past
"""

from __future__ import annotations

import email.utils
import time

import pytest

from cache.remote.retry import retry_after


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
