"""An exchange ends by its deadline, whatever a server sends; Ctrl-C ends it at once.

with RawServer(lambda: forever(b"HTTP/1.1 200 OK\\r\\nX: ", b"a")) as server:     # a header without end
    RemoteCache(server.url, RemoteOptions(), POLICY).copy_tables()               # CacheError
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cache.errors import CacheError, RequestError, UnreachableError
from cache.remote.deadline import Deadline, apart, plain_text
from cache.remote.http import HttpStore
from cache.remote.open import RemoteCache, RemoteOptions
from cache.remote.retry import RetryPolicy
from cache.share import share
from cache.store.paths import LISTING, CacheRoot
from tests.support import ROOT
from tests.support.faults import in_time
from tests.support.remote_servers import RawServer, WebServer, environment, forever
from tests.support.spaces import SLOTS, fill, make_space
from tests.support.web_server import CERTIFICATE

POLICY = RetryPolicy(
    connect_s=0.2,
    read_s=0.15,
    request_s=0.3,
    give_up_after_s=0.1,
    backoff_s=0.01,
    max_backoff_s=0.02,
)
OK = b"HTTP/1.1 200 OK\r\n"
PART = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-999/1000\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

# What a server sends -> the bytes before the endless ones, and those.
DRIPS: dict[str, tuple[bytes, bytes]] = {
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "status line of digits": (b"HTTP/1.1 ", b"2"),
    "name of a header": (OK, b"X"),
    "value of a header": (OK + b"X: ", b"a"),
    "headers": (OK, b"X: y\r\n"),
    "folded header": (OK + b"X: y\r\n", b" y\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers of an interim answer": (b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n"),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"5;", b"x"),
    "chunk": (CHUNKED + b"3e8\r\n", b"x"),
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n"),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
    "one trailer": (CHUNKED + b"1\r\nx\r\n0\r\nX: ", b"y"),
    "body": (b"Content-Length: 1000\r\n\r\n", b"x"),
    "body without length": (b"Connection: close\r\n\r\n", b"x"),
    "text of an error": (b"HTTP/1.1 500 No\r\nContent-Length: 9999\r\n\r\n", b"x"),
}


def drip(kind: str, status: bytes) -> Callable[[], Iterator[bytes]]:
    before, piece = DRIPS[kind]
    headed = before.startswith((OK, b"HTTP/")) or not before
    return lambda: forever((b"" if headed else status) + before, piece)


@pytest.mark.parametrize("kind", DRIPS)
def test_an_answer_that_drips_ends_in_time(kind: str, tmp_path: Path) -> None:
    with RawServer(drip(kind, OK)) as server, in_time(20), pytest.raises(CacheError) as error:
        RemoteCache(server.url, RemoteOptions(mirror=tmp_path), POLICY).copy_tables()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with RawServer(drip(kind, PART)) as server, in_time(20), pytest.raises(RequestError) as failure:
        HttpStore(server.url, POLICY).read("spaces/x", 0, memoryview(bytearray(1000)), 1000)
    assert len(failure.value.reason) < 200


@pytest.mark.parametrize("kind", DRIPS)
def test_an_answer_without_end_is_not_received_without_end(kind: str) -> None:
    """As fast as the loopback is: what arrives until the deadline is not kept, nor most of it received."""
    before, piece = drip(kind, OK)().__next__(), DRIPS[kind][1]
    many = piece * max(1, 4096 // len(piece))
    policy = RetryPolicy(request_s=20, give_up_after_s=0)
    with RawServer(lambda: forever(before, many), pause_s=0) as server, in_time(20):
        try:
            HttpStore(server.url, policy).read_file(LISTING, 1000)
        except RequestError as error:
            assert "too slow" not in error.reason
        assert server.sent < 16 << 20  # the buffers of the sockets, which nobody reads


def test_a_silent_server_ends_in_time(tmp_path: Path) -> None:
    with RawServer(lambda: iter([b"", *[b""] * 10**6])) as server, in_time(20):
        for url in (server.url, server.url.replace("http:", "https:")):  # no TLS handshake either
            with pytest.raises(CacheError, match=r"no byte for too|no connection in|too slow"):
                RemoteCache(url, RemoteOptions(mirror=tmp_path), POLICY).copy_tables()


def test_a_tls_handshake_that_drips_ends_in_time(tmp_path: Path) -> None:
    record = b"\x16\x03\x03\x40\x00"  # the head of a record of 16 KiB
    with RawServer(lambda: forever(record, b"\x02")) as server, in_time(20):
        url = server.url.replace("http:", "https:")
        with pytest.raises(CacheError, match=r"no connection in time|too slow"):
            RemoteCache(url, RemoteOptions(mirror=tmp_path), POLICY).copy_tables()


def test_https_is_read_and_its_certificate_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = make_space(tmp_path / "there")
    fill(space, range(SLOTS))
    share(CacheRoot(tmp_path / "there"))
    certificate = tmp_path / "certificate.pem"
    certificate.write_text(CERTIFICATE)

    def remote() -> RemoteCache:
        return RemoteCache(
            url, RemoteOptions(mirror=tmp_path / "here"), RetryPolicy(give_up_after_s=0)
        )

    with WebServer(tmp_path / "there", tls=certificate) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(UnreachableError, match="certificate verify failed"):
            remote().copy_tables()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert remote().open_reader(None).logical_hash()


# ---- lookups, and clients of other libraries


def test_a_name_lookup_without_end_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def look_up(*_: object, **__: object) -> list[Any]:
        ended.wait(20)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with in_time(20), pytest.raises(CacheError, match="too slow"):
        RemoteCache("https://a.test/b", RemoteOptions(mirror=tmp_path), POLICY).copy_tables()
    ended.set()


@pytest.mark.parametrize("kind", ["value of a header", "interim answers", "chunk size", "body"])
@pytest.mark.parametrize("scheme", ["s3", "hf"])
def test_other_clients_end_in_time(
    scheme: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawServer(drip(kind, OK)) as server, in_time(20, memory=4 << 30):
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        url = {"s3": "s3://bucket/x", "hf": "hf://datasets/o/n"}[scheme]
        with pytest.raises(CacheError):
            RemoteCache(url, RemoteOptions(mirror=tmp_path), POLICY).copy_tables()


def test_what_a_call_apart_returns_and_raises() -> None:
    assert apart(lambda: 3, Deadline(9)) == 3
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0, Deadline(9))


def test_a_part_of_an_exchange_ends_no_later_than_all_of_it() -> None:
    assert Deadline(1).within(99).left() <= 1
    stop = threading.Event()
    part = Deadline(99, stop).within(1)
    assert part.left() <= 1
    stop.set()
    with pytest.raises(RequestError, match="cancelled"):
        part.left()


def test_text_of_a_server_is_short_and_printable() -> None:
    shown = plain_text("a\nb \x1b[31m\u202eé\x00\ud800" + "x" * 10**6)
    assert shown.startswith("a b \\x1b[31m\\u202e\\xe9\\x00\\ud800xxx") and len(shown) == 160


# ---- Ctrl-C


@pytest.mark.parametrize("where", ["the listing", "its tables", "s3", "hf"])
def test_one_ctrl_c_ends_a_command(where: str, tmp_path: Path) -> None:
    space = make_space(tmp_path / "there")
    fill(space, range(SLOTS))
    share(CacheRoot(tmp_path / "there"))
    with RawServer(drip("body", PART)) as raw, WebServer(tmp_path / "there") as server:

        def hang(handler: Any, _path: str) -> None:
            raw.accepted.set()
            handler.wfile.write(b"HTTP/1.1 206 OK\r\nContent-Length: 9\r\n\r\n")
            time.sleep(20)

        server.acts["/spaces/"] = hang
        url = {"s3": "s3://b/x", "hf": "hf://datasets/o/n", "its tables": server.url}
        words = ["-m", "cache.ls", "--features", url.get(where, raw.url), "--mirror", tmp_path]
        elsewhere = environment(raw.url) | {"HF_ENDPOINT": raw.url}
        with subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | elsewhere,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert raw.accepted.wait(30)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            _, said = process.communicate(timeout=20)
    assert time.monotonic() - started < 8  # a second, on an idle machine
    assert process.returncode == 130, said
    assert said.endswith("interrupted\n") and "Traceback" not in said
    assert not list((tmp_path).rglob("*.partial"))
