"""The HTTP session of a `Fetcher`, which connects to allowed addresses only.

A list of URLs from the open web must not make this machine connect to its own services, its neighbours or
the metadata service of its cloud. Addresses are checked twice: after the name lookup, and again where the
socket is made. So a name that changes its address in between (DNS rebinding) is no way round the check.
`cache.remote.net` lists the allowed addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from cache.errors import RefusedAddressError
from cache.remote.net import refusal_reason
from encode.download.config import DownloadConfig

USER_AGENT = "nanoMolmo2/0.1 (fetches each image of a training set once; honours Retry-After)"

KEEP_ALIVE_S = 5.0
"""Seconds that an idle connection stays open."""

SHUTDOWN_S = 1.0
"""Longest time in seconds that closing waits for sockets to close."""

DNS_CACHE_S = 60
"""Seconds that the result of a name lookup is reused."""

HEADER_BYTES = 32 << 10
"""Largest header line."""
# aiohttp's default of 8190 is too small for the security policies of some sites.


def new_session(
    config: DownloadConfig, sockets: CheckedSockets, tls: ssl.SSLContext
) -> aiohttp.ClientSession:
    """Return a session without cookies, proxies, redirects, decompression or limits of its own."""
    connector = aiohttp.TCPConnector(
        limit=0,  # `HostLimits` limits the connections
        resolver=CheckedResolver(config.allow_private, config.connect_s),
        socket_factory=sockets.make,
        ttl_dns_cache=DNS_CACHE_S,
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=tls,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=_NoCookies(),
        # With `*/*`, sites that choose a format send the original file, not one made for a browser.
        headers={"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=config.connect_s, sock_read=config.read_s
        ),
        auto_decompress=False,
        trust_env=False,
        max_line_size=HEADER_BYTES,
        max_field_size=HEADER_BYTES,
    )


class _NoCookies(aiohttp.DummyCookieJar):
    """A cookie jar that does not parse cookies: aiohttp would log each malformed one."""

    def update_cookies_from_headers(self, headers: Sequence[str], response_url: URL) -> None:
        pass


class CheckedSockets:
    """Make sockets for allowed addresses only, and close them all at the end.

    aiohttp does not wait for connections that are still ending TLS, so their sockets would stay open.
    """

    def __init__(self, allow_private: bool) -> None:
        """Allow private and loopback addresses too, or global addresses only."""
        self._allow_private = allow_private
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def make(self, addr_info: tuple[Any, ...]) -> socket.socket:
        """Return a non-blocking socket, as aiohttp's `socket_factory`.

        Args:
            addr_info: one entry of `getaddrinfo`.

        Raises:
            RefusedAddressError: the address is not allowed.
        """
        family, socket_type, protocol, _, address = addr_info
        if what := refusal_reason(address[0], self._allow_private):
            raise RefusedAddressError(what)
        made = socket.socket(family, socket_type, protocol)
        made.setblocking(False)
        self._sockets.add(made)
        return made

    async def close(self) -> None:
        """Shut all sockets down and wait until they are closed, SHUTDOWN_S at most."""
        for made in list(self._sockets):
            with contextlib.suppress(OSError):  # closed, or never connected
                made.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + SHUTDOWN_S
        while any(made.fileno() >= 0 for made in self._sockets) and time.monotonic() < deadline:
            await asyncio.sleep(0.002)


class CheckedResolver(AbstractResolver):
    """Resolve names to their allowed addresses, with `getaddrinfo` in daemon threads.

    The default executor of the event loop has few threads on a small machine, and a name server that does
    not answer blocks each of them for many seconds. Python also waits for it when it ends, but not for daemon
    threads.
    """

    THREADS = 64
    """Largest number of threads: one for each of the default number of connections."""

    def __init__(self, allow_private: bool, timeout_s: float) -> None:
        """Look each name up for `timeout_s` seconds at most."""
        self._allow_private, self._timeout_s = allow_private, timeout_s
        self._free_threads = asyncio.Semaphore(self.THREADS)

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 - the connector sets none
    ) -> list[ResolveResult]:
        """Return the allowed addresses of `host`.

        Raises:
            RefusedAddressError: none of its addresses is allowed.
            OSError: it has no address.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._lookup(host, port)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer") from None
        reasons = {
            info[4][0]: refusal_reason(info[4][0], self._allow_private)
            for info in found
            if info[0] in (socket.AF_INET, socket.AF_INET6)
        }
        if not reasons:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        allowed = [address for address, reason in reasons.items() if reason is None]
        if not allowed:
            raise RefusedAddressError(str(next(iter(reasons.values()))))
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in allowed
        ]

    async def close(self) -> None:
        """Do nothing: the resolver holds no resources."""

    async def _lookup(self, host: str, port: int) -> list[Any]:
        """Return what `getaddrinfo` returns, or raise its OSError."""
        # Released when the thread ends: a time-out cancels this call, but not `getaddrinfo`.
        await self._free_threads.acquire()
        future: asyncio.Future[list[Any] | OSError] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._work, args=(future, host, port), daemon=True).start()
        if isinstance(found := await future, OSError):
            raise found
        return found

    def _work(self, future: asyncio.Future[list[Any] | OSError], host: str, port: int) -> None:
        found: list[Any] | OSError
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            found = error
        except UnicodeError:  # labels that no name can have
            found = socket.gaierror(socket.EAI_NONAME, "not a host name")
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            future.get_loop().call_soon_threadsafe(self._finish, future, found)

    def _finish(
        self, future: asyncio.Future[list[Any] | OSError], found: list[Any] | OSError
    ) -> None:
        self._free_threads.release()
        if not future.done():  # cancelled by the time-out
            future.set_result(found)
