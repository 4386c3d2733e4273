"""No URL, name or redirect leads to an address that is not allowed.

sockets = CheckedSockets(allow_private=False)
sockets.make(getaddrinfo("localhost", 80)[0])   # RefusedAddressError
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cache.remote.net
from cache.errors import RefusedAddressError
from encode.download.client import Fetched, Fetcher
from encode.download.session import CheckedResolver, CheckedSockets
from tests.support.web_server import CERTIFICATE, MakeFetcher, TroubleServer, outcome, redirect

pytestmark = pytest.mark.slow


Names = dict[str, list[list[str]]]
"""Name -> the addresses of each lookup in turn; the last ones repeat."""


def test_no_socket_is_made_for_a_refused_address() -> None:
    def info(address: str) -> tuple[Any, ...]:
        return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, 80))

    with pytest.raises(RefusedAddressError, match=r"a loopback address 127.0.0.1"):
        CheckedSockets(allow_private=False).make(info("127.0.0.1"))
    with CheckedSockets(allow_private=True).make(info("127.0.0.1")) as made:
        assert not made.getblocking()


# ---- with a server


@pytest.fixture(scope="module")
def server() -> Iterator[TroubleServer]:
    extra = {
        "to-private": redirect("http://10.0.0.1/x?k=SECRET"),
        "to-a-name": redirect("http://inside.test/"),
    }
    with TroubleServer(photos=2, extra=extra) as one:
        yield one


@pytest.fixture
def strict(fetcher: MakeFetcher) -> Fetcher:
    """Return a fetcher without --allow-private."""
    return fetcher(allow_private=False)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Return a table, empty at first, that lookups use."""
    table: Names = {}
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        if host not in table:
            return real(host, port, *args, **kwargs)
        answers = table[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [line for address in found for line in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return table


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat 127.0.0.1, but no other loopback address, as global."""
    public = (ipaddress.IPv4Network("127.0.0.1/32"), "global")
    monkeypatch.setattr(cache.remote.net, "_NETWORKS", (public, *cache.remote.net._NETWORKS))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[0:0:0:0:0:ffff:7f00:1]",
        "[2002:7f00:1::]",
        "[64:ff9b::7f00:1]",
        "①②⑦.0.0.1",
    ],
)
def test_no_spelling_of_this_machine_is_contacted(
    host: str, server: TroubleServer, strict: Fetcher
) -> None:
    before = server.connections
    port = server.base.rpartition(":")[2]
    got = outcome(strict.submit(f"http://{host}:{port}/photo-0"))
    assert not isinstance(got, Fetched)
    assert got.stage == "fetch"
    reasons = ("which is not allowed", "an invalid URL", "no such host")
    assert got.reason.endswith(reasons), got.reason
    assert server.connections == before


def test_a_name_is_checked_by_its_addresses(
    server: TroubleServer, strict: Fetcher, names: Names
) -> None:
    port = server.base.rpartition(":")[2]
    names["inside.test"] = [["127.0.0.1", "10.0.0.1"]]
    names["meta.test"] = [["169.254.169.254"]]
    names["six.test"] = [["::ffff:127.0.0.1"]]
    names["nobody.test"] = [[]]
    before = server.connections
    for name, said in {
        "inside.test": "a loopback address 127.0.0.1, which is not allowed",
        "meta.test": "a link-local address 169.254.169.254, which is not allowed",
        "six.test": "a loopback address ::ffff:127.0.0.1, which is not allowed",
        "nobody.test": "no such host",
    }.items():
        assert str(outcome(strict.submit(f"http://{name}:{port}/photo-0"))) == said
    assert server.connections == before


def test_only_the_allowed_addresses_of_a_name_are_used(
    server: TroubleServer, strict: Fetcher, names: Names, loopback_is_public: None
) -> None:
    port = server.base.rpartition(":")[2]
    names["mixed.test"] = [["169.254.169.254", "10.0.0.1", "127.0.0.2", "127.0.0.1"]]
    assert isinstance(outcome(strict.submit(f"http://mixed.test:{port}/photo-0")), Fetched)


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        ("to-private", "private address 10.0.0.1"),
        ("to-a-name", "private address 10.0.0.2"),
        ("redirect-to-link-local", "link-local address 169.254.169.254"),
    ],
)
def test_redirects_are_checked(
    kind: str,
    address: str,
    server: TroubleServer,
    strict: Fetcher,
    names: Names,
    loopback_is_public: None,
) -> None:
    names["inside.test"] = [["10.0.0.2"]]
    got = outcome(strict.submit(server.url(kind)))
    assert str(got) == f"redirect to a {address}, which is not allowed"


def test_dns_rebinding_is_refused(
    server: TroubleServer, strict: Fetcher, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that returns a refused address cannot make a socket connect to it."""
    port = server.base.rpartition(":")[2]
    names["rebind.test"] = [["1.1.1.1"], ["127.0.0.1"]]

    async def lie(self: Any, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        found = socket.getaddrinfo(host, port)
        if found[0][4][0] == "1.1.1.1":
            found = socket.getaddrinfo(host, port)  # between check and use
        keys = ("hostname", "host", "port", "family", "proto", "flags")
        return [dict(zip(keys, (host, found[0][4][0], port, socket.AF_INET, 0, 0), strict=True))]

    monkeypatch.setattr(CheckedResolver, "resolve", lie)
    before = server.connections
    got = outcome(strict.submit(f"http://rebind.test:{port}/photo-0"))
    assert str(got) == "a loopback address 127.0.0.1, which is not allowed"
    assert server.connections == before


# ---- name servers


def test_a_name_server_that_does_not_answer_delays_no_other_host(
    server: TroubleServer, monkeypatch: pytest.MonkeyPatch, fetcher: MakeFetcher
) -> None:
    real, answer = socket.getaddrinfo, threading.Event()

    def lookup(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        if host.endswith(".slow.test"):
            answer.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "timed out")
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    one = fetcher(connect_s=3, total_s=20, tries=1, outage_s=0)
    stuck = [one.submit(f"http://{i}.slow.test/") for i in range(20)]
    time.sleep(0.1)
    start = time.monotonic()
    url = server.url("photo-1").replace("127.0.0.1", "localhost")
    assert isinstance(outcome(one.submit(url)), Fetched)
    assert time.monotonic() - start < 2.5
    for future in stuck:
        assert str(outcome(future)) == "temporary failure of the name lookup"
    answer.set()


# ---- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


def test_certificates_are_verified(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, fetcher: MakeFetcher
) -> None:
    with TroubleServer(photos=1, tls=certificate) as server:
        one = fetcher()
        got = outcome(one.submit(server.url("photo-0")))
        assert str(got) == "TLS certificate refused: self-signed certificate"
        assert server.counts["/photo-0"] == 0

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        one = fetcher()
        for url in (server.url("photo-0"), server.url("photo-0").replace("127.0.0.1", "localhost")):
            assert isinstance(outcome(one.submit(url)), Fetched)
        for kind in ("stall", "hang-up", "reset-in-body", "404"):
            assert not isinstance(outcome(one.submit(server.url(kind))), Fetched)


def test_https_to_a_server_without_tls(server: TroubleServer, fetcher: MakeFetcher) -> None:
    one = fetcher()
    got = outcome(one.submit(server.url("photo-0").replace("http:", "https:")))
    assert str(got).startswith("TLS: ")
