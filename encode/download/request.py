"""One try to fetch one URL: ask, follow redirects, read the body, check it; what went wrong, in words."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import socket
import ssl
from dataclasses import dataclass

import aiohttp
from yarl import URL

from cache.remote.net import RefusedAddressError, literal_address, refusal_reason
from cache.remote.retry import retry_after
from encode.download.config import DownloadConfig, DownloadError
from encode.download.host_limits import HostLimits
from encode.download.memory_budget import Lease
from encode.download.session import KEEP_ALIVE_S
from encode.download.urls import host_of, redirect_url

__all__ = ["Body", "Exchange"]

_REDIRECTS = (301, 302, 303, 307, 308)
_WHOLE = (200, 203)
_PASSING = (408, 425, 429)
_NO_CODING = ("", "identity", "none", "binary", "utf-8")
"""Of Content-Encoding: what leaves the bytes as they are, whether or not it is in the standard."""
_CHUNKED = ("", "identity", "chunked")
_UNREACHABLE = (errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)


@dataclass(frozen=True, kw_only=True)
class Body:
    """A whole answer."""

    data: bytes
    """As sent, and as the known sha256 wants it."""
    url: URL
    """Who sent it, after all redirects."""


class Exchange:
    """Tries, with one client session."""

    def __init__(
        self, session: aiohttp.ClientSession, lanes: HostLimits, rules: DownloadConfig
    ) -> None:
        """The session must not follow redirects, decode bodies or keep cookies by itself."""
        self._session, self._lanes, self._rules = session, lanes, rules

    async def once(self, url: URL, lease: Lease, sha256: str | None) -> Body:
        """Fetch `url`, within the bytes of `lease`.

        Raises:
            DownloadError: it failed.
            NoRoomError: it needs more bytes than there are.
        """
        left_s = self._rules.total_s
        seen: set[URL] = set()
        while True:
            if url in seen:
                raise DownloadError("redirects in a circle")
            if len(seen) > self._rules.redirects:
                raise DownloadError(f"more than {self._rules.redirects} redirects")
            seen.add(url)
            host = host_of(url)
            clock = asyncio.get_running_loop().time
            try:
                async with self._lanes.turn(host):
                    lease.check()
                    begun = clock()
                    answer = await self._timed(url, lease, sha256, left_s, len(seen) > 1)
                    left_s = max(0.001, left_s - (clock() - begun))
            except DownloadError as trouble:
                trouble.host = host
                raise
            if isinstance(answer, Body):
                return answer
            url = redirect_url(url, answer)

    async def _timed(
        self, url: URL, lease: Lease, sha256: str | None, left_s: float, redirected: bool
    ) -> Body | str:
        """What `url` answers: a body, or where to go."""
        self._check_literal(url, redirected)
        trouble: DownloadError
        try:
            async with asyncio.timeout(left_s) as limit:
                return await self._ask(url, lease, sha256)
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            if limit.expired():
                said = f"not finished within {self._rules.total_s:g} s"
                trouble = DownloadError(said, again=True)
            else:
                trouble = _describe(error, self._rules, redirected)
        raise trouble  # outside `except`: the error would keep the body's parts in memory

    async def _ask(self, url: URL, lease: Lease, sha256: str | None) -> Body | str:
        host = host_of(url)
        # For a host asked once, keeping the connection is of no use: see `lanes.RECENT`.
        close = {} if self._lanes.wanted(host) else {"Connection": "close"}
        async with self._session.get(url, allow_redirects=False, headers=close) as response:
            connection = response.connection  # None once the whole answer is there
            transport = connection.transport if connection else None
            try:
                return await self._read(response, host, lease, sha256)
            except BaseException:
                if transport is not None:
                    transport.abort()  # TLS would wait for the other side to say goodbye
                raise

    async def _read(
        self, response: aiohttp.ClientResponse, host: str, lease: Lease, sha256: str | None
    ) -> Body | str:
        status = response.status
        if status in _REDIRECTS:
            location = response.headers.get("Location")
            if location is None:
                raise DownloadError(f"HTTP {status} that does not say where to")
            return location
        if status not in _WHOLE:
            raise self._status_trouble(response, host)
        for header, plain in (("Content-Encoding", _NO_CODING), ("Transfer-Encoding", _CHUNKED)):
            coding = response.headers.get(header, "").strip().lower()
            if coding not in plain:
                coding = re.sub(r"[^a-z0-9, -]", "", coding)[:20]
                raise DownloadError(f"{header} {coding}, though none was asked for")
        data = await self._read_body(response, lease)
        if sha256 is not None:
            # Large bodies in a thread: the loop has others to serve.
            found = _sha256(data) if len(data) < 1 << 20 else await asyncio.to_thread(_sha256, data)
            if found != sha256.strip().lower():
                said = f"other bytes than recorded: sha256 {found[:12]}..., not {sha256[:12]}..."
                raise DownloadError(said, stage="verify")
        return Body(data=data, url=response.url)

    async def _read_body(self, response: aiohttp.ClientResponse, lease: Lease) -> bytes:
        limit = self._rules.max_bytes
        length = response.content_length
        if length is not None:
            if length > limit:
                raise DownloadError(f"a body of {length} bytes, more than {limit}")
            lease.grow(length, length)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in response.content.iter_any():
                size += len(part)
                if size > limit:
                    raise DownloadError(f"a body of more than {limit} bytes")
                if size > lease.held:
                    lease.grow(min(limit, 2 * size), limit)
                parts.append(part)
            return b"".join(parts)
        finally:
            parts.clear()  # an error keeps this frame alive until garbage is collected

    def _status_trouble(self, response: aiohttp.ClientResponse, host: str) -> DownloadError:
        status = response.status
        said = f"HTTP {status}"
        if status not in _PASSING and not 500 <= status <= 599:
            return DownloadError(said)
        wait_s = retry_after(response.headers.get("Retry-After"))
        if status == 429 or wait_s > 0:
            self._lanes.pause(host, wait_s)
        if wait_s > self._rules.retry_after_s:
            return DownloadError(f"{said}, asks to wait {wait_s:.0f} s", wait_s=wait_s)
        return DownloadError(said, again=True, wait_s=wait_s)

    def _check_literal(self, url: URL, redirected: bool) -> None:
        """An address in the URL itself; names are judged when they are looked up."""
        address = literal_address(url.host or "")
        what = refusal_reason(address, self._rules.allow_private) if address else None
        if what:
            raise DownloadError(_refused(what, redirected))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _refused(what: str, redirected: bool) -> str:
    return f"redirect to {what}" if redirected else f"{what} is not fetched from"


def _describe(error: Exception, rules: DownloadConfig, redirected: bool) -> DownloadError:
    """What aiohttp and the system raise, in our words: theirs may quote the URL."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, RefusedAddressError):
        return DownloadError(_refused(cause.what, redirected))
    if isinstance(cause, socket.gaierror):
        if cause.errno in (socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM):
            return _silence("the host's name cannot be looked up for now")
        return DownloadError("no such host")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        found = error.certificate_error
        said = found.verify_message if isinstance(found, ssl.SSLCertVerificationError) else ""
        return DownloadError(f"TLS certificate refused: {_plain(said) or 'no reason given'}")
    if isinstance(cause, ssl.SSLError):
        return DownloadError(f"TLS: {_plain(cause.reason or 'failed').lower().replace('_', ' ')}")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return _silence(f"no connection within {rules.connect_s:g} s")
    if isinstance(error, aiohttp.SocketTimeoutError):
        return DownloadError(f"timed out after {rules.read_s:g} s without a byte", again=True)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return DownloadError("connection closed without an answer", again=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        return _no_connection(cause)
    if isinstance(error, aiohttp.ClientPayloadError):
        return DownloadError("body cut short", again=True)
    if isinstance(error, aiohttp.InvalidURL):
        return DownloadError(f"{'redirect to ' if redirected else ''}no valid URL")
    if isinstance(error, aiohttp.ClientResponseError):
        return DownloadError("the answer is no valid HTTP")
    if isinstance(error, OSError):
        return DownloadError(f"connection lost: {_system(error)}", again=True)
    return DownloadError(f"cannot be fetched ({type(error).__name__})")


def _no_connection(error: Exception) -> DownloadError:
    said, number = f"no connection: {_system(error)}", getattr(error, "errno", None)
    if number in _UNREACHABLE:
        return _silence(said)
    # Files are freed when kept connections end.
    wait_s = KEEP_ALIVE_S if number in (errno.EMFILE, errno.ENFILE) else 0.0
    return DownloadError(said, again=True, wait_s=wait_s)


def _silence(said: str) -> DownloadError:
    trouble = DownloadError(said, again=True)
    trouble.silent = True
    return trouble


def _system(error: BaseException) -> str:
    """The system's words for an error, without addresses."""
    number = getattr(error, "errno", None)
    if isinstance(error, TimeoutError) and number is None:
        number = errno.ETIMEDOUT
    return os.strerror(number).lower() if isinstance(number, int) else "failed"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9 _.,:'-]", "", text)[:80]
