"""Ranges of files over https, with every limit the open web teaches.

The standard library's client, one connection a thread at a time: reading and TLS run outside Python's lock,
and the body goes into the caller's buffer. Sockets are made here, so the address that is judged is the one
that is connected to. No proxies from the environment, no cookies; a `Authorization` header stays with the
host it is for. A body is never longer than what was asked for, whatever the server sends.
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

from cache.errors import CacheError, RefusedAddressError, RequestError
from cache.remote.net import is_loopback, refusal_reason, tls_context
from cache.remote.retry import Entry, RetryPolicy, retry_after

USER_AGENT = "nanoMolmo2/0.1 (reads ranges of a shared feature cache; honours Retry-After)"
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
GONE = frozenset({401, 403, 404, 410})
"""What a redirect's target answers once its signature has run out."""
MEMO_S = 240
"""A redirect is believed for so long: signed URLs live for minutes to hours."""
IDLE_S = 15
"""A connection idle for longer is not used again: many servers have closed it by then."""
AT_ONCE = 256 << 10
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class _Origin:
    scheme: str
    host: str
    port: int


class HttpStore:
    """Files below a URL."""

    needs_listing = True

    def __init__(
        self,
        base: str,
        rules: RetryPolicy,
        *,
        place: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            base: the URL of the folder.
            rules: limits.
            place: what to call it in messages; `base` when None.
            headers: sent to the host of `base` alone, as an authorization.

        Raises:
            CacheError: a URL that is not read from.
        """
        self._base, self._rules = base.rstrip("/"), rules
        self.place = place or self._base
        self._headers = dict(headers or {})
        try:
            parts = urlsplit(base)
            secret = bool(parts.query or parts.fragment or "@" in parts.netloc)
            if not secret:
                self._origin = _origin(base)
        except ValueError:
            raise CacheError(f"{self.place}: no valid URL") from None
        if secret:  # which is not repeated here
            raise CacheError(
                f"{parts.scheme}://{parts.hostname}: a URL with a password, a query or a fragment; give "
                "the plain URL of the folder (for private ones there are s3:// and hf://)"
            )
        # Who names this machine means it; nothing that a server says can lead there.
        self._local = is_loopback(self._origin.host)
        if what := self._refused(self._origin):
            raise CacheError(f"{self.place}: {what}; if you trust it: --allow-private")
        self._pool = _Pool(rules, rules.allow_private or self._local)
        self._memo: dict[str, tuple[str, float]] = {}

    def names(self) -> dict[str, Entry]:
        """There is no list of what a web server has."""
        raise NotImplementedError

    def read(self, name: str, offset: int, target: memoryview, size: int | None) -> None:
        """See Store."""
        last = offset + len(target) - 1
        with self._answer(name, {"Range": f"bytes={offset}-{last}"}) as (response, deadline):
            if response.status == 200 and offset == 0 and response.length == len(target) == size:
                pass  # the whole file is what was asked for
            elif response.status != 206:
                raise RequestError(
                    "the server ignores Range requests (200 instead of 206), so rows cannot be read one by "
                    "one; use one that honours them (nginx, caddy, an object store)",
                    again=False,
                )
            else:
                _check_range(response, offset, last, size)
            _receive(response, target, deadline)

    def whole(self, name: str, most: int) -> bytes:
        """See Store."""
        with self._answer(name, {}) as (response, deadline):
            data = bytearray()
            while block := _block(response, most + 1 - len(data), deadline):
                data += block
                if len(data) > most:
                    raise RequestError(f"{name} has more than {most:,} bytes", again=False)
            if response.length:
                raise RequestError("the body ends early", again=True)
            return bytes(data)

    # ---- one request

    @contextlib.contextmanager
    def _answer(
        self, name: str, headers: Mapping[str, str]
    ) -> Iterator[tuple[http.client.HTTPResponse, float]]:
        """The 200 or 206 for a file, redirects followed; and when it must be read. Raises RequestError."""
        deadline = time.monotonic() + self._rules.request_s
        start = f"{self._base}/{quote(name)}"
        memo, until = self._memo.get(name, (start, 0.0))
        url = memo if time.monotonic() < until else start
        for _ in range(self._rules.redirects + 1):
            origin = _origin(url)
            own = self._headers if origin == self._origin else {}
            with self._pool.request(origin, _target(url), {**own, **headers}, deadline) as response:
                if response.status in (200, 206):
                    if url != start:
                        self._memo[name] = url, max(until, time.monotonic() + MEMO_S)
                    yield response, deadline
                    return
                if response.status in GONE and url == memo != start:
                    url, memo = start, start
                    self._memo.pop(name, None)
                    continue
                url = self._next(url, response)
        raise RequestError(f"more than {self._rules.redirects} redirects", again=False)

    def _next(self, url: str, response: http.client.HTTPResponse) -> str:
        """Where a redirect leads. Raises RequestError: nowhere, or it is none."""
        status, location = response.status, response.headers.get("Location")
        if status not in REDIRECTS or not location:
            wait_s = retry_after(response.headers.get("Retry-After"))
            host = urlsplit(url).hostname
            reason = f"{status} {http.client.responses.get(status, '')}".strip() + f" from {host}"
            missing = status in GONE and status != 401
            raise RequestError(reason, again=status in PASSING, wait_s=wait_s, missing=missing)
        try:
            to = urljoin(url, location)
            origin = _origin(to)
        except ValueError:
            raise RequestError("a redirect to no valid URL", again=False) from None
        if what := self._refused(origin):
            raise RequestError(f"a redirect to {what}", again=False)
        return to

    def _refused(self, origin: _Origin) -> str | None:
        """Why a URL is not asked for whatever its address: not for its name."""
        if origin.scheme == "https" or self._rules.allow_private:
            return None
        if self._local and is_loopback(origin.host):
            return None
        return (
            f"plain http ({origin.host}), where anybody on the way can read and change what comes"
        )


def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError
    return _Origin(
        parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    )


def _target(url: str) -> str:
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="%/:;=@!$&'()*+,~")
    return f"{path}?{quote(parts.query, safe='%/:;=@!$&()*+,~?')}" if parts.query else path


def _check_range(
    response: http.client.HTTPResponse, offset: int, last: int, size: int | None
) -> None:
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not found:
        raise RequestError("a 206 without its Content-Range", again=True)
    if size is not None and found[3] not in ("*", str(size)):
        raise RequestError(f"{int(found[3]):,} bytes, not the {size:,} of its commit", again=False)
    if (int(found[1]), int(found[2])) != (offset, last):
        raise RequestError(f"bytes {found[1]}-{found[2]} instead of {offset}-{last}", again=True)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("a compressed body, which nobody asked for", again=True)


def _receive(response: http.client.HTTPResponse, target: memoryview, deadline: float) -> None:
    """Fill `target` with the body. Raises RequestError that knows how much of it came."""
    got = 0
    try:
        while got < len(target):
            block = _block(response, len(target) - got, deadline)
            if not block:
                raise RequestError("the body ends early", again=True)
            target[got : got + len(block)] = block
            got += len(block)
    except RequestError as trouble:
        trouble.got = got
        raise


def _block(response: http.client.HTTPResponse, most: int, deadline: float) -> bytes:
    """What one read brings; nothing at the end."""
    if time.monotonic() > deadline:
        raise RequestError("too slow: the answer is not complete in time", again=True)
    try:
        left = response.length
        block = response.read1(min(most, AT_ONCE))
        if left is not None:  # some versions of Python do not count what `read1` brings
            response.length = left - len(block)
        return block
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RequestError(_reason(error), again=True) from None


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no byte for too long"
    if isinstance(error, http.client.HTTPException | ValueError):
        return f"no valid answer ({type(error).__name__})"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- connections


class _Pool:
    """Connections that wait for their next request."""

    def __init__(self, rules: RetryPolicy, private: bool) -> None:
        self._rules, self._private = rules, private
        self._idle: dict[_Origin, list[tuple[http.client.HTTPConnection, float]]] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._tls: ssl.SSLContext | None = None

    def __del__(self) -> None:
        for waiting in self._idle.values():
            for connection, _ in waiting:
                connection.close()

    @contextlib.contextmanager
    def request(
        self, origin: _Origin, path: str, headers: Mapping[str, str], deadline: float
    ) -> Iterator[http.client.HTTPResponse]:
        """The head of the answer to a GET; its body is read within the block. Raises RequestError."""
        reused = self._take(origin)
        connection = reused or self._connect(origin)
        try:
            try:
                response = _ask(connection, path, headers)
            except (ConnectionError, http.client.RemoteDisconnected):
                if reused is None:
                    raise
                connection.close()  # it was closed while idle: that says nothing of the server
                connection = self._connect(origin)
                response = _ask(connection, path, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise RequestError(f"{origin.host}: {_reason(error)}", again=True) from None
        try:
            yield response
        except BaseException:
            connection.close()
            raise
        self._give_back(origin, connection, response, deadline)

    def _take(self, origin: _Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            if self._pid != os.getpid():  # a forked child must not write into its parent's streams
                self._pid, self._idle = os.getpid(), {}
            waiting = self._idle.get(origin, [])
            while waiting:
                connection, since = waiting.pop()
                if time.monotonic() - since < IDLE_S:
                    return connection
                connection.close()
        return None

    def _give_back(
        self,
        origin: _Origin,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        deadline: float,
    ) -> None:
        """For the next request, if nothing of this one's answer is still to come."""
        rest = response.length
        ended = response.isclosed() or (rest == 0 and not response.chunked)
        if not ended and not response.will_close and (rest or 0) < AT_ONCE:
            with contextlib.suppress(
                RequestError
            ):  # the words of an error, or the end of a chunked body
                ended = not _block(response, AT_ONCE, deadline) or response.isclosed()
        if not ended or response.will_close:
            connection.close()
            return
        response.close()
        with self._lock:
            self._idle.setdefault(origin, []).append((connection, time.monotonic()))

    def _connect(self, origin: _Origin) -> http.client.HTTPConnection:
        """A new connection, to an address that is allowed. Raises RequestError."""
        try:
            found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise RequestError(f"{origin.host}: {_reason(error)}", again=True) from None
        why: Exception = OSError("no address")
        for family, kind, protocol, _, address in found:
            if what := refusal_reason(str(address[0]), self._private):
                why = RefusedAddressError(what)
                continue
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(self._rules.connect_s)
                made.connect(address)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self._speak(origin, made)
            except OSError as error:  # ssl.SSLError, too
                made.close()
                why = error
        if isinstance(why, RefusedAddressError):
            raise RequestError(
                f"{origin.host} is {why.what}; if you trust it: --allow-private", again=False
            )
        certificate = isinstance(why, ssl.SSLCertVerificationError)
        raise RequestError(f"{origin.host}: {_reason(why)}", again=not certificate)

    def _speak(self, origin: _Origin, made: socket.socket) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if origin.scheme == "https":
            with self._lock:
                self._tls = self._tls or tls_context()
            connection = http.client.HTTPSConnection(origin.host, origin.port, context=self._tls)
            made = self._tls.wrap_socket(made, server_hostname=origin.host)
        else:
            connection = http.client.HTTPConnection(origin.host, origin.port)
        made.settimeout(self._rules.read_s)
        connection.sock = made
        return connection


def _ask(
    connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    own = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
    connection.auto_open = 0  # a socket of the library's own choosing would go unjudged
    connection.request("GET", path, headers={**own, **headers})
    return connection.getresponse()
