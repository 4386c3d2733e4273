"""Read ranges of files over https from servers that are not trusted.

The client is the standard library's, with one connection a thread at a time: receiving and TLS run outside
Python's global lock, and the body is copied into the caller's buffer. This module opens the sockets itself,
so the address that is checked is the address that is connected to. It ignores the environment's proxies and
cookies, sends an `Authorization` header only to its own host, and never receives more bytes than it asked
for.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from cache.errors import CacheError, NotFoundError, RefusedAddressError, RequestError
from cache.remote.listing import FileInfo
from cache.remote.net import is_loopback, refusal_reason, tls_context
from cache.remote.retry import RetryPolicy, retry_after
from cache.store.paths import LISTING

USER_AGENT = "nanoMolmo2/0.1 (reads ranges of a shared feature cache; honours Retry-After)"
PASSING_STATUS = frozenset(
    {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529}
)
"""Statuses after which the same request may succeed; 509 and 52x are used by web hosts and CDNs."""
REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
EXPIRED_STATUS = frozenset({401, 403, 404, 410})
"""Statuses with which the target of a redirect answers once its signature has expired."""
REDIRECT_MEMORY_S = 240
"""Seconds for which a redirect is used again. Signed URLs are valid for minutes to hours."""
IDLE_S = 15
"""Seconds after which an idle connection is not used again: many servers have closed it by then."""
BLOCK_BYTES = 256 << 10
"""The most bytes that one call receives."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class _Origin:
    scheme: str
    host: str
    port: int


