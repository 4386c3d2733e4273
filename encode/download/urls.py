"""URLs as they stand in data sets -> URLs that can be asked for, read as browsers read them.

What a data set spells is sent as it is spelt, since signed URLs break when their escapes are put another
way; only what may not stand in a request (spaces, quotes, letters beyond ASCII) is escaped.
"""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from encode.download.config import DownloadError

__all__ = ["host_of", "is_url", "parse_url", "redirect_url"]

_DROPPED = {ord(mark): None for mark in "\t\r\n"}
_CONTROLS = "".join(map(chr, range(0x21)))
_SAFE_IN_PATH = "%/:;=@!$&'()*+,~|[]^"
_SAFE_IN_QUERY = _SAFE_IN_PATH + "?{}`\\"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,11}):", re.IGNORECASE | re.ASCII)


def is_url(source: str) -> bool:
    """Whether a source is to be fetched, and no path."""
    return source[:8].lower().startswith(("http://", "https://"))


def host_of(url: URL) -> str:
    """The host a URL asks, spelt one way."""
    return (url.raw_host or "").rstrip(".").lower()


def parse_url(text: str, what: str = "") -> URL:
    """The URL to ask for.

    Args:
        text: as the data set, or a redirect, has it.
        what: how a reason begins: `redirect to`, for one.

    Raises:
        DownloadError: it cannot be asked for, or should not.
    """
    said = f"{what} " if what else ""
    text = text.translate(_DROPPED).strip(_CONTROLS)
    try:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https"):
            scheme = _SCHEME.match(text)
            named = f"scheme {scheme[1].lower()}" if scheme else "no scheme"
            raise DownloadError(f"{said}a URL with {named}, not http or https")
        if "@" in parts.netloc:
            raise DownloadError(f"{said}a URL with a user name or password, which are not sent on")
        if not parts.hostname:
            raise DownloadError(f"{said}a URL without a host")
        origin = URL.build(scheme=parts.scheme, host=parts.hostname, port=parts.port)
        path = quote(parts.path or "/", safe=_SAFE_IN_PATH, errors="surrogateescape")
        query = quote(parts.query, safe=_SAFE_IN_QUERY, errors="surrogateescape")
        whole = f"{str(origin).rstrip('/')}{path}"
        url = URL(f"{whole}?{query}" if query else whole, encoded=True)
        if not url.host:  # asked here, since what cannot be a host name raises only now
            raise DownloadError(f"{said}a URL without a host")
    except (ValueError, UnicodeError):
        raise DownloadError(f"{said}no valid URL") from None
    return url


def redirect_url(base: URL, location: str) -> URL:
    """Where a redirect leads.

    Raises:
        DownloadError: nowhere that can be asked for.
    """
    try:
        joined = urljoin(str(base), location.translate(_DROPPED).strip(_CONTROLS))
    except ValueError:
        raise DownloadError("redirect to no valid URL") from None
    return parse_url(joined, "redirect to")
