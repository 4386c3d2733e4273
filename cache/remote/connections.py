"""Open and keep connections to web servers that are not trusted, and send requests over them.

    pool = ConnectionPool(policy, allow_private=False)
    with pool.get(origin_of(url), "/path", headers, most=1000, deadline=deadline) as response:
        next_block(response, 1000)

The address that is checked is the address that is connected to. Each exchange ends by its deadline, and
receives a limited number of bytes (`wire.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cache.errors import RefusedAddressError, RequestError
from cache.remote.deadline import Deadline, apart, plain_text
from cache.remote.net import literal_address, refusal_reason, tls_context
from cache.remote.retry import RetryPolicy
from cache.remote.wire import AddressInfo, Wire

USER_AGENT = "nanoMolmo2/0.1 (reads ranges of a shared feature cache; honours Retry-After)"
PORTS = {"http": 80, "https": 443}
IDLE_S = 15
"""Seconds after which an idle connection is not used again: many servers have closed it by then."""
BLOCK_BYTES = 256 << 10
"""The most bytes that one call receives."""
MAX_HEAD_BYTES = 64 << 10
"""The most bytes before the body of an answer: its status line, its headers, and interim answers (1xx)."""
SPARE_BYTES = 64 << 10
"""Bytes that may surround the content of any body: chunk sizes, trailers, the text of an error. A body in
chunks may have as many bytes of these again as it has content."""


@dataclass(frozen=True)
class Origin:
    """The server that a URL names."""

    scheme: str
    host: str
    port: int


def origin_of(url: str) -> Origin:
    """Return the server of a URL.

    Raises:
        ValueError: it is no URL of a web server, or has a password.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise ValueError
    if not host.isprintable() or " " in host:
        raise ValueError
    return Origin(parts.scheme, host, parts.port or PORTS[parts.scheme])