class HttpStore:
    """Files below the URL of a folder."""

    def __init__(
        self,
        base: str,
        policy: RetryPolicy,
        *,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Check the URL; connect to nothing yet.

        Args:
            base: the URL of the folder.
            policy: limits.
            url: the URL to name in messages; default: `base`.
            headers: headers for the host of `base` only, such as an authorization.

        Raises:
            CacheError: the URL is invalid, contains a secret, or is plain http.
        """
        self._base, self._policy = base.rstrip("/"), policy
        self.url = url or self._base
        self._headers = dict(headers or {})
        try:
            parts = urlsplit(base)
            secret = bool(parts.query or parts.fragment or "@" in parts.netloc)
            if not secret:
                self._origin = _origin(base)
        except ValueError:
            raise CacheError(f"{self.url}: no valid URL") from None
        if secret:  # the message must not repeat it
            raise CacheError(
                f"{parts.scheme}://{parts.hostname}: a URL with a password, a query or a fragment; give "
                "the plain URL of the folder (for private ones use s3:// or hf://)"
            )
        # A user may name this machine itself. A redirect to it from elsewhere is refused.
        self._local = is_loopback(self._origin.host)
        if reason := self._plain_http(self._origin):
            raise CacheError(f"{self.url}: {reason}; if you trust it: --allow-private")
        self._pool = _ConnectionPool(policy, policy.allow_private or self._local)
        self._redirects: dict[str, tuple[str, float]] = {}  # name -> URL, and when to forget it

    def read(self, name: str, offset: int, target: memoryview, size: int | None) -> None:
        """Fill `target` from a file; see `cache.remote.stores.Store`."""
        last = offset + len(target) - 1
        with self._open(name, {"Range": f"bytes={offset}-{last}"}) as (response, deadline):
            if response.status == 200 and offset == 0 and response.length == len(target) == size:
                pass  # the request was for the whole file
            elif response.status != 206:
                raise RequestError(
                    "the server ignores Range requests (200 instead of 206), so rows cannot be read one by "
                    "one; use one that honours them (nginx, caddy, an object store)",
                    again=False,
                )
            else:
                _check_range(response, offset, last, size)
            _receive(response, target, deadline)

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file; see `cache.remote.stores.Store`."""
        with self._open(name, {}) as (response, deadline):
            data = bytearray()
            while block := _block(response, max_bytes + 1 - len(data), deadline):
                data += block
                if len(data) > max_bytes:
                    raise RequestError(f"{name} has more than {max_bytes:,} bytes", again=False)
            if response.length:
                raise RequestError("the body ends early", again=True)
            return bytes(data)

    def list_files(self) -> dict[str, FileInfo]:
        """Raise NotFoundError: a web server cannot list its files, so its cache needs a `listing.json`."""
        raise NotFoundError(
            f"{self.url}: no {LISTING}, and a web server cannot list its files; where the cache is, run "
            "python -m cache.share --features DIR, and serve that file with it"
        )

    # ---- one request

    @contextlib.contextmanager
    def _open(
        self, name: str, headers: Mapping[str, str]
    ) -> Iterator[tuple[http.client.HTTPResponse, float]]:
        """Yield the response (200 or 206) for a file after redirects, and the deadline for its body.

        Raises:
            RequestError: the request failed, within the block too.
        """
        deadline = time.monotonic() + self._policy.request_s
        start = f"{self._base}/{quote(name)}"
        remembered, until = self._redirects.get(name, (start, 0.0))
        url = remembered if time.monotonic() < until else start
        for _ in range(self._policy.max_redirects + 1):
            origin = _origin(url)
            own = self._headers if origin == self._origin else {}
            with self._pool.get(origin, _path(url), {**own, **headers}, deadline) as response:
                if response.status in (200, 206):
                    if url != start:
                        until = max(until, time.monotonic() + REDIRECT_MEMORY_S)
                        self._redirects[name] = url, until
                    yield response, deadline
                    return
                if response.status in EXPIRED_STATUS and url == remembered != start:
                    url, remembered = start, start
                    self._redirects.pop(name, None)
                    continue
                url = self._redirect_target(url, response)
        raise RequestError(f"more than {self._policy.max_redirects} redirects", again=False)

    def _redirect_target(self, url: str, response: http.client.HTTPResponse) -> str:
        """Return the URL that a redirect leads to.

        Raises:
            RequestError: the response is no redirect, or leads to a forbidden URL.
        """
        status, location = response.status, response.headers.get("Location")
        if status not in REDIRECT_STATUS or not location:
            host = urlsplit(url).hostname
            raise RequestError(
                f"{status} {http.client.responses.get(status, '')}".strip() + f" from {host}",
                again=status in PASSING_STATUS,
                wait_s=retry_after(response.headers.get("Retry-After")),
                missing=status in EXPIRED_STATUS and status != 401,
            )
        try:
            target = urljoin(url, location)
            origin = _origin(target)
        except ValueError:
            raise RequestError("a redirect to no valid URL", again=False) from None
        if reason := self._plain_http(origin):
            raise RequestError(f"a redirect to {reason}", again=False)
        return target

    def _plain_http(self, origin: _Origin) -> str | None:
        """Return why an http:// URL is refused, or None for an acceptable one."""
        if origin.scheme == "https" or self._policy.allow_private:
            return None
        if self._local and is_loopback(origin.host):
            return None
        return f"plain http ({origin.host}), where anybody on the way can read and change the data"


def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError
    return _Origin(
        parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    )


def _path(url: str) -> str:
    """Return the path and the query of a URL, escaped for a request line."""
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="%/:;=@!$&'()*+,~")
    return f"{path}?{quote(parts.query, safe='%/:;=@!$&()*+,~?')}" if parts.query else path


def _check_range(
    response: http.client.HTTPResponse, offset: int, last: int, size: int | None
) -> None:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not found:
        raise RequestError("a 206 without its Content-Range", again=True)
    if size is not None and found[3] not in ("*", str(size)):
        raise RequestError(f"{int(found[3]):,} bytes, not the {size:,} of its commit", again=False)
    if (int(found[1]), int(found[2])) != (offset, last):
        raise RequestError(f"bytes {found[1]}-{found[2]} instead of {offset}-{last}", again=True)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("a compressed body, though none was requested", again=True)


def _receive(response: http.client.HTTPResponse, target: memoryview, deadline: float) -> None:
    """Fill `target` with the body; a RequestError tells how many bytes arrived before it."""
    received = 0
    try:
        while received < len(target):
            block = _block(response, len(target) - received, deadline)
            if not block:
                raise RequestError("the body ends early", again=True)
            target[received : received + len(block)] = block
            received += len(block)
    except RequestError as error:
        error.got = received
        raise


