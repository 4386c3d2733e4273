"""The HTTP session of a `Fetcher`, which connects to allowed addresses only.

A list of URLs from the open web must not make this machine connect to its own services, its neighbours or
the metadata service of its cloud. Addresses are checked twice: after the name lookup, and again where the
socket is made. So a name that changes its address in between (DNS rebinding) is no way round the check.
`cache.remote.net` lists the allowed addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
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

from cache.errors import RefusedAddressError
from cache.remote.net import refusal_reason, tls_context
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
    config: DownloadConfig, dns: DnsThreads, sockets: CheckedSockets
) -> aiohttp.ClientSession:
    """Return a session without cookies, proxies, redirects, decompression or limits of its own."""
    connector = aiohttp.TCPConnector(
        limit=0,  # `HostLimits` limits the connections
        resolver=CheckedResolver(dns, config.allow_private, config.connect_s),
        socket_factory=sockets.make,
        ttl_dns_cache=DNS_CACHE_S,
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=tls_context(),
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
    """Resolve names to their allowed addresses."""

    def __init__(self, dns: DnsThreads, allow_private: bool, timeout_s: float) -> None:
        """Look names up in `dns`, for `timeout_s` seconds at most."""
        self._dns, self._allow_private, self._timeout_s = dns, allow_private, timeout_s

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
                found = await self._dns.lookup(host, port)
        except TimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer") from None
        addresses = [info[4][0] for info in found if info[0] in (socket.AF_INET, socket.AF_INET6)]
        refused = {address: refusal_reason(address, self._allow_private) for address in addresses}
        allowed = [address for address, reason in refused.items() if reason is None]
        if not allowed and refused:
            raise RefusedAddressError(str(next(iter(refused.values()))))
        if not allowed:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
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


class DnsThreads:
    """Call `getaddrinfo` in daemon threads.

    The default executor of the event loop has few threads on a small machine, and a name server that does
    not answer blocks each of them for many seconds. Python also waits for it when it ends, but not for these
    threads.
    """

    THREADS = 64
    """Largest number of threads: one for each of the default number of connections."""

    def __init__(self) -> None:
        """Start no thread before the first lookup."""
        self._queue: queue.SimpleQueue[tuple[asyncio.Future[list[Any]], str, int] | None]
        self._queue = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0

    async def lookup(self, host: str, port: int) -> list[Any]:
        """Return what `getaddrinfo` returns.

        Raises:
            OSError: what it raises.
        """
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._unfinished += 1  # until a thread has finished, even if the caller was cancelled
        if self._unfinished > self._threads and self._threads < self.THREADS:
            self._threads += 1
            threading.Thread(target=self._work, name="lookup", daemon=True).start()
        self._queue.put((future, host, port))
        return await future

    def close(self) -> None:
        """Let each thread end after its lookup."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            future, host, port = job
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
                future.get_loop().call_soon_threadsafe(self._finish, future, found, error)

    def _finish(
        self, future: asyncio.Future[list[Any]], found: list[Any], error: OSError | None
    ) -> None:
        self._unfinished -= 1
        if future.done():
            return
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)
