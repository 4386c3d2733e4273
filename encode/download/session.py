"""Which addresses may be connected to, and the two places where that is decided: the resolver, and the
socket itself.

A list of URLs from the open web must not make this machine talk to its own services, its neighbours, or
the metadata service of its cloud. Names are judged by the addresses they lead to, and the address judged
is the one connected to, so a name that changes its address between check and use (DNS rebinding) is no
way round. Which they are is in `cache.remote.net`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from cache.remote.net import RefusedAddressError, refusal_reason, tls_context
from encode.download.config import DownloadConfig

__all__ = ["CheckedResolver", "Lookups", "checked_socket"]


def checked_socket(allow_private: bool, addr_info: tuple[Any, ...]) -> socket.socket:
    """The socket for one connection attempt, as `TCPConnector(socket_factory=partial(...))` wants it.

    Raises:
        RefusedAddressError: the rules keep us from this address.
    """
    family, kind, protocol, _, address = addr_info
    if what := refusal_reason(address[0], allow_private):
        raise RefusedAddressError(what)
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    return made


class Lookups:
    """`getaddrinfo` in daemon threads of its own.

    The event loop's default executor has few threads on a small machine, and a name server that does not
    answer holds each of them for many seconds; and it is joined when Python ends, these are not.
    """

    THREADS = 64
    """At most: as many lookups as connections by default."""

    def __init__(self) -> None:
        """No thread is started before it is needed."""
        self._asked: queue.SimpleQueue[tuple[asyncio.Future[list[Any]], str, int] | None]
        self._asked = queue.SimpleQueue()
        self._threads = 0
        self._open = 0

    async def find(self, host: str, port: int) -> list[Any]:
        """What `getaddrinfo` answers.

        Raises:
            OSError: what it raises.
        """
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._open += 1  # until a thread is done with it, even when nobody waits any more
        if self._open > self._threads and self._threads < self.THREADS:
            self._threads += 1
            threading.Thread(target=self._work, name="lookup", daemon=True).start()
        self._asked.put((future, host, port))
        return await future

    def close(self) -> None:
        """Let the threads end, each once its lookup ends."""
        for _ in range(self._threads):
            self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            future, host, port = asked
            found: list[Any] = []
            error: OSError | None = None
            try:
                if not future.cancelled():
                    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as raised:
                error = raised
            except UnicodeError:  # labels that no name can have
                error = socket.gaierror(socket.EAI_NONAME, "not a host name")
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                future.get_loop().call_soon_threadsafe(self._answer, future, found, error)

    def _answer(
        self, future: asyncio.Future[list[Any]], found: list[Any], error: OSError | None
    ) -> None:
        self._open -= 1
        if future.done():
            return
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)


class CheckedResolver(AbstractResolver):
    """Names to those of their addresses that the rules allow."""

    def __init__(self, lookups: Lookups, allow_private: bool, timeout_s: float) -> None:
        """With whose threads, which addresses, and how long a name server may take."""
        self._lookups, self._timeout_s = lookups, timeout_s
        self._refusal_reason = functools.partial(refusal_reason, allow_private=allow_private)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of `host`.

        Raises:
            RefusedAddressError: it has only such as the rules keep us from.
            OSError: it has none.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._lookups.find(host, port)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer") from None
        addresses = list(dict.fromkeys(info[4][0] for info in found if _is_inet(info, family)))
        allowed = [address for address in addresses if not self._refusal_reason(address)]
        if not allowed and addresses:
            raise RefusedAddressError(str(self._refusal_reason(addresses[0])))
        if not allowed:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        return [_result(host, address, port) for address in allowed]

    async def close(self) -> None:
        """Nothing is kept."""


def _is_inet(info: Sequence[Any], family: int) -> bool:
    wanted = (socket.AF_INET, socket.AF_INET6) if family == socket.AF_UNSPEC else (family,)
    return info[0] in wanted


def _result(host: str, address: str, port: int) -> ResolveResult:
    return ResolveResult(
        hostname=host,
        host=address,
        port=port,
        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
        proto=socket.IPPROTO_TCP,
        flags=socket.AI_NUMERICHOST,
    )


KEEP_ALIVE_S = 5.0


GOODBYE_S = 1.0


DNS_CACHE_S = 60


HEADER_BYTES = 32 << 10  # aiohttp's own 8190 is less than some sites' security policies need


class Sockets:
    """All that were made, so that none is left: aiohttp gives up those that still say goodbye to TLS."""

    def __init__(self, allow_private: bool) -> None:
        """To private addresses too, or not."""
        self._allow_private = allow_private
        self._made: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def make(self, addr_info: tuple[Any, ...]) -> socket.socket:
        """One for aiohttp's `socket_factory`; raises RefusedAddressError."""
        made = checked_socket(self._allow_private, addr_info)
        self._made.add(made)
        return made

    async def close(self) -> None:
        """Hang up, and let the transports notice."""
        for made in list(self._made):
            with contextlib.suppress(OSError):  # it is closed, or was never connected
                made.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + GOODBYE_S
        while any(made.fileno() >= 0 for made in self._made) and time.monotonic() < deadline:
            await asyncio.sleep(0.002)


class _NoCookies(aiohttp.DummyCookieJar):
    """Not even read: aiohttp's log would complain of each that is malformed."""

    def update_cookies_from_headers(self, headers: Sequence[str], response_url: URL) -> None:
        pass


def new_session(rules: DownloadConfig, lookups: Lookups, sockets: Sockets) -> aiohttp.ClientSession:
    """A session that does nothing by itself: no cookies, proxies, redirects, unpacking, limits."""
    connector = aiohttp.TCPConnector(
        limit=0,  # `HostLimits` keeps the limits
        resolver=CheckedResolver(lookups, rules.allow_private, rules.connect_s),
        socket_factory=sockets.make,
        ttl_dns_cache=DNS_CACHE_S,
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=tls_context(),
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=_NoCookies(),
        # `*/*`: sites that can choose shall send the original, not one made for a browser.
        headers={"User-Agent": rules.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=rules.connect_s, sock_read=rules.read_s
        ),
        auto_decompress=False,
        trust_env=False,
        max_line_size=HEADER_BYTES,
        max_field_size=HEADER_BYTES,
    )
