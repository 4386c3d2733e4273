"""Read ranges of files over https from servers that are not trusted.

The client is the standard library's, with one connection a thread at a time: receiving and TLS run outside
Python's global lock, and the body is copied into the caller's buffer. It ignores the environment's proxies
and cookies, sends an `Authorization` header only to its own host, and never uses more bytes than it asked
for. `connections.py` opens the connections.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Iterator, Mapping
from urllib.parse import quote, urljoin, urlsplit

from cache.errors import CacheError, NotFoundError, RequestError
from cache.remote.connections import ConnectionPool, Origin, next_block, next_block_into, origin_of
from cache.remote.deadline import Deadline, plain_text
from cache.remote.listing import FileInfo
from cache.remote.net import is_loopback
from cache.remote.retry import RetryPolicy, retry_after
from cache.store.paths import LISTING

PASSING_STATUS = frozenset(
    {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529}
)
"""Statuses after which the same request may succeed; 509 and 52x are used by web hosts and CDNs."""
REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
EXPIRED_STATUS = frozenset({401, 403, 404, 410})
"""Statuses with which the target of a redirect answers once its signature has expired."""
REDIRECT_MEMORY_S = 240
"""Seconds for which a redirect is used again. Signed URLs are valid for minutes to hours."""
MAX_URL = 8192
"""Characters of a URL that a redirect leads to, at most."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


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
                self._origin = origin_of(base)
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
        self._pool = ConnectionPool(policy, policy.allow_private or self._local)
        self._redirects: dict[str, tuple[str, float]] = {}  # URL -> another, and when to forget it

    def read(
        self,
        name: str,
        offset: int,
        target: memoryview,
        size: int | None,
        stop: threading.Event | None = None,
    ) -> None:
        """Fill `target` from a file; see `cache.remote.stores.Store`."""
        last = offset + len(target) - 1
        span = {"Range": f"bytes={offset}-{last}"}
        with self._open(self._url(name), span, len(target), self._deadline(stop)) as response:
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
            _receive(response, target)

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file; see `cache.remote.stores.Store`."""
        with self._open(self._url(name), {}, max_bytes, self._deadline()) as response:
            return whole_body(response, name, max_bytes)

    def list_files(self) -> dict[str, FileInfo]:
        """Raise NotFoundError: a web server cannot list its files, so its cache needs a `listing.json`."""
        raise NotFoundError(
            f"{self.url}: no {LISTING}, and a web server cannot list its files; where the cache is, run "
            "python -m cache.share --features DIR, and serve that file with it"
        )

    # ---- one request

    def _url(self, name: str) -> str:
        return f"{self._base}/{quote(name)}"

    def _deadline(self, stop: threading.Event | None = None) -> Deadline:
        return Deadline(self._policy.request_s, stop)

    @contextlib.contextmanager
    def _open(
        self, start: str, headers: Mapping[str, str], most: int, deadline: Deadline
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the response (200 or 206) for a URL after redirects.

        Args:
            start: the URL.
            headers: of the request.
            most: bytes of the body that will be read.
            deadline: of everything, the body included.

        Raises:
            RequestError: the request failed, within the block too.
        """
        remembered, until = self._redirects.get(start, (start, 0.0))
        url = remembered if time.monotonic() < until else start
        for _ in range(self._policy.max_redirects + 1):
            origin = origin_of(url)
            own = self._headers if origin == self._origin else {}
            with self._pool.get(origin, _path(url), {**own, **headers}, most, deadline) as response:
                if response.status in (200, 206):
                    if url != start:
                        until = max(until, time.monotonic() + REDIRECT_MEMORY_S)
                        self._redirects[start] = url, until
                    yield response
                    return
                if response.status in EXPIRED_STATUS and url == remembered != start:
                    url, remembered = start, start
                    self._redirects.pop(start, None)
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
            host = plain_text(urlsplit(url).hostname)
            raise RequestError(
                f"{status} {http.client.responses.get(status, '')}".strip() + f" from {host}",
                again=status in PASSING_STATUS,
                wait_s=retry_after(response.headers.get("Retry-After")),
                missing=status in EXPIRED_STATUS and status != 401,
            )
        try:
            if len(location) > MAX_URL:
                raise ValueError
            target = urljoin(url, location)
            origin = origin_of(target)
        except ValueError:
            raise RequestError("a redirect to no valid URL", again=False) from None
        if reason := self._plain_http(origin):
            raise RequestError(f"a redirect to {reason}", again=False)
        return target

    def _plain_http(self, origin: Origin) -> str | None:
        """Return why an http:// URL is refused, or None for an acceptable one."""
        if origin.scheme == "https" or self._policy.allow_private:
            return None
        if self._local and is_loopback(origin.host):
            return None
        host = plain_text(origin.host)
        return f"plain http ({host}), where anybody on the way can read and change the data"


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


def _receive(response: http.client.HTTPResponse, target: memoryview) -> None:
    """Fill `target` with the body; a RequestError tells how many bytes arrived before it."""
    received = 0
    try:
        while received < len(target):
            # Released in any case, as in `read_range`.
            with target[received:] as rest:
                count = next_block_into(response, rest)
            if not count:
                raise RequestError("the body ends early", again=True)
            received += count
    except RequestError as error:
        error.got = received
        raise


def whole_body(response: http.client.HTTPResponse, name: str, max_bytes: int) -> bytes:
    """Return a body of at most `max_bytes`.

    Raises:
        RequestError: it is longer, or ends early.
    """
    data = bytearray()
    while block := next_block(response, max_bytes + 1 - len(data)):
        data += block
        if len(data) > max_bytes:
            raise RequestError(f"{name} has more than {max_bytes:,} bytes", again=False)
    if response.length:
        raise RequestError("the body ends early", again=True)
    return bytes(data)
