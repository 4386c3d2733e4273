"""A fetcher downloads many URLs: every kind of failure is reported, and limits hold.

fetcher = Fetcher(DownloadConfig())
fetched = fetcher.submit("https://example.com/cat.jpg").result()
fetched.release()
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from encode.download.client import Fetched, Fetcher
from encode.download.config import DownloadConfig
from encode.download.request import Attempt
from model.media.images import BadMediaError, decode_image
from tests.support import ROOT
from tests.support.web_server import (
    TROUBLES,
    Handler,
    MakeFetcher,
    TroubleServer,
    at_first,
    outcome,
    quick_config,
    status,
    wait_until,
)

pytestmark = pytest.mark.slow


REASONS = {
    "404": "HTTP 404",
    "403": "HTTP 403",
    "410": "HTTP 410",
    "500": "HTTP 500",
    "206": "HTTP 206",
    "429-for-a-year": "HTTP 429, Retry-After 31536000 s",
    "slow": "not finished within 2 s",
    "stall": "no data for 0.8 s",
    "silent": "no data for 0.8 s",
    "truncated": "incomplete body",
    "truncated-chunks": "incomplete body",
    "hang-up": "connection closed without a response",
    "garbage": "invalid HTTP response",
    "200-mb": "a body of 209715200 bytes, more than 1048576",
    "200-mb-unsaid": "a body of more than 1048576 bytes",
    "redirect-loop": "redirect loop",
    "redirect-circle": "redirect loop",
    "redirect-to-link-local": "redirect to a link-local address 169.254.169.254, which is not allowed",
    "redirect-to-file": "redirect to a URL with scheme file, not http or https",
    "redirect-with-password": "redirect to a URL with a user name or password",
    "redirect-to-private": "no connection: connection refused",
    "redirect-to-nowhere": "no such host",
    "redirect-without-location": "HTTP 302 without a Location",
    "cookie-wall": "redirect loop",
    "gzip": "unrequested Content-Encoding gzip",
}
Outcomes = tuple[TroubleServer, dict[str, Fetched | BadMediaError]]
TRIED_AGAIN = ("500", "slow", "stall", "silent", "truncated", "truncated-chunks", "reset-in-body")


# ---- every kind of failure


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    """Download every kind of URL at the same time; return the server and the outcome of each kind."""
    with TroubleServer() as server:
        one = Fetcher(quick_config())
        started = {
            entry.kind: one.submit(f"{server.base}{entry.path}?token=SECRET", sha256=entry.sha256)
            for entry in server.entries()
        }
        yield server, {kind: outcome(future) for kind, future in started.items()}
        one.close()


def test_every_kind_fails_at_its_stage_or_succeeds(outcomes: Outcomes) -> None:
    server, found = outcomes
    assert len(TROUBLES) >= 30
    for entry in server.entries():
        got = found[entry.kind]
        if entry.expected in ("fetch", "verify"):
            assert isinstance(got, BadMediaError), entry.kind
            assert got.stage == entry.expected, entry.kind
            continue
        assert isinstance(got, Fetched), f"{entry.kind}: {got}"
        if entry.expected == "ok":
            assert got.data == server.image(entry.kind), entry.kind
            decode_image(got.data)
        else:
            with pytest.raises(BadMediaError):
                decode_image(got.data)


@pytest.mark.parametrize("kind", REASONS)
def test_each_failure_has_its_reason(outcomes: Outcomes, kind: str) -> None:
    got = outcomes[1][kind]
    assert isinstance(got, BadMediaError)
    assert got.reason == REASONS[kind]


def test_resets_wrong_bytes_and_dates_have_their_reasons(outcomes: Outcomes) -> None:
    digest = hashlib.sha256(b"other bytes").hexdigest()
    assert str(outcomes[1]["reset"]).startswith("connection ")
    assert re.search(f"{digest[:12]}.* as recorded$", str(outcomes[1]["wrong-sha"]))
    assert str(outcomes[1]["503-until-a-date"]).startswith("HTTP 503, Retry-After 3153")


def test_only_temporary_failures_are_retried(outcomes: Outcomes) -> None:
    server, _ = outcomes
    for kind in TRIED_AGAIN:
        # aiohttp repeats a request itself if a kept connection turns out to be closed.
        assert 3 <= server.counts[f"/{kind}"] <= 6, kind
    again = {*TRIED_AGAIN, "reset", "hang-up", "redirect-to-private"}
    once = [k for k in TROUBLES if k not in again and not k.startswith("redirect-circle")]
    assert all(server.counts[f"/{kind}"] for kind in once)
    # One, or a repeated request of aiohttp; on a busy machine, two of them for one kind.
    often = [kind for kind in once if server.counts[f"/{kind}"] > 2]
    assert len(often) <= 1, often


def test_reasons_contain_no_secrets_of_the_url(outcomes: Outcomes) -> None:
    for kind, got in outcomes[1].items():
        if isinstance(got, BadMediaError):
            assert "SECRET" not in got.reason and "token" not in got.reason, kind
            assert "secret" not in got.reason and "user:" not in got.reason, kind
            assert "\n" not in got.reason and len(got.reason) < 160, kind
            assert got.__traceback__ is None or "SECRET" not in str(got)


def test_a_healed_server_serves_every_url(fetcher: MakeFetcher) -> None:
    with TroubleServer(photos=2) as server:
        server.heal()
        one = fetcher()
        started = {e: one.submit(server.base + e.path, sha256=e.sha256) for e in server.entries()}
        for entry, future in started.items():
            got = outcome(future)
            assert isinstance(got, Fetched), f"{entry.kind}: {got}"
            assert got.data == server.image(entry.kind)


def test_redirects_are_followed(server: TroubleServer, fetcher: MakeFetcher) -> None:
    got = outcome(fetcher().submit(server.url("redirect-thrice")))
    assert isinstance(got, Fetched)
    assert got.data == server.image("photo-0")
    assert 0 < got.seconds < 10


def test_the_number_of_redirects_is_limited(server: TroubleServer, fetcher: MakeFetcher) -> None:
    got = outcome(fetcher(redirects=2).submit(server.url("redirect-thrice")))
    assert str(got) == "more than 2 redirects"
    got = outcome(fetcher(redirects=3).submit(server.url("redirect-thrice")))
    assert isinstance(got, Fetched)
    got = outcome(fetcher(redirects=0).submit(server.url("redirect")))
    assert str(got) == "more than 0 redirects"


def test_a_known_sha256_is_checked_in_upper_or_lower_case(
    server: TroubleServer, fetcher: MakeFetcher
) -> None:
    one, url = fetcher(), server.url("photo-1")
    digest = hashlib.sha256(server.image("photo-1")).hexdigest()
    assert isinstance(outcome(one.submit(url, sha256=digest)), Fetched)
    assert isinstance(outcome(one.submit(url, sha256=digest.upper())), Fetched)
    got = outcome(one.submit(url, sha256="0" * 64))
    assert isinstance(got, BadMediaError)
    assert got.stage == "verify"


# ---- limits


def gauge(hold_s: float) -> tuple[Callable[[Handler, bytes, int], None], list[int]]:
    """Return a slow kind of URL, and a list [now, most] of its simultaneous requests."""
    lock = threading.Lock()
    now = [0, 0]

    def act(h: Handler, image: bytes, _: int) -> None:
        with lock:
            now[0] += 1
            now[1] = max(now)
        h.wait(hold_s)
        with lock:
            now[0] -= 1
        h.send(image)

    return act, now


def test_simultaneous_requests_are_limited(fetcher: MakeFetcher) -> None:
    act, now = gauge(0.05)
    with TroubleServer(photos=1, extra={"gauge": act}) as server:
        one = fetcher(per_host=3)
        started = [one.submit(server.url("gauge")) for _ in range(13)]
        assert all(isinstance(outcome(future), Fetched) for future in started)
        assert now[1] == 3
        assert server.connections <= 4  # connections are reused

        now[1] = 0
        one = fetcher(per_host=3, connections=5)
        other = server.url("gauge").replace("127.0.0.1", "localhost")
        started = [one.submit(url) for _ in range(12) for url in (server.url("gauge"), other)]
        assert all(isinstance(outcome(future), Fetched) for future in started)
        assert now[1] == 5


def test_a_slow_host_delays_only_its_own_downloads(fetcher: MakeFetcher) -> None:
    with TroubleServer(photos=1) as server:
        one = fetcher(per_host=2, connections=4, read_s=5, total_s=10)
        slow = server.url("silent").replace("127.0.0.1", "localhost")
        stuck = [one.submit(slow) for _ in range(50)]
        wait_until(lambda: server.counts["/silent"] == 2)
        start = time.monotonic()
        assert isinstance(outcome(one.submit(server.url("photo-0"))), Fetched)
        assert time.monotonic() - start < 3
        assert server.counts["/silent"] == 2
        assert not any(future.done() for future in stuck)


def test_the_size_limit_is_exact(fetcher: MakeFetcher) -> None:
    with TroubleServer(photos=1) as server:
        for kind in ("photo-0", "chunked", "until-closed"):
            size = len(server.image(kind))
            got = outcome(fetcher(max_bytes=size).submit(server.url(kind)))
            assert isinstance(got, Fetched), f"{kind}: {got}"
            got = outcome(fetcher(max_bytes=size - 1).submit(server.url(kind)))
            assert str(size - 1) in str(got) and isinstance(got, BadMediaError), kind


def test_waiting_for_a_connection_does_not_time_out(fetcher: MakeFetcher) -> None:
    act, _ = gauge(0.5)
    with TroubleServer(photos=1, extra={"gauge": act}) as server:
        one = fetcher(per_host=1, read_s=1.5, total_s=1.5)
        started = [one.submit(server.url("gauge")) for _ in range(5)]
        assert all(isinstance(outcome(future), Fetched) for future in started)


def test_retry_after_is_obeyed(fetcher: MakeFetcher) -> None:
    with TroubleServer(photos=1) as server:
        got = outcome(fetcher().submit(server.url("429-then-fine")))
        assert isinstance(got, Fetched)
        assert got.seconds >= 1.0


def test_a_pause_applies_to_all_requests_to_a_host(fetcher: MakeFetcher) -> None:
    extra = {"busy": at_first(429, 1, Retry_After="1")}
    with TroubleServer(photos=3, extra=extra) as server:
        one = fetcher()
        busy = one.submit(server.url("busy"))
        wait_until(lambda: server.counts["/busy"] == 1)
        time.sleep(0.1)
        start = time.monotonic()
        assert isinstance(outcome(one.submit(server.url("photo-0"))), Fetched)
        assert time.monotonic() - start > 0.5
        assert isinstance(outcome(busy), Fetched)


def test_a_failing_host_gets_one_attempt_per_url(fetcher: MakeFetcher) -> None:
    with TroubleServer(photos=1) as server:
        one = fetcher(max_host_failures=3, per_host=1)
        for tries in (3, 3, 3, 1, 1):
            before = server.counts["/500"]
            assert str(outcome(one.submit(server.url("500")))) == "HTTP 500"
            assert server.counts["/500"] - before == tries
        assert isinstance(outcome(one.submit(server.url("photo-0"))), Fetched)
        outcome(one.submit(server.url("500")))
        assert server.counts["/500"] == 14


def test_a_failing_host_that_asks_for_a_pause_gets_no_requests(fetcher: MakeFetcher) -> None:
    extra = {"limited": status(429)}
    with TroubleServer(photos=1, extra=extra) as server:
        one = fetcher(max_host_failures=2, per_host=1, retry_after_s=30)
        reasons = {str(outcome(one.submit(server.url("limited")))) for _ in range(2)}
        assert reasons == {"HTTP 429"} and server.counts["/limited"] == 6
        first = outcome(one.submit(server.url("limited")))  # one attempt, and the pause begins
        assert str(first) == "HTTP 429" and server.counts["/limited"] == 7
        start = time.monotonic()
        for _ in range(20):
            got = str(outcome(one.submit(server.url("limited"))))
            assert (
                got == "not attempted: the host asked for a pause, and its last 3 downloads failed"
            )
        assert server.counts["/limited"] == 7
        assert time.monotonic() - start < 5


# ---- headers


def test_requests_have_no_cookies_referer_or_proxy(
    server: TroubleServer, fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    one = fetcher()
    assert str(outcome(one.submit(server.url("cookie-wall")))) == "redirect loop"
    assert isinstance(outcome(one.submit(server.url("photo-2"))), Fetched)
    sent = server.headers["/photo-2"]
    assert sent["User-Agent"].startswith("nanoMolmo2/")
    assert sent["Accept-Encoding"] == "identity"
    assert sent["Accept"] == "*/*"
    assert not {"Cookie", "Referer", "Authorization"} & set(sent)


# ---- configuration


@pytest.mark.parametrize(
    "wrong",
    [
        {"connections": 0},
        {"per_host": 0},
        {"tries": 0},
        {"read_s": 0},
        {"total_s": -1},
        {"redirects": -1},
        {"max_bytes": 10, "budget_bytes": 9},
    ],
)
def test_invalid_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
        DownloadConfig(**wrong)


# ---- closing


def test_closing_cancels_running_downloads(server: TroubleServer) -> None:
    one = Fetcher(quick_config(read_s=20, total_s=60, per_host=4))
    started = [one.submit(server.url(kind)) for kind in ("stall", "silent", "slow") * 5]
    time.sleep(0.2)
    start = time.monotonic()
    closers = [threading.Thread(target=one.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(5)
        assert not closer.is_alive()
    one.close()
    assert time.monotonic() - start < 2
    for future in started:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        one.submit(server.url("photo-0"))
    assert not one._thread.is_alive()


def test_a_callback_may_close_the_fetcher(server: TroubleServer) -> None:
    one = Fetcher(quick_config())
    one.submit(server.url("photo-0")).add_done_callback(lambda _: one.close())
    one._thread.join(5)
    assert not one._thread.is_alive()
    one.close()


def test_a_cancelled_download_frees_its_connection(fetcher: MakeFetcher) -> None:
    with TroubleServer(photos=1) as server:
        one = fetcher(per_host=1, read_s=20, total_s=60)
        stuck = one.submit(server.url("stall"))
        waiting = one.submit(server.url("photo-0"))
        time.sleep(0.2)
        assert not waiting.done()
        assert stuck.cancel()
        assert isinstance(outcome(waiting), Fetched)


QUIET_END = """
import sys, time
from encode.download.client import Fetcher
from encode.download.config import DownloadConfig
rules = DownloadConfig(allow_private=True, read_s=20)
fetcher = Fetcher(rules)
ahead = [fetcher.submit(url) for url in sys.argv[2:]]
kept = ahead[0].result().data
time.sleep(0.3)
if sys.argv[1] == "close":
    fetcher.close()
    fetcher.close()
if sys.argv[1] == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("close", 0), ("leave", 0), ("exit", 3)])
def test_python_ends_without_messages(how: str, code: int, server: TroubleServer) -> None:
    kinds = ("photo-0", "stall", "silent", "slow", "photo-1", "reset", "200-mb-unsaid", "500")
    urls = [server.url(kind) for kind in kinds]
    urls.append("https://no-such-host.invalid/")
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", QUIET_END, how, *urls]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert time.monotonic() - start < 20
    assert done.returncode == code
    lines = [s for s in done.stderr.splitlines() if not s.startswith("Executing <")]  # slow machine
    assert lines == []


def test_an_unexpected_error_fails_one_download_and_is_logged(
    server: TroubleServer,
    fetcher: MakeFetcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = fetcher()

    async def broken(*_: object) -> None:
        raise LookupError(f"something about {server.base}/?token=SECRET")

    monkeypatch.setattr(Attempt, "run", broken)
    with caplog.at_level(logging.WARNING):
        got = outcome(one.submit(server.url("photo-0")))
    assert isinstance(got, BadMediaError)
    assert got.reason == "download failed (LookupError)"
    assert "LookupError" in caplog.text and "SECRET" not in caplog.text
