"""Responses that bend or break HTTP are read as intended, or refused with a reason."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest

from encode.download.client import Fetched
from tests.support.web_server import Act, Handler, MakeFetcher, TroubleServer, outcome

INVALID = "invalid HTTP response"


def raw(answer: bytes) -> Act:
    """Send these bytes with BODY and LEN replaced, then close the connection."""

    def act(h: Handler, image: bytes, _: int) -> None:
        h.wfile.write(answer.replace(b"LEN", b"%d" % len(image)).replace(b"BODY", image))
        h.hang_up()

    return act


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> Act:
    return raw(b"\r\n".join((status, *lines)) + b"\r\n\r\nBODY")


LENGTH = b"Content-Length: LEN"
FOUND = b"HTTP/1.1 302 Found"
ODD: dict[str, tuple[Act, str | None]] = {
    "many-headers": (head(LENGTH, *(b"X-%d: y" % i for i in range(100))), None),
    "large-header": (head(LENGTH, b"X: " + b"y" * 20_000), None),
    "too-large-header": (head(LENGTH, b"X: " + b"y" * 100_000), INVALID),
    "two-lengths": (head(LENGTH, b"Content-Length: 7"), INVALID),
    "negative-length": (head(b"Content-Length: -5"), INVALID),
    "no-number": (head(b"Content-Length: abc"), INVALID),
    "http-1.0": (head(status=b"HTTP/1.0 200 OK"), None),
    "no-reason": (head(LENGTH, status=b"HTTP/1.1 200"), None),
    "icy": (head(LENGTH, status=b"ICY 200 OK"), INVALID),
    "http-0.9": (raw(b"BODY"), INVALID),
    "continued": (raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nBODY"), None),
    "hints": (raw(b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nBODY"), None),
    "upgrade": (
        head(b"Upgrade: websocket", b"Connection: upgrade", status=b"HTTP/1.1 101 Switching"),
        "HTTP 101",
    ),
    "zero-byte": (head(LENGTH, b"X: a\x00b"), INVALID),
    "latin-1": (head(LENGTH, b"X: a\xe9b"), None),
    "999": (head(LENGTH, status=b"HTTP/1.1 999 No"), "HTTP 999"),
    "304": (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "HTTP 304"),
    "part": (head(LENGTH, b"Content-Range: bytes 0-5/10", status=b"HTTP/1.1 206 P"), "HTTP 206"),
    "bad-location": (
        head(b"Location: http://[::1", LENGTH, status=FOUND),
        "redirect to an invalid URL",
    ),
    "empty-location": (head(b"Location: ", LENGTH, status=FOUND), "redirect loop"),
    "latin-location": (head(b"Location: /photo-0?x=\xe9\xff", LENGTH, status=FOUND), None),
    "cookies": (head(LENGTH, b'Set-Cookie: b\xe9[]=1; "; =3, ;;', b"Set-Cookie: @=:"), None),
    "coding-of-no-coding": (head(LENGTH, b"Content-Encoding: UTF-8"), None),
    "brotli": (head(LENGTH, b"Content-Encoding: br"), "unrequested Content-Encoding br"),
    "two-codings": (
        head(LENGTH, b"Content-Encoding: gzip", b"Content-Encoding: <br>"),
        "unrequested Content-Encoding gzip",
    ),
    "packed-on-the-way": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
        "unrequested Transfer-Encoding gzip, chunked",
    ),
    "wrong-chunk": (
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nBODY\r\n0\r\n\r\n"),
        INVALID,
    ),
}


def test_odd_responses(caplog: pytest.LogCaptureFixture, fetcher: MakeFetcher) -> None:
    extra = {kind: act for kind, (act, _) in ODD.items()}
    with TroubleServer(photos=1, extra=extra) as server, caplog.at_level(logging.INFO):
        one = fetcher()
        started = {kind: one.submit(server.url(kind)) for kind in ODD}
        for kind, future in started.items():
            got, reason = outcome(future), ODD[kind][1]
            if reason is not None:
                assert str(got) == reason, kind
            else:
                assert isinstance(got, Fetched), f"{kind}: {got}"
                expected = "photo-0" if kind == "latin-location" else kind
                assert got.data == server.image(expected), kind
    assert caplog.text == ""


@pytest.mark.soak_counted
def test_mutated_responses_give_a_body_or_a_reason(
    soak: Callable[[int, int], int], caplog: pytest.LogCaptureFixture, fetcher: MakeFetcher
) -> None:
    """Bytes of valid responses are changed, removed and inserted; half of the responses are chunked."""
    sound = (
        b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 300\r\n\r\n" + b"x" * 300,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n96\r\n"
        + b"y" * 150
        + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /photo-0\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 Wait\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\nno",
    )

    def mutated(h: Handler, _: bytes, count: int) -> None:
        chance = random.Random(count)
        data = bytearray(chance.choice(sound))
        for _i in range(chance.randint(1, 4)):
            at = chance.randrange(min(len(data), 120))
            new = chance.choice([b"", bytes([chance.randrange(256)]), b"\r\n", b"9", b": "])
            data[at : at + chance.randint(0, 2)] = new
        h.wfile.write(bytes(data))
        h.hang_up()

    count = soak(150, 5000)
    with TroubleServer(photos=1, extra={"mutated": mutated}) as server:
        one = fetcher(
            tries=1, retry_after_s=0, max_host_failures=10**9, per_host=16, read_s=2, total_s=4
        )
        started = [one.submit(server.url("mutated")) for _ in range(count)]
        got = [outcome(future) for future in started]
    fetched = sum(isinstance(g, Fetched) for g in got)
    assert 0 < fetched < count
    reasons = {str(g) for g in got if not isinstance(g, Fetched)}
    assert len(reasons) >= 3
    assert not any(r.startswith("download failed") for r in reasons), reasons
    assert "unexpected error" not in caplog.text
    print(f"{count} answers: {fetched} bodies, {len(reasons)} reasons")
