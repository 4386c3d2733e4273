"""The client session of a fetcher, and the sockets below it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
import weakref
from collections.abc import Sequence
from typing import Any

import aiohttp
import certifi
from yarl import URL

from encode.download.config import FetchRules
from encode.download.session import CheckedResolver, Lookups, checked_socket

__all__ = ["Sockets", "new_session"]

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
        """One for aiohttp's `socket_factory`; raises RefusedAddress."""
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


def new_session(rules: FetchRules, lookups: Lookups, sockets: Sockets) -> aiohttp.ClientSession:
    """A session that does nothing by itself: no cookies, proxies, redirects, unpacking, limits."""
    connector = aiohttp.TCPConnector(
        limit=0,  # `Lanes` keeps the limits
        resolver=CheckedResolver(lookups, rules.allow_private, rules.connect_s),
        socket_factory=sockets.make,
        ttl_dns_cache=DNS_CACHE_S,
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=_trusted(),
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


def _trusted() -> ssl.SSLContext:
    """The system's certificates, or certifi's where Python finds none (macOS, standalone builds)."""
    context = ssl.create_default_context()
    if not context.get_ca_certs():
        context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(("http/1.1",))
    return context