def _block(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """Return the next bytes of a body; b"" at its end."""
    if time.monotonic() > deadline:
        raise RequestError("too slow: the answer is not complete in time", again=True)
    try:
        left = response.length
        block = response.read1(min(max_bytes, BLOCK_BYTES))
        if left is not None:  # some versions of Python do not subtract what `read1` returns
            response.length = left - len(block)
        return block
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RequestError(_reason(error), again=True) from None


def _reason(error: Exception) -> str:
    """Return what to say of a failed connection, without addresses or URLs."""
    if isinstance(error, TimeoutError):
        return "no byte for too long"
    if isinstance(error, http.client.HTTPException | ValueError):
        return f"no valid answer ({type(error).__name__})"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- connections


class _ConnectionPool:
    """Idle connections, kept for the next request to their host."""

    def __init__(self, policy: RetryPolicy, allow_private: bool) -> None:
        self._policy, self._allow_private = policy, allow_private
        self._idle: dict[_Origin, list[tuple[http.client.HTTPConnection, float]]] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._tls: ssl.SSLContext | None = None

    def __del__(self) -> None:
        for idle in self._idle.values():
            for connection, _ in idle:
                connection.close()

    @contextlib.contextmanager
    def get(
        self, origin: _Origin, path: str, headers: Mapping[str, str], deadline: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a GET and yield the response, whose body is read within the block.

        Raises:
            RequestError: the connection or the request failed.
        """
        reused = self._take_idle(origin)
        connection = reused or self._connect(origin)
        try:
            try:
                response = _get(connection, path, headers)
            except (ConnectionError, http.client.RemoteDisconnected):
                if reused is None:
                    raise
                connection.close()  # it was closed while idle, which is no failure of the server
                connection = self._connect(origin)
                response = _get(connection, path, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise RequestError(f"{origin.host}: {_reason(error)}", again=True) from None
        try:
            yield response
        except BaseException:
            connection.close()
            raise
        self._keep_or_close(origin, connection, response, deadline)

    def _take_idle(self, origin: _Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            if (
                self._pid != os.getpid()
            ):  # a forked child must not write to its parent's connections
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
        origin: _Origin,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        deadline: float,
    ) -> None:
        """Keep a connection for the next request when its response is read to the end, else close it."""
        rest = response.length
        ended = response.isclosed() or (rest == 0 and not response.chunked)
        if not ended and not response.will_close and (rest or 0) < BLOCK_BYTES:
            # Read the text of an error, or the end of a chunked body.
            with contextlib.suppress(RequestError):
                ended = not _block(response, BLOCK_BYTES, deadline) or response.isclosed()
        if not ended or response.will_close:
            connection.close()
            return
        response.close()
        with self._lock:
            self._idle.setdefault(origin, []).append((connection, time.monotonic()))

    def _connect(self, origin: _Origin) -> http.client.HTTPConnection:
        """Open a connection to an allowed address of the host.

        Raises:
            RequestError: no address is allowed, or none accepts the connection.
        """
        try:
            found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise RequestError(f"{origin.host}: {_reason(error)}", again=True) from None
        failure: Exception = OSError("no address")
        for family, kind, protocol, _, address in found:
            if reason := refusal_reason(str(address[0]), self._allow_private):
                failure = RefusedAddressError(reason)
                continue
            opened = socket.socket(family, kind, protocol)
            try:
                opened.settimeout(self._policy.connect_s)
                opened.connect(address)
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self._start(origin, opened)
            except OSError as error:  # ssl.SSLError is one, too
                opened.close()
                failure = error
        if isinstance(failure, RefusedAddressError):
            raise RequestError(
                f"{origin.host} is {failure}; if you trust it: --allow-private", again=False
            )
        certificate = isinstance(failure, ssl.SSLCertVerificationError)
        raise RequestError(f"{origin.host}: {_reason(failure)}", again=not certificate)

    def _start(self, origin: _Origin, opened: socket.socket) -> http.client.HTTPConnection:
        """Return an HTTP connection over a connected socket, after the TLS handshake for https."""
        connection: http.client.HTTPConnection
        if origin.scheme == "https":
            with self._lock:
                self._tls = self._tls or tls_context()
            connection = http.client.HTTPSConnection(origin.host, origin.port, context=self._tls)
            opened = self._tls.wrap_socket(opened, server_hostname=origin.host)
        else:
            connection = http.client.HTTPConnection(origin.host, origin.port)
        opened.settimeout(self._policy.read_s)
        connection.sock = opened
        return connection


def _get(
    connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    own = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
    connection.auto_open = 0  # the library must not open a socket whose address nobody checked
    connection.request("GET", path, headers={**own, **headers})
    return connection.getresponse()