class ConnectionPool:
    """Idle connections, kept for the next request to their host."""

    def __init__(self, policy: RetryPolicy, allow_private: bool) -> None:
        self._policy, self._allow_private = policy, allow_private
        self._idle: dict[Origin, list[tuple[_Connection, float]]] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._tls: ssl.SSLContext | None = None

    def __del__(self) -> None:
        for idle in self._idle.values():
            for connection, _ in idle:
                connection.close()

    @contextlib.contextmanager
    def get(
        self, origin: Origin, path: str, headers: Mapping[str, str], most: int, deadline: Deadline
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a GET and yield the response, whose body is read within the block.

        Raises:
            RequestError: the connection or the request failed, or the deadline is over.
        """
        reused = self._take_idle(origin)
        connection = reused or self._connect(origin, deadline)
        try:
            try:
                response = _get(connection, path, headers, deadline)
            except (ConnectionError, http.client.RemoteDisconnected):
                if reused is None:
                    raise
                connection.close()  # it was closed while idle, which is no failure of the server
                connection = self._connect(origin, deadline)
                response = _get(connection, path, headers, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            host = plain_text(origin.host)
            raise RequestError(f"{host}: {_reason(error)}", again=True) from None
        except BaseException:
            connection.close()
            raise
        try:
            connection.wire.begin(deadline, 2 * most + SPARE_BYTES)
            yield response
        except BaseException:
            connection.close()
            response.close()
            raise
        self._keep_or_close(origin, connection, response)

    def _take_idle(self, origin: Origin) -> _Connection | None:
        with self._lock:
            # A forked child must not write to its parent's connections.
            if self._pid != os.getpid():
                self._pid, self._idle = os.getpid(), {}
            idle = self._idle.get(origin, [])
            while idle:
                connection, since = idle.pop()
                if time.monotonic() - since < IDLE_S:
                    return connection
                connection.close()
        return None

    def _keep_or_close(
        self,
        origin: Origin,
        connection: _Connection,
        response: http.client.HTTPResponse,
    ) -> None:
        """Keep a connection for the next request when its response is read to the end, else close it."""
        rest = response.length
        ended = response.isclosed() or (rest == 0 and not response.chunked)
        if not ended and not response.will_close and (rest or 0) < BLOCK_BYTES:
            # Read the text of an error, or the end of a chunked body.
            with contextlib.suppress(RequestError):
                ended = not next_block(response, BLOCK_BYTES) or response.isclosed()
        if not ended or response.will_close:
            connection.close()
            return
        response.close()
        with self._lock:
            self._idle.setdefault(origin, []).append((connection, time.monotonic()))

    def _connect(self, origin: Origin, deadline: Deadline) -> _Connection:
        """Open a connection to an allowed address of the host.

        Raises:
            RequestError: no address is allowed, or none accepts the connection in time.
        """
        shown = plain_text(origin.host)
        failure: Exception = OSError("no address")
        for info in _addresses(origin, deadline):
            if reason := refusal_reason(str(info[4][0]), self._allow_private):
                failure = RefusedAddressError(reason)
                continue
            try:
                return _Connection(origin, self._open(origin, info, deadline))
            except (OSError, RequestError) as error:  # ssl.SSLError is an OSError
                failure = error
        if isinstance(failure, RefusedAddressError):
            raise RequestError(
                f"{shown} is {failure}; if you trust it: --allow-private", again=False
            )
        certificate = isinstance(failure, ssl.SSLCertVerificationError)
        why = failure.reason if isinstance(failure, RequestError) else _reason(failure)
        raise RequestError(f"{shown}: {why}", again=not certificate)

    def _open(self, origin: Origin, info: AddressInfo, deadline: Deadline) -> Wire:
        """Connect to one address; for https, do the TLS handshake too."""
        opening = deadline.within(self._policy.connect_s, "no connection in time")
        wire = Wire.connect(info, opening, self._policy.read_s)
        try:
            if origin.scheme == "https":
                with self._lock:
                    self._tls = self._tls or tls_context()
                wire.start_tls(self._tls, origin.host)
        except BaseException:
            wire.close()
            raise
        return wire


class _Connection(http.client.HTTPConnection):
    """An HTTP connection over a Wire."""

    auto_open = 0  # the library must not open a socket whose address nobody checked

    def __init__(self, origin: Origin, wire: Wire) -> None:
        super().__init__(origin.host, origin.port)
        # What the library leaves out of the `Host` header.
        self.default_port = PORTS[origin.scheme]
        self.wire = wire
        self.sock: Any = wire


def _addresses(origin: Origin, deadline: Deadline) -> list[AddressInfo]:
    """Look up a host.

    Raises:
        RequestError: it has no address, or the lookup takes too long.
    """

    def look_up() -> list[AddressInfo]:
        return socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)

    try:
        # A lookup has no time limit of its own, and cannot be interrupted.
        return look_up() if literal_address(origin.host) else apart(look_up, deadline)
    except (OSError, ValueError) as error:  # UnicodeError is a ValueError
        raise RequestError(f"{plain_text(origin.host)}: {_reason(error)}", again=True) from None


def _get(
    connection: _Connection, path: str, headers: Mapping[str, str], deadline: Deadline
) -> http.client.HTTPResponse:
    own = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
    connection.wire.begin(deadline, MAX_HEAD_BYTES)
    connection.request("GET", path, headers={**own, **headers})
    return connection.getresponse()


def next_block(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the next bytes of a body, at most `max_bytes`; b"" at its end.

    Raises:
        RequestError: the connection failed, or the deadline is over.
    """
    try:
        left = response.length
        block = response.read1(min(max_bytes, BLOCK_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RequestError(_reason(error), again=True) from None
    if len(block) > max_bytes:  # as for a chunk of negative size
        raise RequestError("no valid answer (chunk size)", again=True)
    if left is not None:  # some versions of Python do not subtract what `read1` returns
        response.length = left - len(block)
    return block


def next_block_into(response: http.client.HTTPResponse, target: memoryview) -> int:
    """Receive the next bytes of a body straight into `target`; return their number, 0 at its end.

    Raises:
        RequestError: the connection failed, or the deadline is over.
    """
    if response.chunked or not response.length:
        block = next_block(response, len(target))
        target[: len(block)] = block
        return len(block)
    try:
        count: int = response.fp.readinto1(target[: response.length])
    except (OSError, ValueError) as error:
        raise RequestError(_reason(error), again=True) from None
    response.length -= count
    return count


def _reason(error: Exception) -> str:
    """Return what to say of a failed connection, without addresses or URLs."""
    if isinstance(error, TimeoutError):
        return "no byte for too long"
    if isinstance(error, http.client.HTTPException | ValueError) and not isinstance(error, OSError):
        return f"no valid answer ({type(error).__name__})"
    return plain_text(getattr(error, "strerror", None) or error or type(error).__name__)
