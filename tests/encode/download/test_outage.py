"""Downloads wait while the network is down; a list of dead hosts costs one wait.

outage = Outage(max_wait_s=600)
await outage.wait_if_down(error)    # True: the network was down, try again
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from typing import Any

import pytest

import encode.download.outage
from encode.download.client import Fetched
from encode.download.outage import HOSTS, Outage
from encode.errors import DownloadError
from tests.support.web_server import MakeFetcher, TroubleServer, outcome, wait_until

pytestmark = pytest.mark.slow


class Names:
    """A name server: *.test is the loopback address while the network is up, *.dead.test does not exist."""

    def __init__(self) -> None:
        self.network_is_up = threading.Event()
        self.lookups = 0
        self._real = socket.getaddrinfo

    def lookup(self, host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        self.lookups += 1
        if host.endswith(".dead.test") or (
            host.endswith(".test") and not self.network_is_up.is_set()
        ):
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure")
        return self._real("127.0.0.1" if host.endswith(".test") else host, port, *args, **kwargs)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    made = Names()
    monkeypatch.setattr(socket, "getaddrinfo", made.lookup)
    monkeypatch.setattr(encode.download.outage, "PROBE_S", 0.2)
    return made


def url_at(server: TroubleServer, host: str) -> str:
    return server.url("photo-0").replace("127.0.0.1", host)


def failure(host: str, *, unreachable: bool) -> DownloadError:
    error = DownloadError("no connection", unreachable=unreachable)
    error.host = host
    return error


def test_downloads_survive_an_outage(
    server: TroubleServer, names: Names, caplog: pytest.LogCaptureFixture, fetcher: MakeFetcher
) -> None:
    one = fetcher(outage_s=30, tries=2)
    started = [one.submit(url_at(server, f"h{i}.test")) for i in range(HOSTS * 2)]
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: "network may be down" in caplog.text)
        time.sleep(0.5)
        failed = sum(future.done() for future in started)
        names.network_is_up.set()
        got = [outcome(future) for future in started]
        wait_until(lambda: "the network is back" in caplog.text)
    assert failed == 0
    assert all(isinstance(one, Fetched) for one in got)
    assert caplog.text.count("network may be down") == 1


def test_an_endless_outage_is_waited_for_once(
    server: TroubleServer, names: Names, caplog: pytest.LogCaptureFixture, fetcher: MakeFetcher
) -> None:
    one = fetcher(outage_s=0.5, tries=2)
    for _ in range(2):
        start = time.monotonic()
        started = [one.submit(url_at(server, f"h{i}.dead.test")) for i in range(HOSTS * 3)]
        assert {str(outcome(future)) for future in started} == {
            "temporary failure of the name lookup"
        }
        assert time.monotonic() - start < 5
    assert caplog.text.count("network may be down") == 1


def test_a_host_that_answers_shows_that_the_network_is_up(
    server: TroubleServer, names: Names, fetcher: MakeFetcher
) -> None:
    names.network_is_up.set()
    one = fetcher(outage_s=30, tries=1, connections=2, per_host=2)
    urls = [
        url_at(server, host) for i in range(HOSTS * 2) for host in (f"h{i}.dead.test", "here.test")
    ]
    start = time.monotonic()
    got = [outcome(future) for future in [one.submit(url) for url in urls]]
    assert time.monotonic() - start < 5
    assert sum(isinstance(one, Fetched) for one in got) == HOSTS * 2


def test_closing_does_not_wait_for_the_network(
    server: TroubleServer, names: Names, fetcher: MakeFetcher
) -> None:
    one = fetcher(outage_s=600)
    started = [one.submit(url_at(server, f"h{i}.test")) for i in range(HOSTS)]
    wait_until(lambda: names.lookups >= HOSTS)
    time.sleep(0.1)
    start = time.monotonic()
    one.close()
    assert time.monotonic() - start < 1
    assert all(future.cancelled() for future in started)


def test_each_wait_in_vain_raises_the_number_of_hosts_for_an_alarm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> list[int]:
        outage = Outage(0.0)
        alarms = []
        for _ in range(3):
            before = caplog.text.count("network may be down")
            for number in range(1000):
                assert not await outage.wait_if_down(failure(f"host{number}", unreachable=True))
                if caplog.text.count("network may be down") > before:
                    alarms.append(number + 1)
                    before += 1
            assert not await outage.wait_if_down(failure("alive", unreachable=False))
        return alarms

    assert asyncio.run(scenario()) == [HOSTS, 4 * HOSTS, 16 * HOSTS]


def test_one_unreachable_host_is_not_an_outage() -> None:
    async def scenario() -> None:
        outage = Outage(600)
        for _ in range(1000):
            assert not await outage.wait_if_down(failure("host", unreachable=True))

    asyncio.run(asyncio.wait_for(scenario(), 5))
