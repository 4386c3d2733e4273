"""Download one URL once: send requests, follow redirects, read the body and check its sha256."""

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

from cache.errors import RefusedAddressError
from cache.remote.net import literal_address, refusal_reason
from cache.remote.retry import retry_after
from encode.download.config import DownloadConfig
from encode.download.host_limits import HostLimits
from encode.download.memory_budget import Reservation
from encode.download.session import KEEP_ALIVE_S
from encode.download.urls import host_of, redirect_url
from encode.errors import DownloadError

_REDIRECTS = (301, 302, 303, 307, 308)
_COMPLETE = (200, 203)
_TEMPORARY = (408, 425, 429)
_PLAIN = {
    "Content-Encoding": ("", "identity", "none", "binary", "utf-8"),
    "Transfer-Encoding": ("", "identity", "chunked"),
}
"""Header -> values that leave the bytes unchanged, including values outside the standard."""
_UNREACHABLE = (errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)


@dataclass(kw_only=True, eq=False)
class Attempt:
    """One attempt to download a URL."""

    session: aiohttp.ClientSession
    """A session that does not follow redirects, decode bodies or keep cookies."""
    hosts: HostLimits
    """The limits of all downloads."""
    config: DownloadConfig
    """Time-outs and sizes."""
    memory: Reservation
    """The memory of this download."""
    sha256: str | None
    """Expected sha256 of the body, hex; None: unknown."""

    async def run(self, url: URL) -> tuple[bytes, str]:
        """Download `url`. Return its body, with the expected sha256, and the host that sent it.

        Raises:
            DownloadError: the attempt failed.
            OverBudgetError: the body needs more memory than is free.
        """
        left_s = self.config.total_s
        seen: set[URL] = set()
        clock = asyncio.get_running_loop().time
        while True:
            if url in seen:
                raise DownloadError("redirect loop")
            if len(seen) > self.config.redirects:
                raise DownloadError(f"more than {self.config.redirects} redirects")
            seen.add(url)
            host = host_of(url)
            try:
                async with self.hosts.slot(host):
                    self.memory.check_room()
                    begun = clock()
                    prefix = "redirect to " if len(seen) > 1 else ""
                    answer = await self._request(url, left_s, prefix)
                    left_s = max(0.001, left_s - (clock() - begun))
            except DownloadError as error:
                error.host = host
                raise
            if isinstance(answer, bytes):
                return answer, host
            url = redirect_url(url, answer)

    async def _request(self, url: URL, left_s: float, prefix: str) -> bytes | str:
        """Return the body of `url`, or the Location of its redirect."""
        address = literal_address(url.host or "")  # a name is checked when it is resolved
        if address and (refused := refusal_reason(address, self.config.allow_private)):
            raise DownloadError(f"{prefix}{refused}, which is not allowed")
        failure: DownloadError
        try:
            async with asyncio.timeout(left_s) as limit:
                return await self._send(url)
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            if limit.expired():
                reason = f"not finished within {self.config.total_s:g} s"
                failure = DownloadError(reason, retryable=True)
            else:
                failure = _as_download_error(error, self.config, prefix)
        raise failure  # outside `except`: as its context, the error would keep the body in memory

    async def _send(self, url: URL) -> bytes | str:
        host = host_of(url)
        close = {} if self.hosts.keeps_connection(host) else {"Connection": "close"}
        async with self.session.get(url, allow_redirects=False, headers=close) as response:
            connection = response.connection  # None once the whole response has arrived
            transport = connection.transport if connection else None
            try:
                return await self._read(response, host)
            except BaseException:
                if transport is not None:
                    transport.abort()  # otherwise TLS waits for the other side to close
                raise

    async def _read(self, response: aiohttp.ClientResponse, host: str) -> bytes | str:
        status = response.status
        if status in _REDIRECTS:
            location = response.headers.get("Location")
            if location is None:
                raise DownloadError(f"HTTP {status} without a Location")
            return location
        if status not in _COMPLETE:
            raise self._status_error(response, host)
        for header, plain in _PLAIN.items():
            value = response.headers.get(header, "").strip().lower()
            if value not in plain:
                value = re.sub(r"[^a-z0-9, -]", "", value)[:20]
                raise DownloadError(f"unrequested {header} {value}")
        data = await self._read_body(response)
        if self.sha256 is not None:
            # In a thread: hashing a large body here would delay other downloads.
            found = (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
            if found != self.sha256.strip().lower():
                reason = f"sha256 is {found[:12]}..., not {self.sha256[:12]}... as recorded"
                raise DownloadError(reason, stage="verify")
        return data

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self.config.max_bytes
        length = response.content_length
        if length is not None:
            if length > limit:
                raise DownloadError(f"a body of {length} bytes, more than {limit}")
            self.memory.grow(length, length)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in response.content.iter_any():
                size += len(part)
                if size > limit:
                    raise DownloadError(f"a body of more than {limit} bytes")
                if size > self.memory.held:
                    self.memory.grow(min(limit, 2 * size), limit)
                parts.append(part)
            return b"".join(parts)
        finally:
            parts.clear()  # the traceback of an error keeps this frame alive

    def _status_error(self, response: aiohttp.ClientResponse, host: str) -> DownloadError:
        status = response.status
        reason = f"HTTP {status}"
        if status not in _TEMPORARY and not 500 <= status <= 599:
            return DownloadError(reason)
        wait_s = retry_after(response.headers.get("Retry-After"))
        if status == 429 or wait_s > 0:
            self.hosts.pause(host, wait_s)
        if wait_s > self.config.retry_after_s:
            return DownloadError(f"{reason}, Retry-After {wait_s:.0f} s", wait_s=wait_s)
        return DownloadError(reason, retryable=True, wait_s=wait_s)


def _as_download_error(error: Exception, config: DownloadConfig, prefix: str) -> DownloadError:
    """Describe an error of aiohttp or the system without quoting the URL, as their messages may."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, RefusedAddressError):
        return DownloadError(f"{prefix}{cause}, which is not allowed")
    if isinstance(cause, socket.gaierror):
        if cause.errno in (socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_SYSTEM):
            reason = "temporary failure of the name lookup"
            return DownloadError(reason, retryable=True, unreachable=True)
        return DownloadError("no such host")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        found = error.certificate_error
        why = found.verify_message if isinstance(found, ssl.SSLCertVerificationError) else ""
        return DownloadError(f"TLS certificate refused: {_printable(why) or 'no reason given'}")
    if isinstance(cause, ssl.SSLError):
        why = _printable(cause.reason or "failed").lower().replace("_", " ")
        return DownloadError(f"TLS: {why}")
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        reason = f"no connection within {config.connect_s:g} s"
        return DownloadError(reason, retryable=True, unreachable=True)
    if isinstance(error, aiohttp.SocketTimeoutError):
        return DownloadError(f"no data for {config.read_s:g} s", retryable=True)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return DownloadError("connection closed without a response", retryable=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        number = getattr(cause, "errno", None)
        return DownloadError(
            f"no connection: {_system_message(cause)}",
            retryable=True,
            unreachable=number in _UNREACHABLE,
            # Files become free when kept connections are closed.
            wait_s=KEEP_ALIVE_S if number in (errno.EMFILE, errno.ENFILE) else 0.0,
        )
    if isinstance(error, aiohttp.ClientPayloadError):
        return DownloadError("incomplete body", retryable=True)
    if isinstance(error, aiohttp.InvalidURL):
        return DownloadError(f"{prefix}an invalid URL")
    if isinstance(error, aiohttp.ClientResponseError):
        return DownloadError("invalid HTTP response")
    if isinstance(error, OSError):
        return DownloadError(f"connection lost: {_system_message(error)}", retryable=True)
    return DownloadError(f"download failed ({type(error).__name__})")


def _system_message(error: BaseException) -> str:
    """Return the system's message for an error, without addresses."""
    number = getattr(error, "errno", None)
    if isinstance(error, TimeoutError) and number is None:
        number = errno.ETIMEDOUT
    return os.strerror(number).lower() if isinstance(number, int) else "failed"


def _printable(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9 _.,:'-]", "", text)[:80]
