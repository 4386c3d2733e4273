"""How long a server asks a client to wait, and which requests are repeated.

retry_after("120")                                  # 120.0 seconds
retry_after("Wed, 21 Oct 2015 07:28:00 GMT")        # 0.0: in the past
"""

from __future__ import annotations

import email.utils
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.errors import RequestError, UnreachableError
from cache.remote import retry
from cache.remote.deadline import Deadline
from cache.remote.retry import (
    PROGRESS_BYTES,
    RetryPolicy,
    first_contact,
    retry_after,
    with_retries,
)
from tests.support import ROOT


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

    with pytest.raises(UnreachableError, match=r"tried \d+ times in .* s\)$"):
        with_retries(POLICY, "https://host/x", slow(PROGRESS_BYTES - 1))
    assert with_retries(POLICY, "https://host/x", slow(PROGRESS_BYTES)) == "done"


# ---- what is said meanwhile


def test_a_failing_request_is_reported_while_it_is_repeated(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_notices", retry._Notices())
    monkeypatch.setattr(retry, "NOTICE_AFTER_S", 0.01)
    refused = [RequestError("h: Connection refused", again=True) for _ in range(40)]
    for _ in range(2):  # many reads fail together, which is one line
        with pytest.raises(UnreachableError, match="tried"):
            with_retries(POLICY, "http://h/x", failing(*refused, seconds=0.002))
    assert caplog.messages == ["http://h/x: h: Connection refused; trying for 0 s"]


def test_a_hiccup_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert with_retries(POLICY, "http://h/x", failing(RequestError("x", again=True))) == "done"
    assert not caplog.messages


def test_a_read_that_was_cancelled_is_neither_repeated_nor_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a reader is closed while requests are under way: "trying for 300 s" would be wrong."""
    monkeypatch.setattr(retry, "_notices", retry._Notices())
    monkeypatch.setattr(retry, "NOTICE_AFTER_S", 0)
    stop, calls = threading.Event(), 0

    def attempt() -> None:
        nonlocal calls
        calls += 1
        stop.set()
        Deadline(10, stop).left()

    with pytest.raises(UnreachableError, match=r"^http://h/x: the read was cancelled$"):
        with_retries(RetryPolicy(), "http://h/x", attempt, stop)
    assert calls == 1
    assert not caplog.messages


def test_a_server_that_does_not_answer_is_reported_within_five_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert retry.SILENCE_S < 5 and retry.NOTICE_AFTER_S < 5
    monkeypatch.setattr(retry, "_notices", retry._Notices())
    monkeypatch.setattr(retry, "SILENCE_S", 0.02)
    with first_contact(RetryPolicy(), "http://h/x"):
        time.sleep(0.2)
    assert caplog.messages == ["http://h/x: no answer yet; trying for 300 s"]
    with first_contact(RetryPolicy(), "http://h/y"):
        pass
    time.sleep(0.1)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("scheme", ["http", "hf", "s3"])
def test_a_closed_port_is_reported_within_five_seconds(scheme: str, tmp_path: Path) -> None:
    """As a user sees it: a line on standard error, while the command goes on trying."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
        url = {"http": f"http://{host}/x", "hf": "hf://datasets/o/n", "s3": "s3://b/x"}[scheme]
        words = ["-m", "cache.ls", "--features", url, "--mirror", str(tmp_path)]
        elsewhere = dict.fromkeys(("HF_ENDPOINT", "AWS_ENDPOINT_URL"), f"http://{host}")
        with subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | elsewhere | {"AWS_SKIP_SIGNATURE": "true"},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert process.poll() is None
            process.kill()
    assert line.startswith(url) and line.endswith("; trying for 300 s\n")
